"""A file system with two layers: what is durable, and what a power cut may take away. Commands are recorded and replayed call by call.

`Recording` writes down every call to `knnstore.storage.files.disk`. `FileSystem` replays them; after each one `states` gives the trees
that a cut then may leave. What is assumed of a file system is what POSIX promises, and no more:

- bytes of a file are durable after its fsync. Of what was written since, any may be lost: all of it, all from some 512-byte sector on,
  any sectors; where the file grew, lost bytes may read as zeros.
- a name (made, linked, moved, removed) is durable after an fsync of its folder. Of those since, any may be kept and any lost, in any
  order, also within one folder. A move between folders is kept or lost as one: a file system that loses the file is broken.
"""

import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from knnstore.storage import files

SECTOR = 512  # bytes that a disk writes whole or not at all
Tree = dict[str, bytes | None]  # path → content; None for a folder
Call = tuple[Any, ...]

WAYS = ("kept", "lost", "torn", "zeros", "mixed")  # what may become of bytes that were not synced


class Recording:
    """Every change that commands make below a folder, in order: what is called, where, and with which bytes."""

    def __init__(self, root: Path, *, closed: bool = True) -> None:
        """closed: whether only what is recorded may write there."""
        self.root, self._closed = root.absolute(), closed
        self.calls: list[Call] = []
        self._handles: dict[int, int] = {}  # file descriptor → number of the opening
        self._live = FileSystem(tree_of(self.root))  # what the door let through so far

    @contextmanager
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Iterator["Recording"]:
        """While it lasts, all of knnstore's calls are recorded; at its end, nothing may have gone past the door."""
        names = (
            "open",
            "write",
            "pwrite",
            "truncate",
            "fsync",
            "make_folder",
            "rename",
            "replace",
            "link",
            "copy",
            "remove",
            "remove_folder",
        )
        # Those that are made of others (sync_folder, remove_tree) are recorded by their parts.
        subclass = type("Recorded", (files.Disk,), {name: self._recorded(name) for name in names})
        with monkeypatch.context() as patch:
            patch.setattr(files.disk, "__class__", subclass)
            yield self
        real, known = tree_of(self.root), self._live.kept()
        differ = sorted(path for path in real | known if real.get(path) != known.get(path))
        assert not (self._closed and differ), f"written past the door: {differ}"

    def _recorded(self, name: str) -> Callable[..., Any]:
        def call(disk: files.Disk, *arguments: Any) -> Any:
            note = getattr(self, f"_note_{name}")(*arguments)
            result = getattr(files.Disk, name)(disk, *arguments)
            for one in note(result) if callable(note) else note:
                self.calls.append(one)
                self._live.apply(one)
            return result

        return call

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.root).as_posix()

    def _note_open(self, path: Path, flags: int) -> Callable[[int], list[Call]]:
        calls: list[Call] = []
        if not path.exists():
            calls.append(("create", self._name(path)))
        elif self._live.kept_file(self._name(path)) != (content := path.read_bytes()):
            calls.append(("foreign", self._name(path), content))  # LMDB wrote it, and now it is adopted
        if flags & os.O_TRUNC and path.exists():
            calls.append(("cut", self._name(path)))

        def note(fd: int) -> list[Call]:
            self._handles[fd] = len(self.calls)
            return [*calls, ("open", self._name(path), self._handles[fd])]

        return note

    def _note_write(self, fd: int, data: memoryview, path: Path) -> list[Call]:
        return [("write", self._handles[fd], os.lseek(fd, 0, os.SEEK_CUR), bytes(data))]

    def _note_pwrite(self, fd: int, data: memoryview, offset: int, path: Path) -> list[Call]:
        return [("write", self._handles[fd], offset, bytes(data))]

    def _note_truncate(self, fd: int, size: int, path: Path) -> list[Call]:
        return [("resize", self._handles[fd], size)]

    def _note_fsync(self, fd: int, path: Path) -> list[Call]:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return [("sync_folder", self._name(path))] if path.absolute().is_relative_to(self.root) else []
        return [("sync", self._handles[fd])]

    def _note_make_folder(self, path: Path) -> list[Call]:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        return [("mkdir", self._name(folder)) for folder in reversed(missing)]

    def _note_rename(self, source: Path, target: Path) -> list[Call]:
        return [("rename", self._name(source), self._name(target))]

    _note_replace = _note_rename

    def _note_link(self, source: Path, target: Path) -> list[Call]:
        return [("link", self._name(source), self._name(target))]

    def _note_copy(self, source: Path, target: Path) -> list[Call]:
        return [("create", self._name(target)), ("foreign", self._name(target), source.read_bytes())]

    def _note_remove(self, path: Path) -> list[Call]:
        return [("remove", self._name(path))] if os.path.lexists(path) else []

    def _note_remove_folder(self, path: Path) -> list[Call]:
        return [("remove", self._name(path))]


def tree_of(root: Path) -> Tree:
    """Everything below a folder."""
    tree: Tree = {}
    for folder, names, file_names in os.walk(root):
        for name in (*names, *file_names):
            path = Path(folder, name)
            tree[path.relative_to(root).as_posix()] = None if path.is_dir() else path.read_bytes()
    return tree


@dataclass(eq=False, slots=True)
class _File:
    """durable: content at the last sync. pending: (offset, bytes) written since, or (size, None) for a resize."""

    durable: bytes
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    _kept: bytes | None = None

    def change(self, offset: int, data: bytes | None) -> None:
        self.pending.append((offset, data))
        self._kept = None

    def kept(self) -> bytes:
        if self._kept is None:
            self._kept = _applied(self.durable, self.pending)
        return self._kept

    def sync(self) -> None:
        self.durable, self.pending = self.kept(), []

    def after_cut(self, how: str, rng: random.Random) -> bytes:
        """Content after a cut. how: `kept`, `lost`, `torn` in one of the writes, `zeros` where bytes are new, or any sectors (`mixed`)."""
        if not self.pending or how == "kept":
            return self.kept()
        if how == "lost":
            return self.durable
        if how == "torn":
            at = rng.randrange(len(self.pending))
            offset, data = self.pending[at]
            before = self.pending[:at]
            if not data:
                return _applied(self.durable, before)
            sectors = rng.randrange(-(-(offset % SECTOR + len(data)) // SECTOR))  # whole sectors of this write that got there
            n = max(0, sectors * SECTOR - offset % SECTOR)
            return _applied(self.durable, [*before, (offset, data[:n])])
        new, old = self.kept(), self.durable
        old = old[: len(new)] + bytes(max(0, len(new) - len(old)))
        if how == "zeros":
            return old
        pieces = range(0, len(new), SECTOR)
        return b"".join((new if rng.random() < 0.5 else old)[at : at + SECTOR] for at in pieces)


def _applied(content: bytes, changes: list[tuple[int, bytes | None]]) -> bytes:
    result = bytearray(content)
    for offset, data in changes:
        size = offset if data is None else offset + len(data)
        if len(result) < size:
            result.extend(bytes(size - len(result)))
        if data is None:
            del result[size:]
        else:
            result[offset:size] = data
    return bytes(result)


@dataclass(eq=False, slots=True)
class _Folder:
    """Names: (order of the change that set it, what it names; None where it was removed)."""

    durable: dict[str, tuple[int, "_File | _Folder | None"]] = field(default_factory=dict)
    now: dict[str, "_File | _Folder"] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class _NameChange:
    """One change of names, kept or lost as a whole. edits: (folder, name, what it names then)."""

    order: int
    edits: tuple[tuple[_Folder, str, _File | _Folder | None], ...]


class FileSystem:
    """Replays recorded calls. At its beginning all is durable."""

    def __init__(self, tree: Tree) -> None:
        self.root = _Folder()
        self.pending: list[_NameChange] = []
        self._handles: dict[int, _File] = {}
        self._files: list[_File] = []  # those with bytes that are not durable
        self._locks: set[_File] = set()
        self._n_changes = 0
        for path in sorted(tree):
            content = tree[path]
            self._change_names((path, _Folder() if content is None else _File(content)))
        self._settle(self.pending)

    def _settle(self, changes: list[_NameChange]) -> None:
        for change in changes:
            for folder, name, node in change.edits:
                if folder.durable.get(name, (-1, None))[0] < change.order:
                    folder.durable[name] = (change.order, node)
        self.pending = [change for change in self.pending if change not in changes]

    def _find(self, path: str) -> _File | _Folder | None:
        node: _File | _Folder | None = self.root
        for name in path.split("/") if path != "." else []:
            node = node.now.get(name) if isinstance(node, _Folder) else None
        return node

    def _folder(self, path: str) -> _Folder:
        node = self._find(path)
        assert isinstance(node, _Folder), f"{path} is no folder"
        return node

    def _file(self, path: str) -> _File:
        node = self._find(path)
        assert isinstance(node, _File), f"{path} is no file"
        return node

    def kept_file(self, path: str) -> bytes | None:
        """A file's content as a process sees it."""
        node = self._find(path)
        return node.kept() if isinstance(node, _File) else None

    def _change_names(self, *edits: tuple[str, _File | _Folder | None]) -> None:
        resolved = []
        for path, node in edits:
            parent, _, name = path.rpartition("/")
            folder = self._folder(parent or ".")
            resolved.append((folder, name, node))
        for folder, name, node in resolved:
            if node is None:
                del folder.now[name]
            else:
                folder.now[name] = node
        self.pending.append(_NameChange(self._n_changes, tuple(resolved)))
        self._n_changes += 1

    def _change_bytes(self, file: _File, offset: int, data: bytes | None) -> None:
        file.change(offset, data)
        if file in self._locks:
            file.sync()  # a process id, for messages: whatever it is, it means nothing
        elif file not in self._files:
            self._files.append(file)

    def apply(self, call: Call) -> None:
        """The next call."""
        match call:
            case ("create", path):
                self._change_names((path, _File(b"")))
            case ("foreign", path, content):
                if self._find(path) is None:
                    self._change_names((path, _File(b"")))
                self._change_bytes(self._file(path), 0, None)
                self._change_bytes(self._file(path), 0, content)
            case ("cut", path):
                self._change_bytes(self._file(path), 0, None)
            case ("open", path, handle):
                self._handles[handle] = self._file(path)
                if path.rpartition("/")[2] in ("LOCK", "lock"):
                    self._locks.add(self._handles[handle])
            case ("write", handle, offset, data):
                self._change_bytes(self._handles[handle], offset, data)
            case ("resize", handle, size):
                self._change_bytes(self._handles[handle], size, None)
            case ("sync", handle):
                self._handles[handle].sync()
                self._files = [file for file in self._files if file.pending]
            case ("sync_folder", path):
                folder = self._folder(path)
                self._settle([change for change in self.pending if any(edit[0] is folder for edit in change.edits)])
            case ("mkdir", path):
                self._change_names((path, _Folder()))
            case ("rename", source, target):
                self._change_names((source, None), (target, self._find(source)))
            case ("link", source, target):
                self._change_names((target, self._file(source)))
            case ("remove", path):
                self._change_names((path, None))
            case _:
                raise AssertionError(f"unknown call {call}")

    def kept(self) -> Tree:
        """The tree as a process sees it: what is left where only the process is killed."""
        return self._tree(self.pending, lambda file: file.kept())

    def _tree(self, changes: list[_NameChange], content: Callable[[_File], bytes]) -> Tree:
        """The tree where these of the pending changes of names are kept."""
        over: dict[int, dict[str, tuple[int, _File | _Folder | None]]] = {}
        for change in changes:
            for folder, name, node in change.edits:
                if folder.durable.get(name, (-1, None))[0] < change.order:
                    over.setdefault(id(folder), {})[name] = (change.order, node)
        tree: Tree = {}
        stack: list[tuple[str, _Folder]] = [("", self.root)]
        while stack:
            at, folder = stack.pop()
            for name, (_, node) in {**folder.durable, **over.get(id(folder), {})}.items():
                if isinstance(node, _Folder):
                    tree[at + name] = None
                    stack.append((f"{at}{name}/", node))
                elif node is not None:
                    tree[at + name] = content(node)
        return tree

    def states(self, rng: random.Random, *, n_single: int, n_random: int) -> Iterator[Tree]:
        """Trees that a cut at this moment may leave; many are alike.

        n_single: how many of the last changes of names are lost or kept alone. n_random: how many trees are drawn at random.
        """
        self._forget()
        every = self.pending
        subsets = [every, [], every[-1:], every[:-1]]
        for folder in {id(edit[0]) for change in every for edit in change.edits}:
            of_folder = [change for change in every if any(id(edit[0]) == folder for edit in change.edits)]
            subsets += [of_folder, [change for change in every if change not in of_folder]]
        for change in every[-n_single:]:
            subsets += [[change], [other for other in every if other is not change]]
        subsets = list({tuple(change.order for change in subset): subset for subset in subsets}.values())
        ways = WAYS if self._files else WAYS[:1]
        for names, how in itertools.product(subsets, ways):
            yield self._cut(names, lambda how=how: how, rng)
        for _ in range(n_random if every or self._files else 0):
            yield self.random_state(rng)

    def _forget(self) -> None:
        """Drops what happened to files and folders that no name leads to any more, whatever is lost."""
        names: dict[int, list[_File | _Folder | None]] = {}
        for change in self.pending:
            for folder, _, node in change.edits:
                names.setdefault(id(folder), []).append(node)
        reached: set[int] = set()
        stack: list[_File | _Folder | None] = [self.root]
        while stack:
            node = stack.pop()
            if node is None or id(node) in reached:
                continue
            reached.add(id(node))
            if isinstance(node, _Folder):
                stack += [child for _, child in node.durable.values()] + names.get(id(node), [])
        self.pending = [change for change in self.pending if any(id(folder) in reached for folder, _, _ in change.edits)]
        self._files = [file for file in self._files if id(file) in reached]

    def random_state(self, rng: random.Random) -> Tree:
        """One of the trees that a cut at this moment may leave: any names, and any bytes of each file."""
        share = rng.random()
        names = [change for change in self.pending if rng.random() < share]
        return self._cut(names, lambda: rng.choice(WAYS), rng)

    def _cut(self, names: list[_NameChange], how: Callable[[], str], rng: random.Random) -> Tree:
        contents: dict[int, bytes] = {}  # a file of two names has one content

        def content(file: _File) -> bytes:
            return contents.setdefault(id(file), file.after_cut(how(), rng)) if file.pending else file.kept()

        return self._tree(names, content)

"""Tags: names for snapshots. Each is a small file that has the snapshot's number and the sha256 of its manifest; gc keeps what has one."""

import hashlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knnstore.errors import DamageError, ExistsError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.format import TAGS
from knnstore.storage.files import disk, hold_lock, replace_file, write_file
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_hex, parse_json_bytes, parse_object, parse_size, parse_text, read_small

if TYPE_CHECKING:
    from knnstore.storage.catalog import StoreFolder

__all__ = ["TAG_PREFIX", "Tag", "check_name", "list_tags", "read_tag", "remove_tag", "resolve", "tag_name", "write_tag"]

TAG_PREFIX = "tag:"  # before a tag's name, where a snapshot is named by number or by tag
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_SUFFIX = ".json"
_TAG_MAX = 4_096  # bytes of a tag's file: a name of 100 characters, a number, a hash and a time take under 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """What a tag names. sha256: of the snapshot's manifest; time: when it was set, UTC."""

    snapshot: int
    sha256: str
    time: str


def check_name(name: str) -> None:
    """Raises InvalidArgumentError for what cannot be the name of a tag."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"tag {name[:120]!r}: use 1 to 100 letters (a-z), digits, dots, underscores and hyphens, and no dot at the beginning."
        )


def tag_name(path: Path) -> str | None:
    """The tag that a file in `tags/` is for; None for other files."""
    name = path.name.removesuffix(_SUFFIX)
    return name if name != path.name and _NAME.fullmatch(name) else None


def _content(name: str, tag: Tag) -> bytes:
    fields = {"name": name, **asdict(tag)}
    return canonical({**fields, "check": hashlib.sha256(canonical(fields)).hexdigest()})


def read_tag(path: Path) -> Tag:
    """A tag's file. Raises DamageError."""
    raw, at = read_small(path, _TAG_MAX), str(path)
    fields = parse_object(parse_json_bytes(raw, at), at, required=("check", "name", "sha256", "snapshot", "time"))
    tag = Tag(
        snapshot=parse_size(fields["snapshot"], f"{at}.snapshot"),
        sha256=parse_hex(fields["sha256"], f"{at}.sha256", 64),
        time=parse_text(fields["time"], f"{at}.time"),
    )
    if raw != _content(parse_text(fields["name"], f"{at}.name"), tag):
        raise DamageError(f"{at}: its content does not match its checksum. Run `knnstore verify`.")
    if fields["name"] != tag_name(path):
        raise DamageError(f"{at}: it is the tag {fields['name']!r}. Give the file its name back, or remove it.")
    return tag


def list_tags(store: "StoreFolder") -> dict[str, Tag]:
    """All tags by name, sorted; whether their snapshots are there is not looked at. Raises DamageError naming a tag that is damaged."""
    folder = store.path / TAGS
    try:
        paths = {name: path for path in folder.iterdir() if (name := tag_name(path)) is not None}
    except FileNotFoundError:  # an empty folder is lost in some ways of copying
        return {}
    except NotADirectoryError as error:
        raise DamageError(f"{folder}: not a folder. Run `knnstore verify`.") from error
    except OSError as error:
        raise StorageError(f"{folder}: cannot read: {error.strerror}. Check the path and its permissions.") from error
    return {name: read_tag(paths[name]) for name in sorted(paths)}


def resolve(store: "StoreFolder", name: str) -> Tag:
    """A tag, whose snapshot is there and the one that was tagged. Raises NotFoundError, DamageError, InvalidArgumentError."""
    path = _find(store, name)
    tag = read_tag(path)
    while True:
        damage = _damage(store, tag)
        if damage is None:
            return tag
        # It may have been moved, and the snapshot removed since.
        before, tag = tag, read_tag(_find(store, name))
        if tag == before:
            raise DamageError(f"{path}: {damage}. Run `knnstore verify`; `knnstore tag {name} --remove` takes the tag away.")


def _damage(store: "StoreFolder", tag: Tag) -> str | None:
    """What is wrong with the snapshot that a tag names."""
    manifest = store.manifest(tag.snapshot)
    if not os.path.lexists(manifest):
        return f"snapshot {tag.snapshot}, which it names, is not there"
    try:
        found = hashlib.sha256(read_small(manifest)).hexdigest()
    except DamageError:
        if not os.path.lexists(manifest):
            return f"snapshot {tag.snapshot}, which it names, is not there"
        raise
    return None if found == tag.sha256 else f"snapshot {tag.snapshot} is not the one that was tagged"


def _find(store: "StoreFolder", name: str) -> Path:
    check_name(name)
    path = store.tag(name)
    if not os.path.lexists(path):
        known = sorted(known for child in _children(store.path / TAGS) if (known := tag_name(child)) is not None)
        raise NotFoundError(f"{store.path}: no tag {name!r}. It has {', '.join(known) or 'none'}.")
    return path


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def write_tag(store: "StoreFolder", name: str, tag: Tag, *, move: bool = False) -> None:
    """Names a snapshot; the caller holds a pin on it. move: also where the name is taken.

    Raises ExistsError where it is taken, InvalidArgumentError for what is no name, StorageError.
    """
    check_name(name)
    path = store.tag(name)
    with hold_lock(store.lock, purpose="changing this store", wait=True):
        if os.path.lexists(path) and not move:
            raise ExistsError(f"{store.path}: tag {name!r} is there already. Choose another name, or move it with --move.")
        if not path.parent.exists():
            disk.make_folder(path.parent)
            disk.sync_folder(store.path)
        if move:
            replace_file(path, _content(name, tag))
            return
        temporary = path.with_name(f"{path.name}.tmp")
        write_file(temporary, _content(name, tag))
        disk.link(temporary, path)
        disk.remove(temporary)
        disk.sync_folder(path.parent)


def remove_tag(store: "StoreFolder", name: str) -> None:
    """Takes a tag away, also a damaged one; its snapshot stays until a gc. Raises NotFoundError, InvalidArgumentError, StorageError."""
    with hold_lock(store.lock, purpose="changing this store", wait=True):
        path = _find(store, name)
        disk.remove_tree(path)
        disk.sync_folder(path.parent)

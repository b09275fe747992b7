"""Reads the fenced blocks of a Markdown page, runs them as a reader would, and compares what is printed with what the page shows.

A block is run, or is the output of the block before it, or has a comment on the line before that says why neither:

    ```console    lines after `$ ` are typed in a shell; what follows each is what it prints
    ```sh         commands without their output
    ```python     run in one namespace for each page
    ```text       directly after a python or sh block: what it printed. Anywhere else: a picture, no code
    ```json       directly after a python or sh block: what it printed
    <!-- not run: REASON -->       the block is not run
    <!-- slow: REASON -->          the block is run by the slow tests only, with those after it that carry the same mark
    <!-- signature: NAME -->       the block is the signature of knnstore.NAME
    <!-- message: NAME -->         the block is the message of an error of this class
    <!-- needs: NAME NAME -->      anywhere on a page: files and folders that lie in the working folder when its blocks are run
    <!-- needs modules: NAME -->   anywhere on a page: its blocks are run only where these modules are installed

`WRITE_DOCS=1 pytest tests/test_docs.py` writes what is printed now in the place of every output that is not so.
"""

import contextlib
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

COLUMNS = 100  # width of the tables on the pages
ELISION = "…"  # a line of its own in an output: lines that are not shown
TOLERANCE = 0.3  # relative, of numbers: another CPU may compute in bfloat16, and its sums differ
LIKENESS = 0.6  # share of the words in rows of probabilities that must be the same

_FENCE = re.compile(r"^```(.*)$")
_MARK = re.compile(r"^<!-- (not run|slow|signature|message): (.+) -->$")
_MEASURED = re.compile(r"\b0\.\d{4,}\b|\be-\d\d\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_REPLACED = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"^tokens/s .*$", re.MULTILINE), "tokens/s"),  # another machine's
    (re.compile(r" \([\d,.]+( [kMGT]?B)?/s\)"), ""),  # a rate is shown where a stage takes longer than a second
    (re.compile(r"\b(\d+ h )?(\d+ min )?[\d.]+ s\b"), "DURATION"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "HEX"),
    (re.compile(r"#+(?=\s|$)"), ""),  # bars
    (re.compile(r"process \d+"), "process N"),
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. line: number of its opening fence, from 1. mark, said: of the comment before it. after: follows a block directly."""

    line: int
    tag: str
    code: str
    mark: str
    said: str
    after: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """An output on a page and the one that came. first, stop: its lines on the page, from 0."""

    at: str
    documented: str
    printed: str
    first: int
    stop: int


def read_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    blocks: list[Block] = []
    lines = page.split("\n")
    number = 0
    above: str | None = None  # the last line with something in it; None for the closing fence of a block
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening is None:
            above = lines[number] if lines[number].strip() else above
            number += 1
            continue
        stop = lines.index("```", number + 1)
        mark = _MARK.match(above or "")
        blocks.append(
            Block(
                line=number + 1,
                tag=opening[1],
                code="\n".join(lines[number + 1 : stop]),
                mark=mark[1] if mark else "",
                said=mark[2] if mark else "",
                after=above is None and bool(blocks),
            )
        )
        above = None
        number = stop + 1
    return blocks


def needs(page: str) -> list[str]:
    """What a page says lies in its working folder."""
    return [name for found in re.findall(r"^<!-- needs: (.+) -->$", page, re.MULTILINE) for name in found.split()]


def needs_modules(page: str) -> list[str]:
    """The modules that must be installed for the blocks of a page."""
    return [name for found in re.findall(r"^<!-- needs modules: (.+) -->$", page, re.MULTILINE) for name in found.split()]


def outputs_of(blocks: Sequence[Block]) -> dict[int, Block]:
    """Line of a block → the block that shows what it prints."""
    return {
        before.line: block
        for before, block in pairwise(blocks)
        if block.after
        and block.tag in ("text", "json")
        and not block.mark
        and before.tag in ("python", "sh")
        and before.mark in ("", "slow")
    }


def _invoke(arguments: Sequence[str], given: str | None) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return CliRunner().invoke(import_module("knnstore_cli.main").cli, list(arguments), input=given, env={"COLUMNS": str(COLUMNS)})


@dataclass(slots=True)
class Made:
    """Datastores that a page had made, so that the same `create` of the same files on another page need not compute again."""

    shelf: Path
    done: dict[tuple[str, ...], tuple[Result, Path]] = field(default_factory=dict)

    def create(self, arguments: list[str], folder: Path) -> Result:
        """What `knnstore create` prints; the store is in `folder` after."""
        store = folder / next((arguments[i + 1] for i, word in enumerate(arguments) if word in ("--store", "-s")), "store.knn")
        files = [path for word in arguments[1:] for path in sorted([folder / word, *(folder / word).rglob("*")]) if path.is_file()]
        key = (*arguments, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))
        if store.exists() or key not in self.done:
            done = _invoke(arguments, None)
            if done.exit_code == 0:
                self.done[key] = (done, Path(shutil.copytree(store, self.shelf / f"{len(self.done)}.knn")))
            return done
        done, copy = self.done[key]
        shutil.copytree(copy, store)
        return done


@dataclass(slots=True)
class Reader:
    """Someone who types what a page says, in a folder of their own."""

    folder: Path
    name: str  # of the page
    path: str  # $PATH, with `knnstore` and `python` on it
    made: "Made"
    names: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def follow(self, page: str, *, slow: bool = False) -> Iterator[Shown]:
        """Runs the blocks of a page in order; gives every output with what came instead. The working folder must be `folder`."""
        blocks = read_blocks(page)
        outputs = outputs_of(blocks)
        shown_by = {id(block) for block in outputs.values()}
        for block in blocks:
            if id(block) in shown_by or block.mark not in ("", "slow") or (block.mark == "slow" and not slow):
                continue
            if block.tag == "console":
                yield from self._console(block)
            elif block.tag in ("python", "sh"):
                at = f"{self.name}:{block.line}"
                printed = self._python(block, at) if block.tag == "python" else self.type(block.code)
                output = outputs.get(block.line)
                if output is not None:
                    stop = output.line + (len(output.code.split("\n")) if output.code else 0)
                    yield Shown(at, output.code, printed, output.line, stop)
                elif block.tag == "python":
                    yield Shown(at, "", printed, 0, 0)

    def _console(self, block: Block) -> Iterator[Shown]:
        lines = block.code.split("\n")
        assert lines[0].startswith("$ "), f"{self.name}:{block.line}: a console block begins with `$ `"
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
            command, first = lines[start][2:], start + 1
            while command.endswith("\\"):
                command, first = f"{command[:-1]}{lines[first]}", first + 1
            printed = self.type(command)
            yield Shown(
                f"{self.name}:{block.line + start + 1}: $ {command}",
                "\n".join(lines[first:stop]),
                printed,
                block.line + first,
                block.line + stop,
            )

    def _python(self, block: Block, at: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, at, "exec"), self.names)
        return printed.getvalue()

    def type(self, command: str) -> str:
        """What a command prints, stdout and stderr. `knnstore` alone or in a pipe runs in this process: loading torch takes seconds."""
        if command.strip() == "echo $?":
            return f"{self.exit_code}\n"
        words = _words(command)
        stages = [list(stage) for stage in _split(words, "|")] if words is not None else []
        ours = [number for number, stage in enumerate(stages) if stage[0] == "knnstore"]
        if len(ours) != 1:
            return self._bash(command, None, merge=True)
        at = ours[0]
        given = self._bash(_pipe(stages[:at]), None, merge=False) if at else None
        after = stages[at + 1 :]
        done = self._knnstore(stages[at][1:], given)
        self.exit_code = done.exit_code
        if not after:
            return done.output
        return done.stderr + self._bash(_pipe(after), done.stdout, merge=True)

    def _knnstore(self, arguments: list[str], given: str | None) -> Result:
        return self.made.create(arguments, self.folder) if arguments[0] == "create" and given is None else _invoke(arguments, given)

    def _bash(self, command: str, given: str | None, *, merge: bool) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNSTORE")}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={**environment, "PATH": self.path, "COLUMNS": str(COLUMNS)},
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else None,
            text=True,
            timeout=240,
            check=False,
        )
        self.exit_code = done.returncode
        return done.stdout


def _words(command: str) -> list[str] | None:
    """The words of a line whose only operator is a pipe, None for anything else."""
    if "\n" in command.strip() or "$(" in command or "`" in command:
        return None
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    operators = {word for word in words if set(word) <= set("();<>|&")}
    return words if words and operators <= {"|"} else None


def _split(words: Sequence[str], at: str) -> Iterator[list[str]]:
    stage: list[str] = []
    for word in [*words, at]:
        if word == at:
            yield stage
            stage = []
        else:
            stage.append(word)


def _pipe(stages: Sequence[Sequence[str]]) -> str:
    return " | ".join(shlex.join(stage) for stage in stages)


def python_path(folder: Path) -> str:
    """A $PATH with this interpreter as `python`, and the command."""
    for name, code in (("python", ""), ("knnstore", "-c 'from knnstore_cli.main import cli; cli()'")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {code} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# What is the same


def differences(shown: Shown, folder: Path) -> list[str]:
    """What of an output on a page is not what came: nothing where they agree.

    Numbers may differ by a tolerance, times, durations, rates, hashes and the lengths of bars altogether. In rows with a
    probability most words must be the same: which of two tokens comes first may depend on the last bit. Every other line must be
    there, in order; a line `…` stands for any that are not shown.
    """
    documented, printed = _lines(shown.documented, folder), _lines(shown.printed, folder)
    elided = ELISION in documented
    wanted, came = ([line for line in lines if not _MEASURED.search(line) and line != ELISION] for lines in (documented, printed))
    if elided:
        came = _found_in_order(wanted, came)
    found = []
    for number in range(max(len(wanted), len(came))):
        one = wanted[number] if number < len(wanted) else None
        other = came[number] if number < len(came) else None
        if one is None or other is None or not _same_line(one, other):
            found.append(f"{shown.at}\n  the page: {one}\n  printed:  {other}")
            break
    rows = [[_NUMBER.sub("0", line) for line in lines if _MEASURED.search(line)] for lines in (documented, printed)]
    if len(rows[0]) != len(rows[1]) and not elided:
        found.append(f"{shown.at}\n  the page: {len(rows[0])} rows with probabilities\n  printed:  {len(rows[1])}")
    elif rows[0] and not elided:
        likeness = SequenceMatcher(None, " ".join(rows[0]).split(), " ".join(rows[1]).split(), autojunk=False).ratio()
        if likeness < LIKENESS:
            found.append(f"{shown.at}\n  {likeness:.0%} of the words in rows with probabilities are the same\n  printed: {printed}")
    return found


def _lines(text: str, folder: Path) -> list[str]:
    text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), ".")
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()]


def _same_line(one: str, other: str) -> bool:
    if _NUMBER.sub("0", one) != _NUMBER.sub("0", other):
        return False
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return all(abs(a - b) <= max(TOLERANCE * max(abs(a), abs(b)), 1e-5) for a, b in pairs)


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(line)]


def _found_in_order(wanted: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The lines that stand for the wanted ones, one after the other; it ends where one is not found."""
    found, rest = [], iter(lines)
    for line in wanted:
        match = next((other for other in rest if _same_line(line, other)), None)
        if match is None:
            return found
        found.append(match)
    return found


def rewritten(page: str, outputs: Sequence[Shown], folder: Path) -> str:
    """The page with every output as it came; those with lines left out stay as they are."""
    lines = page.split("\n")
    for shown in sorted(outputs, key=lambda shown: -shown.first):
        if ELISION not in shown.documented.split("\n") and shown.stop:
            text = shown.printed.replace(f"{folder}{os.sep}", "").rstrip("\n")
            lines[shown.first : shown.stop] = text.split("\n") if text else []
    return "\n".join(lines)

"""Damage is done to every kind of file, and a child process looks: `verify` names the file, a query that needs it refuses,
and one that does not need it answers as before. Nothing dies, hangs, or answers otherwise.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from damage import REPLACEMENTS, Child, files_by_role, restored
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore.errors import DamageError, ExistsError
from knnstore.format import HEADER_SIZE

# What each way of asking must read. `open` reads what names the snapshot, and every other way opens first.
OPENING = {"KNNSTORE", "CURRENT", "manifest"}
TAGGED = {"KNNSTORE", "manifest", "tag"}  # what names a snapshot that is opened by its tag
QUANTIZERS = {"space space.json", "space rotation.bin", "space centroids.bin", "coarse centroids.bin"}
READS = {
    "open": OPENING,
    "search": OPENING | QUANTIZERS | {"lists.bin", "lists.dir"},
    "tagged": TAGGED | QUANTIZERS | {"lists.bin", "lists.dir"},
    "contexts": OPENING | QUANTIZERS | {"values.bin", "contexts.lmdb"},
    "exact": OPENING | QUANTIZERS | {"values.bin", "keys.bin"},
    "find": OPENING | QUANTIZERS | {"ids.bin", "contexts.lmdb"},
}
READS_RAW = {**READS, "exact": READS["search"] | {"values.bin"}}  # lists of raw keys are the keys
# What is compared with a checksum as a whole before its first use.
CHECKED_WHOLE = OPENING | {"tag"} | QUANTIZERS | {"lists.dir", "contexts.lmdb"}
BINARY = QUANTIZERS - {"space space.json"} | {"lists.bin", "lists.dir", "values.bin", "ids.bin", "keys.bin"}
# What level quick does not read in full: the bytes of lists, values, ids, keys (but for header and checksums) and contexts.
UNREAD_WHEN_QUICK = {"lists.bin", "values.bin", "ids.bin", "keys.bin", "contexts.lmdb"}

STORES = ("pq4", "pq8", "raw")
TRIED: Counter[str] = Counter()  # what the tests did, told at their end


@dataclass(frozen=True)
class Bench:
    """A store to be damaged, the same one untouched, another of the same kind, and what the untouched one answers."""

    store: Path
    pristine: Path
    other: Path
    reads: dict[str, set[str]]
    answers: dict[str, str]
    child: Child

    @property
    def roles(self) -> dict[str, Path]:
        return files_by_role(self.pristine)

    def path(self, role: str) -> Path:
        return self.store / self.roles[role].relative_to(self.pristine)

    def verify(self, level: str) -> dict[str, Any]:
        answer = self.child.ask("verify", self.store, level=level)
        assert answer.error is None, answer.trace
        return answer.value

    def check(self, role: str, done: str, *, seen_by_quick: bool, answers: dict[str, str] | None = None) -> None:
        """The laws, for a file that was damaged. done: how; answers: those of the damaged store, if they were asked for already."""
        path = self.roles[role].relative_to(self.pristine).as_posix()
        TRIED["damages"] += 1
        for level in ("full", "quick") if seen_by_quick else ("full",):
            report = self.verify(level)
            assert not report["ok"], f"{role}, {done}: verify --level {level} did not see it"
            assert path in [problem[1] for problem in report["problems"]], f"{role}, {done}: {level} blames {report['problems']}"
        if answers is None:
            asked = self.child.ask("answers", self.store)
            assert asked.error is None, f"{role}, {done}: {asked.trace}"
            answers = asked.value
        self.check_answers(role, done, answers)

    def check_answers(self, role: str, done: str, answers: dict[str, str]) -> None:
        refusals = {"DamageError", "FormatError"} if role in ("KNNSTORE", "manifest") else {"DamageError"}
        for way, answer in answers.items():
            if answer == self.answers[way]:
                TRIED["answered as before"] += 1
                continue
            TRIED["refused"] += 1
            assert answer in refusals, f"{role}, {done}: {way} gave {answer}, undamaged {self.answers[way]}"
            assert role in self.reads[way], f"{role}, {done}: {way} refused"

    def must_refuse(self, role: str, done: str) -> None:
        """Every way that reads the file refuses."""
        asked = self.child.ask("answers", self.store)
        assert asked.error is None, f"{role}, {done}: {asked.trace}"
        for way, answer in asked.value.items():
            if role in self.reads[way]:
                assert answer in ("DamageError", "FormatError"), f"{role}, {done}: {way} answered"


@pytest.fixture(scope="module")
def child(tell: Callable[[str], None]) -> Iterator[Child]:
    with Child() as running:
        yield running
    if TRIED:
        tell("damage: " + ", ".join(f"{n:,} {what}" for what, n in TRIED.items()))


def _create(kind: str, path: Path, seed: int) -> None:
    if kind == "pq4":  # lists with gaps between them (an entry takes 5 bytes and a label), two segments, a document in both
        n = [1_500, 3_500, 1_000]
        options = {"keep_keys": "f16", "segment_entries": 3_800, "seed": seed}
        options |= {"training_keys": draw_keys(seed + 10, 5_000, 10), "expected_entries": 40_000}  # 256 lists for few entries
    elif kind == "pq8":
        n, options = [900, 600], {"codec": "pq8", "keep_keys": "bf16", "seed": seed}
        options |= {"training_keys": draw_keys(seed + 10, 10_240, 10), "expected_entries": 11_000}
    else:
        n, options = [30, 1, 70], {"keep_keys": "f32"}
    total = sum(n)
    documents = damage.text_documents(n, domains=("a", "b"))
    create_store(path, draw_keys(seed, total, 10), draw_values(seed, total), documents, **options)
    knnstore.tag(path, "kept")


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, child: Child) -> dict[str, Bench]:
    found = {}
    for kind in STORES:
        folder = tmp_path_factory.mktemp(kind)
        _create(kind, folder / "pristine.knn", 1)
        _create(kind, folder / "other.knn", 2)
        shutil.copytree(folder / "pristine.knn", folder / "store.knn")
        reads = READS_RAW if kind == "raw" else READS
        answers = child.ask("answers", folder / "store.knn")
        assert answers.error is None, answers.trace
        assert not {"DamageError", "FormatError"} & set(answers.value.values())
        found[kind] = Bench(folder / "store.knn", folder / "pristine.knn", folder / "other.knn", reads, answers.value, child)
    return found


@pytest.fixture(params=STORES)
def bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Iterator[Bench]:
    chosen = benches[request.param]
    with restored(chosen.store, chosen.pristine):
        yield chosen


def _cuts(size: int) -> list[int]:
    return sorted({0, 1, HEADER_SIZE - 1, HEADER_SIZE, size // 2, size - 1} & set(range(size)))


def test_a_store_is_clean_before_and_after(bench: Bench) -> None:
    """What is not damaged is not reported, at either level."""
    for level in ("quick", "full"):
        assert bench.verify(level) == {"ok": True, "problems": [], "orphans": []}


def test_every_kind_of_file_is_there(benches: dict[str, Bench]) -> None:
    """The damaged stores have every file that a store can have."""
    assert set(benches["pq4"].roles) == OPENING | QUANTIZERS | {*UNREAD_WHEN_QUICK, "lists.dir", "segment.json", "tag"}


def test_files_of_another_kind(bench: Bench) -> None:
    """A file that is gone, or is a folder, a FIFO or a link, is found at both levels; nothing waits for it."""
    for role in bench.roles:
        for done, replace in REPLACEMENTS.items():
            if (role, done) == ("tag", "removed"):
                continue  # as by `untag`
            with restored(bench.store, bench.pristine):
                replace(bench.path(role))
                bench.check(role, done, seen_by_quick=True)
                if done != "link":  # to the same content: it may be read
                    bench.must_refuse(role, done)


def test_files_of_another_size(bench: Bench) -> None:
    """A file that is shorter or longer is found at both levels, and not read (a mapped file that is short would end the process)."""
    for role, path in bench.roles.items():
        size = path.stat().st_size
        damages = {f"cut to {n}": partial(damage.cut, size=n) for n in _cuts(size)}
        damages |= {f"grown by {len(more)}": partial(damage.grow, more=more) for more in (b"\0", b"\n", b"x" * 4_096)}
        for done, do in damages.items():
            with restored(bench.store, bench.pristine):
                do(bench.path(role))
                bench.check(role, done, seen_by_quick=True)
                bench.must_refuse(role, done)


def test_files_of_another_store(bench: Bench) -> None:
    """A sound file of another store of the same kind is found; where the sizes are the same too."""
    for role, path in files_by_role(bench.other).items():
        if role not in bench.roles or path.read_bytes() == bench.roles[role].read_bytes():
            continue
        with restored(bench.store, bench.pristine):
            shutil.copyfile(path, bench.path(role))
            bench.check(role, "swapped", seen_by_quick=role != "contexts.lmdb" or path.stat().st_size != bench.roles[role].stat().st_size)
            bench.must_refuse(role, "swapped")


def test_folders_of_another_kind(bench: Bench) -> None:
    """A folder that is gone, a file or a link is found at both levels."""
    folders = [path for path in (bench.pristine, *bench.pristine.iterdir()) if path.is_dir()]
    folders = sorted(path for parent in folders for path in parent.iterdir() if path.is_dir() and any(path.iterdir()))
    for folder in folders:
        name = folder.relative_to(bench.pristine)
        for done in ("removed", "file", "FIFO", "link")[str(name) == "tags" :]:  # without tags it may be missing
            with restored(bench.store, bench.pristine):
                target = bench.store / name
                if done == "link":
                    target.rename(bench.store / "elsewhere")
                    target.symlink_to(bench.store / "elsewhere")
                else:
                    shutil.rmtree(target)
                    if done == "file":
                        target.touch()
                    elif done == "FIFO":
                        os.mkfifo(target)
                for level in ("quick", "full"):
                    report = bench.verify(level)
                    assert not report["ok"], f"{name}, {done}: {level}"
                    assert any(str(name) in (problem[1], str(Path(problem[1]).parent)) for problem in report["problems"]), report
                asked = bench.child.ask("answers", bench.store)
                assert asked.error is None, asked.trace
                refusals = {"DamageError", *(["NotFoundError"] if str(name) == "tags" else [])}
                assert set(asked.value.values()) <= {*refusals, *bench.answers.values()}, f"{name}, {done}: {asked.value}"


def _places(role: str, path: Path, rng: random.Random, step: int) -> list[int]:
    """Bytes to invert: of the header each field, the first and last, some between; of short files one in `step`."""
    size = path.stat().st_size
    if size < 1_000:
        return [*range(rng.randrange(step), size - 1, step), size - 1]
    places = {0, 1, size - 1, size - 8, size // 2, size // 3, *rng.sample(range(size), 6)}
    if role in BINARY:
        places |= {0, 9, 10, 11, 12, 13, 14, 16, 24, 32, 47, 48, 56, 63, HEADER_SIZE}
    if role == "contexts.lmdb":  # the head of a page of LMDB says how to read the page: its number, kind and bounds
        places |= {4_096 * page + rng.randrange(16) for page in range(size // 4_096)[:: 1 + size // (12 * 4_096)]}
    return sorted(places)


MASKS = (0xFF, 0x01, 0x20)  # all bits, the lowest, the one between a and A


def test_inverted_bytes(bench: Bench, benches: dict[str, Bench]) -> None:
    """A byte whose bits are inverted, all or one, is found wherever it is; what refuses and what answers is as it must be."""
    _invert_bytes(bench, random.Random(0), step=3 if bench is benches["raw"] else 20, masks=MASKS)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS, ids=["inverted", "lowest bit", "letter case"])
def test_inverted_bytes_with_each_mask(bench: Bench, benches: dict[str, Bench], mask: int) -> None:
    """The same with each way at each place, where the test before takes them in turn."""
    _invert_bytes(bench, random.Random(mask), step=3 if bench is benches["raw"] else 20, masks=[mask])


def _invert_bytes(bench: Bench, rng: random.Random, *, step: int, masks: Sequence[int]) -> None:
    """masks: taken in turn, from place to place."""
    for role, path in bench.roles.items():
        places = _places(role, path, rng, step=step)
        rng.shuffle(places)
        for number, mask in enumerate(masks):
            _invert_in_file(bench, role, path, sorted(places[number :: len(masks)]), mask)


def _invert_in_file(bench: Bench, role: str, path: Path, places: list[int], mask: int) -> None:
    size = path.stat().st_size
    for levels, some in (
        (["quick", "full"], [at for at in places if role not in UNREAD_WHEN_QUICK or (role in BINARY and at < HEADER_SIZE)]),
        (["full"], [at for at in places if role in UNREAD_WHEN_QUICK and (role not in BINARY or at >= HEADER_SIZE)]),
    ):
        asked = bench.child.ask("each byte", bench.store, path=str(bench.path(role)), places=some, mask=mask, levels=levels)
        assert asked.error is None, f"{role}: {asked.trace}"
        for at, missed, answers in asked.value:
            done = f"byte {at} of {size} ^ {mask:#x}"
            assert not missed, f"{role}, {done}: not seen by {missed}"
            bench.check_answers(role, done, answers)
            TRIED["bytes changed"] += 1
            refused = [way for way, answer in answers.items() if answer in ("DamageError", "FormatError")]
            assert role not in CHECKED_WHOLE or refused == [way for way in answers if role in bench.reads[way]], (
                f"{role}, {done}: {answers}"
            )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_byte(benches: dict[str, Bench]) -> None:
    """No byte of any file can be inverted without `verify` naming the file."""
    bench = benches["raw"]
    for role, path in bench.roles.items():
        places = list(range(path.stat().st_size))
        asked = bench.child.ask(
            "each byte", bench.store, within_s=280, path=str(bench.path(role)), places=places, mask=0xFF, levels=["full"], ask=False
        )
        assert asked.error is None, f"{role}: {asked.trace}"
        assert not [at for at, missed, _ in asked.value if missed], role


def test_padding(benches: dict[str, Bench]) -> None:
    """Bytes that no query reads (zeros between lists and after values) are found at level full, and answers stay."""
    bench = benches["pq4"]
    for role in ("lists.bin", "values.bin", "keys.bin"):
        content = bench.roles[role].read_bytes()
        if role == "lists.bin":
            table = np.frombuffer(bench.roles["lists.dir"].read_bytes(), "<u8", offset=HEADER_SIZE).reshape(-1, 3).astype(int)
            ends = table[:, 1] + -(-table[:, 0] // 32) * 32 * (5 + 8)
            places = ends[ends % 64 != 0][:3].tolist()
            assert places, "some lists end within 64 bytes"
        else:
            n = json.loads(bench.roles["segment.json"].read_text())["entries"]
            end = HEADER_SIZE + n * (2 if role == "values.bin" else 20)
            places = [end, -(-end // 64) * 64 - 1] if end % 64 else []
        for at in places:
            assert content[at] == 0, "this is padding"
            with restored(bench.store, bench.pristine):
                damage.invert(bench.path(role), at)
                bench.check(role, f"padding at {at}", seen_by_quick=False)
                answers = bench.child.ask("answers", bench.store).value
                assert answers == bench.answers


def test_checksum_tables_are_seen_by_quick(benches: dict[str, Bench]) -> None:
    """The checksums at the end of values, ids and keys are read at level quick."""
    for bench in benches.values():
        for role in ("values.bin", "ids.bin", "keys.bin"):
            with restored(bench.store, bench.pristine):
                damage.invert(bench.path(role), -1)
                bench.check(role, "last byte", seen_by_quick=True)
                bench.must_refuse(role, "last byte")


def test_two_damages_are_both_found(bench: Bench) -> None:
    """One damaged file does not hide the others."""
    roles = [role for role in bench.roles if role not in OPENING]
    for role in roles:
        damage.invert(bench.path(role), bench.roles[role].stat().st_size // 2)
    named = {problem[1] for problem in bench.verify("full")["problems"]}
    assert named == {bench.roles[role].relative_to(bench.pristine).as_posix() for role in roles}


@pytest.mark.parametrize("done", ["removed", "folder", "FIFO", "broken link", "loop"])
@pytest.mark.parametrize("role", ["CURRENT", "KNNSTORE"])
def test_create_does_not_clear_a_damaged_store_away(benches: dict[str, Bench], role: str, done: str) -> None:
    """The command that made a store, typed again when CURRENT or KNNSTORE is lost, refuses and leaves everything where it is."""
    bench = benches["raw"]
    with restored(bench.store, bench.pristine):
        REPLACEMENTS[done](bench.path(role))
        before = {path: path.lstat().st_ino for path in bench.store.rglob("*")}
        with pytest.raises((DamageError, ExistsError)):
            _create("raw", bench.store, 1)
        assert {path: path.lstat().st_ino for path in bench.store.rglob("*")} == before


def test_command_exits_8(bench: Bench) -> None:
    """`knnstore verify` names each damaged file and exits with 8, also in JSON; `info` reads the manifest only."""
    for role in bench.roles:
        name = bench.roles[role].relative_to(bench.pristine).as_posix()
        for do in (partial(damage.invert, at=bench.roles[role].stat().st_size // 2), damage.to_folder):
            with restored(bench.store, bench.pristine):
                do(bench.path(role))
                told = bench.child.ask("command", bench.store, arguments=["verify", "--store", str(bench.store), "--json"])
                assert told.error is None, told.trace
                assert told.value["code"] == 8, told.value
                fields = json.loads(told.value["out"])
                assert fields["ok"] is False
                assert name in [problem["path"] for problem in fields["problems"]]
                info = bench.child.ask("command", bench.store, arguments=["info", "--store", str(bench.store)])
                assert info.value["code"] == (8 if role in OPENING else 0), info.value


def test_command_in_a_process_of_its_own(benches: dict[str, Bench]) -> None:
    """The exit code is that of the process."""
    bench = benches["raw"]
    script = "import sys; from knnstore_cli.main import cli; cli(sys.argv[1:])"
    command = [sys.executable, "-c", script, "verify", "--store", str(bench.store), "--level", "quick"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    with restored(bench.store, bench.pristine):
        damage.to_fifo(bench.path("lists.bin"))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 8
        assert "lists.bin" in done.stdout
        assert "FIFO" in done.stdout

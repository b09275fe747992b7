"""Every kind of file is damaged in every way, and the store repaired by a child process: it lives, answers in time, and either says that
nothing is left or leaves a store that is whole, in which everything that was not lost is found as before."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import damage
import pytest
from broken import in_segments, inventory, manifest_of
from damage import REPLACEMENTS, Child, restored, same_holdings
from stores import create_store, draw_keys, draw_values

import knnstore

Damage = Callable[[Path], None]


def _make(folder: Path, seed: int) -> Path:
    """Two domains in two spaces with lists, kept keys, four segments, a document in two of them; three snapshots, two tags."""
    for number, name in enumerate(("first", "second")):
        documents = [
            knnstore.EntryDocument(id=f"{name} {document.id}", n_entries=document.n_entries, domain=name)
            for document in damage.text_documents([200, 250, 50])
        ]
        create_store(
            folder / f"{name}{seed}.knn",
            draw_keys(seed + number, 500, 10),
            draw_values(seed + number, 500),
            documents,
            training_keys=draw_keys(seed + number + 10, 5_000, 10),
            expected_entries=40_000,
            segment_entries=300,
            keep_keys="f16",
            seed=seed + number,
        )
    path = folder / f"store{seed}.knn"
    knnstore.merge([folder / f"first{seed}.knn", folder / f"second{seed}.knn"], path).close()
    knnstore.tag(path, "paper")
    knnstore.delete(path, ["second document 2"])
    knnstore.delete(path, ["first document 0"])
    knnstore.tag(path, "newest")
    return path


@dataclass(frozen=True)
class Bench:
    """A store to be damaged, the same one untouched, another one, and the files of both by what they are."""

    store: Path
    pristine: Path
    files: dict[str, Path]
    others: dict[str, Path]
    child: Child


def _files(store: Path) -> dict[str, Path]:
    """Every file of a store but LOCK, by a name that does not depend on what hashes and uuids there are."""
    manifest = manifest_of(store)
    found = {name: store / name for name in ("KNNSTORE", "CURRENT")}
    found |= {f"manifest {number}": store / "manifests" / f"{number}.json" for number in (1, 2, 3)}
    found |= {f"tag {name}": store / "tags" / f"{name}.json" for name in ("paper", "newest")}
    folders = [("space", [store / "spaces" / item.id for item in manifest.spaces])]
    folders += [("coarse", [store / "coarse" / item.id for item in manifest.coarse])]
    folders += [("segment", [store / "segments" / item.content.uuid for item in manifest.segments])]
    for kind, paths in folders:
        for number, folder in enumerate(paths):
            found |= {f"{kind} {number} {path.name}": path for path in sorted(folder.iterdir())}
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    pristine, other = _make(folder, 1), _make(folder, 7)
    store = Path(shutil.copytree(pristine, folder / "store.knn"))
    with Child() as child:
        yield Bench(store, pristine, _files(pristine), _files(other), child)


def _damages(rng: random.Random, path: Path, other: Path) -> dict[str, Damage]:
    """All that is done to a file of this size."""
    size, content = path.stat().st_size, path.read_bytes()
    done: dict[str, Damage] = dict(REPLACEMENTS)
    for at in {0, size - 1, *(rng.randrange(size) for _ in range(4))}:
        done[f"byte {at} inverted"] = partial(damage.invert, at=at, mask=rng.choice((0xFF, 1, 1 << rng.randrange(8))))
    done |= {f"cut to {n}": partial(damage.cut, size=n) for n in (0, rng.randrange(size))}
    done["grown"] = partial(damage.grow, more=rng.randbytes(rng.randrange(1, 5_000)))
    if other.read_bytes() != content:
        done["swapped"] = lambda target: shutil.copyfile(other, target) and None
    return done


def _gone(bench: Bench, role: str) -> tuple[set[str], int]:
    """By a dull reckoning: the documents that are lost when a file is, and the snapshot that is gone on from."""
    manifest = manifest_of(bench.pristine)
    kind, *rest = role.split()
    if role == "manifest 3":
        return set(), 2
    if kind not in ("space", "coarse", "segment"):
        return set(), 3
    records = {"space": manifest.spaces, "coarse": manifest.coarse, "segment": manifest.segments}[kind]
    record: Any = records[int(rest[0])]
    name = record.content.uuid if kind == "segment" else record.id
    needing = [item.content.uuid for item in manifest.segments if name in (item.content.uuid, item.content.space, item.content.coarse)]
    return {document for _, document in in_segments(bench.pristine, needing)}, 3


def _check(bench: Bench, role: str, done: str, do: Damage, expected: dict[tuple[int, tuple[str, ...]], Any]) -> bool:
    """Damages one file, repairs, and compares. Returns whether something was lost."""
    name = bench.files[role].relative_to(bench.pristine)
    do(bench.store / name)
    damaged = inventory(bench.store)
    asked = bench.child.ask("repair", bench.store)
    assert asked.error is None, f"{role}, {done}: {asked.trace}"
    report = asked.value
    gone, base = _gone(bench, role)
    assert report["base"] == base, f"{role}, {done}: {report}"
    unnamed = sum(report["unnamed"].values())
    named = {document for _, document in report["lost"]}
    assert named <= gone, f"{role}, {done}: {report}"
    assert unnamed == len(gone - named), f"{role}, {done}: {report}"
    assert not unnamed or name.name == "contexts.lmdb"
    assert report["lossless"] is (not gone and base == 3), f"{role}, {done}"
    verified = bench.child.ask("verify", bench.store, level="full")
    assert verified.error is None, verified.trace
    assert verified.value["problems"] == [], f"{role}, {done}: {verified.value}"
    key = (base, tuple(sorted(gone)))
    if key not in expected:
        expected[key] = bench.child.ask("holdings", bench.pristine, snapshot=base, without=key[1]).value
    found = bench.child.ask("holdings", bench.store, snapshot=None, without=[])
    assert found.error is None, f"{role}, {done}: {found.trace}"
    assert same_holdings(found.value, expected[key]), f"{role}, {done}"
    assert damaged <= inventory(bench.store), f"{role}, {done}: something was deleted"
    return bool(gone)


@pytest.mark.parametrize(
    "share", [pytest.param(0.07, id="some"), pytest.param(1.0, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1_200)])]
)
def test_every_file_in_every_way(bench: Bench, tell: Callable[[str], None], share: float) -> None:
    """Each damage leaves a store that is whole after a repair."""
    rng = random.Random(3)
    expected: dict[tuple[int, tuple[str, ...]], Any] = {}
    n_done = n_lossy = 0
    for role, path in bench.files.items():
        damages = _damages(rng, path, bench.others[role])
        for done in rng.sample(sorted(damages), max(1, round(share * len(damages)))):
            with restored(bench.store, bench.pristine):
                n_lossy += _check(bench, role, done, damages[done], expected)
                n_done += 1
    tell(f"damage, then repair: {n_done} damages of {len(bench.files)} files, {n_lossy} of them with documents lost")
    assert n_done >= len(bench.files)
    assert 0 < n_lossy < n_done


def test_two_damages_at_once(bench: Bench, tell: Callable[[str], None]) -> None:
    """Two files of different kinds: the store that is left is whole, or it is said that nothing is left and nothing is changed."""
    rng = random.Random(5)
    n_done = n_refused = 0
    for _ in range(12):
        with restored(bench.store, bench.pristine):
            for role in rng.sample(sorted(bench.files), 2):
                path = bench.store / bench.files[role].relative_to(bench.pristine)
                damages = _damages(rng, bench.files[role], bench.others[role])
                damages[rng.choice(sorted(damages))](path)
            before = inventory(bench.store)
            asked = bench.child.ask("repair", bench.store)
            n_done += 1
            if asked.error is not None:
                assert asked.error == "DamageError", asked.trace
                assert "nothing to go on from" in asked.trace
                n_refused += 1
                continue
            assert before <= inventory(bench.store)
            assert bench.child.ask("verify", bench.store, level="full").value["problems"] == []
            found = bench.child.ask("holdings", bench.store, snapshot=None, without=[])
            assert found.error is None, found.trace
            base = asked.value["base"]
            kept = set(found.value["documents"])
            every = bench.child.ask("holdings", bench.pristine, snapshot=base, without=[]).value["documents"]
            assert kept <= set(every), "a document that was not there"
    tell(f"two damages, then repair: {n_done} pairs, {n_refused} of which left nothing")

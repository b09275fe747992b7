"""A store that lives through anything, in any order: after every step it holds and answers what a plain dict and brute force say."""

import functools
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from crash import FileSystem, Recording, tree_of
from cuts import Shown
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from living import Drawn, Key, batches, by_key, check_answers, check_contents, contents, create, draw

import knnstore
from knnstore.errors import ExistsError, NotFoundError
from knnstore.storage.catalog import StoreFolder, list_manifests
from knnstore.store import Datastore

DOMAINS = ("default", "law", "other")
TAGS = ("a", "b")
Documents = dict[Key, Drawn]

names = st.tuples(st.sampled_from(DOMAINS), st.sampled_from("abcde"))
versions = st.integers(0, 2)
some_documents = st.dictionaries(names, versions, min_size=1, max_size=4)
seeds = st.integers(0, 1 << 30)


@functools.cache
def document(key: Key, version: int, dim: int) -> Drawn:
    """One version of a document; some have text, and some fit in no segment whole."""
    domain, name = key
    n = 1 + (3 * ord(name) + 5 * version) % 11
    return draw(name, version, domain=domain, n=n, dim=dim, text=(ord(name) + version) % 3 > 0, odd=version % 2)


class Living(RuleBasedStateMachine):
    """One store. documents: what it must hold; past: the same of each kept snapshot; tags: by name, the snapshot."""

    dim = 4
    base: tuple[Drawn, ...] = ()  # documents that it begins with
    keep_keys: str | None = None
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="knnstore-state-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.path = self.folder / "0" / "s.knn"
        self.documents: Documents = {}
        self.past: dict[int, Documents] = {}
        self.tags: dict[str, int] = {}
        self.reader: Datastore | None = None
        self.reader_documents: Documents = {}
        self.n_cuts = 0

    def teardown(self) -> None:
        if self.reader is not None:
            self.reader.close()
        shutil.rmtree(self.folder)

    def drawn(self, chosen: dict[Key, int]) -> list[Drawn]:
        return [document(key, version, self.dim) for key, version in chosen.items()]

    @initialize(chosen=some_documents, segment_entries=st.sampled_from([6, 40, 1 << 20]))
    def create(self, chosen: dict[Key, int], segment_entries: int) -> None:
        self.path.parent.mkdir()
        first = [*self.base, *self.drawn(chosen)]
        create(self.path, first, dim=self.dim, segment_entries=max(segment_entries, 4_096 if self.base else 0), keep_keys=self.keep_keys)
        self._committed(by_key(first))

    def _committed(self, documents: Documents) -> None:
        self.documents = documents
        with knnstore.open(self.path) as store:
            self.past[store.snapshot] = documents

    @rule(chosen=some_documents)
    def append(self, chosen: dict[Key, int]) -> None:
        """New documents come, those that are there are left out, changed ones are refused with all that came with them."""
        drawn = self.drawn(chosen)
        if any(item.key in self.documents and self.documents[item.key] is not item for item in drawn):
            with pytest.raises(ExistsError):
                knnstore.append_entries(self.path, batches(drawn))
            return
        knnstore.append_entries(self.path, batches(drawn))
        self._committed(self.documents | by_key(drawn))

    def _replace(self, path: Path, chosen: dict[Key, int]) -> Documents:
        knnstore.append_entries(path, batches(self.drawn(chosen)), replace=True)
        return self.documents | by_key(self.drawn(chosen))

    @rule(chosen=some_documents)
    def replace(self, chosen: dict[Key, int]) -> None:
        self._committed(self._replace(self.path, chosen))

    def _delete(self, path: Path, key: Key, *, purge: bool) -> Documents:
        knnstore.delete(path, key[1], domain=key[0], purge=purge)
        return {other: drawn for other, drawn in self.documents.items() if other != key}

    @rule(data=st.data(), purge=st.booleans())
    def delete(self, data: st.DataObject, purge: bool) -> None:
        key = data.draw(st.one_of(names, st.sampled_from(sorted(self.documents))) if self.documents else names)
        if key not in self.documents:
            with pytest.raises(NotFoundError):
                self._delete(self.path, key, purge=purge)
            return
        self._committed(self._delete(self.path, key, purge=purge))

    @rule(domain=st.sampled_from(DOMAINS), purge=st.booleans())
    def delete_domain(self, domain: str, purge: bool) -> None:
        if domain not in {of_domain for of_domain, _ in self.documents}:
            with pytest.raises(NotFoundError):
                knnstore.delete(self.path, domain=domain)
            return
        receipt = knnstore.delete(self.path, domain=domain, purge=purge)
        gone = {key: drawn for key, drawn in self.documents.items() if key[0] == domain}
        assert (receipt.documents, receipt.entries) == ({domain: len(gone)}, sum(len(drawn.values) for drawn in gone.values()))
        self._committed({key: drawn for key, drawn in self.documents.items() if key[0] != domain})

    @rule(odd=st.integers(0, 1), purge=st.booleans())
    def delete_where(self, odd: int, purge: bool) -> None:
        knnstore.delete(self.path, where={"odd": odd}, purge=purge)
        self._committed({key: drawn for key, drawn in self.documents.items() if drawn.metadata.get("odd") != odd})

    def _merge(self, path: Path, chosen: dict[str, int], on_conflict: str | None, *, link: bool) -> Documents:
        """Another store's `default` comes as domain `other`."""
        came = by_key(self.drawn({("default", name): version for name, version in chosen.items()}))
        source = path.parent / "other.knn"
        shutil.rmtree(source, ignore_errors=True)
        create(source, came.values(), dim=self.dim, keep_keys=self.keep_keys)
        renamed = {
            ("other", name): Drawn("other", name, d.keys, d.values, d.text, d.starts, d.ends, d.metadata) for (_, name), d in came.items()
        }
        knnstore.merge([source], path, on_conflict=on_conflict, link=link).close()
        return renamed | self.documents if on_conflict == "keep-first" else self.documents | renamed

    @rule(chosen=st.dictionaries(st.sampled_from("abcde"), versions, min_size=1, max_size=3), data=st.data(), link=st.booleans())
    def merge(self, chosen: dict[str, int], data: st.DataObject, link: bool) -> None:
        on_conflict = data.draw(st.sampled_from([None, "keep-first", "keep-last"]))
        held = {name: self.documents.get(("other", name)) for name in chosen}
        came = {name: document(("default", name), version, self.dim) for name, version in chosen.items()}
        if on_conflict is None and any(drawn is not None and drawn.held() != came[name].held() for name, drawn in held.items()):
            with pytest.raises(ExistsError):
                self._merge(self.path, chosen, on_conflict, link=link)
            return
        self._committed(self._merge(self.path, chosen, on_conflict, link=link))

    def _compact(self, path: Path) -> Documents:
        knnstore.compact(path).close()
        return self.documents

    @rule()
    def compact(self) -> None:
        self._committed(self._compact(self.path))

    @precondition(lambda self: self.keep_keys is not None)
    @rule()
    def retrain(self) -> None:
        knnstore.compact(self.path, retrain=True).close()
        self._committed(self.documents)

    @rule(name=st.sampled_from(TAGS), data=st.data())
    def tag(self, name: str, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.past)))
        if name in self.tags:
            with pytest.raises(ExistsError):
                knnstore.tag(self.path, name, number)
        knnstore.tag(self.path, name, number, move=True)
        self.tags[name] = number

    @precondition(lambda self: self.tags)
    @rule(data=st.data())
    def untag(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tags)))
        knnstore.untag(self.path, name)
        del self.tags[name]

    def _restore(self, path: Path, number: int) -> Documents:
        knnstore.restore(path, number)
        return self.past[number]

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self._committed(self._restore(self.path, data.draw(st.sampled_from(sorted(self.past)))))

    def _collect(self, path: Path, keep: int) -> Documents:
        knnstore.gc(path, keep=keep)
        return self.documents

    @rule(keep=st.integers(1, 3))
    def gc(self, keep: int) -> None:
        """The last, the tagged and what a reader has open stay; nothing else does, of any kind."""
        wanted = {*sorted(self.past)[-keep:], *self.tags.values()} | ({self.reader.snapshot} if self.reader is not None else set())
        self._collect(self.path, keep)
        assert list_manifests(StoreFolder(self.path)) == sorted(wanted)
        self.past = {number: documents for number, documents in self.past.items() if number in wanted}
        assert not list((self.path / "staging").iterdir())
        assert knnstore.verify(self.path, level="quick").orphans == ()

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        """A reader of any kept snapshot, which stays open through what comes."""
        if self.reader is not None:
            self.reader.close()
        number = data.draw(st.sampled_from(sorted(self.past)))
        by_name = [f"tag:{name}" for name, tagged in self.tags.items() if tagged == number]
        self.reader = knnstore.open(self.path, snapshot=data.draw(st.sampled_from([number, *by_name])))
        self.reader_documents = self.past[number]

    @rule(data=st.data(), seed=seeds)
    def crash(self, data: st.DataObject, seed: int) -> None:
        """The power is cut at any moment of a command, with any loss; the store goes on in another place, as before or as after."""
        act = data.draw(st.sampled_from(list(self._acts(data))))
        if self.reader is not None:
            self.reader.close()
            self.reader = None
        root, start = self.path.parent, tree_of(self.path.parent)
        with pytest.MonkeyPatch.context() as patch, Recording(root, closed=False).on(patch) as recording:
            after = act(self.path)
        system, rng = FileSystem(start), random.Random(seed)
        for call in recording.calls[: rng.randrange(len(recording.calls) + 1)]:
            system.apply(call)
        self.n_cuts += 1
        self.counts["power cuts"] += 1
        place = self.folder / str(self.n_cuts)
        Shown(place).show(system.random_state(rng))
        shutil.rmtree(root)
        self.path = place / self.path.name
        with knnstore.open(self.path) as store:
            number, held = store.snapshot, contents(store)
        kept = set(list_manifests(StoreFolder(self.path)))
        assert number in self.past or number == max(self.past) + 1
        documents = self.documents if number == max(self.past) else after
        self.past = {other: documents for other, documents in self.past.items() if other in kept}
        assert held == {key: drawn.held() for key, drawn in documents.items()}
        self.documents = self.past[number] = documents

    def _acts(self, data: st.DataObject) -> Iterator[Callable[[Path], Documents]]:
        yield functools.partial(self._replace, chosen=data.draw(some_documents))
        yield self._compact
        yield functools.partial(self._collect, keep=1)
        yield functools.partial(self._restore, number=data.draw(st.sampled_from(sorted(self.past))))
        yield functools.partial(self._merge, chosen={"a": 1}, on_conflict="keep-last", link=data.draw(st.booleans()))
        if self.documents:
            key = data.draw(st.sampled_from(sorted(self.documents)))
            yield functools.partial(self._delete, key=key, purge=data.draw(st.booleans()))

    @invariant()
    def holds_and_answers(self) -> None:
        """Documents, values, texts, contexts and searches are the dict's; those of an open reader are what they were."""
        if not self.past:
            return
        self.counts["steps"] += 1
        queries = draw("queries", len(self.past), n=2, dim=self.dim).keys
        with knnstore.open(self.path) as store:
            check_contents(store, self.documents)
            check_answers(store, self.documents, queries, k=7)
        if self.reader is not None:
            check_answers(self.reader, self.reader_documents, queries, k=7)
        assert {name: found.snapshot for name, found in knnstore.tags(self.path).items()} == self.tags


class Coded(Living):
    """A store of 4-bit codes, with kept keys."""

    dim = 8
    base = (draw("base", n=4_200, dim=8, text=False, domain="base"),)
    keep_keys = "f16"


SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))


def live(machine: type[Living], tell: Callable[[str], None], n_examples: int, n_steps: int, phases: Iterable[Phase]) -> None:
    machine.counts.clear()
    chosen = settings(SETTINGS, max_examples=n_examples, stateful_step_count=n_steps, phases=phases)
    run_state_machine_as_test(machine, settings=chosen)
    tell(f"lives: {machine.__name__}: {n_examples}, {machine.counts['steps']:,} steps, {machine.counts['power cuts']:,} power cuts")


@pytest.mark.parametrize(("machine", "n_examples", "n_steps"), [(Living, 20, 15), (Coded, 4, 10)])
def test_any_life_quick(tell, machine, n_examples, n_steps):
    """Few lives; one that fails is not made shorter, which takes minutes."""
    live(machine, tell, n_examples, n_steps, set(Phase) - {Phase.shrink})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("machine", "n_examples", "n_steps"), [(Living, 150, 30), (Coded, 40, 20)])
def test_any_life(tell, machine, n_examples, n_steps):
    live(machine, tell, n_examples, n_steps, Phase)

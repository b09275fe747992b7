"""create_from_entries: any size, documents cut anywhere, what comes back for a hit, and what is refused."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import VOCABULARY, checkpoint, create_store, draw_keys, draw_values

import knnstore
from knnstore import EntryDocument, IndexOptions
from knnstore.errors import ExistsError, InvalidArgumentError, NotFoundError
from knnstore.storage.jobs import JOB_FILE

DIM = 8


@pytest.mark.parametrize(
    ("n", "codec", "nlist"), [(1, "raw", 1), (20, "raw", 1), (4_095, "raw", 1), (4_096, "pq4", 1), (33_000, "pq4", 256)]
)
def test_any_number_of_entries_just_works(tmp_path, n, codec, nlist):
    """Raw keys as long as a quantizer cannot be trained, one flat list up to 32,767; every entry finds itself with its value."""
    keys, values = draw_keys(n, n, DIM), draw_values(n, n)
    manifest = create_store(tmp_path / "s.knn", keys, values)
    assert [
        (space.codec.name.lower(), segment.content.nlist) for space, segment in zip(manifest.spaces, manifest.segments, strict=True)
    ] == [(codec, nlist)]
    with knnstore.open(tmp_path / "s.knn") as store:
        assert (len(store), store.dim, store.domains) == (n, DIM, ["default"])
        hits = store.search(keys[:200], k=20)
        n_asked = min(n, 200)
        if codec == "raw":
            assert np.array_equal(hits.rows[:, 0], np.arange(n_asked))
            assert not hits.distances[:, 0].any()
        found = (hits.rows == np.arange(n_asked)[:, None]).any(axis=1)
        assert found.mean() > 0.9
        real = hits.rows >= 0
        assert np.array_equal(hits.values[real], values[hits.rows[real]])
        assert (hits.n_found == min(n, 20)).all()


def test_pq8_is_trained_from_10_240_entries_on(tmp_path):
    for n, codec in ((10_239, "RAW"), (10_240, "PQ8")):
        manifest = create_store(tmp_path / f"{n}.knn", draw_keys(n, n, 4), draw_values(n, n), codec="pq8")
        assert [space.codec.name for space in manifest.spaces] == [codec]


LETTERS = ["a", "b", "é", "中", "👩‍👩‍👧", " ", "\n"]


@dataclasses.dataclass
class Whole:
    """A document as it was before it was cut into batches: the oracle."""

    id: str
    domain: str
    keys: np.ndarray
    values: np.ndarray
    text: str | None
    starts: np.ndarray
    ends: np.ndarray
    metadata: dict


@st.composite
def corpora(draw):
    """A few documents (ids repeat across domains), with text or without, and where batches are cut."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    wholes = []
    for number in range(draw(st.integers(1, 5))):
        n = int(rng.integers(1, 30))
        text, starts, ends = "", [], []
        while len(starts) < n:
            piece = str(rng.choice(LETTERS)) * int(rng.integers(1, 4))
            times = 2 if len(piece) == 1 and rng.integers(3) == 0 and len(starts) + 2 <= n else 1  # two tokens of one character
            starts += [len(text)] * times
            ends += [len(text) + len(piece)] * times
            text += piece + "-" * int(rng.integers(0, 2))
        bare = draw(st.booleans())
        wholes.append(
            Whole(
                id=f"doc {number // 2}",
                domain=("law", "med")[number % 2],
                keys=rng.standard_normal((n, DIM)).astype(np.float32),
                values=rng.integers(0, VOCABULARY, n),
                text=None if bare else text,
                starts=np.array(starts),
                ends=np.array(ends),
                metadata={"number": number} if number % 2 else {},
            )
        )
    total = sum(len(whole.values) for whole in wholes)
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=5))
    return wholes, sorted(cuts), draw(st.integers(3, 40)), draw(st.booleans())


def batches_of(wholes, cuts):
    """The documents in batches: a cut inside a document makes two stretches of it."""
    total = sum(len(whole.values) for whole in wholes)
    firsts = np.cumsum([0] + [len(whole.values) for whole in wholes])
    for begin, end in itertools.pairwise([0, *[cut for cut in cuts if cut < total], total]):
        documents, keys, values = [], [], []
        for whole, first in zip(wholes, firsts, strict=False):
            a, b = max(begin - first, 0), min(end - first, len(whole.values))
            if a >= b:
                continue
            fields = {}
            if whole.text is not None:
                # Text up to the next stretch; a character shared by tokens on both sides goes with the first.
                low = 0 if a == 0 else max(whole.starts[a], whole.ends[a - 1])
                high = len(whole.text) if b == len(whole.values) else max(whole.starts[b], whole.ends[b - 1])
                fields = {"text": whole.text[low:high], "starts": whole.starts[a:b], "ends": whole.ends[a:b]}
            documents.append(
                EntryDocument(id=whole.id, domain=whole.domain, n_entries=b - a, source=f"/{whole.id}", metadata=whole.metadata, **fields)
            )
            keys.append(whole.keys[a:b])
            values.append(whole.values[a:b])
        yield np.concatenate(keys), np.concatenate(values), documents


def create(path, batches, *, options=None, vocab_size=VOCABULARY, **arguments):
    return knnstore.create_from_entries(
        path, batches, checkpoint=checkpoint(vocab_size), dim=DIM, vocab_size=vocab_size, options=options, **arguments
    )


@given(corpus=corpora())
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
def test_hits_come_with_the_context_they_have_in_their_document(tmp_path_factory, corpus):
    """Documents cut over batches and segments: ids, tokens around, text around, offsets and indices are those of the whole document."""
    wholes, cuts, segment_entries, trained = corpus
    path = tmp_path_factory.mktemp("entries") / "s.knn"
    arguments = {"training_keys": draw_keys(0, 10, DIM), "expected_entries": 100} if trained else {}
    manifest = create(path, batches_of(wholes, cuts), options=IndexOptions(segment_entries=segment_entries), **arguments)
    assert manifest.documents == {domain: sum(whole.domain == domain for whole in wholes) for domain in {whole.domain for whole in wholes}}
    assert all(segment.content.entries <= segment_entries for segment in manifest.segments)
    by_name = {(whole.domain, whole.id): whole for whole in wholes}
    with knnstore.open(path) as store:
        listed = [(document.domain, document.id, document.entries, document.source, document.metadata) for document in store.documents()]
        assert listed == [(whole.domain, whole.id, len(whole.values), f"/{whole.id}", whole.metadata) for whole in wholes]
        for record in itertools.chain.from_iterable(segment.contexts.documents() for segment in store.segments):
            contents = [
                b"tokens\0" + np.asarray(whole.values, "<u4").tobytes() if whole.text is None else whole.text.encode()
                for whole in wholes
                if whole.id == record.id
            ]
            hashes = {hashlib.sha256(content).hexdigest() for content in contents}
            assert record.content_hash in hashes if record.last else record.content_hash is None
        for whole in wholes:
            hits = store.search(whole.keys, k=1)
            assert not hits.distances.any()
            assert hits.values[:, 0].tolist() == whole.values.tolist()
            for index in range(len(whole.values)):
                context = hits.context(index, 0, left=4, right=3)
                assert by_name[context.domain, context.document] is whole
                assert_context(context, whole, index, store.segments[hits.segments[index, 0]], int(hits.rows[index, 0]))


def assert_context(context, whole, index, segment, row):
    """Against the whole document; what is shown stays within the part that is in the hit's segment."""
    (part,) = [d for d in segment.contexts.documents() if d.first_row <= row < d.first_row + d.n_entries]
    low, high = max(index - 4, part.first_token), min(index + 4, part.first_token + part.n_entries)
    assert (context.token_index, context.token_id, context.source) == (index, whole.values[index], f"/{whole.id}")
    assert context.left_ids == tuple(whole.values[low:index])
    assert context.right_ids == tuple(whole.values[index + 1 : high])
    assert context.metadata == whole.metadata
    if whole.text is None:
        assert (context.left, context.token, context.right, context.char_start, context.char_end) == (None,) * 5
        return
    start, end = whole.starts[index], whole.ends[index]
    assert (context.char_start, context.char_end) == (start, end)
    alone = part.part == 0 and part.last
    begin = 0 if low == part.first_token and part.part == 0 else whole.starts[low]
    expected = (whole.text[begin:start], whole.text[start:end], whole.text[end : max(whole.ends[high - 1], end)])
    if alone:
        assert (context.left, context.token, context.right) == expected
    else:  # a character of several tokens that a boundary cuts may be with one side only
        assert expected[0].endswith(context.left)
        assert context.token in (expected[1], "")
        assert expected[2].startswith(context.right)


def test_entries_without_end_come_from_a_generator(tmp_path):
    """Batches are taken one at a time; empty ones are no harm."""
    taken = []

    def batches():
        for number in range(5):
            taken.append(number)
            n = 0 if number == 2 else 10
            documents = [EntryDocument(id=str(number), n_entries=10)] if n else []
            yield draw_keys(number, n, DIM).tolist(), draw_values(number, n).tolist() if n else np.zeros(0, int), documents

    create(tmp_path / "s.knn", batches())
    assert taken == [0, 1, 2, 3, 4]
    assert len(knnstore.open(tmp_path / "s.knn")) == 40


@pytest.mark.parametrize("keep", [None, "f32"])
def test_training_keys_take_the_place_of_a_spool(tmp_path, keep):
    """With keys to train on, entries are encoded as they come: the same kind of store, and no spool on the way."""
    keys, values = draw_keys(1, 6_000, DIM), draw_values(1, 6_000)
    documents = [EntryDocument(id=str(i), n_entries=500) for i in range(12)]
    path = tmp_path / "s.knn"
    create_store(
        path, keys, values, documents, batch=1, training_keys=keys[::1], expected_entries=6_000, segment_entries=2_500, keep_keys=keep
    )
    with knnstore.open(path) as store:
        assert [segment.content.entries for segment in store.segments] == [2_500, 2_500, 1_000]
        hits = store.search(keys[::50], k=50)
        rows = hits.segments.astype(int) * 2_500 + hits.rows
        assert (rows == np.arange(0, 6_000, 50)[:, None]).any(axis=1).mean() > 0.9
        assert np.array_equal(hits.values, values[rows])
        if keep:
            exact = store.search(keys[::50], k=1, exact=True)
            assert np.array_equal(exact.segments[:, 0] * 2_500 + exact.rows[:, 0], np.arange(0, 6_000, 50))
    files = [file.name for file in path.rglob("*") if file.is_file()]
    assert ("keys.bin" in files) == (keep is not None)
    assert not [name for name in files if name.endswith(".tmp") or name in ("journal", "keys.spool")]


ONE = [EntryDocument(id="a", n_entries=3)]
GOOD = np.zeros((3, DIM), np.float32)


def with_text(**fields):
    return [EntryDocument(id="a", n_entries=3, **{"text": "abc", "starts": [0, 1, 2], "ends": [1, 2, 3], **fields})]


BAD = {
    "nothing": ([], "no entries were given"),
    "empty batches": ([(np.zeros((0, DIM)), np.zeros(0, int), [])], "no entries were given"),
    "nan": ([(GOOD * np.nan, [1, 2, 3], ONE)], "not finite"),
    "overflow": ([(np.full((3, DIM), 1e300), [1, 2, 3], ONE)], "not finite"),
    "dimension": ([(np.zeros((3, DIM + 1)), [1, 2, 3], ONE)], r"the datastore's keys are \(n, 8\)"),
    "strings": ([([["x"] * DIM] * 3, [1, 2, 3], ONE)], "the datastore's keys are"),
    "ragged": ([([[1.0], [1.0, 2.0]], [1, 2], ONE)], "keys are not an array"),
    "values": ([(GOOD, [1, 2], ONE)], "3 integers are expected"),
    "float values": ([(GOOD, [1.0, 2.0, 3.0], ONE)], "3 integers are expected"),
    "negative value": ([(GOOD, [1, -2, 3], ONE)], "token ids -2 to 3: the vocabulary has 1000"),
    "large value": ([(GOOD, [1, 1_000, 3], ONE)], "token ids 1 to 1000: the vocabulary has 1000"),
    "too few documents": ([(GOOD, [1, 2, 3], [])], "the documents of a batch have 0 entries, it has 3"),
    "too many documents": ([(GOOD, [1, 2, 3], [*ONE, *ONE])], "the documents of a batch have 6 entries, it has 3"),
    "empty document": ([(GOOD, [1, 2, 3], [*ONE, EntryDocument(id="b", n_entries=0)])], "leave empty documents out"),
    "twice": ([(GOOD, [1, 2, 3], [EntryDocument(id=i, n_entries=1) for i in "aba"])], "document 'a' of domain 'default' comes twice"),
    "no offsets": ([(GOOD, [1, 2, 3], with_text(starts=None))], "document 'a': "),
    "offsets of another shape": ([(GOOD, [1, 2, 3], with_text(starts=[0, 1]))], r"starts and ends of shape \(3,\)"),
    "offsets that fall": ([(GOOD, [1, 2, 3], with_text(starts=[1, 0, 2]))], "offsets must rise"),
    "end before start": ([(GOOD, [1, 2, 3], with_text(ends=[0, 0, 3]))], "offsets must rise"),
    "offsets beyond the text": ([(GOOD, [1, 2, 3], with_text(ends=[1, 2, 4]))], "from 0 to the 3 characters"),
    "negative offsets": ([(GOOD, [1, 2, 3], with_text(starts=[-1, 1, 2]))], "from 0"),
    "lone surrogate": ([(GOOD, [1, 2, 3], with_text(text="a\ud800b"))], "its text or offsets cannot be taken"),
    "text now and then": ([(GOOD, [1, 2, 3], with_text()), (GOOD, [1, 2, 3], ONE)], "text comes with all of its entries or with none"),
    "metadata": ([(GOOD, [1, 2, 3], [EntryDocument(id="a", n_entries=3, metadata={"x": {1}})])], "its metadata is not JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_entries_are_refused_by_name_and_leave_no_store(tmp_path, what):
    """One clear error, nothing that opens, no job behind; the path can be used at once, with whatever arguments."""
    batches, message = BAD[what]
    path = tmp_path / "s.knn"
    with pytest.raises(InvalidArgumentError, match=message):
        create(path, batches)
    with pytest.raises(NotFoundError):
        knnstore.open(path)
    assert not [file for file in path.rglob("*") if file.is_file() and file.name != "KNNSTORE"]
    create(path, [(GOOD, [1, 2, 3], ONE)], options=IndexOptions(codec="pq8"))
    assert len(knnstore.open(path)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim 0"),
        ({"dim": 70_000}, "dim 70000"),
        ({"vocab_size": 5}, "the checkpoint has 1000"),
        ({"training_keys": GOOD}, "give both or none"),
        ({"expected_entries": 5}, "give both or none"),
        ({"training_keys": GOOD, "expected_entries": 10_000}, "3 keys; pq4 needs 4096"),
        ({"training_keys": GOOD + np.inf, "expected_entries": 10}, "not finite"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_taken(tmp_path, arguments, message):
    def batches():
        raise AssertionError("taken")
        yield

    arguments = {"dim": DIM, "vocab_size": VOCABULARY, **arguments}
    with pytest.raises(InvalidArgumentError, match=message):
        knnstore.create_from_entries(tmp_path / "s.knn", batches(), checkpoint=checkpoint(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codec": "raw"}, "codec"), ({"rotation": "x"}, "rotation"), ({"keep_keys": "f8"}, "keep_keys"), ({"segment_entries": 0}, "segment")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        IndexOptions(**options)


def test_a_second_creation_finds_the_first(tmp_path):
    """A datastore, or anything else that is there, is not touched."""
    path = tmp_path / "s.knn"
    create(path, [(GOOD, [1, 2, 3], ONE)])
    before = (path / "CURRENT").read_bytes()
    with pytest.raises(ExistsError, match="a datastore exists already"):
        create(path, [(GOOD, [1, 2, 3], ONE)])
    assert (path / "CURRENT").read_bytes() == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for other in ("folder", "file"):
        with pytest.raises(ExistsError, match="not a datastore"):
            create(tmp_path / other, [(GOOD, [1, 2, 3], ONE)])
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty", [(GOOD, [1, 2, 3], ONE)])
    assert len(knnstore.open(tmp_path / "empty")) == 3


class CallersError(Exception):
    """What a test raises in the middle of a creation."""


def test_an_unfinished_creation_is_begun_anew_or_named(tmp_path):
    """After an error of the caller's own: with the same arguments it works; with others both are named."""

    def batches():
        yield GOOD, [1, 2, 3], ONE
        raise CallersError

    path = tmp_path / "s.knn"
    with pytest.raises(CallersError):
        create(path, batches())
    assert len(list(path.rglob(JOB_FILE))) == 1
    with pytest.raises(NotFoundError, match="its creation was not finished"):
        knnstore.open(path)
    with pytest.raises(ExistsError, match="begun with codec 'pq4'; this command has codec 'pq8'"):
        create(path, [(GOOD, [1, 2, 3], ONE)], options=IndexOptions(codec="pq8"))
    create(path, [(GOOD + 1, [4, 5, 6], ONE)])
    with knnstore.open(path) as store:
        assert len(store) == 3
        assert store.search(GOOD[:1], k=3).values.tolist() == [[4, 5, 6]]
    assert sorted(folder.name for folder in (path / "segments").iterdir()) == [s.content.uuid for s in store.manifest.segments]
    assert not list((path / "staging").iterdir())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("trained", [True, False])
def test_files_do_not_stay_open(tmp_path, trained):
    """Neither while hundreds of segments are made, nor after an error."""
    most = 0
    before = open_files()

    def batches(n, broken=False):
        nonlocal most
        for number in range(n):
            most = max(most, open_files())
            yield draw_keys(number, 4, DIM), draw_values(number, 4), [EntryDocument(id=str(number), n_entries=4)]
        if broken:
            raise CallersError

    arguments = {"training_keys": GOOD, "expected_entries": 300} if trained else {}
    options = IndexOptions(segment_entries=6)
    create(tmp_path / "s.knn", batches(75), options=options, **arguments)
    assert most - before < 20
    with pytest.raises(CallersError):
        create(tmp_path / "t.knn", batches(10, broken=True), options=options, **arguments)
    assert open_files() <= before + 1


def test_a_vocabulary_beyond_sixteen_bits(tmp_path):
    """Tokens above 65,535 come back as they are, from a search and in contexts."""
    values = np.array([0, 65_535, 65_536, 150_000, (1 << 24) - 1])
    keys = draw_keys(5, 5, DIM)
    documents = [EntryDocument(id="a", n_entries=5)]
    create(tmp_path / "s.knn", [(keys, values, documents)], vocab_size=1 << 24)
    with knnstore.open(tmp_path / "s.knn") as store:
        hits = store.search(keys, k=1)
        assert hits.values[:, 0].tolist() == values.tolist()
        assert hits.context(2, 0).left_ids == (0, 65_535)
        assert hits.context(2, 0).right_ids == (150_000, (1 << 24) - 1)


def test_info_counts_what_is_there(tmp_path):
    """Sizes are those of the files; entries and documents those of each domain."""
    documents = [EntryDocument(id=str(i), n_entries=100, domain=("law", "med")[i % 2]) for i in range(51)]
    path = tmp_path / "s.knn"
    create_store(path, draw_keys(6, 5_100, DIM), draw_values(6, 5_100), documents, keep_keys="f16")
    with knnstore.open(path) as store:
        info = store.info()
    assert (info["entries"], info["documents"], info["segments"]) == (5_100, 51, 1)
    assert info["domains"] == {"law": {"entries": 2_600, "documents": 26}, "med": {"entries": 2_500, "documents": 25}}
    files = {"lists": ("lists.*",), "values": ("values.bin",), "contexts": ("contexts.lmdb", "ids.bin"), "keys": ("keys.bin",)}
    size = {part: sum(file.stat().st_size for name in names for file in path.rglob(name)) for part, names in files.items()}
    assert [info["bytes"][part] for part in size] == list(size.values())
    spaces = sum(file.stat().st_size for file in (path / "spaces").rglob("*") if file.is_file())
    assert info["bytes"]["total"] == sum(size.values()) + spaces

"""`ids.bin`: a document is found by its id, and those that are not there are not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Document, build_segment, draw_keys, draw_values, flip

from knnstore.errors import DamageError
from knnstore.format import HEADER_SIZE
from knnstore.storage import contexts_writer, segment
from knnstore.storage.contexts import id_hash
from knnstore.storage.segment import Segment
from knnstore.storage.space import raw_space

NAMES = ["a", "b", "a/b.txt", "naïve 中", "\udce9 is no UTF-8", "", *(f"#{number}" for number in range(8))]


def segment_of(parent: Path, names: list[str]) -> Segment:
    """A segment of documents of these ids, one to three entries each."""
    sizes = [1 + number % 3 for number in range(len(names))]
    documents = [Document(name, size) for name, size in zip(names, sizes, strict=True)]
    n = sum(sizes)
    return build_segment(parent, draw_keys(0, n, 2), draw_values(0, n), space=raw_space(2), documents=documents)


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=60),
    bits=st.sampled_from([0, 1, 2, 64]),
    at_once=st.integers(0, 5),
    same=st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_documents_are_found_by_id(tmp_path_factory, names, bits, at_once, same):
    """All records of an id and no others, in row order; also where many ids have one hash, and where few rows are read at once."""
    mask = (1 << bits) - 1
    with pytest.MonkeyPatch.context() as patch:
        for module in (contexts_writer, segment):
            patch.setattr(module, "id_hash", lambda name: id_hash(name) & mask)
        patch.setattr(segment, "_IDS_AT_ONCE", at_once)
        patch.setattr(segment, "_SAME_HASH", same)
        made = segment_of(tmp_path_factory.mktemp("ids"), names)
        rows = np.cumsum([0] + [1 + number % 3 for number in range(len(names))])
        for name in {*NAMES, "none such"}:
            expected = [int(rows[number]) for number, other in enumerate(names) if other == name]
            alike = [int(rows[number]) for number, other in enumerate(names) if id_hash(other) & mask == id_hash(name) & mask]
            assert [record.first_row for record in made.find(name)] == expected
            assert made.find_rows(name).tolist() == alike
        made.close()


def test_looking_for_an_id_touches_few_blocks(tmp_path):
    """Of 6 blocks of 64 KiB a search looks at 3; contexts are not opened for an id that is not there; damage elsewhere is not met."""
    names = [f"document {number}" for number in range(24_000)]
    made = segment_of(tmp_path, names)
    assert made.ids._seen.tolist() == [False] * 6
    assert made.find_rows("none such").tolist() == []
    assert 1 <= made.ids._seen.sum() <= 3
    assert made._contexts is None
    (untouched, *_) = np.flatnonzero(~made.ids._seen).tolist()
    flip(made.folder / "ids.bin", HEADER_SIZE + untouched * 65_536)
    assert made.find("none such") == []
    lowest, highest = min(names, key=id_hash), max(names, key=id_hash)
    said = []
    for name in (lowest, highest, *names[:200]):
        try:
            assert [record.id for record in made.find(name)] == [name]
        except DamageError as error:
            said.append(str(error))
    assert 0 < len(said) < 100
    assert all("ids.bin" in message for message in said)

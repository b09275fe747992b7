"""From corpus arguments to documents: ids, order, decoding, and a named outcome for each thing that can be wrong."""

import gzip
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import CorpusError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.lm import decoding
from knnstore.lm.corpus import ContentHash, Document, SkippedDocument, list_inputs, read_documents

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
# Characters of one to four bytes, of several code points, line breaks that Python would join or split.
TEXT = "A café\r\nnaïve 漢字 👩‍👩‍👧 e\u0301 \u2028\x0b\x85 end\n\n"


def texts(corpora: object, **options: object) -> dict[str, str]:
    """id -> text of every document; a test's ids are distinct."""
    documents = list(read_documents(list_inputs(corpora, **options)))  # type: ignore[arg-type]
    found = {document.id: "".join(document.chunks) for document in documents}
    assert len(found) == len(documents)
    return found


def documents_of(path: Path) -> list[Document]:
    return list(read_documents(list_inputs(path)))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- which files, in which order, under which names


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Ids are paths inside the folder with their suffixes; sources are paths as the user gave them."""
    names = ["b.txt", "a/z.md", "a.txt", "a/b/c.rst.gz", "B.TXT", "a/x.txt.zst", "a-1.txt"]
    for name in names:
        write(tmp_path / name, PACK.get(Path(name).suffix, bytes)(name.encode()))
    inputs = list_inputs(f"{tmp_path}/")
    assert [file.id for file in inputs] == sorted(names)
    assert [file.source for file in inputs] == [f"{tmp_path}/{name}" for name in sorted(names)]
    assert texts(tmp_path) == {name: name for name in names}
    assert inputs.files[0].size == len("B.TXT")
    assert inputs.files[0].mtime_ns == (tmp_path / "B.TXT").stat().st_mtime_ns


def test_sources_keep_the_form_the_user_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is not made absolute or normalised."""
    write(tmp_path / "c" / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    inputs = list_inputs(["./c", "c/", "c/../c/a.txt", "."])
    assert [file.source for file in inputs] == ["./c/a.txt", "c/a.txt", "c/../c/a.txt", "./c/a.txt"]
    assert [file.id for file in inputs] == ["a.txt", "a.txt", "a.txt", "c/a.txt"]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    """Other suffixes, hidden files and folders, links that lead back up or nowhere: each with its reason."""
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "deep" / "b.txt", "b")
    write(tmp_path / "page.html", "no")
    write(tmp_path / "packed.bin.gz", "no")
    write(tmp_path / ".git" / "c.txt", "no")
    write(tmp_path / ".hidden.txt", "no")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "missing.txt")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    inputs = list_inputs(tmp_path)
    assert [file.id for file in inputs] == ["a.txt", "deep/b.txt", "link.txt"]
    assert {skipped.id: skipped.reason for skipped in inputs.ignored} == {
        ".git": "hidden",
        ".hidden.txt": "hidden",
        "deep/up": "loop",
        "nowhere.txt": "broken link",
        "packed.bin.gz": "suffix",
        "page.html": "suffix",
        "pipe.txt": "not a regular file",
        "self.txt": "broken link",
    }
    assert SkippedDocument("page.html", f"{tmp_path}/page.html", "suffix") in inputs.ignored


def test_two_links_to_one_folder_are_both_read(tmp_path: Path) -> None:
    """Only a link to a folder above is a loop."""
    write(tmp_path / "real" / "a.txt", "a")
    (tmp_path / "again").symlink_to(tmp_path / "real")
    assert set(texts(tmp_path)) == {"again/a.txt", "real/a.txt"}


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        ("missing", NotFoundError, "no such file"),
        ("a.txt/b.txt", NotFoundError, "no such file"),
        ("page.html", CorpusError, r"\.html.*\.txt \.md \.rst \.jsonl.*\.gz or \.zst"),
        ("noext", CorpusError, r"\(none\)"),
        ("empty", CorpusError, "no text in this folder"),
        ("pipe.txt", CorpusError, "neither a file nor a folder"),
    ],
)
def test_an_argument_that_cannot_be_taken_is_named(tmp_path: Path, argument: str, error: type[Exception], words: str) -> None:
    """Each wrong argument has its own error, with the path in it."""
    for name in ("a.txt", "page.html", "noext", "empty/x.html"):
        write(tmp_path / name, "x")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(error, match=words) as caught:
        list_inputs([tmp_path / "a.txt", tmp_path / argument])
    assert argument in str(caught.value)


def test_no_corpus_is_a_usage_error() -> None:
    """Nothing given is not the same as nothing found."""
    with pytest.raises(InvalidArgumentError, match="No corpus"):
        list_inputs([])


def test_a_file_without_permission_is_refused_while_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the hours of work, not after them."""
    write(tmp_path / "a.txt", "a")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may read everything
    with pytest.raises(StorageError, match=r"a\.txt: no permission"):
        list_inputs(tmp_path)


def test_a_read_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the operating system is a StorageError; a file that is gone is a NotFoundError."""
    (document,) = documents_of(write(tmp_path / "a.txt", "a"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(StorageError, match=r"a\.txt: cannot be read: Input/output error"):
            list(document.chunks)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(NotFoundError, match=r"a\.txt: the file is gone"):
        list(document.chunks)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """It could not be a document's id."""
    try:
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")), "a")
    except OSError:
        pytest.skip("this file system refuses such names itself")
    with pytest.raises(CorpusError, match="not UTF-8"):
        list_inputs(tmp_path)


# --- standard input


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("letters", TEXT.encode(), {"letters": TEXT}),
        ("x.txt.gz", gzip.compress(b"abc"), {"x.txt.gz": "abc"}),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b", "id": 7}', {"x.jsonl#1": "a", "7": "b"}),
    ],
    ids=["text", "gzip", "jsonl"],
)
def test_standard_input_is_what_its_name_says(name: str, content: bytes, expected: dict[str, str], seekable: bool) -> None:
    """The name is id and source; it can be read again even if it is a pipe."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return seekable

    inputs = list_inputs("-", stdin_name=name, stdin=Pipe(content))
    assert [(file.id, file.source, file.size) for file in inputs] == [(name, name, len(content))]
    for _ in range(2):
        assert {document.id: "".join(document.chunks) for document in read_documents(inputs)} == expected


def test_standard_input_needs_a_name_and_comes_once() -> None:
    """A document needs an id, and a stream has none."""
    with pytest.raises(InvalidArgumentError, match="--name"):
        list_inputs(["-"], stdin=io.BytesIO())
    with pytest.raises(InvalidArgumentError, match="twice"):
        list_inputs(["-", "-"], stdin_name="x", stdin=io.BytesIO())


# --- bytes to text


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 1 << 20])
def test_text_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: str, block_bytes: int) -> None:
    """Plain or compressed, however the reads fall; no newline is translated."""
    monkeypatch.setattr(decoding, "BLOCK_BYTES", block_bytes)
    assert texts(write(tmp_path / f"a.md{pack}", PACK[pack](TEXT.encode()))) == {f"a.md{pack}": TEXT}


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 200), max_size=6), bom=st.booleans())
def test_decoding_does_not_depend_on_blocks(text: str, cuts: list[int], bom: bool) -> None:
    """Blocks cut anywhere give what decoding at once gives; one byte order mark goes, a second is text."""
    raw = (decoding.BOM if bom else "").encode() + text.encode()
    expected = text if bom else text.removeprefix(decoding.BOM)
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    chunks = list(decoding.decode_text([raw[a:b] for a, b in pairwise(edges)], "x"))
    assert "".join(chunks) == expected
    assert "" not in chunks


@given(
    before=st.text(max_size=20),
    cut=st.integers(0, 100),
    bad=st.sampled_from([b"\xff", b"\xe9 ", b"\xed\xa0\x80", b"\xc0\x80", b"\xf0\x9f"]),
)
def test_the_first_byte_that_is_not_utf8_is_named(before: str, cut: int, bad: bytes) -> None:
    """Source, byte and offset are in the message, however the reads fall, at the end of the text too."""
    raw = before.encode() + bad
    with pytest.raises(CorpusError) as caught:
        list(decoding.decode_text([raw[:cut], raw[cut:]], "old.txt"))
    assert f"old.txt: not UTF-8: byte 0x{bad[0]:02X} at offset {len(before.encode()):,} (" in str(caught.value)
    assert "iconv" in str(caught.value)


def test_latin1_and_utf16_files_are_refused_with_advice(tmp_path: Path) -> None:
    """The advice names the encoding where the file tells it."""
    with pytest.raises(CorpusError, match=r"l\.txt: not UTF-8: byte 0xE9 at offset 3 .*iconv -f LATIN1"):
        texts(write(tmp_path / "l.txt", "café noir".encode("latin-1")))
    with pytest.raises(CorpusError, match=r"u\.txt: not UTF-8: byte 0xFF at offset 0 .*iconv -f UTF-16"):
        texts(write(tmp_path / "u.txt", "café".encode("utf-16")))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_in_several_members_are_one_text(tmp_path: Path, suffix: str) -> None:
    """`cat a.gz b.gz > c.gz` is a valid file, and so with zstd, whose skippable frames hold no text."""
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" if suffix == ".zst" else b""
    packed = PACK[suffix](b"one ") + skippable + PACK[suffix](b"") + PACK[suffix](b"two") + skippable
    assert texts(write(tmp_path / f"a.txt{suffix}", packed)) == {f"a.txt{suffix}": "one two"}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_anywhere_is_damaged(tmp_path: Path, suffix: str) -> None:
    """A cut file is never taken for a shorter text."""
    packed = PACK[suffix](os.urandom(100).hex().encode())
    for length in range(1, len(packed)):
        with pytest.raises(CorpusError, match=rf"a\.txt\{suffix}: the compressed data is damaged"):
            texts(write(tmp_path / f"a.txt{suffix}", packed[:length]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_something_else_is_damaged(tmp_path: Path, suffix: str) -> None:
    """The suffix is believed; what is not such a file is named."""
    with pytest.raises(CorpusError, match="the compressed data is damaged"):
        texts(write(tmp_path / f"a.txt{suffix}", "plain text, and long enough for any header"))


def test_blocks_of_a_highly_compressed_file_are_bounded(tmp_path: Path) -> None:
    """A kilobyte that unfolds to 200 MB is not unfolded at once."""
    for pack in (".gz", ".zst"):
        write(tmp_path / f"a.txt{pack}", PACK[pack](bytes(200_000_000)))
        (file,) = list_inputs(tmp_path / f"a.txt{pack}")
        sizes = [len(block) for block in decoding.read_blocks(file)]
        assert sum(sizes) == 200_000_000
        assert max(sizes) <= 34 << 20


# --- JSONL


@pytest.mark.parametrize("pack", PACK)
def test_a_jsonl_file_is_one_document_per_line(tmp_path: Path, pack: str) -> None:
    """Ids are the lines' own, else path#line counting every line; other fields are metadata; blank lines are skipped."""
    lines = [
        decoding.BOM + json.dumps({"text": TEXT, "year": 1843, "tags": ["a", {"b": None}]}),
        "",
        json.dumps({"id": "own", "text": "second"}, ensure_ascii=False) + "\r",
        "  \t ",
        json.dumps({"id": 12, "text": "\u2028 a\0b 😀"}, ensure_ascii=False),
        json.dumps({"id": None, "text": ""}),
    ]
    path = write(tmp_path / "in" / f"d.jsonl{pack}", PACK[pack]("\n".join(lines).encode()))
    documents = list(read_documents(list_inputs(tmp_path)))
    at = f"in/d.jsonl{pack}"
    assert [(d.id, "".join(d.chunks), d.metadata) for d in documents] == [
        (f"{at}#1", TEXT, {"year": 1843, "tags": ["a", {"b": None}]}),
        ("own", "second", {}),
        ("12", "\u2028 a\0b 😀", {}),
        (f"{at}#6", "", {}),
    ]
    assert [d.source for d in documents] == [f"{path}#{n}" for n in (1, 3, 5, 6)]


@given(
    records=st.lists(st.fixed_dictionaries({"text": st.text(max_size=30)}, optional={"m": st.text(max_size=5)}), max_size=5),
    ascii_only=st.booleans(),
    block_bytes=st.integers(1, 9),
)
def test_jsonl_does_not_depend_on_reads(records: list[dict[str, str]], ascii_only: bool, block_bytes: int) -> None:
    """Any texts, escaped or not, come back whole however the reads fall."""
    content = "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "BLOCK_BYTES", block_bytes)
        documents = list(read_documents(list_inputs("-", stdin_name="x.jsonl", stdin=io.BytesIO(content))))
    assert [{"text": "".join(d.chunks), **d.metadata} for d in documents] == records


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', r"not JSON: .*Each line must be one JSON object"),
        ("[1]", "a JSON list where an object is needed"),
        ('"text"', "a JSON str where an object"),
        ('{"body": "a", "n": 1}', r"no field `text` \(it has: body, n\)"),
        ("{}", r"no field `text` \(it has: none\)"),
        ('{"text": 3}', r"\.text: 3 where a string"),
        ('{"text": null}', r"\.text: null where a string"),
        ('{"text": "a", "id": 1.5}', r"\.id: 1\.5 where a string or an integer"),
        ('{"text": "a", "id": true}', r"\.id: true where a string"),
        ('{"text": "a", "id": ""}', r'\.id: "" where a string'),
        ('{"text": "a", "id": {"long": "' + "x" * 100 + '"}}', r"x…"),
        (r'{"text": "a\ud800b"}', r"lone surrogate '\\ud800'"),
        (r'{"text": "a", "m": [{"\uDC00": 1}]}', r"lone surrogate '\\udc00'"),
        ('{"text": "a", "m": NaN}', "NaN is no JSON value"),
        pytest.param('{"text": "a", "m": ' + "[" * 100_000 + "}", "not JSON", id="deep"),
        pytest.param('{"text": "a", "m": ' + "9" * 10_000 + "}", "not JSON", id="long"),
    ],
)
def test_a_line_that_cannot_be_taken_is_named(tmp_path: Path, line: str, words: str) -> None:
    """Path and line are in the message; the line before was fine."""
    path = write(tmp_path / "d.jsonl", '{"text": "fine"}\n' + line + "\n")
    documents = read_documents(list_inputs(path))
    assert "".join(next(documents).chunks) == "fine"
    with pytest.raises(CorpusError, match=words) as caught:
        next(documents)
    assert str(caught.value).startswith(f"{path}#2")


def test_surrogate_pairs_in_json_are_characters(tmp_path: Path) -> None:
    """Two escapes that make one character are no error."""
    assert texts(write(tmp_path / "d.jsonl", r'{"text": "\ud83d\ude00 \\ud800"}')) == {"d.jsonl#1": r"😀 \ud800"}


def test_a_jsonl_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """The offset counts from the beginning of the file."""
    path = write(tmp_path / "d.jsonl", '{"text": "é"}\n'.encode() + b'{"text": "\xe9"}\n')
    with pytest.raises(CorpusError, match=r"d\.jsonl#2: not UTF-8: byte 0xE9 at offset 25 "):
        texts(path)


# --- documents as a whole


def test_an_empty_file_is_a_document_without_text(tmp_path: Path) -> None:
    """What to do with it is the caller's decision; a byte order mark alone is empty too."""
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", decoding.BOM)
    write(tmp_path / "c.txt.gz", "")
    write(tmp_path / "d.txt.zst", "")
    assert texts(tmp_path) == dict.fromkeys(["a.txt", "b.txt", "c.txt.gz", "d.txt.zst"], "")


def test_a_document_can_be_read_again(tmp_path: Path) -> None:
    """Chunks iterate anew each time, and several readers do not disturb each other."""
    (document,) = documents_of(write(tmp_path / "a.txt", TEXT))
    first = iter(document.chunks)
    assert "".join(document.chunks) == next(first) + "".join(first) == TEXT


@given(chunks=st.lists(st.text(max_size=10), max_size=5))
def test_the_content_hash_is_of_the_text(chunks: list[str]) -> None:
    """However it is cut: SHA-256 of the UTF-8 form, and the count of characters."""
    seen = ContentHash()
    assert list(seen.through(chunks)) == chunks
    assert seen.hexdigest() == hashlib.sha256("".join(chunks).encode()).hexdigest()
    assert seen.n_chars == len("".join(chunks))


def test_the_content_hash_refuses_half_a_character() -> None:
    """A string from Python may hold what no file can."""
    seen = ContentHash()
    seen.update("abc")
    with pytest.raises(CorpusError, match=r"Character 4 of the text is the lone surrogate '\\ud800'"):
        seen.update("d\ud800")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.zst"])
def test_a_line_of_50_mb_is_read_in_a_few_seconds(tmp_path: Path, name: str) -> None:
    """Time is linear in the length of a line; a text file is never whole in memory."""
    n_chars = 49_999_980
    raw = b'{"text": "' + b"x" * n_chars + b'"}' if "jsonl" in name else b"x" * n_chars
    path = write(tmp_path / name, PACK.get(Path(name).suffix, bytes)(raw))
    begun = time.perf_counter()
    (document,) = documents_of(path)
    seen = ContentHash()
    longest = max(len(chunk) for chunk in seen.through(document.chunks))
    assert time.perf_counter() - begun < 8  # 0.3 s on an idle core
    assert seen.n_chars == n_chars
    assert "jsonl" in name or longest <= 34 << 20

"""docs/format-v1.md: its tables are those of the code, and a reader written from it alone reads a store."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
import zstandard

import knnstore
from knnstore import format as format_1

PAGE = (Path(__file__).parent.parent / "docs" / "format-v1.md").read_text(encoding="utf-8")
TYPES = {1: "u1", 2: "<u2", 3: "<u4", 4: "<u8", 5: "<f2", 6: "<u2", 7: "<f4"}
P = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


def tables() -> dict[str, list[list[str]]]:
    """The page's tables by the first cell of their heads."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
        found.setdefault(f"{rows[0][0]} {rows[0][1]}", rows[2:])
    return found


def test_limits_are_those_of_the_code() -> None:
    """Every limit of the page has the value it has in format.py, and every number there that is a limit is on the page."""
    shown = {name: int(value) for name, value, _ in tables()["name value"]}
    assert shown == {name: getattr(format_1, name) for name in shown}
    numbers = {name for name, value in vars(format_1).items() if name.isupper() and isinstance(value, int)}
    assert numbers - set(shown) == {"HEADER_VERSION"}


def test_header_is_that_of_the_code() -> None:
    """Offsets, sizes, names and meanings of the header's fields agree, and fill its 64 bytes."""
    shown = [(int(offset), int(size), name, meaning) for offset, size, name, meaning in tables()["offset size"]]
    assert shown == list(format_1.HEADER_FIELDS)
    assert [offset for offset, *_ in shown] == [sum(size for _, size, *_ in shown[:i]) for i in range(len(shown))]
    assert sum(size for _, size, *_ in shown) == format_1.HEADER_SIZE


@pytest.mark.parametrize(
    ("table", "numbers"), [("kind number", format_1.Kind), ("codec number", format_1.Codec), ("dtype number", format_1.DType)]
)
def test_numbers_are_those_of_the_code(table: str, numbers: Any) -> None:
    """Kinds, codecs and types have the numbers on the page."""
    assert {row[0]: int(row[1]) for row in tables()[table]} == {member.name: member.value for member in numbers}
    if numbers is format_1.DType:
        assert {row[0]: int(row[2]) for row in tables()[table]} == {
            member.name: format_1.NUMPY_TYPES[member].itemsize for member in numbers
        }


class PageReader:
    """A reader made from the page. It shares no code with the package."""

    def __init__(self, root: Path) -> None:
        self.root = root
        number, sha256 = (root / "CURRENT").read_text().split()
        raw = (root / "manifests" / f"{number}.json").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == sha256
        self.manifest = json.loads(raw)
        member = f'"check":"{self.manifest["check"]}",'.encode()
        assert hashlib.sha256(raw.replace(member, b"")).hexdigest() == self.manifest["check"]
        assert raw == (json.dumps(self.manifest, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")
        assert json.loads((root / "KNNSTORE").read_text()) == {"format": 1, "magic": "knnstore", "uuid": self.manifest["uuid"]}

    def header(self, path: Path, kind: int) -> tuple[int, int, int, int, bytes]:
        """Codec, rows, columns, check and body of a file."""
        raw = path.read_bytes()
        magic, version, found, codec, codec_version, dtype, reserved, rows, columns, owner, check, own = struct.unpack(
            "<8sHBBBBHQQ16sQQ", raw[:64]
        )
        assert (magic, version, found, codec_version, reserved) == (bytes.fromhex("894B4E4E530D0A1A"), 1, kind, 1, 0)
        assert owner.hex() == path.parent.name
        assert own == xxhash.xxh3_64_intdigest(raw[:56])
        self.dtype = TYPES[dtype]
        return codec, rows, columns, check, raw[64:]

    def small(self, path: Path, kind: int) -> np.ndarray:
        _, rows, columns, check, body = self.header(path, kind)
        assert xxhash.xxh3_64_intdigest(body) == check
        return np.frombuffer(body, self.dtype).reshape(rows, columns)

    def long(self, path: Path, kind: int) -> np.ndarray:
        _, rows, columns, check, body = self.header(path, kind)
        size = rows * columns * np.dtype(self.dtype).itemsize
        table = body[-(-(64 + size) // 64) * 64 - 64 :]
        assert xxhash.xxh3_64_intdigest(table) == check
        sums = [xxhash.xxh3_64_intdigest(body[at : min(at + 65_536, size)]) for at in range(0, size, 65_536)]
        assert np.frombuffer(table, "<u8").tolist() == sums
        return np.frombuffer(body[:size], self.dtype).reshape(rows, columns)

    def space(self, name: str) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray | None]:
        folder = self.root / "spaces" / name
        fields = json.loads((folder / "space.json").read_text())
        rotation = self.small(folder / "rotation.bin", 5) if fields["rotation"] != "none" else None
        centroids = None
        if fields["codec"] != "raw":
            centroids = self.small(folder / "centroids.bin", 6).reshape(fields["n_sub"], -1, fields["dim"] // fields["n_sub"])
        digest = hashlib.sha256(f'["space", 1, "{fields["codec"]}", "l2", {fields["dim"]}]'.encode())
        for array in (rotation, centroids):
            digest.update(b"-" if array is None else np.array(array.shape, "<u8").tobytes() + array.astype("<f4").tobytes())
        assert digest.hexdigest()[:32] == name
        return fields, rotation, centroids

    def entries(self, segment: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, tokens and decoded codes (in the key's own axes) of all lists of a segment."""
        folder = self.root / "segments" / segment["content"]["uuid"]
        fields, rotation, centroids = self.space(segment["content"]["space"])
        directory = self.small(folder / "lists.dir", 2)
        _, n_entries, width, _, body = self.header(folder / "lists.bin", 1)
        labels, keys = [], []
        for n, offset, check in directory.tolist():
            capacity = -(-n // 32) * 32
            raw = body[offset - 64 : offset - 64 + capacity * (width + 8)]
            assert xxhash.xxh3_64_intdigest(raw) == check
            assert offset % 64 == 0
            codes = np.frombuffer(raw[: capacity * width], np.uint8)
            of_list = np.frombuffer(raw[capacity * width :], "<i8")
            assert (of_list[n:] == -1).all()
            assert (np.diff(of_list[:n]) > 0).all()
            decoded = self.decode(fields, centroids, codes, capacity)
            padding = np.zeros(fields["dim"]) if centroids is None else centroids[:, 0].reshape(-1)
            assert (decoded[n:] == padding).all()
            labels.append(of_list[:n])
            keys.append(decoded[:n])
        found, decoded = np.concatenate(labels), np.concatenate(keys)
        assert len(found) == n_entries
        rows = (found >> 24) - segment["content"].get("label_base", 0)
        return rows, found & 0xFFFFFF, decoded if rotation is None else decoded @ rotation

    def decode(self, fields: dict[str, Any], centroids: np.ndarray | None, codes: np.ndarray, capacity: int) -> np.ndarray:
        if centroids is None:
            return codes.view("<f4").reshape(capacity, fields["dim"])
        n_sub = fields["n_sub"]
        if fields["codec"] == "pq8":
            sub_codes = codes.reshape(capacity, n_sub)
        else:
            blocks = codes.reshape(capacity // 32, n_sub + n_sub % 2, 16)
            sub_codes = np.zeros((capacity // 32, 32, n_sub + n_sub % 2), np.uint8)
            for j in range(16):
                sub_codes[:, P[j]] = blocks[:, :, j] & 15
                sub_codes[:, P[j] + 16] = blocks[:, :, j] >> 4
            sub_codes = sub_codes.reshape(capacity, -1)
        return np.concatenate([centroids[m][sub_codes[:, m]] for m in range(n_sub)], axis=1)

    def documents(self, segment: dict[str, Any]) -> list[dict[str, Any]]:
        """Records with their text and each token's span."""
        folder = self.root / "segments" / segment["content"]["uuid"]
        with lmdb.open(str(folder / "contexts.lmdb"), subdir=False, readonly=True, lock=False, max_dbs=2) as environment:
            names = [environment.open_db(name, create=False) for name in (b"documents", b"text")]
            with environment.begin() as transaction:
                first_rows = np.frombuffer(transaction.get(b"first_rows"), "<u8").tolist()
                records, frames = ([(key, content) for key, content in transaction.cursor(db=name)] for name in names)
        unpacked = zstandard.ZstdDecompressor()
        documents = []
        for key, content in records:
            record = json.loads(unpacked.decompress(content))
            record.update(first_row=struct.unpack(">Q", key)[0], text="", text_start=None, spans=[])
            documents.append(record)
        assert [record["first_row"] for record in documents] == first_rows
        digests = [hashlib.sha256(record["id"].encode("utf-8", "surrogatepass")).digest() for record in documents]
        ids = sorted((int.from_bytes(digest[:8], "little"), row) for digest, row in zip(digests, first_rows, strict=True))
        assert list(map(tuple, self.long(folder / "ids.bin", 8).tolist())) == ids
        for key, content in frames:
            raw = unpacked.decompress(content)
            tokens, size, base, gap_width, length_width, zero = struct.unpack("<IIQBBH", raw[:20])
            gap_type, length_type = (np.dtype(("u1", "<u2", "<u4", "<u8")[width]) for width in (gap_width, length_width))
            gaps = np.frombuffer(raw, gap_type, tokens, 20).tolist()
            lengths = np.frombuffer(raw, length_type, tokens, 20 + tokens * gap_type.itemsize).tolist()
            assert zero == 0
            row = struct.unpack(">Q", key)[0]
            document = next(record for record in reversed(documents) if record["first_row"] <= row)
            if document["text_start"] is None:
                document["text_start"] = base
            assert base == document["text_start"] + len(document["text"])
            assert row == document["first_row"] + len(document["spans"])
            document["text"] += raw[len(raw) - size :].decode()
            at = base
            for gap, length in zip(gaps, lengths, strict=True):
                begin = at + (gap // 2 if gap % 2 == 0 else -(gap + 1) // 2)
                at = begin + length
                document["spans"].append((begin, at))
        return documents


@pytest.mark.parametrize(
    ("n", "dim", "codec", "rotation", "segment_entries"),
    [
        (700, 5, "pq4", "random", 700),
        (700, 5, "pq4", "random", 150),
        (9_000, 6, "pq4", "random", 9_000),
        (9_000, 7, "pq4", "none", 4_000),
        (12_000, 6, "pq8", "random", 12_000),
        (34_000, 4, "pq4", "random", 34_000),
    ],
)
def test_a_reader_made_from_the_page_reads_a_store(
    tmp_path: Path, n: int, dim: int, codec: str, rotation: str, segment_entries: int
) -> None:
    """Values, keys, codes, documents, texts and spans come back as they were put in: raw, packed and plain codes, one list and many,
    documents in parts."""
    rng = np.random.default_rng(n)
    keys = rng.standard_normal((n, dim)).astype(np.float32)
    values = rng.integers(0, 70_000, n)
    cut = n // 3
    texts = ["".join(rng.choice(list("ab cé漢😀"), size)) for size in (cut, n - cut)]
    names = ["naïve", "\udce9 is no UTF-8"]
    documents = [
        knnstore.EntryDocument(
            id=names[i],
            n_entries=len(text),
            domain=f"Gebiet äöü {i}",
            source=f"s{i}",
            metadata={"year": 1843 + i},
            text=text,
            starts=np.arange(len(text)),
            ends=np.arange(1, len(text) + 1),
        )
        for i, text in enumerate(texts)
    ]
    checkpoint = knnstore.Checkpoint(name="none", revision=None, identity="0" * 64, tokenizer=None, architecture="none", vocab_size=70_000)
    options = knnstore.IndexOptions(codec=codec, rotation=rotation, keep_keys="f32", segment_entries=segment_entries)
    knnstore.create_from_entries(
        tmp_path / "s.knn", [(keys, values, documents)], checkpoint=checkpoint, dim=dim, vocab_size=70_000, options=options
    )
    reader = PageReader(tmp_path / "s.knn")
    parts, runs, first = [], [], 0
    for segment in reader.manifest["segments"]:
        content = segment["content"]
        stop = first + content["entries"]
        folder = tmp_path / "s.knn" / "segments" / content["uuid"]
        assert hashlib.sha256((folder / "segment.json").read_bytes()).hexdigest() == segment["sha256"]
        for name, record in content["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]
        rows, tokens, decoded = reader.entries(segment)
        assert sorted(rows.tolist()) == list(range(content["entries"]))
        assert np.array_equal(tokens, values[first + rows])
        assert np.array_equal(reader.long(folder / "values.bin", 3)[:, 0], values[first:stop])
        assert np.array_equal(reader.long(folder / "keys.bin", 4), keys[first:stop])
        error = np.square(decoded - keys[first + rows]).sum(axis=1).mean()
        if n < 4_096:
            assert error == 0.0
            assert rows.tolist() == list(range(content["entries"]))
        else:
            assert error == pytest.approx(content["distortion"], rel=0.5)
            assert error < 0.5 * dim
        if content["coarse"] is not None:
            name = content["coarse"]
            centroids = reader.small(tmp_path / "s.knn" / "coarse" / name / "centroids.bin", 7)
            text = f"coarse 1 {content['space']} ({len(centroids)}, {dim})"
            assert hashlib.sha256(text.encode() + centroids.tobytes()).hexdigest()[:32] == name
        runs += [(domain, first + begin, first + end) for domain, begin, end in segment["runs"]]
        parts += reader.documents(segment)
        first = stop
    assert first == n
    assert [domain for domain, begin, end in runs for _ in range(begin, end)] == [documents[0].domain] * cut + [documents[1].domain] * (
        n - cut
    )
    for number, document in enumerate(documents):
        mine = [part for part in parts if part["id"] == document.id]
        assert [part["part"] for part in mine] == list(range(len(mine)))
        assert [part["last"] for part in mine] == [False] * (len(mine) - 1) + [True]
        assert [part["first_token"] for part in mine] == np.cumsum([0] + [part["entries"] for part in mine[:-1]]).tolist()
        assert {(part["source"], part["metadata"]["year"]) for part in mine} == {(f"s{number}", 1843 + number)}
        assert "".join(part["text"] for part in mine) == document.text
        assert [span for part in mine for span in part["spans"]] == [(i, i + 1) for i in range(len(document.text))]
        hashes = [(part["hash"], part["chars"]) for part in mine]
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        assert hashes == [(None, None)] * (len(mine) - 1) + [(digest, len(document.text))]

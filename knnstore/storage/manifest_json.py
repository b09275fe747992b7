"""A manifest as a file: canonical JSON, immutable, checked by its own hash and field by field."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from knnstore.errors import DamageError, FormatError
from knnstore.format import (
    CENTROIDS_FILE,
    CODECS_BY_NAME,
    CONTEXTS_FILE,
    DIRECTORY_FILE,
    FORMAT_VERSION,
    IDS_FILE,
    KEYS_FILE,
    LISTS_FILE,
    MAX_VOCABULARY,
    READER_FEATURES,
    ROTATION_FILE,
    ROTATIONS,
    ROW_BITS,
    SLOT_BITS,
    SPACE_FILE,
    VALUES_FILE,
)
from knnstore.storage.calibration import calibration_fields, parse_calibration
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.manifest import (
    SEED_MAX,
    CoarseRecord,
    FileRecord,
    IndexOptions,
    Manifest,
    Operation,
    SegmentContent,
    SegmentRecord,
    SpaceRecord,
    WindowRule,
)
from knnstore.storage.parse import (
    parse_flag,
    parse_free,
    parse_hex,
    parse_json_bytes,
    parse_list,
    parse_mapping,
    parse_number,
    parse_object,
    parse_size,
    parse_text,
    parse_word,
)
from knnstore.storage.rows import as_ranges

__all__ = ["SNAPSHOT_MAX", "canonical", "manifest_bytes", "parse_manifest", "parse_segment_content", "segment_content_fields"]

KEY_TYPES = ("f16", "bf16", "f32")
VALUE_TYPES = ("u16", "u32")
SPACE_FILES = frozenset((SPACE_FILE, ROTATION_FILE, CENTROIDS_FILE))
COARSE_FILES = frozenset((CENTROIDS_FILE,))
SEGMENT_FILES = frozenset((LISTS_FILE, DIRECTORY_FILE, VALUES_FILE, CONTEXTS_FILE, IDS_FILE, KEYS_FILE))
SNAPSHOT_MAX = 10**17  # ten times fewer than a file name has digits for: there is always a next one
DIM_MAX = 1 << 20  # dimensions of a key
DISTANCE_MAX = 3e38  # squared distances are float32


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest file's bytes; `check` in it is the sha256 of the same JSON without it."""
    fields = _manifest_fields(manifest)
    return canonical({**fields, "check": hashlib.sha256(canonical(fields)).hexdigest()})


# Names are sorted and quotes in strings escaped: nothing else in a manifest looks like this.
_CHECK = re.compile(rb'"check":"([0-9a-f]{64})",')


def _is_whole(raw: bytes) -> bool:
    check = _CHECK.search(raw)
    return check is not None and hashlib.sha256(raw[: check.start()] + raw[check.end() :]).hexdigest() == check[1].decode()


def canonical(fields: Any) -> bytes:
    """JSON with sorted names, no spaces, in ASCII (a file name that is not UTF-8 has no other form), and a line end."""
    return (json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _plain(record: Any) -> Any:
    return dataclasses.asdict(record)


def segment_content_fields(content: SegmentContent) -> dict[str, Any]:
    """The JSON fields of a segment.json."""
    fields = {**_plain(content), "files": _file_fields(content.files)}
    if not content.label_base:
        del fields["label_base"]
    return fields


def _file_fields(files: Sequence[FileRecord]) -> dict[str, Any]:
    return {file.name: {"sha256": file.sha256, "size": file.size} for file in files}


def _manifest_fields(manifest: Manifest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "calibration": None,
        "checkpoint": _plain(manifest.checkpoint),
        "coarse": [{**_plain(item), "files": _file_fields(item.files)} for item in manifest.coarse],
        "documents": manifest.documents,
        "defaults": {"k": manifest.k, "nprobe": manifest.nprobe},
        "features": {"reader": list(manifest.reader_features), "writer": list(manifest.writer_features)},
        "format": FORMAT_VERSION,
        "index": _plain(manifest.index),
        "key": _plain(manifest.key),
        "operation": _plain(manifest.operation),
        "parent": None if manifest.parent is None else {"sha256": manifest.parent[1], "snapshot": manifest.parent[0]},
        "segments": [
            {
                "content": segment_content_fields(item.content),
                "dead": [list(pair) for pair in item.dead],
                "runs": [list(run) for run in item.runs],
                "sha256": item.sha256,
            }
            for item in manifest.segments
        ],
        "snapshot": manifest.snapshot,
        "spaces": [{**_plain(item), "codec": item.codec.name.lower(), "files": _file_fields(item.files)} for item in manifest.spaces],
        "time": manifest.time,
        "tokens": manifest.tokens,
        "uuid": manifest.uuid,
        "windows": None if manifest.windows is None else _plain(manifest.windows),
    }
    if manifest.calibration is not None:
        fields["calibration"] = calibration_fields(manifest.calibration)
    return fields


def parse_manifest(raw: bytes, at: str) -> Manifest:
    """A manifest from its file's bytes. Raises DamageError for what is not one, FormatError for one of a later format."""
    fields = parse_json_bytes(raw, at)
    if not _is_whole(raw):  # in later formats too this field and the next mean the same
        raise DamageError(f"{at}: its content does not match its checksum. Run `knnstore verify`.")
    if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > FORMAT_VERSION:
        raise FormatError(f"{at}: format {fields['format']}; this knnstore reads up to {FORMAT_VERSION}. Install a newer one.")
    names = (
        "calibration", "check", "checkpoint", "coarse", "defaults", "documents", "features", "format", "index", "key",
        "operation", "parent", "segments", "snapshot", "spaces", "time", "tokens", "uuid", "windows",
    )  # fmt: skip
    fields = parse_object(fields, at, required=names)
    if parse_size(fields["format"], f"{at}.format") != FORMAT_VERSION:
        raise DamageError(f"{at}: format {fields['format']}, which there never was. Run `knnstore verify`.")
    features = parse_object(fields["features"], f"{at}.features", required=("reader", "writer"))
    readers, writers = (
        tuple(parse_text(item, f"{at}.features.{side}") for item in parse_list(features[side], f"{at}.features.{side}"))
        for side in ("reader", "writer")
    )
    unknown = sorted(set(readers) - READER_FEATURES)
    if unknown:
        raise FormatError(f"{at}: it needs {', '.join(unknown)[:80]}, which this knnstore does not have. Install a newer one.")
    defaults = parse_object(fields["defaults"], f"{at}.defaults", required=("k", "nprobe"))
    manifest = Manifest(
        uuid=parse_hex(fields["uuid"], f"{at}.uuid", 32),
        snapshot=parse_size(fields["snapshot"], f"{at}.snapshot", least=1, most=SNAPSHOT_MAX),
        parent=_parse_parent(fields["parent"], f"{at}.parent"),
        time=parse_text(fields["time"], f"{at}.time"),
        operation=_parse_operation(fields["operation"], f"{at}.operation"),
        checkpoint=_parse_checkpoint(fields["checkpoint"], f"{at}.checkpoint"),
        key=_parse_key(fields["key"], f"{at}.key"),
        tokens=None if fields["tokens"] is None else parse_free(fields["tokens"], f"{at}.tokens"),
        windows=_parse_windows(fields["windows"], f"{at}.windows"),
        index=_parse_index(fields["index"], f"{at}.index"),
        spaces=tuple(_parse_space(raw, f"{at}.spaces[{i}]") for i, raw in enumerate(parse_list(fields["spaces"], f"{at}.spaces"))),
        coarse=tuple(_parse_coarse(raw, f"{at}.coarse[{i}]") for i, raw in enumerate(parse_list(fields["coarse"], f"{at}.coarse"))),
        segments=tuple(
            _parse_segment(raw, f"{at}.segments[{i}]") for i, raw in enumerate(parse_list(fields["segments"], f"{at}.segments"))
        ),
        documents=_parse_documents(fields["documents"], f"{at}.documents"),
        calibration=parse_calibration(fields["calibration"], f"{at}.calibration"),
        k=parse_size(defaults["k"], f"{at}.defaults.k"),
        nprobe=parse_size(defaults["nprobe"], f"{at}.defaults.nprobe"),
        writer_features=writers,
    )
    _check_references(manifest, at)
    return manifest


def _check_references(manifest: Manifest, at: str) -> None:
    spaces = {space.id for space in manifest.spaces}
    coarse = {item.id: item for item in manifest.coarse}
    uuids = {segment.content.uuid for segment in manifest.segments}
    if (len(spaces), len(coarse), len(uuids)) != (len(manifest.spaces), len(manifest.coarse), len(manifest.segments)):
        raise DamageError(f"{at}: it lists a space, a coarse quantizer or a segment twice. Run `knnstore verify`.")
    for segment in manifest.segments:
        content = segment.content
        lists = coarse.get(content.coarse) if content.coarse is not None else None
        nlist = 1 if content.coarse is None else (lists.nlist if lists is not None and lists.space == content.space else 0)
        if content.space not in spaces or content.nlist != nlist:
            raise DamageError(f"{at}: segment {content.uuid} refers to a space or lists that are not there. Run `knnstore verify`.")


def _parse_documents(raw: object, at: str) -> dict[str, int]:
    return {name: parse_size(n, f"{at}.{name}") for name, n in parse_mapping(raw, at).items()}


def _parse_parent(raw: object, at: str) -> tuple[int, str] | None:
    if raw is None:
        return None
    fields = parse_object(raw, at, required=("sha256", "snapshot"))
    return parse_size(fields["snapshot"], f"{at}.snapshot", least=1, most=SNAPSHOT_MAX), parse_hex(fields["sha256"], f"{at}.sha256", 64)


def _parse_operation(raw: object, at: str) -> Operation:
    fields = parse_object(raw, at, required=("arguments", "counts", "name"))
    arguments, counts = (parse_free(fields[name], f"{at}.{name}") for name in ("arguments", "counts"))
    return Operation(name=parse_text(fields["name"], f"{at}.name"), arguments=arguments, counts=counts)


def _parse_checkpoint(raw: object, at: str) -> Checkpoint:
    fields = parse_object(raw, at, required=("architecture", "identity", "name", "revision", "tokenizer", "vocab_size"))
    return Checkpoint(
        name=parse_text(fields["name"], f"{at}.name"),
        revision=None if fields["revision"] is None else parse_text(fields["revision"], f"{at}.revision"),
        identity=parse_hex(fields["identity"], f"{at}.identity", 64),
        tokenizer=None if fields["tokenizer"] is None else parse_hex(fields["tokenizer"], f"{at}.tokenizer", 64),
        architecture=parse_text(fields["architecture"], f"{at}.architecture"),
        vocab_size=parse_size(fields["vocab_size"], f"{at}.vocab_size", least=1, most=MAX_VOCABULARY),
    )


def _parse_key(raw: object, at: str) -> KeyLayer:
    fields = parse_object(raw, at, required=("dim", "layer"))
    return KeyLayer(layer=parse_text(fields["layer"], f"{at}.layer"), dim=parse_size(fields["dim"], f"{at}.dim", least=1, most=DIM_MAX))


def _parse_index(raw: object, at: str) -> IndexOptions:
    fields = parse_object(raw, at, required=("codec", "keep_keys", "rotation", "seed", "segment_entries"))
    return IndexOptions(
        codec=parse_word(fields["codec"], f"{at}.codec", ("pq4", "pq8")),
        rotation=parse_word(fields["rotation"], f"{at}.rotation", ROTATIONS),
        keep_keys=None if fields["keep_keys"] is None else parse_word(fields["keep_keys"], f"{at}.keep_keys", KEY_TYPES),
        seed=parse_size(fields["seed"], f"{at}.seed", most=SEED_MAX),
        segment_entries=parse_size(fields["segment_entries"], f"{at}.segment_entries", least=1, most=1 << 32),
    )


def _parse_files(raw: object, at: str, names: frozenset[str]) -> tuple[FileRecord, ...]:
    """names: what the format has in such a folder; also what keeps a path inside it."""
    records = []
    for name, item in parse_mapping(raw, at).items():
        if name not in names:
            raise DamageError(f"{at}: {name[:80]!r} is not a file name of the format. Run `knnstore verify`.")
        entry = parse_object(item, f"{at}.{name}", required=("sha256", "size"))
        size = parse_size(entry["size"], f"{at}.{name}.size")
        records.append(FileRecord(name=name, size=size, sha256=parse_hex(entry["sha256"], f"{at}.{name}.sha256", 64)))
    return tuple(records)


def _parse_space(raw: object, at: str) -> SpaceRecord:
    fields = parse_object(raw, at, required=("codec", "distortion", "files", "id", "n_sub", "rotation"))
    return SpaceRecord(
        id=parse_hex(fields["id"], f"{at}.id", 32),
        codec=CODECS_BY_NAME[parse_word(fields["codec"], f"{at}.codec", tuple(CODECS_BY_NAME))],
        n_sub=parse_size(fields["n_sub"], f"{at}.n_sub", most=DIM_MAX),
        rotation=parse_word(fields["rotation"], f"{at}.rotation", ROTATIONS),
        distortion=parse_number(fields["distortion"], f"{at}.distortion", 0.0, DISTANCE_MAX),
        files=_parse_files(fields["files"], f"{at}.files", SPACE_FILES),
    )


def _parse_coarse(raw: object, at: str) -> CoarseRecord:
    fields = parse_object(raw, at, required=("files", "id", "nlist", "space"))
    return CoarseRecord(
        id=parse_hex(fields["id"], f"{at}.id", 32),
        space=parse_hex(fields["space"], f"{at}.space", 32),
        nlist=parse_size(fields["nlist"], f"{at}.nlist", least=1, most=1 << 32),
        files=_parse_files(fields["files"], f"{at}.files", COARSE_FILES),
    )


def parse_segment_content(raw: object, at: str) -> SegmentContent:
    """What a segment.json holds, from its JSON."""
    names = (
        "coarse", "distortion", "documents", "dtype", "entries", "files", "keys", "nlist", "space", "text", "uuid", "values", "windows",
    )  # fmt: skip
    fields = parse_object(raw, at, required=names, optional=("label_base",))
    return SegmentContent(
        uuid=parse_hex(fields["uuid"], f"{at}.uuid", 32),
        space=parse_hex(fields["space"], f"{at}.space", 32),
        coarse=None if fields["coarse"] is None else parse_hex(fields["coarse"], f"{at}.coarse", 32),
        nlist=parse_size(fields["nlist"], f"{at}.nlist", least=1, most=1 << 32),
        entries=(entries := parse_size(fields["entries"], f"{at}.entries", least=1, most=1 << ROW_BITS)),
        documents=parse_size(fields["documents"], f"{at}.documents", least=1, most=entries),
        values=parse_word(fields["values"], f"{at}.values", VALUE_TYPES),
        keys=None if fields["keys"] is None else parse_word(fields["keys"], f"{at}.keys", KEY_TYPES),
        text=parse_flag(fields["text"], f"{at}.text"),
        dtype=None if fields["dtype"] is None else parse_text(fields["dtype"], f"{at}.dtype"),
        windows=_parse_windows(fields["windows"], f"{at}.windows"),
        distortion=parse_number(fields["distortion"], f"{at}.distortion", 0.0, DISTANCE_MAX),
        files=_parse_files(fields["files"], f"{at}.files", SEGMENT_FILES),
        label_base=_parse_base(fields["label_base"], f"{at}.label_base", entries),
    )


def _parse_base(raw: object, at: str, entries: int) -> int:
    base = 0 if raw is None else parse_size(raw, at, most=(1 << ROW_BITS) - entries)
    if base % (1 << SLOT_BITS):
        raise DamageError(f"{at}: {base} is no multiple of {1 << SLOT_BITS}. Run `knnstore verify`.")
    return base


def _parse_windows(raw: object, at: str) -> WindowRule | None:
    if raw is None:
        return None
    rule = parse_object(raw, at, required=("context", "stride"))
    context, stride = (parse_size(rule[name], f"{at}.{name}", least=1, most=1 << 30) for name in ("context", "stride"))
    return WindowRule(context=context, stride=stride)


def _parse_segment(raw: object, at: str) -> SegmentRecord:
    fields = parse_object(raw, at, required=("content", "dead", "runs", "sha256"))
    content = parse_segment_content(fields["content"], f"{at}.content")
    runs = []
    reached = 0
    for i, run in enumerate(parse_list(fields["runs"], f"{at}.runs")):
        domain, first, stop = parse_list(run, f"{at}.runs[{i}]", length=3)
        begin, end = parse_size(first, f"{at}.runs[{i}].first"), parse_size(stop, f"{at}.runs[{i}].stop")
        if begin != reached or end <= begin:
            raise DamageError(f"{at}.runs[{i}]: rows {begin} to {end} do not follow row {reached}. Run `knnstore verify`.")
        runs.append((parse_text(domain, f"{at}.runs[{i}].domain"), begin, end))
        reached = end
    if reached != content.entries:
        raise DamageError(f"{at}.runs: they end at row {reached} of {content.entries}. Run `knnstore verify`.")
    dead = [
        (parse_size(first, f"{at}.dead", most=content.entries), parse_size(stop, f"{at}.dead", most=content.entries))
        for first, stop in (parse_list(pair, f"{at}.dead", length=2) for pair in parse_list(fields["dead"], f"{at}.dead"))
    ]
    if not np.array_equal(as_ranges(dead), np.array(dead, np.int64).reshape(-1, 2)):
        raise DamageError(f"{at}.dead: ranges that are empty, touch or do not ascend. Run `knnstore verify`.")
    return SegmentRecord(
        content=content,
        runs=tuple(runs),
        dead=tuple(dead),
        sha256=parse_hex(fields["sha256"], f"{at}.sha256", 64),
    )

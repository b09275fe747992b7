"""What is read from disk is checked field by field: each `parse_<kind>` takes a value and its place, or raises DamageError."""

import contextlib
import errno
import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from knnstore.errors import DamageError
from knnstore.format import MANIFEST_MAX

__all__ = [
    "DEPTH_MAX",
    "NOT_PLAIN",
    "is_too_deep",
    "parse_flag",
    "parse_free",
    "parse_hex",
    "parse_json",
    "parse_json_bytes",
    "parse_list",
    "parse_mapping",
    "parse_number",
    "parse_object",
    "parse_size",
    "parse_text",
    "parse_word",
    "read_small",
]


DEPTH_MAX = 64  # levels of lists and objects in what anybody may write: far from where writing it runs out of stack

# What the system says on opening a link to itself, something below a file, or a socket.
NOT_PLAIN = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENXIO})


def _refuse(at: str, found: object, expected: str) -> NoReturn:
    text = found if isinstance(found, str) else reprlib.repr(found)  # which looks at little of what is long or deep
    raise DamageError(f"{at}: {text[:80]!r} where {expected} is expected. Run `knnstore verify`.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is more than any number")
    return number


def parse_json_bytes(raw: bytes, at: str) -> Any:
    """JSON without duplicate names, NaN or infinity."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{at}: not the JSON that was written: {error}. Run `knnstore verify`.") from error


def parse_json(path: Path) -> Any:
    """The JSON in a small file of the store."""
    return parse_json_bytes(read_small(path), str(path))


def read_small(path: Path, most: int = MANIFEST_MAX) -> bytes:
    """A small file's bytes. Raises DamageError where it is missing, not a plain file or larger than `most` bytes."""
    try:
        if not path.is_file():
            raise DamageError(f"{path}: the file is missing or not a plain file. Run `knnstore verify`.")
        if path.stat().st_size > most:
            raise DamageError(f"{path}: larger than the {most} bytes such a file may have. Run `knnstore verify`.")
        return path.read_bytes()
    except OSError as error:
        raise DamageError(f"{path}: cannot be read: {error.strerror}. Run `knnstore verify`.") from error


def parse_object(raw: object, at: str, *, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """An object with exactly these fields; what is optional and absent is None."""
    if not isinstance(raw, dict):
        _refuse(at, raw, "an object")
    missing = [name for name in required if name not in raw]
    unknown = [name for name in raw if name not in required and name not in optional]
    if missing or unknown:
        _refuse(at, ", ".join(missing or unknown), "no field missing" if missing else "no such field")
    return {**dict.fromkeys(optional), **raw}


def parse_mapping(raw: object, at: str) -> dict[str, Any]:
    """An object of any fields."""
    if not isinstance(raw, dict):
        _refuse(at, raw, "an object")
    return raw


def parse_free(raw: object, at: str) -> dict[str, Any]:
    """An object of any JSON, not nested deeper than it can be written and read again."""
    fields = parse_mapping(raw, at)
    if is_too_deep(fields):
        raise DamageError(f"{at}: nested more than {DEPTH_MAX} deep. Run `knnstore verify`.")
    return fields


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than DEPTH_MAX deep."""
    level = [value]
    for _ in range(DEPTH_MAX):
        below = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list | tuple))
        level = [item for items in below for item in items if isinstance(item, dict | list | tuple)]
        if not level:
            return False
    return True


def parse_list(raw: object, at: str, length: int | None = None) -> list[Any]:
    if not isinstance(raw, list) or (length is not None and len(raw) != length):
        _refuse(at, raw, "a list" if length is None else f"a list of {length}")
    return raw


def parse_text(raw: object, at: str) -> str:
    if not isinstance(raw, str):
        _refuse(at, raw, "a string")
    return raw


def parse_flag(raw: object, at: str) -> bool:
    if not isinstance(raw, bool):
        _refuse(at, raw, "true or false")
    return raw


def parse_word(raw: object, at: str, words: Sequence[str]) -> str:
    text = parse_text(raw, at)
    if text not in words:
        _refuse(at, text, "one of " + ", ".join(words))
    return text


def parse_hex(raw: object, at: str, digits: int) -> str:
    """A name of lower-case hex digits: also what keeps a path inside the store."""
    text = parse_text(raw, at)
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", text):
        _refuse(at, text, f"{digits} hex digits")
    return text


def parse_size(raw: object, at: str, most: int = (1 << 63) - 1, least: int = 0) -> int:
    """An integer from least to most."""
    if not isinstance(raw, int) or isinstance(raw, bool) or not least <= raw <= most:
        _refuse(at, raw, f"an integer from {least} to {most}")
    return raw


def parse_number(raw: object, at: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number from least to most."""
    number = math.nan
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond any float
            number = float(raw)
    if not math.isfinite(number) or not least <= number <= most:
        _refuse(at, raw, "a finite number" if least == -math.inf else f"a number from {least:g} to {most:g}")
    return number

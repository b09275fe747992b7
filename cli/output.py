"""What a command hands over: JSON on stdout for programs, and files that it was asked to write."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from knnstore.errors import InvalidArgumentError, NotFoundError, StorageError

__all__ = ["check_file", "print_json", "write_whole"]


def print_json(fields: Mapping[str, Any]) -> None:
    """One JSON object and a newline. A number that JSON cannot hold (NaN, infinity) becomes null."""
    plain = _finite(fields)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # another encoding than UTF-8, or a file name that is not text
        text = json.dumps(plain, ensure_ascii=True, allow_nan=False)
    click.echo(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_file(path: str | Path) -> None:
    """Whether a file can be written there: said before the work that it is to hold is done.

    Raises InvalidArgumentError for a folder, NotFoundError where there is no folder for it, StorageError without permission.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidArgumentError(f"{path}: it is a folder. Name a file to write.")
    if not path.parent.is_dir():
        raise NotFoundError(f"{path}: no folder {path.parent}. Make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StorageError(f"{path}: no permission to write it. Choose another place.")


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8: the file is there whole, or as it was before. A link stays one; a pipe or a device is written to."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        if target.exists():
            temporary.chmod(target.stat().st_mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)

"""What goes to stdout: JSON for programs, tables for people."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["print_json"]


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

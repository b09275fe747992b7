"""Strings for a terminal: control characters made visible, columns cut to a width, sizes and numbers for people."""

import unicodedata

__all__ = ["counted", "shown_bytes", "shown_duration", "visible", "visible_token"]

_KEPT_FORMATS = "\u200c\u200d\u00ad"  # joiners and the soft hyphen: parts of ordinary words, harmless on a terminal
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}


def visible(text: str, *, keep: str = "") -> str:
    """The text with every character that could move a cursor, change a colour or turn the writing direction as a sign.

    A newline becomes ⏎, a tab ⇥, other control characters their control picture, the rest an escape such as \\u202e.
    keep: characters to leave as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep else _sign(char) for char in text)


def _sign(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if unicodedata.category(char) not in _HIDDEN or char in _KEPT_FORMATS:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible_token(token: str) -> str:
    """A token by itself: spaces at its ends are part of it, so they are shown as ␣."""
    inner = token.strip(" ")
    if not inner:
        return "␣" * len(token)
    before = len(token) - len(token.lstrip(" "))
    after = len(token) - len(token.rstrip(" "))
    return "␣" * before + visible(inner) + "␣" * after


def counted(n: int, thing: str, things: str | None = None) -> str:
    """`1 entry`, `2,048 entries`."""
    return f"{n:,} {thing if n == 1 else things or f'{thing}s'}"


def shown_bytes(n: float) -> str:
    """A size in decimal units, three digits: `87.2 MB`."""
    if n < 1000:
        return counted(int(n), "byte")
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 999.5:
            return f"{n:.0f} {unit}" if n >= 99.95 else f"{n:.1f} {unit}"
    return f"{n / 1000:,.1f} TB"


def shown_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

"""From corpus files to documents: one for a text file, one for each line of a JSONL file; streamed, in a fixed order."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from knnstore.errors import CorpusError
from knnstore.lm.decoding import CorpusFile, TextChunks, read_lines
from knnstore.lm.inputs import CorpusInputs, SkippedDocument, list_inputs

__all__ = ["ContentHash", "CorpusFile", "CorpusInputs", "Document", "SkippedDocument", "list_inputs", "read_documents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its name and origin.

    id: unique within a domain. source: the file's path as the user gave it; "path#line" for a line of a JSONL file; the name
    given to standard input. metadata: fields of a JSONL line other than text and id (JSON values).
    chunks: the decoded text in order, cut anywhere. A text file is read from the disk while this is iterated, so errors of
    reading and decoding come then; iterating again reads it again.
    """

    id: str
    source: str
    metadata: dict[str, object]
    chunks: Iterable[str]


class ContentHash:
    """SHA-256 over the UTF-8 form of a document's decoded text, and its length, taken while the text passes by."""

    __slots__ = ("_sha256", "n_chars")

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.n_chars = 0

    def update(self, text: str) -> None:
        """Add the text that follows. Raises CorpusError for a lone surrogate, which has no UTF-8 form."""
        try:
            self._sha256.update(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            place, half = self.n_chars + error.start, text[error.start]
            raise CorpusError(f"Character {place:,} of the text is the lone surrogate {half!r}. Remove it: it is no character.") from None
        self.n_chars += len(text)

    def through(self, chunks: Iterable[str]) -> Iterator[str]:
        """The same chunks, each counted before it is handed on."""
        for chunk in chunks:
            self.update(chunk)
            yield chunk

    def hexdigest(self) -> str:
        """64 lower-case hexadecimal digits, of the text seen so far."""
        return self._sha256.hexdigest()


def read_documents(files: Iterable[CorpusFile]) -> Iterator[Document]:
    """The documents of the files in order, one at a time; those without any text too.

    A JSONL file is read while this is iterated: a line is in memory whole, the file is not. Blank lines are skipped.
    Raises CorpusError for a line that is not JSON, has no string `text`, or an `id` that is neither string nor integer.
    """
    for file in files:
        if file.suffix == ".jsonl":
            for number, line in read_lines(file):
                if line.strip():
                    yield _parse_line(line, file, number)
        else:
            yield Document(id=file.id, source=file.source, metadata={}, chunks=TextChunks(file))


def _parse_line(line: str, file: CorpusFile, number: int) -> Document:
    at = f"{file.source}#{number}"
    try:
        fields: object = json.loads(line, parse_constant=_refuse_constant)
        if "\\ud" in line or "\\uD" in line:  # perhaps half of a surrogate pair, which no UTF-8 text can hold
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise CorpusError(f"{at}: a string has the lone surrogate {half!r}. Remove it: it is half a character.") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{at}: not JSON: {error}. Each line must be one JSON object; correct or remove this one.") from None
    if not isinstance(fields, dict):
        raise CorpusError(f'{at}: a JSON {type(fields).__name__} where an object is needed. Write {{"text": ...}} instead.')
    if "text" not in fields:
        raise CorpusError(f"{at}: no field `text` (it has: {', '.join(fields) or 'none'}). Rename the field that holds the text.")
    text = fields.pop("text")
    if not isinstance(text, str):
        raise CorpusError(f"{at}.text: {_shown(text)} where a string is needed. Put the text there, or remove the line.")
    return Document(id=_parse_id(fields.pop("id", None), file, number), source=at, metadata=fields, chunks=(text,) if text else ())


def _parse_id(raw: object, file: CorpusFile, number: int) -> str:
    if raw is None:
        return f"{file.id}#{number}"
    if isinstance(raw, bool) or not isinstance(raw, str | int) or raw == "":
        raise CorpusError(f"{file.source}#{number}.id: {_shown(raw)} where a string or an integer is needed. Correct it, or leave it out.")
    return str(raw)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"

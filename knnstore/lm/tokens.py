"""From a document's text to token ids and the characters each token comes from, piece by piece.

A long text is tokenized in pieces. Where it is cut depends on the text alone, and the rule is part of the manifest: the same
text must give the same tokens in every version that reads the datastore.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from knnstore.errors import InvalidArgumentError
from knnstore.lm.backend import TextEncoders, text_encoders

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["PIECE_CHARS", "DocumentTokenizer", "TokenPiece", "cut_pieces"]

# Long enough that cuts are rare (one in some 16,000 tokens), short enough that a batch of pieces is a few megabytes.
PIECE_CHARS = 65_536
# Pieces given to the tokenizer's threads at once.
BATCH_PIECES = 8

# Greedy, so the last such place. A space comes first because no tokenizer joins it to what stands before it, while some join a
# line break to the punctuation before it. Both take time linear in the window.
_BEFORE_SPACE = re.compile(r".*\S(?= )", re.DOTALL)
_BEFORE_WHITESPACE = re.compile(r".*\S(?=\s)", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class TokenPiece:
    """Consecutive tokens of a document, without BOS and EOS, and the piece of text they stand for.

    ids: (n,) int32. starts, ends: (n,) int64, character offsets in the whole document's decoded text. Each token has at
    least one character; tokens that share a character share its span.
    """

    text: str
    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def cut_pieces(chunks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """The text in pieces of 1 to piece_chars characters, the same however the text is cut into chunks.

    A piece ends at the last place that has a character other than whitespace before it and a space after it; where there is
    none, at the last with any whitespace after it (a line break); where there is none either, after piece_chars characters.
    Time is linear in the text, memory in piece_chars and the longest chunk.
    """
    if piece_chars < 1:
        raise InvalidArgumentError(f"piece_chars is {piece_chars}, but a piece has at least one character.")
    waiting: list[str] = []
    n_waiting = 0
    for chunk in chunks:
        waiting.append(chunk)
        n_waiting += len(chunk)
        if n_waiting <= piece_chars:
            continue
        text, begin = "".join(waiting), 0
        # One character beyond the window must be known: a cut at its very end needs whitespace after it.
        while len(text) - begin > piece_chars:
            window = (begin, begin + piece_chars + 1)
            place = _BEFORE_SPACE.match(text, *window) or _BEFORE_WHITESPACE.match(text, *window)
            end = place.end() if place else begin + piece_chars
            yield text[begin:end]
            begin = end
        waiting, n_waiting = [text[begin:]], len(text) - begin
    if n_waiting:
        yield "".join(waiting)


class DocumentTokenizer:
    """A fast tokenizer under the rules by which documents become entries.

    Special-token strings in the text are plain text; no token is added, dropped or cut off. The tokenizer given is copied.
    bos_id: put by the caller before each document; None if the tokenizer has none. eos_id: put after the last token; None if
    it has none or eos=False. Raises ModelError for a tokenizer without the tokenizers library behind it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, eos: bool = True) -> None:
        self._encoders: TextEncoders = text_encoders(tokenizer)
        self.bos_id: int | None = _single_id(tokenizer.bos_token_id)
        self.eos_id: int | None = _single_id(tokenizer.eos_token_id) if eos else None

    @property
    def rule(self) -> dict[str, object]:
        """What the manifest keeps, so that later documents and queries are tokenized alike."""
        return {"piece_chars": PIECE_CHARS, "bos": self.bos_id is not None, "eos": self.eos_id is not None}

    def tokenize(self, chunks: Iterable[str]) -> Iterator[TokenPiece]:
        """The document's tokens in order, some eight pieces in memory at a time.

        Raises InvalidArgumentError for a lone surrogate. Errors of reading the chunks pass through.
        """
        offset = 0
        for text, encoding in self._encodings(chunks):
            spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)).reshape(-1, 2)
            starts, ends = _whole_spans(spans[:, 0], spans[:, 1], n_chars=len(text), fill_gaps=self._encoders.composes)
            yield TokenPiece(text, np.array(encoding.ids, np.int32), starts + offset, ends + offset)
            offset += len(text)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a query text (n,) int32, by the same rules, without BOS and EOS. Raises InvalidArgumentError for a lone surrogate."""
        ids = [np.array(encoding.ids, np.int32) for _, encoding in self._encodings((text,))]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def _encodings(self, chunks: Iterable[str]) -> Iterator[tuple[str, "Encoding"]]:
        pieces = cut_pieces(chunks)
        for piece in islice(pieces, 1):
            yield from _encode_batch(self._encoders.first, [piece])
        while batch := list(islice(pieces, BATCH_PIECES)):
            yield from _encode_batch(self._encoders.rest, batch)


def _encode_batch(encoder: "Tokenizer", pieces: list[str]) -> Iterator[tuple[str, "Encoding"]]:
    try:
        encodings = encoder.encode_batch(pieces, add_special_tokens=False)
    except TypeError as error:  # what the library says of a string that has no UTF-8 form
        raise InvalidArgumentError(
            "The text has a lone surrogate (U+D800 to U+DFFF), which is half a character. Decode the text as UTF-8 again, or remove it."
        ) from error
    return zip(pieces, encodings, strict=True)


def _whole_spans(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], *, n_chars: int, fill_gaps: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The spans made to hold at least one character each and, with fill_gaps, everything up to where the next token starts.

    A composing normalizer makes one character of several (e and an accent), and the library then gives the first alone.
    starts, ends: (n,), starts in ascending order.
    """
    starts = np.minimum(starts, n_chars - 1)
    ends = np.maximum(ends, starts + 1)
    if fill_gaps:
        ends = np.append(starts, n_chars)[np.searchsorted(starts, ends)]
    return starts, ends


def _single_id(token_id: object) -> int | None:
    return token_id if isinstance(token_id, int) else None

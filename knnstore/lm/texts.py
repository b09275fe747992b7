"""Texts that are to be predicted, not stored: token ids as the model sees them, and how many bytes the predicted tokens stand for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnstore.lm.corpus import ContentHash, Document
from knnstore.lm.tokens import DocumentTokenizer, TokenPiece

__all__ = ["Text", "read_texts"]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A document to be predicted.

    ids: (t,) int64: BOS where the model has one, then the text's tokens; no EOS, since a text may be cut anywhere. n_bytes: of the
    UTF-8 form of what ids[1:] stand for. content_hash: 64 hex digits over the decoded text, n_chars its length.
    """

    id: str
    source: str
    ids: NDArray[np.int64]
    n_bytes: int
    n_chars: int
    content_hash: str

    @property
    def why_not(self) -> str | None:
        """Why none of it can be predicted; None where some can."""
        if len(self.ids) >= 2:
            return None
        return "one token, which has nothing before it to predict it from" if self.n_chars else "empty"


def read_texts(tokenizer: DocumentTokenizer, documents: Iterable[Document]) -> Iterator[Text]:
    """The texts of documents, one at a time: 8 bytes a token of the one in memory. Raises CorpusError."""
    for document in documents:
        content, n_bytes = ContentHash(), 0
        ids = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64)
        parts = [ids]
        first = not len(ids)  # whether the first token, which nothing predicts, is still to come
        for piece in tokenizer.tokenize(content.through(document.chunks)):
            n_bytes += len(piece.text.encode("utf-8"))
            if first:
                n_bytes -= _unpredicted(piece)
                first = not len(piece.ids)
            parts.append(piece.ids.astype(np.int64))
        yield Text(document.id, document.source, np.concatenate(parts), n_bytes, content.n_chars, content.hexdigest())


def _unpredicted(piece: TokenPiece) -> int:
    """Bytes up to the end of a piece's first token. A character that it shares with the second counts as predicted."""
    if not len(piece.ids):
        return len(piece.text.encode("utf-8"))
    end = min(int(piece.ends[0]), int(piece.starts[1])) if len(piece.ids) > 1 else int(piece.ends[0])
    return len(piece.text[:end].encode("utf-8"))

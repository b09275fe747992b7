"""texts → positions → neighbours → tally: each token of some texts predicted once, and the time that takes."""

from collections.abc import Callable, Container, Iterable, Iterator
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from knnstore import filters
from knnstore.lm.corpus import Document
from knnstore.lm.distribution import neighbor_weights
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.own import OwnDocuments, is_stored
from knnstore.lm.retrieval import Retriever, retriever_for
from knnstore.lm.scoring import Positions, score_documents
from knnstore.lm.searched import Searched
from knnstore.lm.tallies import OfDomains, Tally
from knnstore.lm.texts import Text, read_texts
from knnstore.neighbors import Neighbors
from knnstore.progress import Progress
from knnstore.storage.calibration import LOGISTIC

__all__ = ["Prediction", "Texts"]

CELLS = 1 << 21  # (position, neighbour) pairs searched and mixed at a time: 2,048 positions with 1,024 neighbours, some 100 MB
REPORT_CELLS = 1 << 18  # likewise, where domains are told apart

Ids = NDArray[np.int64]


class Texts:
    """Texts as token ids, counted as they pass; each is read when it is asked for.

    n_documents, n_bytes: of those with a token to predict; n_own: how many of them the datastore has; seconds: that reading took. own:
    number of a text → the rows of its own documents, where it has any.
    """

    def __init__(self, lm: KnnLM, documents: Iterable[Document], own: OwnDocuments | None, progress: Progress) -> None:
        self._lm, self._documents, self._own, self._progress = lm, documents, own, progress
        self.n_documents = self.n_bytes = self.n_own = 0
        self.seconds = 0.0
        self.own: dict[int, tuple[filters.RowRange, ...]] = {}

    def ids(self) -> Iterator[Ids]:
        """Token ids of each text with a token to predict; their numbers are 0, 1, 2 …"""
        texts = read_texts(self._lm.document_tokenizer, self._documents)
        while True:
            begin = perf_counter()
            text = next(texts, None)
            taken = text is not None and self._take(text)
            self.seconds += perf_counter() - begin
            if text is None:
                return
            if taken:
                yield text.ids

    def _take(self, text: Text) -> bool:
        if text.why_not is not None:
            self._progress.note(f"{text.source}: left out ({text.why_not})")
            return False
        self._lm.check_ids(text.ids)
        if self._own is not None:
            if rows := self._own.rows_of(text):
                self.own[self.n_documents] = rows
                self.n_own += 1
        elif is_stored(self._lm.store.segments, text):
            self._progress.note(f"{text.source}: it is in the datastore, so its own entries predict it. Leave them out with --exclude-own.")
        self.n_documents += 1
        self.n_bytes += text.n_bytes
        return True


class Prediction:
    """Predicts texts and tallies what comes. n_searched: positions that a search was made for. seconds: of `lm`, `datastore`, `report`."""

    def __init__(self, lm: KnnLM, texts: Texts, searched: Searched, tally: Tally) -> None:
        self._lm, self._texts, self._searched, self._tally = lm, texts, searched, tally
        self._places = len(searched.domains) > 1  # to tell domains apart
        self._retriever = retriever_for(lm.store, lm.settings, places=self._places)
        self._without_own: tuple[int, Retriever] | None = None  # of the document that is being predicted
        self.n_searched = 0
        self.seconds = {"lm": 0.0, "datastore": 0.0, "report": 0.0}

    def run(self, context: int, stride: int, advance: Callable[[int], None]) -> None:
        """All of it. advance: told of tokens that were predicted."""
        lm, settings, own = self._lm, self._lm.settings, self._texts.own
        pieces = score_documents(
            lm.extractor,
            self._texts.ids(),
            vocab_size=lm.language_model.vocab_size,
            context=context,
            stride=stride,
            views=settings.retrieval == "confident" or (settings.gate is not None and settings.gate.kind == LOGISTIC),
        )
        while (piece := self._next(pieces)) is not None:
            for document, at in _stretches(piece.document, own, most=max(1, CELLS // settings.k)):
                self._add(piece, at, self._retriever if document is None else self._without(document))
                advance(at.stop - at.start)
            for document in [number for number in own if number < piece.document[-1]]:
                del own[document]  # a million texts may have some

    def _next(self, pieces: Iterator[Positions]) -> Positions | None:
        """The next piece. The time that takes is the model's, but for the reading of texts."""
        begin, reading = perf_counter(), self._texts.seconds
        piece = next(pieces, None)
        self.seconds["lm"] += perf_counter() - begin - (self._texts.seconds - reading)
        return piece

    def _without(self, document: int) -> Retriever:
        """What searches all but a text's own documents."""
        if self._without_own is None or self._without_own[0] != document:
            self._without_own = document, retriever_for(self._lm.store, self._lm.settings, self._texts.own[document], places=self._places)
        return self._without_own[1]

    def _add(self, piece: Positions, at: slice, retriever: Retriever) -> None:
        """Searches for some positions of a piece, and tallies them."""
        gold, log_p_lm = piece.gold[at], piece.log_p_lm[at]
        view = None if piece.view is None else piece.view[at]
        begin = perf_counter()
        found = retriever.find(piece.keys[at], view, sequence=piece.window[at], came=piece.before[at])
        mixed = mix_gold_tokens(gold, log_p_lm, view, found.neighbors, self._lm.settings)
        end = perf_counter()
        self.n_searched += int(found.searched.sum())
        step = max(1, REPORT_CELLS // found.neighbors.k)
        for first in range(0, len(gold), step):
            some = slice(first, first + step)
            of_domains = self._of_domains(gold[some], found.neighbors[some], mixed.log_p_knn[some])
            self._tally.add(gold[some], log_p_lm[some], mixed.log_p_knn[some], mixed.log_p[some], mixed.lmbda[some], of_domains)
        self.seconds["datastore"] += end - begin
        self.seconds["report"] += perf_counter() - end

    def _of_domains(self, gold: Ids, neighbors: Neighbors, log_p_knn: NDArray[np.float64]) -> OfDomains:
        m, temperature = len(self._searched.domains), self._lm.settings.temperature
        if m == 0:
            return OfDomains.of_none(len(gold))
        if m == 1:
            return OfDomains.of_one(neighbors.values[:, 0] >= 0, log_p_knn)
        weights = neighbor_weights(neighbors.distances, neighbors.values, temperature=temperature, log_weights=neighbors.log_weights)
        numbers, is_gold = self._searched.numbers_of(neighbors), neighbors.values == gold[:, None]
        return OfDomains.of(numbers, neighbors.distances, weights, is_gold, temperature=temperature, m=m)


def _stretches(documents: Ids, own: Container[int], *, most: int) -> Iterator[tuple[int | None, slice]]:
    """Positions that are searched together, at most `most` each: those of a document in `own`, with its number; of others, with None.

    documents: (n,) ascending.
    """
    begins = np.flatnonzero(np.diff(documents, prepend=-1))
    runs: list[tuple[int | None, int]] = []  # document, first position
    for number, begin in zip(documents[begins].tolist(), begins.tolist(), strict=True):
        document = number if number in own else None
        if not runs or document is not None or runs[-1][0] is not None:
            runs.append((document, begin))
    ends = [*(begin for _, begin in runs[1:]), len(documents)]
    for (document, begin), end in zip(runs, ends, strict=True):
        for first in range(begin, end, most):
            yield document, slice(first, min(first + most, end))

"""Where the tokens of a text come from: for each its probabilities, and the share that each document of the datastore has in it.

p = λ p_kNN + (1 - λ) p_LM, and p_kNN of a token is the sum of the weights of the neighbours that have it. So p is a sum, over the LM and
over documents, and a share is one of its parts divided by p.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.filters import document_domain
from knnstore.lm.distribution import neighbor_weights
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.mixing import LmView, gold_log_probs, mix_gold_tokens
from knnstore.neighbors import Context, Neighbors

if TYPE_CHECKING:
    from knnstore.lm.knnlm import KnnLM

__all__ = ["DocumentShare", "Others", "Source", "TokenTrace", "Trace", "token_texts", "trace", "trace_fields"]

DOCUMENTS = 4  # of one token that are named, with a passage each: more would not be read
LOGITS_CELLS = 1 << 26  # logits of one forward pass at most: 268 MB in float32; a longer text is run again for each piece
LONGEST_CHARACTER = 4  # tokens: bytes of a character in UTF-8

Ids = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One document's part in one token. share: of the token's p. neighbors: how many of the document's entries had a part.

    The rest is of the strongest of these neighbours. weight: its share of p_kNN, all tokens counted. distance: squared L2. context: its
    place in the document; left, token and right are always text, decoded from ids where the entry came without.
    """

    share: float
    neighbors: int
    distance: float
    weight: float
    context: Context


@dataclass(frozen=True, slots=True)
class Others:
    """Documents of a token that are not named: how many, and their share of its p together."""

    documents: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrace:
    """One token and what made it probable.

    text: its characters; empty where it ends inside of a character, which the next token then has. lmbda: λ, the weight of p_kNN in p;
    0 where nothing was found. share: λ p_kNN / p, the datastore's; lm_share: (1 - λ) p_LM / p, the LM's. They sum to 1; where p is 0
    all shares are 0. domains: share of each domain, largest first. sources: the documents with the largest shares; others: the rest.
    """

    id: int
    text: str
    p_lm: float
    p_knn: float
    p: float
    lmbda: float
    share: float
    lm_share: float
    domains: Mapping[str, float]
    sources: tuple[Source, ...]
    others: Others


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentShare:
    """A document's part in a text. share: mean over the text's tokens. tokens: how many of them it had a part in."""

    document: str
    domain: str
    source: str
    share: float
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A text and where it comes from. prompt: text of the tokens before the first new one, without a BOS. text: of the new ones.

    share, lm_share: means over the tokens; domains and documents likewise, every one, largest first. share is the sum of either.
    """

    prompt: str
    text: str
    tokens: tuple[TokenTrace, ...]
    share: float
    lm_share: float
    domains: Mapping[str, float]
    documents: tuple[DocumentShare, ...]


def trace(lm: "KnnLM", ids: Sequence[int] | NDArray[Any], n_prompt: int) -> Trace:
    """Where each token of ids[n_prompt:] comes from, given those before it.

    ids: (n,) token ids of one sequence as the model sees it, prompt first, without padding. How they were chosen does not matter:
    greedily, drawn, by beams, by another model. The numbers are those of a pass over the finished text with a search at each position:
    p is what model and datastore gave the token before any logits processor or warper (temperature, top-k, penalties, bans) changed it,
    and under `retrieval` other than "full" the decoding itself may have gone without a search. With a KV cache and in bfloat16, sums
    are taken in another order while decoding, so that distances and probabilities can differ from these in their last digits.
    Raises InvalidArgumentError where n_prompt leaves nothing before or after it, or the text is longer than the model can see.
    """
    ids = lm.check_ids(np.asarray(ids))
    if not 1 <= n_prompt < len(ids):
        raise InvalidArgumentError(
            f"n_prompt {n_prompt}: of {len(ids)} tokens, at least one must come before the new ones, and one be new."
        )
    longest = lm.language_model.max_positions
    if longest is not None and len(ids) - 1 > longest:
        raise InvalidArgumentError(f"{len(ids)} tokens: the model sees {longest} at most. Trace a shorter text.")
    gold = ids[n_prompt:]
    keys, log_p_lm, view = _predictions(lm.extractor, ids, n_prompt, vocab_size=lm.language_model.vocab_size)
    neighbors = lm.search(keys)
    mixed = mix_gold_tokens(gold, log_p_lm, view, neighbors, lm.settings)
    possible = np.isfinite(mixed.log_p)
    with np.errstate(divide="ignore"):
        log_lmbda, log_rest = np.log(mixed.lmbda), np.log1p(-mixed.lmbda)
    log_p = np.where(possible, mixed.log_p, 0.0)
    share, lm_share = (np.where(possible, np.exp(part - log_p), 0.0) for part in (log_lmbda + mixed.log_p_knn, log_rest + log_p_lm))
    found = _parts(neighbors, gold, share, temperature=lm.settings.temperature)
    texts = token_texts(lm.decode, ids, n_prompt)
    p_lm, p_knn, p = np.exp(log_p_lm), np.exp(mixed.log_p_knn), np.exp(mixed.log_p)
    tokens = tuple(
        TokenTrace(
            id=int(gold[i]),
            text=texts[i],
            p_lm=float(p_lm[i]),
            p_knn=float(p_knn[i]),
            p=float(p[i]),
            lmbda=float(mixed.lmbda[i]),
            share=float(share[i]),
            lm_share=float(lm_share[i]),
            **_of_token(lm.decode, found, i, neighbors),
        )
        for i in range(len(gold))
    )
    before = ids[:n_prompt]
    if before[0] == lm.document_tokenizer.bos_id:
        before = before[1:]
    documents = _document_shares(found, len(gold))
    return Trace(
        prompt=lm.decode(before.tolist()),
        text="".join(texts),
        tokens=tokens,
        share=float(share.mean()),
        lm_share=float(lm_share.mean()),
        domains=_by_domain((item.domain, item.share) for item in documents),
        documents=documents,
    )


def trace_fields(found: Trace) -> dict[str, Any]:
    """A trace as JSON has it: objects, lists, text and finite numbers. λ is `lambda`."""
    fields = asdict(found)
    for token in fields["tokens"]:
        token["lambda"] = token.pop("lmbda")
        token["sources"] = [{**source.pop("context"), **source} for source in token["sources"]]
        for source in token["sources"]:
            source["id"] = source.pop("token_id")
            source["metadata"] = dict(source["metadata"])
            del source["left_ids"], source["right_ids"]
    fields["tokens"], fields["documents"] = list(fields["tokens"]), list(fields["documents"])
    return fields


def token_texts(decode: Callable[[Sequence[int]], str], ids: Ids, first: int) -> list[str]:
    """The characters that each of ids[first:] adds to the text of those before it.

    A token that ends inside of a character adds none, the one that completes it adds it. Joined they are the text.
    """
    texts: list[str] = []
    # From where a character began: to a decoder, a run of bytes that begins inside of one may be none at all.
    start, done = 0, first
    before = decode(ids[start:done].tolist())
    for stop in range(first + 1, len(ids) + 1):
        text = decode(ids[start:stop].tolist())
        if text.endswith("\ufffd") and stop < len(ids) and stop - done < LONGEST_CHARACTER:
            texts.append("")
            continue
        same = next((i for i, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), min(len(before), len(text)))
        texts.append(text[same:])
        start, done = done, stop
        before = decode(ids[start:done].tolist())
    return texts


def _predictions(extractor: KeyExtractor, ids: Ids, n_prompt: int, *, vocab_size: int) -> tuple[NDArray[np.float32], Array, LmView]:
    """Keys (n, dim), log p_LM (n,) and what gates know of p_LM, before each of ids[n_prompt:].

    Logits are many where the vocabulary is large, so that a long text is run in pieces, each after all that is before it.
    """
    at_once = max(1, LOGITS_CELLS // vocab_size)
    all_keys, log_p, views = [], [], []
    for begin in range(n_prompt, len(ids), at_once):
        stop = min(begin + at_once, len(ids))
        inputs = torch.from_numpy(ids[None, : stop - 1]).to(extractor.model.device)
        keys, logits = extractor.keys_and_logits(inputs, last=stop - begin)
        of_piece, view = gold_log_probs(logits[0], ids[begin:stop], views=True)
        assert view is not None, "asked for"
        all_keys.append(keys[0].float().cpu().numpy())
        log_p.append(of_piece)
        views.append(view)
    return np.concatenate(all_keys), np.concatenate(log_p), LmView.joined(views)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts of documents in tokens, sorted by token and within it by share, largest first. All (m,).

    token, document: int64, numbers. share: float64, of p. neighbors: int64. strongest: int64, place among the token's neighbours; weight:
    float64, that one's share of p_kNN. names: (domain, id, source) of each document.
    """

    token: Ids
    document: Ids
    share: Array
    neighbors: Ids
    strongest: Ids
    weight: Array
    names: Sequence[tuple[str, str, str]]


def _parts(neighbors: Neighbors, gold: Ids, share: Array, *, temperature: float) -> _Parts:
    """Groups the neighbours that have the token by their document. gold, share: (n,), token ids and the datastore's share of p."""
    weights = neighbor_weights(neighbors.distances, neighbors.values, temperature=temperature, log_weights=neighbors.log_weights)
    token, place = np.nonzero((neighbors.values == gold[:, None]) & (weights > 0.0) & (share > 0.0)[:, None])
    weight = weights[token, place]
    document, names = _documents_of(neighbors, token, place)
    # By (token, document), in each the strongest first: the first of a group is the one to show.
    order = np.lexsort((place, -weight, document, token))
    token, place, weight, document = token[order], place[order], weight[order], document[order]
    begins = np.flatnonzero((np.diff(token, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0))
    sums = np.add.reduceat(weight, begins) if len(begins) else np.zeros(0)
    p_knn = np.bincount(token, weight, minlength=len(gold))
    token_of, document_of = token[begins], document[begins]
    share_of = share[token_of] * sums / p_knn[token_of]
    by_share = np.lexsort((document_of, -share_of, token_of))
    return _Parts(
        token=token_of[by_share],
        document=document_of[by_share],
        share=share_of[by_share],
        neighbors=np.diff(begins, append=len(token))[by_share],
        strongest=place[begins][by_share],
        weight=weight[begins][by_share],
        names=names,
    )


def _documents_of(neighbors: Neighbors, token: Ids, place: Ids) -> tuple[Ids, list[tuple[str, str, str]]]:
    """Number of the document of each neighbour at (token, place), and the documents: (domain, id, source), sorted.

    Each document's record is read once. The parts of a document that lies in several segments are one document.
    """
    segment, row = neighbors.segments[token, place], neighbors.rows[token, place]
    document = np.empty(len(row), np.int64)
    numbers: dict[tuple[str, str], int] = {}
    names: list[tuple[str, str, str]] = []
    for number in np.unique(segment).tolist():
        source, here = neighbors.source[number], segment == number
        first_rows, inverse = np.unique(source.contexts.first_row_of(row[here]), return_inverse=True)
        of_first_row = np.empty(len(first_rows), np.int64)
        for i, first_row in enumerate(first_rows.tolist()):
            record, domain = source.contexts.document_at(first_row), document_domain(source.record, first_row)
            of_first_row[i] = numbers.setdefault((domain, record.id), len(numbers))
            if len(names) < len(numbers):
                names.append((domain, record.id, record.source))
        document[here] = of_first_row[inverse]
    rank = sorted(range(len(names)), key=names.__getitem__)
    rank_of = np.empty(len(names), np.int64)
    rank_of[rank] = np.arange(len(names))
    return rank_of[document] if len(names) else document, [names[i] for i in rank]


def _of_token(decode: Callable[[Sequence[int]], str], found: _Parts, token: int, neighbors: Neighbors) -> dict[str, Any]:
    """The fields of a TokenTrace that are about documents."""
    begin, stop = np.searchsorted(found.token, [token, token + 1]).tolist()
    named = min(stop, begin + DOCUMENTS)
    shares = found.share[begin:stop].tolist()
    return {
        "domains": _by_domain(zip((found.names[i][0] for i in found.document[begin:stop].tolist()), shares, strict=True)),
        "sources": tuple(
            Source(
                share=float(found.share[i]),
                neighbors=int(found.neighbors[i]),
                distance=float(neighbors.distances[token, found.strongest[i]]),
                weight=float(found.weight[i]),
                context=_as_text(decode, neighbors.context(token, int(found.strongest[i]))),
            )
            for i in range(begin, named)
        ),
        "others": Others(stop - named, float(found.share[named:stop].sum())),
    }


def _as_text(decode: Callable[[Sequence[int]], str], context: Context) -> Context:
    """The context with text for ids where the entry came without; a token without characters, such as an EOS, by its name."""
    return replace(
        context,
        left=decode(context.left_ids) if context.left is None else context.left,
        token=context.token or decode([context.token_id]),
        right=decode(context.right_ids) if context.right is None else context.right,
    )


def _by_domain(shares: Iterator[tuple[str, float]]) -> dict[str, float]:
    """Shares summed by domain, largest first, by name where equal."""
    sums: dict[str, float] = {}
    for domain, share in shares:
        sums[domain] = sums.get(domain, 0.0) + share
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _document_shares(found: _Parts, n_tokens: int) -> tuple[DocumentShare, ...]:
    n = len(found.names)
    shares, counts = np.bincount(found.document, found.share, minlength=n) / n_tokens, np.bincount(found.document, minlength=n)
    return tuple(
        DocumentShare(document=name, domain=domain, source=source, share=float(shares[i]), tokens=int(counts[i]))
        for i, (domain, name, source) in ((i, found.names[i]) for i in np.argsort(-shares, kind="stable").tolist())
    )

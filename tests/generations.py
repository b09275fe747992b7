"""What `generate --json` may print, made by hand or drawn: for tests of what shows it."""

from typing import Any

from hypothesis import strategies as st

__all__ = ["generations", "made"]

UNSAID = dict.fromkeys(("max_new_tokens", "top_k", "top_p", "sampling_temperature", "seed"))
SETTINGS = {
    "store": "made.knn",
    "snapshot": 3,
    "model": "default-gpt2",
    "k": 64,
    "nprobe": 8,
    "exact": False,
    "lambda": 0.25,
    "gate": None,
    "temperature": 12.5,
    "retrieval": "full",
    "decoding": {"num_beams": 1, "sample": False, **UNSAID},
}


def source(document: str, share: float, token: str, *, token_index: int = 7, domain: str = "dickens") -> dict[str, Any]:
    return {
        "share": share,
        "neighbors": 3,
        "distance": 41.5,
        "weight": 0.2,
        "left": f"before it in {document},",
        "token": token,
        "right": " and after it",
        "id": 5,
        "document": document,
        "token_index": token_index,
        "domain": domain,
        "source": f"corpus/{document}",
        "metadata": {},
        "char_start": 1_234,
        "char_end": 1_240,
    }


def token(text: str, sources: list[dict[str, Any]], *, others: tuple[int, float] = (0, 0.0)) -> dict[str, Any]:
    """One token of which the sources and others have their shares, and the LM the rest."""
    share = sum(item["share"] for item in sources) + others[1]
    domains: dict[str, float] = {}
    for item in sources:
        domains[item["domain"]] = domains.get(item["domain"], 0.0) + item["share"]
    return {
        "id": 5,
        "text": text,
        "p_lm": 0.1,
        "p_knn": 0.3,
        "p": 0.15,
        "lambda": 0.25,
        "share": share,
        "lm_share": 1 - share,
        "domains": domains,
        "sources": sources,
        "others": {"documents": others[0], "share": others[1]},
    }


def sequence(tokens: list[dict[str, Any]], *, ended: bool = False) -> dict[str, Any]:
    """The means of its tokens."""
    n, documents, domains = len(tokens), {}, {}
    for item in (item for one in tokens for item in one["sources"]):
        name = item["domain"], item["document"]
        documents[name] = documents.get(name, 0.0) + item["share"] / n
        domains[name[0]] = domains.get(name[0], 0.0) + item["share"] / n
    return {
        "text": "".join(one["text"] for one in tokens),
        "tokens": tokens,
        "share": sum(one["share"] for one in tokens) / n,
        "lm_share": sum(one["lm_share"] for one in tokens) / n,
        "domains": dict(sorted(domains.items(), key=lambda pair: -pair[1])),
        "documents": [
            {"document": name, "domain": domain, "source": f"corpus/{name}", "share": share, "tokens": 1}
            for (domain, name), share in sorted(documents.items(), key=lambda pair: -pair[1])
        ],
        "ended": ended,
    }


def made(*, name: str = "carol.txt", prompt: str = "Marley was", ended: bool = True, texts: int = 1) -> dict[str, Any]:
    """A text of eight tokens with everything that may be in one: all of the datastore, none of it, a newline, half a character, an EOS.

    name: of the document with the largest share.
    """
    tokens = [
        token(" dead", [source(name, 0.75, " dead"), source("law.txt", 0.15, " dead", domain="law")], others=(4, 0.1)),
        token(":", [source(name, 0.5, ":", token_index=8)]),
        token("\n", [source("law.txt", 0.3, "\n", domain="law")]),
        token(" to", []),
        token("", [source("hard-times.txt", 0.2, "")]),
        token("é", [source("hard-times.txt", 0.004, "é")]),
        token(" begin", [source(f"{i}.txt", 0.06 - 0.01 * i, " begin") for i in range(4)], others=(9, 0.02)),
        token("<|endoftext|>", [source(name, 0.1, "<|endoftext|>")]),
    ]
    return {"prompt": prompt, **SETTINGS, "sequences": [sequence(tokens, ended=ended) for _ in range(texts)]}


any_text = st.text(st.characters(), max_size=20)
shares = st.floats(0, 0.2)


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    """Any texts, names and shares."""
    names, domains = draw(st.lists(any_text, min_size=1, max_size=4)), draw(st.lists(any_text, min_size=1, max_size=2))
    texts = []
    for _ in range(draw(st.integers(1, 2))):
        tokens = []
        for _ in range(draw(st.integers(1, 4))):
            found = []
            for name in names[: draw(st.integers(0, len(names)))]:
                one = source(name, draw(shares), draw(any_text), token_index=draw(st.integers(0, 9)), domain=draw(st.sampled_from(domains)))
                beside = {"left": draw(any_text), "right": draw(any_text), "char_start": draw(st.none() | st.integers(0, 10**9))}
                found.append({**one, **beside})
            tokens.append(token(draw(any_text), found, others=(draw(st.integers(0, 3)), draw(shares))))
        texts.append(sequence(tokens, ended=draw(st.booleans())))
    return {"prompt": draw(any_text), **SETTINGS, "sequences": texts}

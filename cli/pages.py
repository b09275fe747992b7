"""One page of HTML with a text and where each of its tokens comes from. It loads nothing: styles and script stand in it.

Whatever comes from the prompt, the model or a document is escaped; the page's policy lets no script run but its own (by its hash).
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from .generation_report import decoding_words
from .text import counted, visible, visible_token

__all__ = ["generation_page"]

COLORS = 6  # documents with a colour of their own, those with the largest shares (pages.css has as many); the rest share one more
ROWS = 12  # documents in the table
SHOWN = 0.005  # share of a token from which on a document is named and coloured
TITLE = 60  # characters

Fields = Mapping[str, Any]
Colors = Mapping[tuple[str, str], int]


def generation_page(fields: Fields) -> str:
    """The page. fields: as `generate --json` prints them."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8").strip() for name in ("pages.css", "pages.js"))
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    sequences = fields["sequences"]
    first = sequences[0]["tokens"]
    title = " ".join((fields["prompt"] + "".join(token["text"] for i, token in enumerate(first) if not _ends(sequences[0], i))).split())
    colors, n = _colors(sequences), len(sequences)
    sections = "\n".join(_section(fields["prompt"], sequence, i, n, colors) for i, sequence in enumerate(sequences))
    details = "\n".join(
        _detail(token, _place(i, number), number, len(sequence["tokens"]), colors, end=_ends(sequence, number))
        for i, sequence in enumerate(sequences)
        for number, token in enumerate(sequence["tokens"])
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title[:TITLE] + "…" * (len(title) > TITLE))}</title>
<style>
{style}
</style>
</head>
<body>
<header><h1>A text and its sources</h1><p>{_summary(sequences)}</p></header>
<div class="columns">
<main>
{sections}
</main>
<aside aria-label="Where a token comes from" aria-live="polite">
<div class="turn"><button type="button" value="-1" aria-label="the token before">←</button>\
<button type="button" value="1" aria-label="the next token">→</button><button type="button" value="0" aria-label="close">×</button></div>
<div class="how soft">
<p>Point at a token, tap it, or go through the text with Tab and the arrow keys: here is where it comes from.</p>
<p>The probability of a token is a sum: p = λ · p<sub>kNN</sub> + (1 − λ) · p<sub>LM</sub>. The language model gives p<sub>LM</sub>.
The datastore gives p<sub>kNN</sub>: it has the passages that are nearest to the text so far, and each has a weight for the token that
comes next there.</p>
<p>So each document has a share of the sum. The more a token owes to the datastore, the darker it is marked.</p>
</div>
{details}
</aside>
</div>
<footer>{_settings(fields)}</footer>
<script>
{script}
</script>
</body>
</html>
"""


def _text(text: str, *, keep: str = "") -> str:
    """A string as HTML, with control characters as signs (keep: but for these): in markup and in attributes."""
    return escape(visible(text, keep=keep))


def _place(sequence: int, number: int) -> str:
    """The fragment that opens a token's details."""
    return f"t{number + 1}" if sequence == 0 else f"s{sequence + 1}-t{number + 1}"


def _ends(sequence: Fields, number: int) -> bool:
    return bool(sequence["ended"]) and number == len(sequence["tokens"]) - 1


def _colors(sequences: Sequence[Fields]) -> Colors:
    """The colour of each document, the same in all texts: the first ones for those with the largest shares."""
    shares: dict[tuple[str, str], float] = {}
    for sequence in sequences:
        for item in sequence["documents"]:
            name = item["domain"], item["document"]
            shares[name] = shares.get(name, 0.0) + item["share"]
    return {name: min(i, COLORS) for i, name in enumerate(sorted(shares, key=lambda name: -shares[name]))}


def _summary(sequences: Sequence[Fields]) -> str:
    n_tokens = sum(len(sequence["tokens"]) for sequence in sequences)
    texts = f"{counted(len(sequences), 'text')}, " if len(sequences) > 1 else ""
    share = sum(sequence["share"] * len(sequence["tokens"]) for sequence in sequences) / n_tokens
    return f"{texts}{counted(n_tokens, 'token')}; {_percent(share)} of their probability is from the datastore"


def _section(prompt: str, sequence: Fields, number: int, of: int, colors: Colors) -> str:
    heading = f"<h2>Text {number + 1} of {of}</h2>\n" if of > 1 else ""
    tokens = "".join(_token(token, _place(number, i), colors, end=_ends(sequence, i)) for i, token in enumerate(sequence["tokens"]))
    legend = (
        '<p class="legend"><span>language model</span><span class="scale" role="img" aria-label="no mark to a strong one"></span>'
        "<span>datastore</span></p>"
    )
    return f"""<section>
{heading}<p class="text"><span class="prompt">{_text(prompt, keep=chr(10))}</span>{tokens}</p>
{legend}
{_table(sequence, colors)}
</section>"""


def _token(token: Fields, place: str, colors: Colors, *, end: bool) -> str:
    shares = {"s": token["share"]}
    for source in token["sources"]:
        color = colors[source["domain"], source["document"]]
        if color < COLORS:
            shares[f"d{color}"] = source["share"]
    style = ";".join(f"--{name}:{share:.2f}".replace("0.", ".") for name, share in shares.items() if share >= SHOWN)
    # The spaces before a word are left without a mark: at the end of a line they would be a mark without a word.
    text = token["text"]
    word = text.lstrip(" ") or text
    spaces = " " * (len(text) - len(word) or end)
    return f'{spaces}<a class="t" href="#{place}"' + (f' style="{style}"' if style else "") + f">{_shown(word, end=end)}</a>"


def _shown(text: str, *, end: bool) -> str:
    """A token in the text. What would have no width has a sign."""
    if end:
        return f'<span class="sign">{_text(text)}</span>'
    if not text:
        return '<span class="sign">▫</span>'
    if not text.strip():
        return _text(text, keep="\n").replace("\n", '<span class="sign">⏎</span>\n')
    return _text(text, keep="\n")


def _signed(text: str) -> str:
    """A token by itself, with signs for the spaces at its ends."""
    shown = visible_token(text)
    word = shown.strip("␣")
    before, after = (
        f'<span class="sign">{part}</span>' * bool(part)
        for part in (shown[: shown.find(word)] if word else shown, shown[len(shown.rstrip("␣")) :] if word else "")
    )
    return f"{before}{_text(word)}{after}" or '<span class="sign">▫</span>'


def _table(sequence: Fields, colors: Colors) -> str:
    documents = sequence["documents"]
    most = max([sequence["lm_share"], *(item["share"] for item in documents[:1])]) or 1.0
    rows = [_row("lm", "the language model", "", sequence["lm_share"], most)]
    for item in documents[:ROWS]:
        color = colors[item["domain"], item["document"]]
        name = _text(item["document"])
        if color < COLORS:
            name = f'<button type="button" value="{color}" aria-pressed="false">{name}</button>'
        rows.append(_row(f"k{color}", name, _text(item["domain"]), item["share"], most))
    rest = documents[ROWS:]
    if rest:
        rows.append(_row(f"k{COLORS}", counted(len(rest), "other document"), "", sum(item["share"] for item in rest), most))
    domains = ""
    if len(sequence["domains"]) > 1:
        shares = ", ".join(f"{_text(domain)} {_percent(share)}" for domain, share in list(sequence["domains"].items())[:ROWS])
        domains = f'<p class="domains">By domain: {shares}{", …" if len(sequence["domains"]) > ROWS else ""}</p>\n'
    hint = '<p class="hint">Point at a document to see its part in each token; press it to keep it.</p>' if documents else ""
    return f"""<table>
<thead><tr><th>source</th><th class="domain">domain</th><th colspan="2">share of the probability</th></tr></thead>
<tbody>
{"".join(rows)}</tbody>
</table>
{domains}{hint}"""


def _row(color: str, name: str, domain: str, share: float, most: float) -> str:
    bar = f'<i class="{color}" style="width:{100 * share / most:.1f}%"></i>' if share else ""
    return (
        f'<tr><td class="name"><span class="dot {color}"></span>{name}</td><td class="domain soft">{domain}</td>'
        f'<td class="right num">{_percent(share)}</td><td class="bar">{bar}</td></tr>\n'
    )


def _detail(token: Fields, place: str, number: int, of: int, colors: Colors, *, end: bool) -> str:
    text = _text(token["text"]) if end else _signed(token["text"])
    named = [source for i, source in enumerate(token["sources"]) if i == 0 or source["share"] >= SHOWN]
    sources = "".join(_source(source, colors[source["domain"], source["document"]]) for source in named)
    n_others = token["others"]["documents"] + len(token["sources"]) - len(named)
    others = token["others"]["share"] + sum(source["share"] for source in token["sources"][len(named) :])
    rest = f'<p class="rest">{counted(n_others, "more document")}: {_percent(others)}</p>\n' if n_others else ""
    if not sources:
        none = "The datastore has nothing near." if token["lambda"] == 0 else "No passage that is near goes on with this token."
        rest = f'<p class="rest">{none}</p>\n'
    return f"""<article class="d" id="{place}">
<p class="place">token {number + 1} of {of}</p>
<h3{' class="end"' if end else ""}>{text}</h3>
<p>{_percent(token["share"])} of its probability is from the datastore</p>
{_stack(token, colors)}
{_probabilities(token)}
<ol class="sources">
{sources}</ol>
{rest}</article>"""


def _stack(token: Fields, colors: Colors) -> str:
    """The token's probability as one bar: a piece for the LM and one for each document."""
    parts = [("lm", token["lm_share"], "the language model")]
    parts += [(f"k{colors[item['domain'], item['document']]}", item["share"], item["document"]) for item in token["sources"]]
    parts.append((f"k{COLORS}", token["others"]["share"], "others"))
    parts = [part for part in parts if part[1] > 0.0]
    label = ", ".join(f"{name} {_percent(share, plain=True)}" for _, share, name in parts)
    pieces = "".join(f'<i class="{color}" style="flex:{share:.4f}"></i>' for color, share, _ in parts)
    return f'<div class="stack" role="img" aria-label="{_text(label)}">{pieces}</div>'


def _probabilities(token: Fields) -> str:
    """p_LM, p_kNN and p on one scale, and how the third is made of the others."""
    names = {"p_lm": "p<sub>LM</sub>", "p_knn": "p<sub>kNN</sub>", "p": "p"}
    most = max(token[name] for name in names) or 1.0
    bars = "".join(
        f'<dt>{shown}</dt><dd class="track"><i style="width:{100 * token[name] / most:.1f}%"></i></dd>'
        f'<dd class="num">{_probability(token[name])}</dd>\n'
        for name, shown in names.items()
    )
    lmbda = f"{token['lambda']:.2f}"
    made = (
        f"p = {lmbda} · {_probability(token['p_knn'])} + {1 - float(lmbda):.2f} · {_probability(token['p_lm'])}, with λ = {lmbda}"
        if token["lambda"]
        else "λ = 0: p is that of the language model"
    )
    return f'<dl class="ps">\n{bars}</dl>\n<p class="sum num">{made}</p>'


def _source(source: Fields, color: int) -> str:
    """One document and its strongest passage."""
    word = source["token"].lstrip(" ") if source["token"].strip() else ""
    token = _text(word) if word else _text(visible_token(source["token"]))
    left, right = (_text(source[side], keep="\n") for side in ("left", "right"))
    left += " " * (bool(word) and word != source["token"])
    facts: list[str] = [_text(source["domain"])]
    if not source["source"].endswith(source["document"]):
        facts.append(_text(source["source"]))
    if source["char_start"] is None:
        facts.append(f"token {source['token_index']:,}")
    else:
        facts.append(f"character {source['char_start']:,}")
    facts.append(f"distance {source['distance']:.1f}")
    if source["neighbors"] > 1:
        facts.append(f"the nearest of {source['neighbors']:,} places")
    return f"""<li><p class="name"><span><span class="dot k{color}"></span>{_text(source["document"])}</span>\
<span class="num">{_percent(source["share"])}</span></p>
<blockquote>…{left}<mark>{token}</mark>{right}…</blockquote>
<p class="facts">{" · ".join(facts)}</p></li>
"""


def _settings(fields: Fields) -> str:
    """What the text was made with, in a few lines."""
    searched = "every key compared" if fields["exact"] else f"nprobe {fields['nprobe']}"
    gate = "λ by a gate" if fields["gate"] else f"λ {fields['lambda']:g}"
    lines = [
        f"datastore {_text(fields['store'])}, snapshot {fields['snapshot']}; model {_text(fields['model'])}",
        f"k {fields['k']}, {searched}, {gate}, temperature {fields['temperature']:g}"
        + (f", retrieval {fields['retrieval']}" if fields["retrieval"] != "full" else ""),
        "decoded " + _text(decoding_words(fields["decoding"])),
    ]
    return "<br>\n".join(lines)


def _percent(share: float, *, plain: bool = False) -> str:
    """A share for people: whole percents, and what is not quite nothing or all as such."""
    if 0.0 < share < 0.01:
        return "under 1%" if plain else "&lt;1%"
    if 0.99 < share < 1.0:
        return "over 99%" if plain else "&gt;99%"
    return f"{100 * share:.0f}%"


def _probability(p: float) -> str:
    """Three digits; below 0.0001 only that."""
    if 0.0 < p < 0.0001:
        return "&lt;0.0001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.3f}"

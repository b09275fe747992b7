"""What `knnstore generate` shows on a terminal: the text, marked by what it owes to the datastore, and under it its sources."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from .page import GAP, Page, cut_left, cut_right, padded
from .text import counted, visible

__all__ = ["Passage", "decoding_words", "passages", "print_generation"]

Fields = Mapping[str, Any]

# Both colours are said, so that they go together whatever the terminal's own are.
LEVELS = ((0.1, "#1d1b17 on #fdf0d5"), (0.25, "#1d1b17 on #fbdfaa"), (0.5, "#1d1b17 on #f9c76f"), (0.75, "#1d1b17 on #f7aa28"))
HALF = 0.5  # share from which on a token stands in brackets, where there are no colours
DOCUMENTS = 10  # of a text that are listed
PASSAGES = 8  # of a text that are shown
MIN_CONTEXT = 20  # columns that a passage keeps, however narrow the terminal


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of a text whose strongest sources follow each other in a document too. first, last: the sources of the first and last one.

    share: of their p, the mean.
    """

    text: str
    share: float
    first: Fields
    last: Fields
    n_tokens: int


def passages(tokens: Sequence[Fields]) -> list[Passage]:
    """The passages that a text owes most to, the largest part first (share times tokens). tokens: as `generate --json` prints them."""
    found: list[Passage] = []
    goes_on = None  # the place in a document that would go on with the last passage
    for token in tokens:
        source = token["sources"][0] if token["sources"] else None
        if source is None:
            goes_on = None
            continue
        place = source["domain"], source["document"], source["token_index"]
        if place == goes_on:
            last = found.pop()
            n = last.n_tokens + 1
            share = (last.share * last.n_tokens + source["share"]) / n
            found.append(Passage(last.text + source["token"], share, last.first, source, n))
        else:
            found.append(Passage(source["token"], source["share"], source, source, 1))
        goes_on = (*place[:2], place[2] + 1)
    return sorted(found, key=lambda passage: -passage.share * passage.n_tokens)


def print_generation(fields: Fields) -> None:
    """fields: as `generate --json` prints them."""
    page, sequences = Page(), fields["sequences"]
    for i, sequence in enumerate(sequences):
        if len(sequences) > 1:
            page.add(Text(f"text {i + 1} of {len(sequences)}", style="bold"), Text(""))
        page.add(_marked(page, fields["prompt"], sequence), Text(""))
        n = counted(len(sequence["tokens"]), "token")
        page.add(Text(f"{n}; {_percent(sequence['share'])} of their probability is from the datastore"), _legend(page), Text(""))
        page.add(_documents(page, sequence))
        shown = passages(sequence["tokens"])[:PASSAGES]
        if shown:
            page.add(Text(""), _passages(page, shown))
        page.add(Text(""))
    page.add(Text("\n".join(_settings(fields)), style="dim"))
    page.print()


def _marked(page: Page, prompt: str, sequence: Fields) -> Text:
    """Prompt and text. Spaces before a word have no mark: a line may be broken there."""
    shown = Text.assemble((visible(prompt, keep="\n"), "dim"))
    tokens = sequence["tokens"]
    for i, (token, inside) in enumerate(zip(tokens, _brackets(tokens), strict=True)):
        text = visible(token["text"], keep="\n")
        if sequence["ended"] and i == len(tokens) - 1:
            shown.append(f" {text}", style="dim")
            continue
        if page.colors:
            word = text.lstrip(" \n")
            shown.append(text[: len(text) - len(word)])
            shown.append(word, style=_level(token["share"]))
        else:
            word = text.lstrip(" \n") or text
            opens, closes = inside
            shown.append(text[: len(text) - len(word)] + "[" * opens + word + "]" * closes)
    return shown


def _brackets(tokens: Sequence[Fields]) -> Iterator[tuple[bool, bool]]:
    """Whether a bracket opens before each token, and closes after it: around those that are more than half the datastore's."""
    high = [token["share"] >= HALF and bool(token["text"].strip()) for token in tokens]
    for i, here in enumerate(high):
        yield here and not (i and high[i - 1]), here and not (i + 1 < len(high) and high[i + 1])


def _level(share: float) -> str:
    return next((style for least, style in reversed(LEVELS) if share >= least), "")


def _legend(page: Page) -> Text:
    if not page.colors:
        return Text("[…]: at least half of each token’s probability")
    legend = Text("the datastore’s share of a token: ")
    bounds = [*(least for least, _ in LEVELS), 1.0]
    legend.append(f"under {_percent(bounds[0])} ")
    for (least, style), to in zip(LEVELS, bounds[1:], strict=True):
        legend.append(f" {100 * least:.0f}–{100 * to:.0f}% ", style=style)
    return legend


def _documents(page: Page, sequence: Fields) -> Any:
    rows = [("the language model", "", sequence["lm_share"])]
    rows += [(visible(item["document"]), visible(item["domain"]), item["share"]) for item in sequence["documents"][:DOCUMENTS]]
    rest = sequence["documents"][DOCUMENTS:]
    if rest:
        rows.append((counted(len(rest), "other document"), "", sum(item["share"] for item in rest)))
    most = max(share for _, _, share in rows) or 1.0
    names = min(max(cell_len(name) for name, _, _ in rows), max(20, page.width // 3))
    domains = min(max(6, *(cell_len(domain) for _, domain, _ in rows)), max(8, page.width // 8))
    bar = max(4, min(40, page.width - names - domains - 6 - 4 * GAP))
    table = page.table()
    for title, width in (("source", names), ("domain", domains), ("share", 5), ("", bar)):
        table.add_column(title, width=width, no_wrap=True, justify="right" if title == "share" else "left")
    for i, (name, domain, share) in enumerate(rows):
        color = "" if i == 0 else "yellow"
        table.add_row(
            Text(cut_left(name, names)), Text(cut_right(domain, domains)), _percent(share), Text(page.bar(share / most, bar), style=color)
        )
    return table


def _passages(page: Page, shown: Sequence[Passage]) -> Any:
    """One line each: what the text has in common with the document in the middle, between what stands before and after it there."""
    documents = [visible(passage.first["document"]) for passage in shown]
    document_width = min(max(8, *map(cell_len, documents)), max(8, page.width // 4))
    width = max(MIN_CONTEXT, page.width - 6 - 5 - document_width - 4 * GAP)
    tokens = [_one_line(passage.text.strip()) or visible(passage.text) for passage in shown]
    if not page.colors:
        tokens = [f"[{token}]" for token in tokens]
    token_width = min(max(map(cell_len, tokens)), width * 2 // 3)
    left_width = (width - token_width) // 2
    table = page.table()
    table.add_column("tokens", width=6, justify="right", no_wrap=True)
    table.add_column("share", width=5, justify="right", no_wrap=True)
    table.add_column(padded("", left_width) + "strongest passages", width=width, no_wrap=True)
    table.add_column("document", width=document_width, no_wrap=True)
    for passage, token, document in zip(shown, tokens, documents, strict=True):
        spaces = " " * (passage.text[:1] == " ")
        left = cut_left(_one_line(passage.first["left"]) + spaces, left_width)
        token = cut_right(token, token_width)
        right = cut_right(_one_line(passage.last["right"]), width - left_width - cell_len(token))
        line = Text.assemble(" " * (left_width - cell_len(left)), (left, "dim"), (token, _level(passage.share) or "bold"), (right, "dim"))
        table.add_row(str(passage.n_tokens), _percent(passage.share), line, Text(cut_left(document, document_width)))
    return table


def _one_line(text: str) -> str:
    """The text with each run of spaces and newlines as one space."""
    words = " ".join(text.split())
    return visible(" " * (text[:1].isspace()) + words + " " * (text[-1:].isspace() and bool(words)))


def _settings(fields: Fields) -> list[str]:
    searched = "every key" if fields["exact"] else f"nprobe {fields['nprobe']}"
    weight = f"λ by a gate ({fields['gate']})" if fields["gate"] else f"λ {fields['lambda']:g}"
    retrieval = "" if fields["retrieval"] == "full" else f", retrieval {fields['retrieval']}"
    return [
        f"snapshot {fields['snapshot']}, k {fields['k']}, {searched}, {weight}, temperature {fields['temperature']:g}{retrieval}",
        f"decoded {decoding_words(fields['decoding'])}",
    ]


def decoding_words(options: Fields) -> str:
    """How the tokens were chosen."""
    how: list[str] = []
    if options["num_beams"] > 1:
        how.append(f"with {options['num_beams']} beams")
    if options["sample"]:
        limits = [f"{name} {options[name]:g}" for name in ("top_k", "top_p", "sampling_temperature") if options[name] is not None]
        how.append(f"by sampling ({', '.join([*limits, 'seed ' + str(options['seed'])])})".replace("_", " "))
    return " and ".join(how) or "greedily"


def _percent(share: float) -> str:
    """A share in whole percents; what is not quite nothing or all as such."""
    if 0.0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1.0 else f"{100 * share:.0f}%"

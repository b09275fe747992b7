"""`knnstore demo`: the whole way on the sample book, in a minute or two."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option
from .query import query_fields

__all__ = ["demo"]

SAMPLE = "a-christmas-carol.txt"
PROMPT = "said Scrooge’s"
TOP = 5


@click.command(cls=ExampleCommand, example="knnstore demo")
@click.option("--store", "-s", metavar="PATH", help="Keep the datastore there.  [default: a temporary folder, removed at the end]")
@quiet_option
@json_option
def demo(store: str | None, quiet: bool, as_json: bool) -> None:
    """See it all on a short book: build, query, compare.

    The first four fifths of A Christmas Carol become a datastore for the small model that ships with knnstore; the last fifth
    is predicted without and with it. No network is needed.
    """
    from .progress import shown_progress

    with _work_folder() as work, shown_progress(starting="loading the model", quiet=quiet) as progress:
        from knnstore.lm.evaluate import perplexity

        known, unknown = _sample_parts()
        book = work / SAMPLE
        book.write_text(known, encoding="utf-8", newline="")
        with knnstore.create(store or work / "demo.knn", [book], domain="dickens", progress=progress) as built:
            lm = knnstore.KnnLM.load(built)
            queried = query_fields(lm, lm.predict(PROMPT), PROMPT, TOP)
            evaluation = perplexity(lm, unknown, progress=progress)
            fields: dict[str, Any] = {
                "store": built.info(),
                "query": queried,
                "perplexity": {
                    "tokens": evaluation.tokens,
                    "without": evaluation.lm,
                    "with": evaluation.mixed,
                    "gain_percent": 100.0 * (1.0 - evaluation.mixed / evaluation.lm),
                    "helped": evaluation.helped,
                },
            }
    if as_json:
        from .output import print_json

        print_json(fields)
    else:
        from .render import print_demo

        print_demo(fields, lm.decode, kept=store)


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="knnstore-demo-") as folder:
        yield Path(folder)


def _sample_parts() -> tuple[str, str]:
    """The first four fifths of the sample book and the rest, cut at a paragraph."""
    from importlib.resources import files

    text = files("knnstore").joinpath("samples", SAMPLE).read_bytes().decode("utf-8")
    cut = text.rindex("\n\n", 0, len(text) * 4 // 5) + 2
    return text[:cut], text[cut:]

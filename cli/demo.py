"""`knnstore demo`: the whole way on the sample book, in a minute or two."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option
from .query import query_fields

if TYPE_CHECKING:
    from knnstore.lm.corpus import CorpusInputs

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
        from knnstore.lm.evaluate import evaluate_text

        known, unknown = _sample_parts()
        with knnstore.create(store or work / "demo.knn", _as_corpus(known), domain="dickens", progress=progress) as built:
            lm = knnstore.KnnLM.load(built)
            queried = query_fields(lm, lm.predict(PROMPT), PROMPT, TOP)
            evaluation = evaluate_text(lm, unknown, progress=progress)
            fields: dict[str, Any] = {
                "store": built.info(),
                "query": queried,
                "perplexity": {
                    "tokens": evaluation.tokens,
                    "without": evaluation.perplexity["lm"],
                    "with": evaluation.perplexity["mixed"],
                    "gain_percent": 100.0 * (1.0 - evaluation.perplexity["mixed"] / evaluation.perplexity["lm"]),
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


def _sample_path() -> Path:
    return Path(knnstore.__file__).parent / "samples" / SAMPLE


def _as_corpus(known: str) -> "CorpusInputs":
    """The beginning of the sample book as a corpus: its characters stand at the same places in the whole book."""
    from io import BytesIO

    from knnstore.lm.corpus import CorpusFile, CorpusInputs

    content = known.encode()
    file = CorpusFile(path=None, source=str(_sample_path()), id=SAMPLE, size=len(content), mtime_ns=0, stream=BytesIO(content))
    return CorpusInputs((file,), ())


def _sample_parts() -> tuple[str, str]:
    """The first four fifths of the sample book and the rest, cut at a paragraph."""
    text = _sample_path().read_bytes().decode("utf-8")
    cut = text.rindex("\n\n", 0, len(text) * 4 // 5) + 2
    return text[:cut], text[cut:]

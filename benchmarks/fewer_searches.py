"""What fewer searches cost: perplexity over the share of searches saved, for `pointers` and `confident`, beside full search.

    knnstore tune HELD_OUT --store STORE
    python benchmarks/fewer_searches.py STORE TEXT... --json docs/fewer-searches.json --plot docs/fewer-searches.svg

The model runs once over the texts; then each setting searches what it would have searched. λ, temperature and gates are those of the
store's calibration (`confident` needs the gate that `tune` fits). Prints one line for each setting. Text that the store has, or that it
was tuned on, tells nothing.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import knnstore
from knnstore import KnnLM
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.retrieval import LISTS_SHARE, retriever_for
from knnstore.lm.scoring import Positions, score_documents
from knnstore.lm.settings import Settings

STRETCH = 2_500  # consecutive tokens taken from a place of a text
COLORS = {"pointers": "#0072b2", "confident": "#d55e00"}  # told apart without red and green (Okabe and Ito 2008)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting and what came of it. saved: share of positions that were not searched. over_full: perplexity over that of full search, - 1.
    seconds: of search and mixing, all positions."""

    retrieval: str
    setting: str
    saved: float
    perplexity: float
    over_full: float
    seconds: float


def stretches(lm: KnnLM, paths: Sequence[Path], n_tokens: int) -> Iterator[NDArray[np.int64]]:
    """About n_tokens tokens of the texts in stretches, evenly spread, as documents."""
    texts = [lm.encode(path.read_bytes().decode()) for path in paths]
    bos = [lm.document_tokenizer.bos_id] if lm.document_tokenizer.bos_id is not None else []
    share = n_tokens / sum(map(len, texts))
    for ids in texts:
        n = max(1, round(share * len(ids) / STRETCH))
        for i in range(n):
            begin = i * len(ids) // n
            cut = ids[begin : begin + min(STRETCH, len(ids) // n)]
            yield cut if begin == 0 else np.concatenate((bos, cut)).astype(np.int64)


def measured(lm: KnnLM, pieces: Sequence[Positions], settings: Settings) -> tuple[float, float, float]:
    """Share of searches saved, perplexity, and seconds that it took."""
    retriever, log_p, begin = retriever_for(lm.store, settings), [], time.perf_counter()
    for piece in pieces:
        found = retriever.find(piece.keys, piece.view, sequence=piece.window, came=piece.before)
        log_p.append(mix_gold_tokens(piece.gold, piece.log_p_lm, piece.view, found.neighbors, settings).log_p)
    seconds = time.perf_counter() - begin
    saved = 1.0 - retriever.n_searched / retriever.n_positions
    return saved, float(np.exp(-np.concatenate(log_p).mean())), seconds


def plot(fields: dict[str, Any], path: Path) -> None:
    """The curves, as SVG, PNG or PDF."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "fewer searches"  # the same figure is the same file
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    full = fields["perplexity"]["full"]
    axes.axhline(full, color="#555555", linewidth=1, label=f"full search: {full:.2f}")
    axes.axhline(1.01 * full, color="#999999", linewidth=1, linestyle="--", label="1% worse")
    for name, color in COLORS.items():
        points = sorted((point["saved"], point["perplexity"], point["setting"]) for point in fields["points"] if point["retrieval"] == name)
        if points:
            axes.plot([100 * p[0] for p in points], [p[1] for p in points], marker="o", color=color, label=name)
            for saved, perplexity, setting in points:
                axes.annotate(setting.split(" ")[1], (100 * saved, perplexity), xytext=(0, 5), textcoords="offset points", fontsize=7)
    axes.set_xlabel("searches saved, % (beside the points: min_knns, threshold)")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    lm = fields["perplexity"]["lm"]
    axes.set_title(f"{fields['tokens']:,} tokens; the model alone: {lm:.2f}", fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=20_000, show_default=True)
@click.option("--min-knns", default="1,2,4,8,16,32,64,128,256", show_default=True)
@click.option("--thresholds", default="0.2,0.225,0.25,0.275,0.3,0.325,0.35,0.375,0.4,0.45", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    store: Path, texts: tuple[Path, ...], tokens: int, min_knns: str, thresholds: str, json_path: Path | None, plot_path: Path | None
) -> None:
    """Measures STORE on TEXTS."""
    with knnstore.open(store) as opened:
        lm = KnnLM.load(opened)
        rule = opened.manifest.windows
        assert rule is not None, "a store made from text has one"
        pieces = list(
            score_documents(
                lm.extractor,
                stretches(lm, texts, tokens),
                vocab_size=lm.language_model.vocab_size,
                context=rule.context,
                stride=rule.stride,
                views=True,
            )
        )
        full = lm.settings
        lists = max(1, full.nprobe // LISTS_SHARE)
        tried = [("full", f"nprobe {full.nprobe}", full), ("full", f"nprobe {lists}", replace(full, nprobe=lists))]
        tried += [
            ("pointers", f"min_knns {n}", replace(full, retrieval="pointers", min_knns=int(n))) for n in filter(None, min_knns.split(","))
        ]
        if full.before is not None:
            tried += [
                ("confident", f"threshold {t}", replace(full, retrieval="confident", threshold=float(t)))
                for t in filter(None, thresholds.split(","))
            ]
        points: list[Point] = []
        for retrieval, setting, settings in tried:
            saved, perplexity, seconds = measured(lm, pieces, settings)
            over = perplexity / points[0].perplexity - 1.0 if points else 0.0
            points.append(Point(retrieval, setting, saved, perplexity, over, seconds))
            print(
                f"{retrieval:9} {setting:15} saved {saved:6.1%}  perplexity {perplexity:8.3f} ({over:+.2%})  {seconds:6.1f} s", flush=True
            )
        log_p_lm = np.concatenate([piece.log_p_lm for piece in pieces])
        fields = {
            "tokens": len(log_p_lm),
            "entries": len(opened),
            "k": full.k,
            "nprobe": full.nprobe,
            "temperature": full.temperature,
            "gate": None if full.gate is None else full.gate.kind,
            "perplexity": {"lm": float(np.exp(-log_p_lm.mean())), "full": points[0].perplexity},
            "points": [asdict(point) for point in points],
        }
    if json_path is not None:
        json_path.write_text(json.dumps(fields, indent=1) + "\n")
    if plot_path is not None:
        plot(fields, plot_path)


if __name__ == "__main__":
    main()

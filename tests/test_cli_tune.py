"""`knnstore tune`: its table, its JSON, its figure, and how it fails."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from commands import fields_of, knnstore, well

import knnstore as package

TEXT = "".join(f"Chapter {i}. Marley was dead, to begin with: there is no doubt whatever about that.\n" for i in range(30))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "chapters.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_table_shows_what_each_choice_bought(copy: Path, text: Path) -> None:
    """A line for each choice with its perplexity beside the model's; one is kept; stages and notes are on stderr."""
    done = well("tune", text, "--store", copy)
    lines = done.stdout.splitlines()
    head = " ".join(done.stdout.partition("\n\n")[0].split())
    assert head.startswith(f"{copy}: snapshot 2 has this calibration fitted on ")
    assert " tokens of 1 document, nprobe 32; " in head
    assert "fitting: " in done.stderr
    (model,) = [line for line in lines if line.startswith("the model alone")]
    perplexity = float(model.split()[-1])
    rows = [line for line in lines if line.startswith(("λ by", "the same λ"))]
    assert len(rows) > 4
    assert sum(row.endswith("kept") for row in rows) == 1
    for row in rows:
        of_choice, change = re.search(r"([\d.]+) +([+-][\d.]+)%", row).groups()
        assert float(change) == pytest.approx(100.0 * (float(of_choice) / perplexity - 1.0), abs=0.1)
    (kept,) = [line for line in lines if line.startswith("kept: k ")]
    calibration = fields_of("info", "--store", copy)["calibration"]
    assert f"k {calibration['k']:,}, temperature {calibration['temperature']:g}" in kept


def test_json(copy: Path, text: Path) -> None:
    """All of it as one object; infinite is null; what is kept is what `info` then has."""
    fields = fields_of("tune", text, "--store", copy, "--gate", "distance", "-k", "8", "--quiet")
    assert set(fields) == {"path", "snapshot", "documents", "stored", "mean_lambda", "calibration", "choices", "surface"}
    assert (fields["snapshot"], fields["documents"], fields["stored"]) == (2, 1, [])
    assert fields["calibration"]["gate"]["kind"] == "distance"
    assert fields["calibration"]["k"] <= 8
    assert {tuple(sorted(choice)) for choice in fields["choices"]} == {("gate", "k", "kept", "perplexity", "weights")}
    surface = fields["surface"]
    assert (len(surface["perplexity"]), len(surface["perplexity"][0])) == (len(surface["temperatures"]), len(surface["lambdas"]))
    shown = fields_of("info", "--store", copy)["calibration"]
    assert {name: shown[name] for name in ("lambda", "temperature", "k", "made_by")} == {
        name: fields["calibration"][name] for name in ("lambda", "temperature", "k", "made_by")
    }


def test_a_dry_run_changes_nothing(copy: Path, text: Path) -> None:
    """It shows the same and says so."""
    assert f"{copy}: nothing was changed" in " ".join(well("tune", text, "--store", copy, "--dry-run", "--gate", "fixed").stdout.split())
    assert fields_of("info", "--store", copy)["snapshot"] == 1


def test_standard_input_has_a_name(copy: Path) -> None:
    """- is read where --name says what it is called."""
    assert well("tune", "-", "--name", "x.txt", "--store", copy, "--dry-run", "--gate", "fixed", "-q", stdin=TEXT).exit_code == 0
    refused = knnstore("tune", "-", "--store", copy, stdin=TEXT)
    assert (refused.exit_code, "--name" in refused.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_surface_is_drawn(copy: Path, text: Path, tmp_path: Path, kind: str) -> None:
    """Perplexity over λ and temperature, with names on both axes, as a file of the kind its name says."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    path = tmp_path / f"surface.{kind}"
    well("tune", text, "--store", copy, "--dry-run", "--gate", "fixed", "-k", "8", "--plot", path, "-q")
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG") if kind == "png" else b"<svg" in raw[:1_000]


def test_what_is_drawn_is_the_surface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Temperature along, λ up, perplexity at each point, and the cross where the calibration is: read from the figure."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    plots = import_module("knnstore_cli.plots")
    figures: list = []
    monkeypatch.setattr(plots, "save_plot", lambda figure, path: figures.append(figure))
    temperatures, lambdas = [1.0, 2.0, 4.0, 8.0], [0.0, 0.3, 0.6]
    heights = [[20.0, 15.0 + abs(t - 4.0) + 10 * (i == 2), 30.0] for i, t in enumerate(temperatures)]
    calibration = {"perplexity": {"lm": 20.0}, "temperature": 4.0, "lambda": 0.3, "tokens": 1_000, "k": 8}
    plots.surface_plot(
        {"surface": {"temperatures": temperatures, "lambdas": lambdas, "perplexity": heights}, "calibration": calibration}, "x.png"
    )
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    assert "temperature" in axes.get_xlabel()
    assert "λ" in axes.get_ylabel()
    (cross,) = axes.get_lines()
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (4.0, 0.3)
    assert (axes.get_xlim(), axes.get_ylim()) == ((1.0, 8.0), (0.0, 0.6))
    assert "17.00 at best" in axes.get_title()


def test_a_figure_without_matplotlib_is_refused_at_once(copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read, with what to install."""
    monkeypatch.setattr(import_module("knnstore_cli.plots"), "find_spec", lambda name: None)
    done = knnstore("tune", text, "--store", copy, "--plot", "x.png")
    assert done.exit_code == 2
    assert done.stderr == 'error: --plot needs matplotlib. Install with: pip install "knnstore[plot]"\n'


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "TEXT..."),
        (["{text}", "--gate", "none"], 2, "none"),
        (["{text}", "--tokens", "10"], 2, "tokens 10: use 256 or more"),
        (["{text}", "--plot", "surface.txt"], 2, "surface.txt"),
        (["none.txt"], 3, "none.txt: no such file"),
        (["{text}", "--store", "none.knn"], 3, "none.knn: no such datastore"),
    ],
)
def test_failures(copy: Path, text: Path, arguments: list[str], code: int, words: str) -> None:
    """One message, its exit code, and no new snapshot."""
    typed = [argument.format(text=text) for argument in arguments]
    done = knnstore("tune", *typed, *([] if "--store" in typed else ["--store", copy]))
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert fields_of("info", "--store", copy)["snapshot"] == 1


def test_a_short_text_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Marley was dead.", encoding="utf-8")
    done = knnstore("tune", tmp_path / "short.txt", "--store", copy, "-q")
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.search(r"error: the text has \d+ tokens to predict; 256 are the least to fit on", done.stderr)


def test_front_door() -> None:
    assert callable(package.tune)
    assert package.Tuning.__name__ == "Tuning"

"""The command line in this process, or as a user types it in a shell; a small corpus and the datastore made of it (see conftest.py)."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

cli: click.Group = import_module("knnstore_cli.main").cli

ESCAPE = "\x1b"
HOSTILE = "He wrote [bold red]markup[/] and [link=file:///x]more[/link] :smile:\nthen \x1b[31mred\x07 and \u202eback\u202c.\t[end"
BOOK = "Marley was dead, to begin with. There is no doubt whatever about that. " * 3


def knnstore(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    """The command in this process: its output, and its exit code."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin, env=environment)


def well(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    """A command that must end with 0."""
    done = knnstore(*arguments, stdin=stdin, **environment)
    assert done.exit_code == 0, done.output
    return done


def fields_of(*arguments: str | Path) -> dict[str, Any]:
    """The one JSON object that a command prints on stdout, with nothing beside it and no NaN."""
    done = well(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("\n")
    fields = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(fields, dict)
    return fields


def make_work(folder: Path) -> Path:
    """A folder with a small corpus and the datastore `store.knn` made of it, with kept keys."""
    (folder / "corpus").mkdir()
    (folder / "corpus" / "carol.txt").write_text(BOOK, encoding="utf-8")
    (folder / "corpus" / "hostile.txt").write_text(HOSTILE, encoding="utf-8", newline="")
    lines = [{"id": "letter 1", "text": "My dear Bob, “a merry Christmas” to you.", "year": 1843}, {"text": "Humbug! 🎄 Humbug!"}]
    (folder / "corpus" / "letters.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "corpus" / "empty.txt").write_text("", encoding="utf-8")
    well("create", folder / "corpus", "--store", folder / "store.knn", "--domain", "dickens", "--keep-keys", "--quiet")
    return folder


def command_on_path(folder: Path) -> str:
    """A PATH that has `knnstore`, whether or not it is installed beside this interpreter."""
    script = folder / "knnstore"
    script.write_text(f"#!{sys.executable}\nfrom knnstore_cli.main import cli\ncli()\n", encoding="utf-8")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def shell(line: str, folder: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line as a user types it."""
    variables = {name: value for name, value in os.environ.items() if name not in ("KNNSTORE", "KNNSTORE_DEBUG", "NO_COLOR", "COLUMNS")}
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**variables, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def change_model(model: Path, folder: Path) -> Path:
    """A copy of a model that is another checkpoint: one parameter differs."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.bias"))
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Help, reference and completion of the command line, and that it starts quickly."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from commands import cli, shell, well

from knnstore._version import __version__

ROOT = Path(__file__).parent.parent
ORDER = [  # as they are used
    *("create", "append", "merge", "query", "generate", "tune", "evaluate", "delete", "compact", "info", "verify", "repair"),
    *("snapshots", "tag", "restore", "diff", "gc", "demo", "completion"),
]


def commands() -> Iterator[tuple[str, click.Command]]:
    """The group and each of its commands, by what is typed."""
    yield "knnstore", cli
    for name, command in cli.commands.items():
        yield f"knnstore {name}", command


def example_of(typed: str) -> str:
    """The example in a command's help."""
    out = well(*typed.split()[1:], "--help").stdout
    assert out.count("\nExample:\n") == 1
    return "\n".join(line.removeprefix("  ") for line in out.partition("\nExample:\n")[2].splitlines())


def test_commands_are_listed_in_the_order_of_use() -> None:
    """The help of the group has one whole line for each command."""
    out = well("--help").stdout
    listed = re.findall(r"^  ([a-z]+) {2,}(\S.*)$", out.partition("Commands:")[2].partition("Example:")[0], re.MULTILINE)
    assert [name for name, _ in listed] == ORDER
    assert all(line.endswith(".") and not line.endswith("...") for _, line in listed)


def test_version() -> None:
    """--version prints the name and the version."""
    assert well("--version").stdout == f"knnstore {__version__}\n"


def test_options_of_the_contract() -> None:
    """Every option that the design names is there under its name."""
    promised = {
        "create": "--store -s --model -m --revision --token --cache-dir --domain --name --codec --rotation --keep-keys --key-layer "
        "--context --stride --no-eos --device --dtype --seed --json --quiet -q",
        "query": "--store -s --at -k --nprobe --lambda --temperature --top --domain --exclude --exact --model -m --device --dtype "
        "--allow-model-mismatch --json",
        "generate": "--store -s --at --max-new-tokens --num-beams --sample --top-k --top-p --sampling-temperature --seed "
        "--num-return-sequences -k --nprobe --lambda --temperature --domain --exclude --exact --retrieval --model -m --device --dtype "
        "--allow-model-mismatch --html --json --quiet -q",
        "tune": "--store -s -k --nprobe --exact --tokens --gate --seed --dry-run --plot --name --model -m --device --dtype "
        "--allow-model-mismatch --json --quiet -q",
        "evaluate": "--store -s --at --context --stride -k --nprobe --lambda --temperature --domain --exclude --exclude-own --exact "
        "--retrieval --plot --model -m --device --dtype --allow-model-mismatch --json --quiet -q",
        "info": "--store -s --at --documents --json",
        "append": "--store -s --model -m --revision --token --cache-dir --domain --name --replace --prune --device --dtype "
        "--allow-model-mismatch --json --quiet -q",
        "merge": "--store -s --domain --on-conflict --link --json --quiet -q",
        "delete": "--store -s --domain --where --purge --dry-run --json --quiet -q",
        "verify": "--store -s --level --json",
        "snapshots": "--store -s --json",
        "tag": "--store -s --at --json",
        "restore": "--store -s --json",
        "diff": "--store -s --json",
        "gc": "--store -s --keep --dry-run --json",
        "demo": "--store",
    }
    for name, options in promised.items():
        has = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert has >= set(options.split()), name


def test_dtypes_are_those_of_the_package() -> None:
    """--dtype offers what the package takes."""
    from knnstore.lm.devices import DTYPES

    assert set(import_module("knnstore_cli.options").DTYPES) == {"auto", *DTYPES}


def test_every_parameter_has_help() -> None:
    """Each option says what it is for."""
    for _, command in commands():
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def folder_of_example(typed: str, example: str, tmp_path: Path) -> Path:
    """An empty folder for the examples that make a datastore; for the others that of append's example."""
    folder = tmp_path / ("knnstore append" if "knnstore create" not in example else typed)
    folder.mkdir(exist_ok=True)
    return folder


def examples_to_run() -> Iterator[tuple[str, str]]:
    """What is typed for a command, and its example. The demo has a test of its own."""
    for typed, command in commands():
        if command not in (cli, cli.commands["demo"]):
            example = example_of(typed)
            assert typed in example
            yield typed, example


def test_examples_work(tmp_path: Path, command_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of the help work: our commands in this process (loading torch takes seconds), all else in a shell."""
    for typed, example in examples_to_run():
        monkeypatch.chdir(folder_of_example(typed, example, tmp_path))
        for line in example.replace(" && ", "\n").splitlines():
            if line.startswith("knnstore "):
                well(*shlex.split(line)[1:])
            else:
                done = shell(line, Path.cwd(), command_path)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_examples_work_as_typed(tmp_path: Path, command_path: str) -> None:
    """The same, all of it in a shell."""
    for typed, example in examples_to_run():
        done = shell(f"set -e\n{example}", folder_of_example(typed, example, tmp_path), command_path)
        assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_example(tmp_path: Path, command_path: str) -> None:
    """The demo shows the perplexity without and with the datastore, the second lower by a fifth at least, and leaves nothing behind."""
    assert example_of("knnstore") == example_of("knnstore demo") == "knnstore demo"
    (tmp_path / "tmp").mkdir()
    done = shell("knnstore demo", tmp_path, command_path, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    without, with_it = (float(number) for number in re.findall(r"perplexity with.*?: +([\d.]+)", done.stdout))
    assert with_it < 0.8 * without
    assert re.search(r"\d+\.\d% lower", done.stdout)
    assert re.search(r"p_LM.*p_kNN.*p: both", done.stdout)
    assert list((tmp_path / "tmp").glob("knnstore*")) == []


def test_reference_is_what_help_says() -> None:
    """docs/cli.md is what tools/cli_reference.py writes now."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cli_reference.py"), "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_script(name: str) -> None:
    """A script for each shell, which calls the command under its own name."""
    out = well("completion", name).stdout
    assert "_KNNSTORE_COMPLETE" in out
    assert "knnstore" in out
    if shutil.which(name):
        subprocess.run([name, "-n", "/dev/stdin"], input=out, text=True, timeout=60, check=True)


def test_completion_completes(tmp_path: Path, command_path: str) -> None:
    """What the script asks for is answered: commands, options and choices."""
    answers = {
        "knnstore ver": "verify",
        "knnstore verify --le": "--level",
        "knnstore verify --level q": "quick",
        "knnstore app": "append",
        "knnstore append --pr": "--prune",
        "knnstore merge --on-conflict keep-l": "keep-last",
    }
    for words, answer in answers.items():
        n = len(words.split()) - 1
        done = shell("knnstore", tmp_path, command_path, _KNNSTORE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(n))
        assert answer in done.stdout


LIGHT = """
import os, sys
os.environ.update({environment!r})
from knnstore_cli.main import cli
try:
    cli({arguments!r})
except SystemExit:
    pass
sys.stderr.write("loaded: " + " ".join(sorted(set(sys.modules) & {{"torch", "transformers", "faiss", "numpy", "rich", "lmdb"}})))
"""


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["query", "--help"], {}),
        (["--version"], {}),
        (["completion", "zsh"], {}),
        ([], {"_KNNSTORE_COMPLETE": "zsh_complete", "COMP_WORDS": "knnstore q", "COMP_CWORD": "1"}),
    ],
    ids=["help", "query-help", "version", "completion", "complete"],
)
def test_start_loads_no_heavy_library(arguments: list[str], environment: dict[str, str]) -> None:
    """Help, version and completion load nothing that takes long."""
    code = (
        LIGHT.format(arguments=arguments, environment=environment)
        .replace("cli([", "cli(args=[")
        .replace("cli(args=[])", "cli(prog_name='knnstore')")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr == "loaded: "


@pytest.mark.parametrize("name", ["info", "snapshots"])
def test_what_reads_manifests_loads_no_search(name: str, store: Path) -> None:
    """`info` and `snapshots` need neither faiss nor LMDB nor a model."""
    code = LIGHT.format(arguments=[name, "--store", str(store)], environment={})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr == "loaded: numpy rich"


def seconds(code: str) -> float:
    """The shortest of five runs of a Python program."""

    def run() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60, check=False)
        return time.perf_counter() - begin

    return min(run() for _ in range(5))


def test_help_starts_quickly() -> None:
    """`--help` takes at most four times what importing click takes."""
    assert seconds("from knnstore_cli.main import cli; cli(['--help'])") <= 4 * seconds("import click")


def test_info_starts_quickly(store: Path) -> None:
    """`info` takes at most eight times what importing click takes."""
    assert seconds(f"from knnstore_cli.main import cli; cli(['info', '--store', {str(store)!r}])") <= 8 * seconds("import click")

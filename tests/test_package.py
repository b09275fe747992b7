"""What is installed: names, files, sizes, and what an import loads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from knnstore._version import __version__

ROOT = Path(__file__).parent.parent
MODEL = "knnstore/models/default-gpt2"
MODEL_LIMIT = 13_000_000  # bytes; what the default model may add to an installation
HEAVY = ("torch", "transformers")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must end well; a failure shows both outputs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made from, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("knnstore", "cli"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """The wheel, built without a network."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def editable_wheel(checkout: Path) -> Path:
    """The wheel that `pip install -e` makes and installs."""
    (checkout / "editable").mkdir()
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('editable')", cwd=checkout)
    (built,) = (checkout / "editable").glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["plain", "editable"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a new environment with the package, plain or editable, and with the libraries of this one."""
    built: Path = request.getfixturevalue("wheel" if request.param == "plain" else "editable_wheel")
    home = tmp_path_factory.mktemp(request.param)
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", built, cwd=home)
    # A folder named by a .pth file comes after the environment's own, and .pth files inside it are not read:
    # an editable install of the package in this environment stays out of sight.
    purelib = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    yield interpreter
    shutil.rmtree(home)


def wheel_sizes(wheel: Path) -> dict[str, int]:
    """Size in bytes, unpacked, of each file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_wheel_installs_two_names(wheel: Path) -> None:
    """The wheel has the top-level names knnstore and knnstore_cli, and no other beside its own metadata."""
    names = {name.partition("/")[0] for name in wheel_sizes(wheel)}
    assert names == {"knnstore", "knnstore_cli", f"knnstore-{__version__}.dist-info"}


def test_wheel_has_every_module(wheel: Path) -> None:
    """Each module of the checkout is in the wheel: a new folder must be added to the list of packages."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "knnstore").rglob("*.py")}
    modules |= {f"knnstore_{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "cli").rglob("*.py")}
    assert {name for name in wheel_sizes(wheel) if name.endswith(".py")} == modules


def test_wheel_has_model_and_sample(wheel: Path) -> None:
    """The default model (at most 13 MB), the sample corpus and the marker of types are in the wheel as they are in the checkout."""
    sizes = wheel_sizes(wheel)
    model = {name for name in sizes if name.startswith(f"{MODEL}/")}
    loaded = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {Path(name).name for name in model} >= loaded
    assert sum(sizes[name] for name in model) <= MODEL_LIMIT
    shipped = {*model, "knnstore/samples/a-christmas-carol.txt", "knnstore/samples/README.md", "knnstore/py.typed"}
    for name in sorted(shipped):
        assert sizes[name] == (ROOT / name).stat().st_size, name


def test_wheel_has_the_parts_of_pages(wheel: Path) -> None:
    """Style and script of the pages that `generate --html` writes."""
    sizes = wheel_sizes(wheel)
    for name in ("pages.css", "pages.js"):
        assert sizes[f"knnstore_cli/{name}"] == (ROOT / "cli" / name).stat().st_size


@pytest.mark.timeout(300)
def test_installs_give_the_package_and_no_cli(python: Path, tmp_path: Path) -> None:
    """Plain and editable: knnstore and knnstore_cli import, and outside the checkout there is no top-level `cli`."""
    probe = "import importlib.util, knnstore, knnstore_cli; print(importlib.util.find_spec('cli')); print(knnstore_cli.__file__)"
    cli, path = run(python, "-c", probe, cwd=tmp_path).splitlines()
    assert cli == "None"
    assert not Path(path).is_relative_to(ROOT)


def test_command_is_installed(python: Path, tmp_path: Path) -> None:
    """The console script runs and knows its version."""
    assert __version__ in run(python.parent / "knnstore", "--version", cwd=tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "import knnstore",
        "from knnstore_cli.main import cli; cli(['--help'], standalone_mode=False)",
        "from knnstore_cli.main import cli; cli(['query', '--help'], standalone_mode=False)",
    ],
    ids=["import", "help", "query-help"],
)
def test_light_start(code: str, tmp_path: Path) -> None:
    """Importing the package and asking for help load no library that takes long to load."""
    probe = f"import sys\n{code}\nprint('loaded:', *sorted(set(sys.modules) & {set(HEAVY)!r}))"
    assert run(sys.executable, "-c", probe, cwd=tmp_path).splitlines()[-1] == "loaded:"


def test_version_is_that_of_the_installation() -> None:
    """The version in the metadata, read from _version.py when it was installed, is the one that the package says."""
    try:
        installed = metadata.version("knnstore")
    except metadata.PackageNotFoundError:
        pytest.skip("knnstore is not installed here, only on the path")
    assert installed == __version__


def test_constraints_name_every_requirement() -> None:
    """Each library that the package or its tests ask for has its tested version in constraints.txt, within the range asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(tested[requirement.name]), requirement

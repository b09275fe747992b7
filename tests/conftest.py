"""What every test shares: no network, quiet tokenizers, hypothesis settings, the path of the default model."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from effort import set_effort
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests started in the background; commands that are tested would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read by the libraries when they are imported, and by child processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch and faiss each have an OpenMP pool, and threads that spin while they wait take each other's cores: five times slower on two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No deadline: the first example of a test may load a library. In CI the examples are the same each time.
settings.register_profile("local", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    set_effort(with_slow="not slow" not in config.option.markexpr)


ROOT = Path(__file__).parent.parent
_TOLD = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """fsync returns at once: half of the time of the storage tests. What it is there for is tested with power cuts (stores.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is not open too
        yield


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Folder of the model that ships with the package."""
    return ROOT / "knnstore" / "models" / "default-gpt2"


@pytest.fixture(scope="session")
def sample_book() -> Path:
    """A Christmas Carol, the sample corpus that ships with the package."""
    return ROOT / "knnstore" / "samples" / "a-christmas-carol.txt"


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line that is shown at the end of the run: how much a test tried."""
    return request.config.stash.setdefault(_TOLD, []).append


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for what `datasets`, which lm_eval reads its data with, would keep in the user's cache."""
    datasets = pytest.importorskip("datasets", reason="lm_eval is not installed (extra: harness)")
    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: for tests that write and remove thousands of small files."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 28):
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="knnstore-test-", dir=memory))
    yield made
    shutil.rmtree(made)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_TOLD, []):
        terminalreporter.section("tried")
        for line in lines:
            terminalreporter.line(line)


# The command line: read by its tests, spoilt in copies only.


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and the datastore `store.knn` made of it, with kept keys."""
    import commands  # loads click and the command

    return commands.make_work(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="session")
def store(work: Path) -> Path:
    return work / "store.knn"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A datastore that a test may spoil."""
    return Path(shutil.copytree(store, tmp_path / "copy.knn"))


@pytest.fixture(scope="session")
def command_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH that has `knnstore`, whether or not it is installed beside this interpreter."""
    import commands

    return commands.command_on_path(tmp_path_factory.mktemp("bin"))

"""What every test shares: no network, quiet tokenizers, hypothesis settings, the path of the default model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read by the libraries when they are imported, and by child processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch and faiss each have an OpenMP pool, and threads that spin while they wait take each other's cores: five times slower on two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No deadline: the first example of a test may load a library. In CI the examples are the same each time.
settings.register_profile("local", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

ROOT = Path(__file__).parent.parent


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

"""knnstore: an embedded datastore for nearest-neighbour language models.

Importing this loads neither torch nor transformers; what needs them loads them when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from knnstore import errors
from knnstore._version import __version__

if TYPE_CHECKING:
    from knnstore.collecting import Collected, gc
    from knnstore.deletion import Receipt, delete
    from knnstore.entries import append_entries, create_from_entries
    from knnstore.filters import RowRange
    from knnstore.history import Difference, diff, restore, tag, tags, untag
    from knnstore.intake import EntryDocument
    from knnstore.lm.append import append
    from knnstore.lm.checking import verify
    from knnstore.lm.create import create
    from knnstore.lm.evaluate import Evaluation, evaluate
    from knnstore.lm.knnlm import KnnLM, Step
    from knnstore.lm.retrain import compact
    from knnstore.lm.tuning import Tuning, tune
    from knnstore.merging import merge
    from knnstore.neighbors import Context, Neighbors
    from knnstore.repairing import RepairReport, repair
    from knnstore.storage.checkpoint import Checkpoint
    from knnstore.storage.manifest import IndexOptions
    from knnstore.storage.tags import Tag
    from knnstore.store import Datastore
    from knnstore.store import open_store as open  # noqa: A004 - the front door's name

_PLACES = {
    "Checkpoint": "knnstore.storage.checkpoint",
    "Collected": "knnstore.collecting",
    "Context": "knnstore.neighbors",
    "Datastore": "knnstore.store",
    "Difference": "knnstore.history",
    "EntryDocument": "knnstore.intake",
    "Evaluation": "knnstore.lm.evaluate",
    "IndexOptions": "knnstore.storage.manifest",
    "KnnLM": "knnstore.lm.knnlm",
    "Neighbors": "knnstore.neighbors",
    "Receipt": "knnstore.deletion",
    "RepairReport": "knnstore.repairing",
    "RowRange": "knnstore.filters",
    "Step": "knnstore.lm.knnlm",
    "Tag": "knnstore.storage.tags",
    "Tuning": "knnstore.lm.tuning",
    "append": "knnstore.lm.append",
    "append_entries": "knnstore.entries",
    "compact": "knnstore.lm.retrain",
    "create": "knnstore.lm.create",
    "create_from_entries": "knnstore.entries",
    "delete": "knnstore.deletion",
    "diff": "knnstore.history",
    "evaluate": "knnstore.lm.evaluate",
    "gc": "knnstore.collecting",
    "merge": "knnstore.merging",
    "open": "knnstore.store",
    "repair": "knnstore.repairing",
    "restore": "knnstore.history",
    "tag": "knnstore.history",
    "tags": "knnstore.history",
    "tune": "knnstore.lm.tuning",
    "untag": "knnstore.history",
    "verify": "knnstore.lm.checking",
}

__all__ = [
    "Checkpoint",
    "Collected",
    "Context",
    "Datastore",
    "Difference",
    "EntryDocument",
    "Evaluation",
    "IndexOptions",
    "KnnLM",
    "Neighbors",
    "Receipt",
    "RepairReport",
    "RowRange",
    "Step",
    "Tag",
    "Tuning",
    "__version__",
    "append",
    "append_entries",
    "compact",
    "create",
    "create_from_entries",
    "delete",
    "diff",
    "errors",
    "evaluate",
    "gc",
    "merge",
    "open",
    "repair",
    "restore",
    "tag",
    "tags",
    "tune",
    "untag",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'knnstore' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), "open_store" if name == "open" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__

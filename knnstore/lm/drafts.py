"""What a corpus was read to: segments whose documents are written and whose keys are not, and the two files that a job keeps of it.

`draft.json` in a segment's folder says that it is wholly read, and how far the corpus was; `read.json` that all of the corpus was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnstore.lm.corpus import SkippedDocument
from knnstore.storage.parse import parse_json

__all__ = ["DRAFT_FILE", "READ_FILE", "DraftSegment", "Reading", "finished_drafts", "load_reading"]

DRAFT_FILE = "draft.json"
READ_FILE = "read.json"


@dataclass(frozen=True, slots=True)
class DraftSegment:
    """A segment whose documents are written and whose keys are not. n_documents: records in it (parts count)."""

    folder: Path
    n_rows: int
    n_documents: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read: segments in order, documents taken, those that were there already, those left out and why.

    replaced: (id, content hash) of documents of the store whose content is another now, or nothing; gone: likewise of those that the
    corpus does not have.
    """

    segments: tuple[DraftSegment, ...]
    documents: int
    repeated: int
    skipped: tuple[SkippedDocument, ...]
    replaced: tuple[tuple[str, str | None], ...]
    gone: tuple[tuple[str, str | None], ...]

    @property
    def entries(self) -> int:
        return sum(segment.n_rows for segment in self.segments)


def load_reading(job: Path) -> Reading:
    """What a job has read: its `read.json`."""
    fields = parse_json(job / READ_FILE)
    return Reading(
        segments=tuple(DraftSegment(job / "segments" / item["uuid"], item["rows"], item["documents"]) for item in fields["segments"]),
        documents=fields["documents"],
        repeated=fields["repeated"],
        skipped=tuple(SkippedDocument(*item) for item in fields["skipped"]),
        replaced=tuple((item[0], item[1]) for item in fields["replaced"]),
        gone=tuple((item[0], item[1]) for item in fields["gone"]),
    )


def finished_drafts(job: Path) -> list[dict[str, Any]]:
    """The `draft.json` of each segment that is wholly read, in order."""
    found = [parse_json(path) for path in (job / "segments").glob(f"*/{DRAFT_FILE}")]
    return sorted(found, key=lambda fields: int(fields["index"]))

"""Every error knnstore raises on purpose, grouped by what a caller would do about it.

Each class has one exit code, which the command line returns. A message says what is wrong, shows the value, and says
what to do. Anything else that escapes is a bug of ours (exit code 1).
"""

__all__ = [
    "CheckpointMismatchError",
    "ConflictError",
    "CorpusError",
    "DamageError",
    "ExistsError",
    "FormatError",
    "InvalidArgumentError",
    "KnnstoreError",
    "LockedError",
    "MissingExtraError",
    "ModelError",
    "NotFoundError",
    "StorageError",
]


class KnnstoreError(Exception):
    """Base of all errors that knnstore raises on purpose."""

    exit_code = 1


class InvalidArgumentError(KnnstoreError, ValueError):
    """An argument, option or array is not of the form asked for."""

    exit_code = 2


class MissingExtraError(InvalidArgumentError):
    """A feature needs an optional package that is not installed; the message names the extra."""


class CorpusError(InvalidArgumentError):
    """A document cannot be taken as it is: not UTF-8, not JSON, the same id twice with different content."""


class ModelError(InvalidArgumentError):
    """A model cannot be loaded, or lacks what is needed (a fast tokenizer, a key layer that can be found)."""


class NotFoundError(KnnstoreError):
    """A datastore, snapshot, document, domain or input file does not exist."""

    exit_code = 3


class ExistsError(KnnstoreError):
    """A datastore, document or tag is there already, or an unfinished datastore that was begun with other arguments."""

    exit_code = 4


class ConflictError(KnnstoreError):
    """Another commit changed what this one builds on."""

    exit_code = 5


class LockedError(ConflictError):
    """Another process is at the same work; the message has its process id."""


class CheckpointMismatchError(KnnstoreError):
    """The model given is not the one the datastore was built with."""

    exit_code = 6


class FormatError(KnnstoreError):
    """The datastore's format, or a feature it uses, is newer than this version of knnstore understands."""

    exit_code = 7


class DamageError(KnnstoreError):
    """A file of the datastore is missing, cut, or not what its checksum says. Nothing is guessed."""

    exit_code = 8


class StorageError(KnnstoreError, OSError):
    """The operating system refused a read or write: permission, no space, an input/output error."""

    exit_code = 9

"""The errors a user can meet. Each message says what, which value, where, and what to do."""

import errno
import os
from pathlib import Path
from typing import TypeVar

from stacking_ds.console import shortened

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_NOT_FINITE, EXIT_LOST_RANK = 1, 2, 3, 4
"""What a program ends with."""

_MENDABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class UserError(ValueError):
    """Something the user can mend; programs print it as one sentence and exit with code 2."""

    on_all_ranks = False
    """True where every rank raises this same error, so that one of them may speak for all."""


class ConfigError(UserError):
    """A recipe, an override, a DeepSpeed JSON or a command line that cannot be used."""


class DataError(UserError):
    """Text, vocabulary or token shards that are missing, empty, damaged or not the run's own."""


class UnreadableDataError(DataError):
    """A file of the data that may be whole, and cannot be read: a permission is missing, or a file
    system fails."""


class StageError(UserError):
    """A stage schedule that cannot be trained, or a step outside it."""


class CheckpointError(UserError):
    """A checkpoint or a run directory that is missing, damaged or belongs to another run."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, of which something cannot be read: a permission is missing,
    or a file system fails."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""

    on_all_ranks = True


class LoaderError(RuntimeError):
    """A process that builds batches has ended or hangs; another attempt may fare better."""


class LostRankError(RuntimeError):
    """Another rank died, hangs or cannot be reached; the run can go on from its checkpoint."""

    said_elsewhere = False
    """True where another rank knows the same and says it."""


def is_mendable(error: OSError) -> bool:
    """Is it the user's to mend (a full disk, a path, a permission)? What a file system does by
    itself, a stale handle or an input/output error, may be gone at the next attempt."""
    return error.errno in _MENDABLE


_Kind = TypeVar("_Kind", bound=UserError)


def unreadable(kind: type[_Kind], path: Path, error: OSError) -> _Kind:
    """The error of that kind for a file or folder that may be whole, and that the system does not
    let us read."""
    reason = os.strerror(error.errno or 0)  # Arrow words it otherwise
    return kind(f"{path} cannot be read ({reason}); mend access to it and try again")


def mended_by(error: OSError) -> str:
    """The sentence for a mendable error: what it is, and what to do about it."""
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.strerror}: '{shortened(str(error.filename))}'; choose a shorter one"
    return f"{error}; make room, or mend paths and permissions"

"""The errors a user can meet. Each message says what, which value, where, and what to do."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_NOT_FINITE, EXIT_LOST_RANK = 1, 2, 3, 4
EXIT_INTERRUPTED = 130
"""Exit codes."""


class UserError(ValueError):
    """Something the user can mend; programs print it as one sentence and exit with code 2."""


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


class AgreedError(Exception):
    """An error that every rank raises alike, so that one of them may speak for all.

    It is of the class of what went wrong too: who catches a `CheckpointError` catches it on one
    rank as on many.
    """


class NonFiniteError(AgreedError, RuntimeError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""


class LoaderError(RuntimeError):
    """A process that builds batches has ended or hangs; another attempt may fare better."""


class LostRankError(RuntimeError):
    """Another rank died, hangs or cannot be reached; the run can go on from its checkpoint."""


class LostRankToldError(LostRankError):
    """A lost rank that another rank knows of too, and tells of."""


def agreed(error: Exception) -> Exception:
    """The same error as an `AgreedError`, for every rank to raise.

    An error that cannot be made again with the same words, as some of libraries', becomes a
    `RuntimeError` with its name before them.
    """
    if isinstance(error, AgreedError):
        return error
    with suppress(Exception):  # constructors of libraries raise what they like
        kind = _agreed_kind(type(error))
        if isinstance(error, OSError) and error.errno is not None:
            made = kind(error.errno, error.strerror, error.filename, None, error.filename2)
        else:
            made = kind.__new__(kind, *error.args)
        made.__dict__.update(error.__dict__)
        if str(made) == str(error):
            return made
    return _agreed_kind(RuntimeError)(f"{type(error).__name__}: {error}")


def _agreed_kind(kind: type[Exception]) -> type[Exception]:
    # by the same name, which tracebacks and records give
    return type(kind.__name__, (AgreedError, kind), {"__module__": kind.__module__})


_Kind = TypeVar("_Kind", bound=UserError)


def unreadable(kind: type[_Kind], path: Path, error: OSError) -> _Kind:
    """The error of that kind for a file or folder that may be whole, and that the system does not
    let us read."""
    reason = os.strerror(error.errno or 0)  # Arrow words it otherwise
    return kind(f"{path} cannot be read ({reason}); mend access to it and try again")

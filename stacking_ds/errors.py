"""The errors a user can meet. Each message says what, which value, where, and what to do."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LostRankError",
    "NonFiniteError",
    "StageError",
    "UserError",
]


class UserError(ValueError):
    """Something the user can mend; programs print it as one sentence and exit with code 2."""

    on_all_ranks = False
    """True where every rank raises this same error, so that one of them may speak for all."""


class ConfigError(UserError):
    """A recipe, an override, a DeepSpeed JSON or a command line that cannot be used."""


class DataError(UserError):
    """Text, vocabulary or token shards that are missing, empty, damaged or not the run's own."""


class StageError(UserError):
    """A stage schedule that cannot be trained, or a step outside it."""


class CheckpointError(UserError):
    """A checkpoint or a run directory that is missing, damaged or belongs to another run."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""


class LostRankError(RuntimeError):
    """Another rank died, hangs or cannot be reached; the run can go on from its checkpoint."""

    said_by_first = False
    """True where rank 0 knows the same and says it."""

"""What a job finds in its run directory: nothing, its own past, or somebody else's."""

from contextlib import ExitStack
from pathlib import Path

from stacking_ds import checkpoint, run_directory
from stacking_ds.distributed import World
from stacking_ds.errors import CheckpointError
from stacking_ds.job import Job
from stacking_ds.meter import TrainState

__all__ = ["enter"]


def enter(
    job: Job, world: World, run_dir: Path, resume: bool, held: ExitStack
) -> tuple[Path | None, TrainState]:
    """Claim the run directory for this job; the newest checkpoint in it and its state.

    A collective. Nothing is written before everything fits; the directory stays locked until
    `held` is closed.

    Raises:
        CheckpointError: the directory or its checkpoint belongs to another run, or a job is at
            work in it.
        DataError: the token shards, or the rows laid out, are not those that were written (checked
            for a new run).
        ConfigError: the directory cannot be written, or is not the same on all nodes.
    """
    found: tuple[Path | None, TrainState] = world.on_first(
        lambda: _enter_on_first(job, run_dir, resume, held)
    )
    run_directory.require_shared(run_dir, world)
    return found


def _enter_on_first(
    job: Job, run_dir: Path, resume: bool, held: ExitStack
) -> tuple[Path | None, TrainState]:
    run_directory.check(run_dir, job.config, resume=resume)
    held.enter_context(run_directory.lock(run_dir))
    found = checkpoint.latest(run_dir)
    state = _state_of(found, job) if found else TrainState()
    if found is None:
        # every byte, once: damaged shards are better known before the first hour than after
        job.shards.verify_once()
        for data in job.train_data.values():
            data.verify()
    run_directory.write_config(run_dir, job.config.with_absolute_paths())
    return found, state


def _state_of(found: Path, job: Job) -> TrainState:
    manifest = checkpoint.read_manifest(found)
    job.require_vocabulary(manifest.vocabulary_sha256, found)
    if manifest.data_sha256 != job.data_sha256:
        raise CheckpointError(
            f"{found} was trained on other token shards than those in {job.config.data.path}, or "
            f"by a version of stacking_ds that makes other rows of them; set data.path to the "
            f"run's own, go back to that version, or start another run"
        )
    try:
        return TrainState(**manifest.train_state)
    except TypeError as error:
        raise CheckpointError(
            f"{found / 'manifest.json'} is damaged or of another version ({error}); "
            f"{checkpoint.fall_back(found)}"
        ) from None

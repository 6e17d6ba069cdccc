"""Resume: what a job finds in its run directory, nothing, its own past or somebody else's, and what
it leaves there of itself.

enter (lock, look) -> the engine is built and filled -> claim (write) -> the attempt begins
"""

import socket
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from stacking_ds.checkpoint import folders
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.distributed.process_group import is_lost_contact
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, NonFiniteError, UserError
from stacking_ds.process.exit import is_mendable
from stacking_ds.run import attempts, directory
from stacking_ds.run.metrics_file import drop_after
from stacking_ds.schedule.stages import StageSchedule
from stacking_ds.train.metrics import TrainState
from stacking_ds.train.plan import TrainingPlan

_TO_END_SECONDS = 15.0


def enter(
    plan: TrainingPlan, world: World, run_dir: Path, resume: bool, held: ExitStack
) -> tuple[Path | None, TrainState, "Attempt"]:
    """Lock the run directory for this job; the newest checkpoint in it, its state, and what is
    recorded of this attempt until `held` is closed.

    A collective. Nothing but the lock is written, which `claim` does once everything fits, and in a
    run that is there the record of an attempt that fails before; the directory stays locked until
    `held` is closed.

    Raises:
        CheckpointError: the directory or its checkpoint belongs to another run, or a job is at
            work in it.
        DataError: the token shards, or the rows laid out, are not those that were written (checked
            here for a new run, by `Rereading` for one that goes on).
        ConfigError: the directory cannot be written, or is not the same on all nodes.
    """
    world.on_first(lambda: _lock_on_first(plan, run_dir, resume, held))
    attempt = held.enter_context(Attempt(run_dir, world))
    found: Path | None
    found, state = world.on_first(lambda: _look_on_first(plan, run_dir))
    world.pulse.step = state.step
    directory.require_shared(run_dir, world)
    return found, state, attempt


def _lock_on_first(plan: TrainingPlan, run_dir: Path, resume: bool, held: ExitStack) -> None:
    directory.check(run_dir, plan.config, resume=resume)
    # what is left of an attempt that was killed, or cut off the network, ends by itself within this
    patience = plan.config.cluster.silence_seconds + _TO_END_SECONDS if resume else 0.0
    forget = partial(directory.forget_if_empty, run_dir, made_by_lock=not run_dir.exists())
    held.enter_context(directory.lock(run_dir, patience))
    held.callback(forget)
    # a job that was waited for may have made the directory its own
    directory.check(run_dir, plan.config, resume=resume)


def _look_on_first(plan: TrainingPlan, run_dir: Path) -> tuple[Path | None, TrainState]:
    found = folders.latest(run_dir)
    if found is not None:
        return found, _state_of(found, plan)
    plan.data.verify()  # damaged shards are better known before the first hour than after
    return None, TrainState()


def claim(plan: TrainingPlan, world: World, run_dir: Path, completed_steps: int) -> str | None:
    """Make the directory this run's: drop the metrics of steps that will be taken again, write the
    recipe, and the tokenizer that it will be exported with. A collective.

    Returns:
        A sentence on the lines of its metrics that were passed over, if any.

    Raises:
        CheckpointError: its metrics are no regular file; nothing is written then.
        ConfigError: the directory cannot be written.
    """
    damage: str | None = world.on_first(lambda: _claim_on_first(plan, run_dir, completed_steps))
    return damage


def _claim_on_first(plan: TrainingPlan, run_dir: Path, completed_steps: int) -> str | None:
    damage = drop_after(run_dir, completed_steps)
    # before anything else that a start leaves: by it the directory is known to be a run's
    directory.write_config(run_dir, plan.config.with_absolute_paths())
    directory.keep_tokenizer(run_dir, plan.data.shards)
    with suppress(OSError):  # of a run that was killed at its very end, no save comes any more
        folders.prune(
            run_dir,
            keep_last=plan.config.checkpoint.keep_last,
            keep_steps=plan.schedule.stages.boundaries,
        )
    return damage


def _state_of(found: Path, plan: TrainingPlan) -> TrainState:
    manifest = checkpoint_manifest.read_manifest(found)
    plan.data.require_vocabulary(manifest.vocabulary_sha256, found)
    if manifest.data_sha256 != plan.data.sha256:
        raise CheckpointError(
            f"{found} was trained on other token shards than those in {plan.config.data.path}, or "
            f"by a version of stacking_ds that makes other rows of them; set data.path to the "
            f"run's own, go back to that version, or start another run"
        )
    try:
        found_state: dict[str, Any] = manifest.train_state
        state = TrainState(**found_state)
        _require_sense(state, manifest, plan.schedule.stages)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found / 'manifest.json'} is damaged or of another version ({error}); "
            f"{folders.fall_back(found)}"
        ) from None
    return state


def _require_sense(
    state: TrainState, manifest: checkpoint_manifest.Manifest, schedule: StageSchedule
) -> None:
    """Raises:
    TypeError: a count is no whole number.
    ValueError: the state is not that of the checkpoint's step and depth.
    """
    for field in fields(state):
        if field.type is int and not isinstance(getattr(state, field.name), int):
            raise TypeError(f"{field.name} is no whole number")
    if state.stage_index >= len(schedule.stages):
        raise ValueError(f"there is no stage {state.stage_index}")
    stage = schedule.stages[state.stage_index]
    if state.step != manifest.step or not stage.start_step <= state.step <= stage.end_step:
        raise ValueError(f"step {state.step} is none of stage {stage.index}")
    if manifest.num_hidden_layers != stage.num_hidden_layers:
        raise ValueError(f"stage {stage.index} has not {manifest.num_hidden_layers} layers")


class Attempt:
    """An attempt in the run's records, while it is entered: that it has begun, and how
    it ended. To make one is a collective.

    In a directory that is no run's yet, an attempt that fails before it begins leaves no record.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir, self._world = run_dir, world
        self._hosts = list(dict.fromkeys(world.gather(socket.gethostname())))
        self._begun = False
        self.complete = False
        """Whether nothing is left to do for another one."""

    def begin(self) -> None:
        """Record that the run goes on. A collective, once `metrics.jsonl` ends at its step."""
        self._world.on_first(self._begin_on_first)

    def _begin_on_first(self) -> None:
        attempts.begun(self._run_dir, self._world.pulse.step, self._world.size, self._hosts)
        self._begun = True

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        outcome: attempts.Outcome | None = "complete" if self.complete else "stopped"
        if error is not None:
            outcome = _outcome(error)
        # an end for want of another rank is left to who knows which one it was
        if self._world.is_first and outcome is not None:
            with suppress(UserError):  # the disk is full: what counts is saved, or `error` says so
                self._end(outcome, "" if error is None else str(error))

    def _end(self, outcome: attempts.Outcome, message: str) -> None:
        if not self._begun:
            if not directory.holds_run(self._run_dir):
                return
            self._begin_on_first()
        attempts.ended(self._run_dir, outcome, self._world.pulse.step, message)


def _outcome(error: BaseException) -> attempts.Outcome | None:
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, UserError) or (isinstance(error, OSError) and is_mendable(error)):
        return "user_error"
    if isinstance(error, NonFiniteError):
        return "not_finite"
    return None if is_lost_contact(error) else "failed"

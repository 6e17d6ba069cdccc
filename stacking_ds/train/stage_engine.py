"""The sharded training state from stage to stage: start it, grow it, save it, restore it.

grow:  capture fragments to host -> release the old engine -> build the deeper one
       -> install by the operator's layer map -> refresh low-precision copies -> go on
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stacking_ds.checkpoint import folders, load
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.checkpoint import save as checkpoint_save
from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import Moments
from stacking_ds.data.run_data import RunData
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.zero.lifecycle import ValueOf
from stacking_ds.engine.zero.sharded_state import (
    fragments,
    refresh,
    seed_moments,
    set_loss_scale,
)
from stacking_ds.errors import CheckpointError
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import TrainingState, capture, install
from stacking_ds.kernels.registry import choose_compute
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.parameters import first_value
from stacking_ds.optim.optimizers import ShardedOptimizer, build_optimizer
from stacking_ds.process.runtime import return_freed_memory
from stacking_ds.schedule.phases import Phase
from stacking_ds.schedule.run_schedule import RunSchedule
from stacking_ds.schedule.stages import Stage

_MOST_FAILED_SAVES = 2
_STOP_SECONDS = 30.0  # deepspeed/launcher/launch.py, terminate_process_tree

logger = logging.getLogger("stacking_ds")


class StageEngine:
    """Owns the engine of the present stage. To make one, and all methods but `close`, are
    collectives."""

    def __init__(
        self,
        config: RunConfig,
        schedule: RunSchedule,
        data: RunData,
        ds_configs: Sequence[dict[str, Any]],
        world: World,
    ) -> None:
        """Raises:
        ConfigError: the recipe names kernels that cannot run here.
        ValueError: `ds_configs` are not for so many ranks.
        """
        _require_ranks(ds_configs, world.size)
        self._config, self._schedule, self._data, self._world = config, schedule, data, world
        self._ds_configs = ds_configs
        self._compute = world.on_all(
            lambda: choose_compute(config.engine, world.device, config.model)
        )
        self._ds_config: dict[str, Any] = {}
        self.engine: Any = None
        self._saving: checkpoint_save.BackgroundSave | None = None
        self._failed_saves = 0  # in a row
        self._warned = False
        self._step_seconds = 0.0
        self._captured: TrainingState | None = None
        """The host copy that the save at a stage's end made, for the boundary that follows."""

    def model_config(self, num_hidden_layers: int) -> BertConfig:
        """The model at a depth, with the vocabulary of the data."""
        return BertConfig.of(self._config.model, num_hidden_layers, self._data.vocab_size)

    def begin(self, found: Path | None, stage: Stage) -> None:
        """An engine of the stage's depth, with the state of the checkpoint `found` if there is one.

        Raises:
            CheckpointError: the checkpoint is damaged, or another model's.
        """
        if found is None:
            self.start(stage)
        else:
            self.restore(found, stage)

    def start(self, stage: Stage) -> None:
        """An engine of the stage's depth with freshly initialised weights."""
        config = self._config
        self._build(
            stage,
            self._schedule.phases.at(stage.start_step),
            lambda name, shape: first_value(
                name, shape, config.seed, config.model.initializer_range
            ),
        )

    def _build(self, stage: Stage, phase: Phase, value_of: ValueOf | None = None) -> None:
        """An engine of the stage's depth; without `value_of` its values are yet to come."""
        self._ds_config = self._ds_configs[phase.index]
        sizes = self.model_config(stage.num_hidden_layers)
        model = BertForPreTraining(sizes, seed=None, compute=self._compute)
        optimizer = build_optimizer(self._config.optimizer, model.named_parameters())
        self.engine = build_engine(model, optimizer, self._ds_config, value_of)

    def grow(self, old: Stage, new: Stage) -> None:
        """Replace the engine of stage `old` by one of stage `new`'s depth that starts from it.

        Raises:
            StageError: the state that arrived is not the one the growth operator predicts.
        """
        growth = self._config.growth
        layers = layer_map(growth.operator, old.num_hidden_layers, new.num_hidden_layers)
        self._rebuild(new, self._schedule.phases.at(new.start_step), layers, growth.moments)

    def enter_phase(self, stage: Stage, phase: Phase) -> None:
        """Replace the engine by one for the phase's batch, unless it is that already. Weights and
        moments stay as they are."""
        if self._ds_configs[phase.index] != self._ds_config:
            self._rebuild(stage, phase, None, "carry")

    def _rebuild(
        self, stage: Stage, phase: Phase, layers: Sequence[int] | None, moments: Moments
    ) -> None:
        """Another engine that starts from this one's state by the map of `layers`."""
        return_freed_memory()  # what steps have left is as much as the copy that is made now
        state = self._captured or capture(self.engine)
        self._release()
        self._build(stage, phase)
        install(state, self.engine, layers, moments, self._world)
        # the step that comes is the likeliest to fail, for want of memory, and what it would fork,
        # the loader's workers, would keep the captured state for the length of the stage
        del state
        self.finish_save()

    def save(self, run_dir: Path, stage: Stage, train_state: dict[str, Any], *, wait: bool) -> None:
        """Write a checkpoint into the run and delete those the recipe no longer keeps.

        The state is copied to host memory, which the rest needs not wait for: training may go on
        and change it. A save that is still under way is finished first.

        Raises:
            CheckpointError: on every rank, if it had to `wait` and one rank could not write. The
                previous checkpoint is untouched.
        """
        self.finish_save()
        growing = train_state["step"] == stage.end_step < self._schedule.total_steps
        state = capture(self.engine, None if growing else self._world.rank)
        self._captured = state if growing else None
        contents = checkpoint_manifest.Contents(
            step=train_state["step"],
            optimizer_step=state.optimizer_step,
            loss_scale=state.loss_scale,
            num_hidden_layers=stage.num_hidden_layers,
            zero_stage=self._ds_config["zero_optimization"].get("stage", 0),
            vocabulary_sha256=self._data.vocabulary_sha256,
            data_sha256=self._data.sha256,
            train_state=train_state,
            config=self._config.with_absolute_paths().model_dump(mode="json"),
        )
        self._saving = checkpoint_save.BackgroundSave(
            run_dir, state.fragments, self._world, contents, lambda: self._prune(run_dir)
        )
        if wait:
            self._saving.finish()

    def poll_save(self, step_seconds: float = 0.0) -> None:
        """Publish the checkpoint under way once all ranks have written it.

        Where one could not, training goes on, with a warning. There is another, once, where a stop
        would take longer than launchers wait, of which a step takes `step_seconds`.

        Raises:
            CheckpointError: on every rank, if that has happened twice in a row.
        """
        self._step_seconds = step_seconds
        self._look_after(checkpoint_save.BackgroundSave.poll)

    def finish_save(self) -> None:
        """Wait for the checkpoint under way; if a rank cannot write it, as `poll_save`."""
        self._look_after(checkpoint_save.BackgroundSave.finish)

    def _look_after(self, step: Callable[[checkpoint_save.BackgroundSave], object]) -> None:
        if self._saving is None or self._saving.over:
            return
        try:
            step(self._saving)
        except CheckpointError as error:
            self._failed_saves += 1
            if self._failed_saves == _MOST_FAILED_SAVES:
                raise  # hours of training that nothing keeps
            if self._world.is_first:
                logger.warning("%s; training goes on until the next one is due", error)
        else:
            if self._saving.over:
                self._failed_saves = 0
                self._warn_if_slow(self._saving.seconds)

    def _warn_if_slow(self, save_seconds: float) -> None:
        # a signal may come when a step and a save have just begun
        stop_seconds = self._step_seconds + 2 * save_seconds
        if stop_seconds < _STOP_SECONDS or self._warned or not self._world.is_first:
            return
        self._warned = True
        logger.warning(
            "a checkpoint takes %.0f s to write and a step %.0f s; a launcher gives a rank that is "
            "to stop about %.0f s, in which a step, the checkpoint under way and another one must "
            "fit: write them to a faster file system, or make checkpoint.every_steps small enough "
            "that the steps since the last one may be lost",
            save_seconds,
            self._step_seconds,
            _STOP_SECONDS,
        )

    def _prune(self, run_dir: Path) -> None:
        keep_last = self._config.checkpoint.keep_last
        try:
            folders.prune(run_dir, keep_last=keep_last, keep_steps=self._schedule.stages.boundaries)
        except OSError as error:
            # the new checkpoint is safe, so what is in the way of tidying up must not end the run
            logger.warning("old checkpoints stay for now: %s", error)

    def restore(self, found: Path, stage: Stage) -> None:
        """An engine of the stage's depth with the state of the checkpoint `found`."""
        manifest = self._world.on_first(lambda: checkpoint_manifest.read_manifest(found))
        self._build(stage, self._schedule.phases.at(manifest.step))
        if manifest.optimizer_step:
            seed_moments(self.engine, manifest.optimizer_step)
        load.load(found, fragments(self.engine), world=self._world)
        refresh(self.engine)
        if manifest.fp16_loss_scale is not None:
            set_loss_scale(self.engine, manifest.fp16_loss_scale)

    def optimizer_metrics(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics and histograms of the last step that the optimizer itself knows, unless loss
        scaling skipped that step."""
        optimizer = self.engine.basic_optimizer
        if isinstance(optimizer, ShardedOptimizer) and self.engine.was_step_applied():
            return optimizer.metrics()
        return {}, {}

    def close(self) -> None:
        """Release the engine and its memory, and leave a checkpoint under way to itself. No
        collective: another rank may be gone."""
        if self._saving is not None and not self._saving.over:
            self._saving.abandon()
        self._release()

    def _release(self) -> None:
        self._captured = None
        if self.engine is not None:
            engine, self.engine = self.engine, None
            release_engine(engine)


def _require_ranks(ds_configs: Sequence[dict[str, Any]], world_size: int) -> None:
    for config in ds_configs[:1]:
        rows = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        if config["train_batch_size"] == rows * world_size:
            return
    raise ValueError(f"open the plan for the {world_size} ranks: open_plan(config, world.size)")

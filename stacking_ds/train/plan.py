"""The training plan: recipe, schedules, DeepSpeed JSON and data, checked and resolved once.

Whatever is wrong with one of them shows here, in seconds, without another rank.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacking_ds.config.run import RunConfig
from stacking_ds.data.batches import RankStep, split_batch
from stacking_ds.data.loader import (
    EvaluationSteps,
    PretrainingData,
    PretrainingSteps,
    unigram_log_probabilities,
    unigram_mlm_loss,
)
from stacking_ds.data.rows import LayoutSpec, require_documents, rows_sha256
from stacking_ds.data.shards import TokenShards
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.errors import CheckpointError, ConfigError
from stacking_ds.growth.operators import layer_map
from stacking_ds.kernels.fp8 import require_fp8_sizes
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.optimizers import require_optimizer
from stacking_ds.schedule.learning_rate import LearningRateSchedule
from stacking_ds.schedule.phases import Phase, PhaseSchedule
from stacking_ds.schedule.stages import StageSchedule


def open_plan(
    config: RunConfig, world_size: int | None = None, *, with_data: bool = True
) -> "TrainingPlan":
    """Open and validate everything that `config` names.

    Args:
        world_size: the ranks to train on; None where no engine will be built.
        with_data: False where the token shards may not be there yet.

    Raises:
        StageError: depths that do not grow, or that the growth operator cannot reach.
        ConfigError: a learning-rate schedule, model or DeepSpeed JSON that cannot be used.
        DataError: shards that are missing or damaged, or splits with too few documents.
    """
    schedule = config.stage_schedule()
    depths = [stage.num_hidden_layers for stage in schedule.stages]
    for old_depth, new_depth in itertools.pairwise(depths):
        layer_map(config.growth.operator, old_depth, new_depth)
    if config.engine.fp8:
        require_fp8_sizes(config.model.hidden_size, config.model.intermediate_size)
    plan = TrainingPlan(
        config=config,
        schedule=schedule,
        phases=config.phase_schedule(),
        learning_rates=config.learning_rates(),
        ds_json=load_ds_config(config.engine.deepspeed),
    )
    if world_size is not None:
        plan = plan.on_ranks(world_size)
    if with_data:
        plan.require_data()
    return plan


_OPENED = ("shards", "train_data")  # once, whatever the ranks


@dataclass(frozen=True)
class TrainingPlan:
    """A run's data, length and learning rates, checked; see `open_plan`."""

    config: RunConfig
    schedule: StageSchedule
    phases: PhaseSchedule
    learning_rates: LearningRateSchedule
    ds_json: dict[str, Any]
    """As it is written, each "auto" still to be filled in."""
    ds_configs: tuple[dict[str, Any], ...] = ()
    """The DeepSpeed configuration of each phase, on the ranks that the plan was opened for."""
    world_size: int | None = None
    """The ranks that it was opened for."""

    def on_ranks(self, world_size: int) -> "TrainingPlan":
        """The plan with what DeepSpeed is told in each phase on so many ranks.

        Raises:
            ConfigError: recipe and DeepSpeed JSON disagree; all disagreements in one message. Or a
            LAMB kernel, or CUDA graphs, that the ZeRO stage rules out.
        """
        if world_size == self.world_size:
            return self
        found = tuple(self._resolve(world_size, phase) for phase in self.phases.phases)
        plan = replace(self, ds_configs=found, world_size=world_size)
        opened = {name: self.__dict__[name] for name in _OPENED if name in self.__dict__}
        plan.__dict__.update(opened)
        return plan

    def _resolve(self, world_size: int, phase: Phase) -> dict[str, Any]:
        config = self.config
        micro_batch_size, accumulation_steps = split_batch(
            phase.global_batch_size, world_size, phase.micro_batch_size
        )
        resolved = resolve_ds_config(
            self.ds_json,
            source=config.engine.deepspeed,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            world_size=world_size,
            gradient_clipping=config.optimizer.max_grad_norm,
            precision=config.engine.precision,
        )
        zero_stage = resolved["zero_optimization"].get("stage", 0)
        if config.engine.cuda_graphs and zero_stage == 3:
            raise ConfigError(
                f"engine.cuda_graphs=true needs weights that stay where they are, which ZeRO 3 "
                f"({config.engine.deepspeed}) moves: choose ZeRO 0, 1 or 2, or turn it off"
            )
        require_optimizer(config.optimizer, sharded=zero_stage > 0)
        return resolved

    def draw(self) -> str:
        """Stages, phases and learning rate as text."""
        return f"{self.schedule.draw()}\n{self.phases.draw()}\n{self.learning_rates.draw()}"

    # ------------------------------------------------------------------ the data

    @cached_property
    def shards(self) -> TokenShards:
        """The token shards of the recipe's data.path; opened once."""
        return TokenShards.open(Path(self.config.data.path))

    @cached_property
    def train_data(self) -> Mapping[int, PretrainingData]:
        """By sequence length."""
        lengths = sorted({phase.sequence_length for phase in self.phases.phases})
        return {
            length: PretrainingData(
                self.shards,
                "train",
                self.config.data.changed(sequence_length=length),
                seed=self.config.seed,
            )
            for length in lengths
        }

    def require_data(self) -> None:
        """Raises:
        DataError: shards that are missing or damaged, or splits with too few documents.
        """
        spec = LayoutSpec.of(self.config.data)
        require_documents(self.shards.split("train"), spec)
        require_documents(self.shards.split("heldout"), spec)
        _ = self.train_data  # its vocabulary can be masked

    def lay_out_rows(self, say: Callable[[str], None], workers: int = 1) -> None:
        """Make the rows that the run will read, where they are not there; `say` is told first.

        Raises:
            DataError: fewer rows than one global batch, or nowhere to write them.
        """
        for length, data in self.train_data.items():
            heldout = self.config.data.changed(sequence_length=length, variants=1)
            for one, rows in (
                (data, self.phases.rows(self.schedule.total_steps, length)),
                (PretrainingData(self.shards, "heldout", heldout, seed=0), 1),
            ):
                for variant, spec in one.missing_layouts(rows):
                    say(
                        f"laying out the rows of {self.shards.folder}, {one.split} {spec}, once "
                        f"for all runs; `stacking-ds data layout` does so ahead of a run"
                    )
                    one.layout(variant, workers)
        for phase in self.phases.phases:
            self.train_data[phase.sequence_length].require_rows(phase.global_batch_size)

    def model_config(self, num_hidden_layers: int) -> BertConfig:
        """The model at a depth, with the vocabulary of the shards."""
        return BertConfig(
            vocab_size=self.shards.manifest.vocab_size,
            num_hidden_layers=num_hidden_layers,
            **self.config.model.model_dump(),
        )

    @property
    def data_sha256(self) -> str:
        """The identity of the training data: the documents, and the way rows are made of them."""
        return rows_sha256(self.shards.split("train"))

    def require_vocabulary(self, vocabulary_sha256: str, checkpoint: Path) -> None:
        """Raises:
        CheckpointError: the shards speak another vocabulary than that of `checkpoint`.
        """
        if vocabulary_sha256 != self.shards.manifest.vocabulary_sha256:
            raise CheckpointError(
                f"{checkpoint} was trained with another vocabulary than that of "
                f"{self.shards.folder}; give shards prepared with the run's own, or start another "
                f"run"
            )

    def training_steps(self, rank: int, world_size: int, phase: Phase) -> PretrainingSteps:
        """This rank's share of each step of a phase; step k of the run is item k."""
        return PretrainingSteps(self.train_data[phase.sequence_length], phase, rank, world_size)

    def heldout_steps(self, rank: int, world_size: int, phase: Phase) -> list[RankStep]:
        """This rank's share of the one fixed pass over held-out rows of the phase's length."""
        steps = EvaluationSteps(
            self.shards,
            self.config.data.changed(sequence_length=phase.sequence_length),
            max_rows=self.config.evaluation.max_samples,
            micro_batch_size=phase.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        return [steps[index] for index in range(len(steps))]

    def unigram_loss(self, phase: Phase) -> float:
        """Held-out MLM loss of a model that knows word frequencies only, in nats."""
        return unigram_mlm_loss(self._unigram, self.heldout_steps(0, 1, phase))

    @cached_property
    def _unigram(self) -> NDArray[np.float64]:
        return unigram_log_probabilities(self.shards)

    def work(self, start_step: int) -> int:
        """Layers times token slots, summed over the steps from `start_step` to the end: what is
        left to do, as far as time grows with both."""
        return sum(
            stage.num_hidden_layers
            * (
                self.phases.slots(stage.end_step)
                - self.phases.slots(max(stage.start_step, start_step))
            )
            for stage in self.schedule.remaining(start_step)
        )

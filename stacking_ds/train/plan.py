"""A recipe and its data, checked as far as one process can before any rank meets another.

Whatever is wrong with the recipe, the shards or the DeepSpeed JSON shows here, in seconds.
"""

import hashlib
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
from stacking_ds.data.loader import EvaluationSteps, PretrainingData, PretrainingSteps, RowOptions
from stacking_ds.data.row_store import require_documents
from stacking_ds.data.rows import LAYOUT_VERSION
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.unigram import unigram_log_probabilities, unigram_mlm_loss
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.errors import CheckpointError, ConfigError
from stacking_ds.growth.operators import layer_map
from stacking_ds.kernels.fp8 import require_fp8_sizes
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.lamb.optimizer import require_whole_tensors
from stacking_ds.schedule.learning_rate import LearningRateSchedule
from stacking_ds.schedule.phases import Phase, PhaseSchedule
from stacking_ds.schedule.stages import StageSchedule


@dataclass(frozen=True)
class CheckedRecipe:
    """What a recipe alone says of a run, checked; see `CheckedRecipe.check`."""

    config: RunConfig
    schedule: StageSchedule
    phases: PhaseSchedule
    learning_rates: LearningRateSchedule
    ds_json: dict[str, Any]

    @classmethod
    def check(cls, config: RunConfig) -> "CheckedRecipe":
        """Validate what needs no data, which may not be there yet.

        Raises:
            StageError: depths that do not grow, or that the growth operator cannot reach.
            ConfigError: a learning-rate schedule, model or DeepSpeed JSON that cannot be used.
        """
        schedule = config.stage_schedule()
        depths = [stage.num_hidden_layers for stage in schedule.stages]
        for old_depth, new_depth in itertools.pairwise(depths):
            layer_map(config.growth.operator, old_depth, new_depth)
        if config.engine.fp8:
            require_fp8_sizes(config.model.hidden_size, config.model.intermediate_size)
        return CheckedRecipe(
            config=config,
            schedule=schedule,
            phases=config.phase_schedule(),
            learning_rates=config.learning_rates(),
            ds_json=load_ds_config(config.engine.deepspeed),
        )

    def ds_config(self, world_size: int, phase: Phase) -> dict[str, Any]:
        """The DeepSpeed configuration for this many ranks in a phase.

        Raises:
            ConfigError: recipe and DeepSpeed JSON disagree; all disagreements in one message. Or a
            LAMB kernel, or CUDA graphs, that the ZeRO stage rules out.
        """
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
        if config.optimizer.lamb is not None:
            require_whole_tensors(config.optimizer.lamb.kernel, sharded=zero_stage > 0)
        return resolved

    def require_ds_configs(self, world_size: int) -> None:
        """Check the DeepSpeed configuration of every phase; raises what `ds_config` does."""
        for phase in self.phases.phases:
            self.ds_config(world_size, phase)

    def draw(self) -> str:
        """Stages, phases and learning rate as text."""
        return f"{self.schedule.draw()}\n{self.phases.draw()}\n{self.learning_rates.draw()}"


@dataclass(frozen=True)
class Job(CheckedRecipe):
    """What a run trains on, how long, and how fast it learns; see `Job.check`."""

    shards: TokenShards
    train_data: Mapping[int, PretrainingData]
    """By sequence length."""

    @classmethod
    def check(cls, config: RunConfig) -> "Job":
        """Open and validate everything that `config` names.

        Raises:
            StageError: depths that do not grow, or that the growth operator cannot reach.
            ConfigError: a learning-rate schedule, model or DeepSpeed JSON that cannot be used.
            DataError: shards that are missing or damaged, or splits with too few documents.
        """
        recipe = CheckedRecipe.check(config)
        shards = TokenShards.open(Path(config.data.path))
        phases = recipe.phases.phases
        job = cls(
            **vars(recipe),
            shards=shards,
            train_data={
                length: PretrainingData(
                    shards, "train", RowOptions.of(config.data, length), seed=config.seed
                )
                for length in sorted({phase.sequence_length for phase in phases})
            },
        )
        spec = job.train_data[phases[0].sequence_length].options.layout(0)
        require_documents(shards.split("train"), spec)
        require_documents(shards.split("heldout"), spec)
        return job

    def lay_out_rows(self, say: Callable[[str], None], workers: int = 1) -> None:
        """Make the rows that the run will read, where they are not there; `say` is told first.

        Raises:
            DataError: fewer rows than one global batch, or nowhere to write them.
        """
        for length, data in self.train_data.items():
            heldout = replace(RowOptions.of(self.config.data, length), variants=1)
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

    @cached_property
    def data_sha256(self) -> str:
        """What identifies the training data: the documents, and the way rows are made of them."""
        identity = f"{self.shards.split_sha256('train')} layout {LAYOUT_VERSION}"
        return hashlib.sha256(identity.encode()).hexdigest()

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
            RowOptions.of(self.config.data, phase.sequence_length),
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

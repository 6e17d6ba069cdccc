"""A recipe and its data, checked as far as one process can before any rank meets another.

Whatever is wrong with the recipe, the shards or the DeepSpeed JSON shows here, in seconds.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stacking_ds.config import RunConfig
from stacking_ds.data.batch_split import split_batch
from stacking_ds.data.batches import RankStep
from stacking_ds.data.loader import EvaluationSteps, PretrainingData, PretrainingSteps
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.unigram import unigram_mlm_loss
from stacking_ds.engine import load_ds_config, resolve_ds_config
from stacking_ds.errors import CheckpointError
from stacking_ds.growth.operators import layer_map
from stacking_ds.model.config import BertConfig
from stacking_ds.optim.lamb import require_whole_tensors
from stacking_ds.optim.schedule import LearningRateSchedule
from stacking_ds.stages import StageSchedule

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What a run trains on, how long, and how fast it learns; see `Job.check`."""

    config: RunConfig
    schedule: StageSchedule
    learning_rates: LearningRateSchedule
    shards: TokenShards
    train_data: PretrainingData
    ds_json: dict[str, Any]

    @classmethod
    def check(cls, config: RunConfig) -> "Job":
        """Open and validate everything that `config` names.

        Raises:
            StageError: depths that do not grow, or that the growth operator cannot reach.
            ConfigError: a learning-rate schedule, model or DeepSpeed JSON that cannot be used.
            DataError: shards that are missing, damaged or too small for one global batch.
        """
        schedule = config.stage_schedule()
        depths = [stage.num_hidden_layers for stage in schedule.stages]
        for old_depth, new_depth in itertools.pairwise(depths):
            layer_map(config.growth.operator, old_depth, new_depth)
        shards = TokenShards.open(Path(config.data.path))
        job = cls(
            config=config,
            schedule=schedule,
            learning_rates=LearningRateSchedule.of(config, schedule),
            shards=shards,
            train_data=PretrainingData(
                shards,
                "train",
                sequence_length=config.data.sequence_length,
                mlm_probability=config.data.mlm_probability,
                seed=config.seed,
            ),
            ds_json=load_ds_config(config.engine.deepspeed),
        )
        job.train_data.require_samples(config.batch.global_batch_size)
        job.model_config(depths[-1])
        job.heldout_steps(0, 1)
        return job

    def model_config(self, num_hidden_layers: int) -> BertConfig:
        """The model at a depth, with the vocabulary of the shards."""
        return BertConfig(
            vocab_size=self.shards.manifest.vocab_size,
            num_hidden_layers=num_hidden_layers,
            **self.config.model.model_dump(),
        )

    def ds_config(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration for this many ranks.

        Raises:
            ConfigError: recipe and DeepSpeed JSON disagree; all disagreements in one message. Or a
            LAMB kernel that the ZeRO stage rules out.
        """
        config = self.config
        micro_batch_size, accumulation_steps = split_batch(
            config.batch.global_batch_size, world_size, config.batch.micro_batch_size
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
        if config.optimizer.lamb is not None:
            zero_stage = resolved["zero_optimization"].get("stage", 0)
            require_whole_tensors(config.optimizer.lamb.kernel, sharded=zero_stage > 0)
        return resolved

    @cached_property
    def data_sha256(self) -> str:
        """What identifies the training data: a hash over the hashes of its shards."""
        shards = self.shards.manifest.train.shards
        return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

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

    def training_steps(self, rank: int, world_size: int) -> PretrainingSteps:
        """This rank's share of each step of the run; step k is item k."""
        return PretrainingSteps(
            self.train_data,
            self.config.batch.global_batch_size,
            self.config.batch.micro_batch_size,
            self.schedule.total_steps,
            rank,
            world_size,
        )

    def heldout_steps(self, rank: int, world_size: int) -> list[RankStep]:
        """This rank's share of the one fixed pass over held-out rows."""
        config = self.config
        steps = EvaluationSteps(
            self.shards,
            sequence_length=config.data.sequence_length,
            mlm_probability=config.data.mlm_probability,
            max_samples=config.evaluation.max_samples,
            global_batch_size=config.batch.global_batch_size,
            micro_batch_size=config.batch.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        return [steps[index] for index in range(len(steps))]

    @cached_property
    def unigram_loss(self) -> float:
        """Held-out MLM loss of a model that knows word frequencies only, in nats."""
        return unigram_mlm_loss(self.shards, self.heldout_steps(0, 1))

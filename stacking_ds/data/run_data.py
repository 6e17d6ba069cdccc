"""The data of a run: the token shards of its recipe, and the rows that are made of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stacking_ds.config.run import RunConfig
from stacking_ds.data.batches import RankStep
from stacking_ds.data.loader import (
    PretrainingData,
    PretrainingSteps,
    evaluation_steps,
    unigram_log_probabilities,
    unigram_mlm_loss,
)
from stacking_ds.data.rows import LayoutSpec, require_documents, rows_sha256
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import CheckpointError
from stacking_ds.schedule.phases import Phase
from stacking_ds.schedule.run_schedule import RunSchedule


@dataclass(frozen=True)
class RunData:
    """Shards and rows, each opened once, when it is first needed."""

    config: RunConfig
    schedule: RunSchedule

    @cached_property
    def shards(self) -> TokenShards:
        """The token shards of the recipe's data.path."""
        return TokenShards.open(Path(self.config.data.path))

    @cached_property
    def train(self) -> Mapping[int, PretrainingData]:
        """The rows to train on, by sequence length."""
        lengths = sorted({phase.sequence_length for phase in self.schedule.phases.phases})
        return {
            length: PretrainingData(
                self.shards,
                "train",
                self.config.data.changed(sequence_length=length),
                seed=self.config.seed,
            )
            for length in lengths
        }

    def require(self) -> None:
        """Raises:
        DataError: shards that are missing or damaged, or splits with too few documents.
        """
        spec = LayoutSpec.of(self.config.data)
        require_documents(self.shards.split("train"), spec)
        require_documents(self.shards.split("heldout"), spec)
        _ = self.train  # its vocabulary can be masked

    def lay_out_rows(self, say: Callable[[str], None], workers: int = 1) -> None:
        """Make the rows that the run will read, where they are not there; `say` is told first.

        Raises:
            DataError: fewer rows than one global batch, or nowhere to write them.
        """
        phases, total_steps = self.schedule.phases, self.schedule.total_steps
        for length, data in self.train.items():
            data.lay_out(phases.rows(total_steps, length), say, workers)
            heldout = self.config.data.changed(sequence_length=length, variants=1)
            PretrainingData(self.shards, "heldout", heldout, seed=0).lay_out(1, say, workers)
        for phase in phases.phases:
            self.train[phase.sequence_length].require_rows(phase.global_batch_size)

    def verify(self) -> None:
        """Compare every byte of shards and rows with what was written, once.

        Raises:
            DataError: they differ.
        """
        self.shards.verify_once()
        for data in self.train.values():
            for _ in data.verifying():
                pass

    @property
    def vocab_size(self) -> int:
        return self.shards.manifest.vocab_size

    @property
    def vocabulary_sha256(self) -> str:
        return self.shards.manifest.vocabulary_sha256

    @property
    def sha256(self) -> str:
        """The identity of the training data: the documents, and the way rows are made of them."""
        return rows_sha256(self.shards.split("train"))

    def require_vocabulary(self, vocabulary_sha256: str, checkpoint: Path) -> None:
        """Raises:
        CheckpointError: the shards speak another vocabulary than that of `checkpoint`.
        """
        if vocabulary_sha256 != self.vocabulary_sha256:
            raise CheckpointError(
                f"{checkpoint} was trained with another vocabulary than that of "
                f"{self.shards.folder}; give shards prepared with the run's own, or start another "
                f"run"
            )

    def training_steps(self, rank: int, world_size: int, phase: Phase) -> PretrainingSteps:
        """This rank's share of each step of a phase; step k of the run is item k."""
        return PretrainingSteps(self.train[phase.sequence_length], phase, rank, world_size)

    def heldout_steps(self, rank: int, world_size: int, phase: Phase) -> list[RankStep]:
        """This rank's share of the one fixed pass over held-out rows of the phase's length."""
        return evaluation_steps(
            self.shards,
            self.config.data.changed(sequence_length=phase.sequence_length),
            max_rows=self.config.evaluation.max_samples,
            micro_batch_size=phase.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def unigram_loss(self, phase: Phase) -> float:
        """Held-out MLM loss of a model that knows word frequencies only, in nats."""
        return unigram_mlm_loss(self._unigram, self.heldout_steps(0, 1, phase))

    @cached_property
    def _unigram(self) -> NDArray[np.float64]:
        return unigram_log_probabilities(self.shards)

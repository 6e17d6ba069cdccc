"""The global batch at any position of the data, as a function of (seed, position) alone.

The order is the endless concatenation of one keyed permutation of the rows per epoch; masks are
drawn from (seed, epoch, example). So ranks, micro-batches, restarts and worker processes decide
only who computes a row, never what is in it, and any position is reached at once.

Shapes: R rows of one rank, E examples.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stacking_ds.config.sections import DataSection
from stacking_ds.data.batches import Assembler, RankStep, rows_of_rank, split_batch
from stacking_ds.data.counter_random import Integers, KeyedPermutation, derive_key
from stacking_ds.data.examples import concatenate
from stacking_ds.data.prefetch import Patience, PrefetchedSteps
from stacking_ds.data.rows import Layout, LayoutSpec, open_layout
from stacking_ds.data.shard_files import SplitName
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import ConfigError, DataError
from stacking_ds.schedule.phases import Phase

_ORDER, _MASK = range(2)
# Held-out batches do not follow the run's seed: runs with different seeds share one yardstick.
_EVALUATION_SEED = 20190524


class PretrainingData:
    """The rows of one split."""

    def __init__(
        self, shards: TokenShards, split: SplitName, section: DataSection, *, seed: int
    ) -> None:
        """Raises DataError for a vocabulary of special tokens alone. Rows are looked for, and laid
        out, when they are first needed: see `rows.open_layout` for what that raises."""
        self.shards, self.section = shards, section
        self._split, self._seed = shards.split(split), seed
        self._length = section.sequence_length
        self._layouts: list[Layout] = []
        self._assembler = Assembler(self._split, section)

    def layout(
        self, variant: int, workers: int = 1, say: Callable[[str], None] = lambda _: None
    ) -> Layout:
        """The rows of a variant, laid out as by `rows.open_layout` if they are not there."""
        while len(self._layouts) <= variant:
            spec = LayoutSpec.of(self.section, len(self._layouts))
            self._layouts.append(open_layout(self._split, spec, workers, say))
        return self._layouts[variant]

    def lay_out(self, num_rows: int, say: Callable[[str], None], workers: int = 1) -> None:
        """Lays out, by up to `workers` processes, the variants that the first `num_rows` rows of
        the order need and that are not there yet; `say` is told of each one first."""
        for variant in range(self.section.variants):
            num_rows -= self.layout(variant, workers, say).num_rows
            if num_rows <= 0:
                return

    def verifying(self) -> Iterator[None]:
        """Compares the rows that this has opened with what was written, a file at a time; raises
        DataError where they differ."""
        for layout in list(self._layouts):
            yield from layout.verifying()

    @property
    def num_rows(self) -> int:
        """Rows in the first epoch."""
        return self.layout(0).num_rows

    def step(
        self,
        first_row: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int,
        stop_row: int | None = None,
    ) -> RankStep:
        """`rank`'s share of the global batch that begins at position `first_row` of the order; rows
        from `stop_row` on carry no weight."""
        rows = rows_of_rank(global_batch_size, world_size, micro_batch_size, rank)
        position_R = first_row + np.asarray(rows, dtype=np.int64)
        if stop_row is not None:
            position_R = position_R[position_R < stop_row]
        epoch_R, place_R = self._locate(position_R)
        counts, found = [np.zeros(0, np.int64)], []
        for epoch in np.unique(epoch_R).tolist():
            layout = self.layout(epoch % self.section.variants)
            order = KeyedPermutation(
                layout.num_rows, derive_key(self._seed, _ORDER, self._length, epoch)
            )
            count, examples = layout.examples_of(order(place_R[epoch_R == epoch]))
            counts.append(count)
            found.append(examples)
        counts_R, examples = np.concatenate(counts), concatenate(found)
        # an example is known by its first token, which no other has
        known_by = np.repeat(epoch_R, counts_R), examples.first_start_E
        return self._assembler.rank_step(
            counts_R,
            examples,
            derive_key(self._seed, _MASK, self._length, *known_by),
            *split_batch(global_batch_size, world_size, micro_batch_size),
        )

    def _locate(self, position_R: Integers) -> tuple[Integers, Integers]:
        """The epoch of each position of the order, and its place in that epoch."""
        bases = [0]
        last = int(position_R.max(initial=0))
        # variants that no position reaches need not be there yet
        while last >= bases[-1] and len(bases) <= self.section.variants:
            bases.append(bases[-1] + self.layout(len(bases) - 1).num_rows)
        cycle_R, place_R = np.zeros_like(position_R), position_R
        if len(bases) > self.section.variants:
            cycle_R, place_R = np.divmod(position_R, bases[-1])
        variant_R = np.searchsorted(bases, place_R, side="right") - 1
        return cycle_R * self.section.variants + variant_R, place_R - np.array(bases)[variant_R]

    def require_rows(self, global_batch_size: int) -> None:
        """Raises DataError when the first epoch has fewer rows than one global batch."""
        if self.num_rows < global_batch_size:
            raise DataError(
                f"the {self._split.name} split of {self.shards.folder} has {self.num_rows} rows of "
                f"{self.section.sequence_length} tokens, fewer than one global batch of "
                f"{global_batch_size}; prepare more text or take a smaller batch"
            )


@dataclass(frozen=True)
class PretrainingSteps:
    """The steps of one rank in one phase; item k is step k of the run, made without what lies
    before it."""

    data: PretrainingData
    phase: Phase
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.data.require_rows(self.phase.global_batch_size)

    def __getitem__(self, step: int) -> RankStep:
        return self.data.step(
            self.phase.first_row(step),
            self.phase.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.phase.micro_batch_size,
        )


def evaluation_steps(
    shards: TokenShards,
    section: DataSection,
    *,
    max_rows: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[RankStep]:
    """One pass over `max_rows` held-out rows, drawn from all of them, the same in every run; a step
    is one micro-batch on each rank. Raises DataError when the held-out split has too few documents.
    """
    if max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; it must be at least 1")
    section = section.changed(variants=1)
    data = PretrainingData(shards, "heldout", section, seed=_EVALUATION_SEED)
    stop_row, step_rows = min(max_rows, data.num_rows), micro_batch_size * world_size
    return [
        data.step(
            first_row,
            step_rows,
            stop_row=stop_row,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
        )
        for first_row in range(0, stop_row, step_rows)
    ]


def load_steps(
    steps: PretrainingSteps,
    numbers: Iterable[int],
    *,
    workers: int,
    pin_memory: bool,
    patience: Patience | None = None,
) -> Generator[RankStep] | PrefetchedSteps:
    """The steps of these numbers, built ahead by `workers` processes, or in this one if there are
    none; to be closed. Raises ConfigError where the machine has no room for the processes, and
    where a step is waited for whatever building it raises, or LoaderError."""
    if workers == 0:
        return (steps[n].pin_memory() if pin_memory else steps[n] for n in numbers)
    return PrefetchedSteps(
        steps.__getitem__,
        numbers,
        workers=workers,
        pin_memory=pin_memory,
        patience=patience or Patience(),
    )


def unigram_log_probabilities(shards: TokenShards) -> NDArray[np.float64]:
    """Natural logarithms of the tokens' shares in the training split, each counted once more than
    it occurs (Laplace 1814), so that none is impossible. Shape [vocab_size]."""
    counts = shards.split("train").unigram_counts() + 1
    logarithms: NDArray[np.float64] = np.log(counts) - np.log(counts.sum())
    return logarithms


def unigram_mlm_loss(log_probability: NDArray[np.float64], steps: Iterable[RankStep]) -> float:
    """Cross-entropy of these probabilities over the masked tokens of `steps`, which are those of a
    single rank, in nats per token. Raises DataError when they mask nothing."""
    total, targets = 0.0, 0
    for step in steps:
        for batch in step.micro_batches:
            labels = batch.mlm_labels_M.numpy()
            total -= float(log_probability[labels].sum())
            targets += len(labels)
    if not targets:
        raise DataError("the evaluation masks no token; there is nothing to compare with")
    return total / targets

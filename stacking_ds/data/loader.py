"""The global batch at any position of the data, as a function of (seed, position) alone.

The order is the endless concatenation of one keyed permutation of the samples per epoch. Sentence
pairs and masks are drawn from (seed, epoch, sample). So ranks, micro-batches, restarts and worker
processes decide only who computes a row, never what is in it, and any position is reached at once.

Shapes: R rows of one rank, S positions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stacking_ds.data.batch_split import rows_of_rank, split_batch
from stacking_ds.data.batches import IGNORE_INDEX, Batch, RankStep
from stacking_ds.data.counter_random import KeyedPermutation, derive_key
from stacking_ds.data.manifest import SplitName
from stacking_ds.data.masking import mask_tokens
from stacking_ds.data.samples import SentencePairs, build_samples, draw_pairs
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import ConfigError, DataError

__all__ = ["EvaluationSteps", "PretrainingData", "PretrainingSteps"]

_ORDER, _PAIR, _MASK = range(3)
# Held-out batches do not follow the run's seed: runs with different seeds share one yardstick.
_EVALUATION_SEED = 20190524

Integers = NDArray[np.int64]


class PretrainingData:
    """The samples of one split at one sequence length."""

    def __init__(
        self,
        shards: TokenShards,
        split: SplitName,
        *,
        sequence_length: int,
        mlm_probability: float,
        seed: int,
    ) -> None:
        """Raises DataError for a sequence that is too short or a split with too few documents."""
        if not 0 < mlm_probability < 1:
            raise ConfigError(f"mlm_probability is {mlm_probability}; it must lie in (0, 1)")
        self.shards = shards
        self.sequence_length = sequence_length
        self._split = shards.split(split)
        self._index = build_samples(self._split, sequence_length)
        self._mlm_probability = mlm_probability
        self._seed = seed
        self._special = shards.special_ids
        self._ordinary_ids = np.setdiff1d(
            np.arange(shards.manifest.vocab_size), list(self._special)
        )

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return len(self._index)

    def step(
        self,
        first_sample: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int,
    ) -> RankStep:
        """`rank`'s share of the global batch that begins at position `first_sample`.

        Raises DataError when an epoch has fewer samples than a global batch.
        """
        self.require_samples(global_batch_size)
        rows = rows_of_rank(global_batch_size, world_size, micro_batch_size, rank)
        epoch_R, place_R = np.divmod(
            first_sample + np.asarray(rows, dtype=np.int64), len(self._index)
        )
        sample_R = np.empty_like(place_R)
        for epoch in np.unique(epoch_R):
            order = KeyedPermutation(len(self._index), derive_key(self._seed, _ORDER, int(epoch)))
            sample_R[epoch_R == epoch] = order(place_R[epoch_R == epoch])
        return self._rank_step(
            sample_R, epoch_R, *split_batch(global_batch_size, world_size, micro_batch_size)
        )

    def step_in_order(
        self,
        first_sample: int,
        global_batch_size: int,
        *,
        stop_sample: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int,
    ) -> RankStep:
        """The same for the samples in the order of the shards, in epoch 0, with rows from
        `stop_sample` on carrying no weight."""
        rows = rows_of_rank(global_batch_size, world_size, micro_batch_size, rank)
        sample_R = first_sample + np.asarray(rows, dtype=np.int64)
        sample_R = sample_R[sample_R < min(stop_sample, len(self._index))]
        return self._rank_step(
            sample_R,
            np.zeros_like(sample_R),
            *split_batch(global_batch_size, world_size, micro_batch_size),
        )

    def require_samples(self, global_batch_size: int) -> None:
        """Raises DataError when an epoch has fewer samples than one global batch."""
        if self.num_samples < global_batch_size:
            raise DataError(
                f"the {self._split.name} split of {self.shards.folder} has {self.num_samples} "
                f"samples of {self.sequence_length} tokens, fewer than one global batch of "
                f"{global_batch_size}; prepare more text or take a smaller batch"
            )

    def _rank_step(
        self, sample_R: Integers, epoch_R: Integers, micro_batch_size: int, num_micro_batches: int
    ) -> RankStep:
        """Builds the rows of `sample_R` and cuts them, padded, into micro-batches."""
        rows = self._rows(sample_R, epoch_R, micro_batch_size * num_micro_batches)
        micro_batches = tuple(
            rows.micro_batch(start, start + micro_batch_size)
            for start in range(0, micro_batch_size * num_micro_batches, micro_batch_size)
        )
        return RankStep(
            micro_batches,
            mlm_targets=len(rows.positions),
            nsp_targets=len(sample_R),
            real_tokens=sum(batch.real_tokens for batch in micro_batches),
        )

    def _rows(self, sample_R: Integers, epoch_R: Integers, num_rows: int) -> "_Rows":
        """The rows of `sample_R`, followed by rows without weight up to `num_rows`."""
        pairs = draw_pairs(self._index, sample_R, derive_key(self._seed, _PAIR, epoch_R, sample_R))
        shape = (num_rows, self.sequence_length)
        input_ids = np.full(shape, self._special.pad, dtype=np.int64)
        token_types = np.zeros(shape, dtype=np.int64)
        real = len(sample_R)
        maskable = self._fill(input_ids[:real], token_types[:real], pairs)
        length = np.full(num_rows, 2)
        length[:real] = pairs.first_length_B + pairs.second_length_B + 3
        input_ids[real:, 0] = self._special.cls
        input_ids[real:, 1] = self._special.sep
        positions, labels = mask_tokens(
            input_ids[:real],
            maskable,
            derive_key(self._seed, _MASK, epoch_R, sample_R),
            mlm_probability=self._mlm_probability,
            mask_id=self._special.mask,
            ordinary_ids=self._ordinary_ids,
        )
        next_sentence = np.full(num_rows, IGNORE_INDEX, dtype=np.int64)
        next_sentence[:real] = pairs.is_random_B
        return _Rows(input_ids, token_types, length, positions, labels, next_sentence, real)

    def _fill(
        self, input_ids: Integers, token_types: Integers, pairs: SentencePairs
    ) -> NDArray[np.bool_]:
        """Writes [CLS] A [SEP] B [SEP] into rows of padding; returns where tokens may be masked:
        at words, not at [CLS], [SEP], padding or [UNK]."""
        column = np.arange(self.sequence_length)
        second = (pairs.first_length_B + 2)[:, None]
        end = second + pairs.second_length_B[:, None]
        in_first = (column > 0) & (column < second - 1)
        in_second = (column >= second) & (column < end)
        source = np.where(
            in_first,
            pairs.first_start_B[:, None] + column - 1,
            pairs.second_start_B[:, None] + column - second,
        )
        is_text = in_first | in_second
        input_ids[is_text] = self._split.tokens_at(source[is_text])
        row = np.arange(len(input_ids))
        input_ids[:, 0] = self._special.cls
        input_ids[row, second[:, 0] - 1] = self._special.sep
        input_ids[row, end[:, 0]] = self._special.sep
        token_types[(column >= second) & (column <= end)] = 1
        maskable: NDArray[np.bool_] = is_text & (input_ids != self._special.unk)
        return maskable


@dataclass(frozen=True)
class _Rows:
    """All rows of one rank in one step, still in numpy; the first `num_real` carry weight."""

    input_ids: Integers
    token_types: Integers
    length: Integers
    positions: Integers
    labels: Integers
    next_sentence: Integers
    num_real: int

    def micro_batch(self, start: int, stop: int) -> Batch:
        """The rows [start, stop) as tensors."""
        width = self.input_ids.shape[1]
        first, last = np.searchsorted(self.positions, (start * width, stop * width))
        attention = np.arange(width) < self.length[start:stop, None]
        return Batch(
            torch.from_numpy(self.input_ids[start:stop]),
            torch.from_numpy(self.token_types[start:stop]),
            torch.from_numpy(attention),
            torch.from_numpy(self.positions[first:last] - start * width),
            torch.from_numpy(self.labels[first:last]),
            torch.from_numpy(self.next_sentence[start:stop]),
            real_tokens=int(self.length[start : min(stop, self.num_real)].sum()),
        )


@dataclass(frozen=True)
class PretrainingSteps(torch.utils.data.Dataset[RankStep]):
    """The steps of one rank for torch's DataLoader, item k being step k of the run.

    Use it with `batch_size=None` and `sampler=range(first_step, num_steps)`: the workers then
    start at `first_step` without reading what lies before it.
    """

    data: PretrainingData
    global_batch_size: int
    micro_batch_size: int
    num_steps: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.data.require_samples(self.global_batch_size)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> RankStep:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        return self.data.step(
            step * self.global_batch_size,
            self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
        )


class EvaluationSteps(torch.utils.data.Dataset[RankStep]):
    """One pass over the first `max_samples` held-out samples, the same in every run."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        mlm_probability: float,
        max_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raises DataError when the held-out split has too few documents."""
        if max_samples < 1:
            raise ConfigError(f"max_samples is {max_samples}; it must be at least 1")
        self._data = PretrainingData(
            shards,
            "heldout",
            sequence_length=sequence_length,
            mlm_probability=mlm_probability,
            seed=_EVALUATION_SEED,
        )
        self.num_samples = min(max_samples, self._data.num_samples)
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self._global_batch_size)

    def __getitem__(self, step: int) -> RankStep:
        if not 0 <= step < len(self):
            raise IndexError(f"evaluation step {step} of {len(self)}")
        return self._data.step_in_order(
            step * self._global_batch_size,
            self._global_batch_size,
            stop_sample=self.num_samples,
            rank=self._rank,
            world_size=self._world_size,
            micro_batch_size=self._micro_batch_size,
        )

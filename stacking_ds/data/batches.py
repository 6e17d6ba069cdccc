"""What one rank computes on: micro-batches of rows.

Shapes: B rows, S positions, T tokens, M masked positions, E examples.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stacking_ds.config.sections import MaskingName
from stacking_ds.data.counter_random import Words
from stacking_ds.data.examples import Examples
from stacking_ds.data.masking import MaskingVocabulary, mask_tokens
from stacking_ds.data.rows import LayoutSpec, ranges
from stacking_ds.data.shards import TokenSplit
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX

# ---- How a global batch is divided among ranks and micro-batches: pure arithmetic.


def split_batch(global_batch_size: int, world_size: int, micro_batch_size: int) -> tuple[int, int]:
    """The micro-batch size to use, at most `micro_batch_size`, and the number of micro-batches
    that every rank runs in a step (DeepSpeed's gradient_accumulation_steps).

    Their product times `world_size` is at least `global_batch_size`; rows beyond it carry no
    weight. Raises ConfigError for values below one.
    """
    for name, value in (
        ("global_batch_size", global_batch_size),
        ("world_size", world_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    rows = -(-global_batch_size // world_size)
    gradient_accumulation_steps = -(-rows // micro_batch_size)
    return -(-rows // gradient_accumulation_steps), gradient_accumulation_steps


def rows_of_rank(
    global_batch_size: int, world_size: int, micro_batch_size: int, rank: int
) -> range:
    """The rows of the global batch that `rank` computes, contiguous; empty where ranks outnumber
    rows. Over the ranks the ranges tile [0, global_batch_size) in order."""
    size, count = split_batch(global_batch_size, world_size, micro_batch_size)
    start = min(rank * size * count, global_batch_size)
    return range(start, min(start + size * count, global_batch_size))


@dataclass(frozen=True)
class Batch:
    """Rows, such as a micro-batch.

    A row holds one example, or several where rows are packed. Rows without weight, which fill up
    what does not divide by the ranks, are one example of [CLS] [SEP]: no masked position, and the
    next-sentence label -100.
    """

    input_ids_BS: torch.Tensor  # int64
    token_type_ids_BS: torch.Tensor  # int64; 0 for [CLS] A [SEP], 1 for B [SEP], 0 for padding
    attention_mask_BS: torch.Tensor  # int64; 0: padding, k: the k-th example of the row
    position_ids_BS: torch.Tensor | None  # int64; counted within each example; None if not packed
    mlm_positions_M: torch.Tensor  # int64; b * S + s, ascending
    mlm_labels_M: torch.Tensor  # int64; the tokens that stood at these positions
    first_positions_E: torch.Tensor  # int64; b * S + s of each example's [CLS], ascending
    next_sentence_label_E: torch.Tensor  # int64; 0: B follows A, 1: it is random, -100: no weight
    token_positions_T: torch.Tensor  # int64; b * S + s of what is not padding, ascending

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on `device`."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if value is not None:
                moved[name] = value.to(device, non_blocking=non_blocking)
        return Batch(**moved)

    @property
    def model_inputs(self) -> tuple[torch.Tensor | None, ...]:
        """What the model's forward takes, in its order."""
        return (
            self.input_ids_BS,
            self.token_type_ids_BS,
            self.attention_mask_BS,
            self.mlm_positions_M,
            self.position_ids_BS,
            self.first_positions_E,
            self.token_positions_T,
        )

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows [start, stop); slots count from the first of them."""
        slots = torch.tensor([start, stop]) * self.input_ids_BS.shape[1]
        masked = slice(*torch.searchsorted(self.mlm_positions_M, slots).tolist())
        examples = slice(*torch.searchsorted(self.first_positions_E, slots).tolist())
        tokens = slice(*torch.searchsorted(self.token_positions_T, slots).tolist())
        positions = self.position_ids_BS
        return Batch(
            self.input_ids_BS[start:stop],
            self.token_type_ids_BS[start:stop],
            self.attention_mask_BS[start:stop],
            None if positions is None else positions[start:stop],
            self.mlm_positions_M[masked] - slots[0],
            self.mlm_labels_M[masked],
            self.first_positions_E[examples] - slots[0],
            self.next_sentence_label_E[examples],
            self.token_positions_T[tokens] - slots[0],
        )


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a global batch: as many micro-batches, of the same shape, on each rank.

    The counts are this rank's; summed over the ranks they are what the losses are divided by.
    Build it with `of`.
    """

    content: torch.Tensor
    """All tensors of the micro-batches in one, which a loader's process hands on as one piece.
    Pinned as a whole, they go to a GPU without waiting for it."""
    shapes: tuple[tuple[tuple[int, ...] | None, ...], ...]
    """Of each micro-batch's tensors, in the order of `Batch`'s fields."""
    mlm_targets: int
    nsp_targets: int
    real_tokens: int
    """Tokens of the rows with weight, [CLS] and [SEP] included."""

    @classmethod
    def of(cls, batch: Batch, micro_batch_size: int, real_tokens: int) -> "RankStep":
        """The step of these rows, so many at a time, `real_tokens` of whose tokens carry weight."""
        micro_batches = [
            batch.rows(start, start + micro_batch_size)
            for start in range(0, len(batch.input_ids_BS), micro_batch_size)
        ]
        parts_of = [[getattr(one, field.name) for field in fields(one)] for one in micro_batches]
        return cls(
            torch.cat([part.flatten() for parts in parts_of for part in parts if part is not None]),
            tuple(
                tuple(None if part is None else tuple(part.shape) for part in parts)
                for parts in parts_of
            ),
            mlm_targets=len(batch.mlm_labels_M),
            nsp_targets=int((batch.next_sentence_label_E != IGNORE_INDEX).sum()),
            real_tokens=real_tokens,
        )

    @property
    def micro_batches(self) -> list[Batch]:
        """Views of the content."""
        sizes = [
            math.prod(shape) for shapes in self.shapes for shape in shapes if shape is not None
        ]
        parts = iter(torch.split(self.content, sizes))
        return [
            Batch(*(None if shape is None else next(parts).view(shape) for shape in shapes))  # type: ignore[arg-type]
            for shapes in self.shapes
        ]

    def pin_memory(self) -> "RankStep":
        """The step in page-locked memory."""
        return replace(self, content=self.content.pin_memory())


# ---- Examples to rows of tensors: frame them by [CLS] and [SEP], mask them, cut them into
# batches.


Integers = NDArray[np.int64]


class Assembler:
    """Makes the rows of one split."""

    def __init__(
        self, split: TokenSplit, spec: LayoutSpec, masking: MaskingName, mlm_probability: float
    ) -> None:
        self._split, self._spec = split, spec
        self._masking, self._mlm_probability = masking, mlm_probability
        self._special = split.shards.special_ids
        self._vocabulary = MaskingVocabulary.of(split.shards.vocabulary)

    def rank_step(
        self,
        counts_R: Integers,
        examples: Examples,
        mask_key_E: Words,
        micro_batch_size: int,
        num_micro_batches: int,
    ) -> RankStep:
        """The micro-batches of rows that hold `counts_R` of the `examples` each, padded by rows
        without weight."""
        num_rows = micro_batch_size * num_micro_batches
        tokens = self._frame(examples)
        masked_M, labels_M = mask_tokens(
            tokens.ids_T,
            tokens.maskable_T,
            tokens.offsets,
            mask_key_E,
            masking=self._masking,
            mlm_probability=self._mlm_probability,
            vocabulary=self._vocabulary,
        )
        batch = self._rows(tokens, counts_R, examples, num_rows, masked_M, labels_M)
        return RankStep.of(batch, micro_batch_size, real_tokens=len(tokens.ids_T))

    def _frame(self, examples: Examples) -> "_Tokens":
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], of each example."""
        first_E = examples.first_length_E.astype(np.int64)
        second_E = examples.second_length_E.astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(examples.slots, dtype=np.int64)])
        start_E, second_start_E = offsets[:-1], offsets[:-1] + first_E + 2
        ids = np.empty(offsets[-1], dtype=np.int64)
        types = np.zeros(offsets[-1], dtype=np.int64)
        maskable = np.zeros(offsets[-1], dtype=np.bool_)
        for source_E, target_E, length_E in (
            (examples.first_start_E, start_E + 1, first_E),
            (examples.second_start_E, second_start_E, second_E),
        ):
            target_T = ranges(target_E, length_E)
            text = self._split.read(source_E, length_E)
            ids[target_T] = text
            maskable[target_T] = text != self._special.unk
        types[ranges(second_start_E, offsets[1:] - second_start_E)] = 1
        ids[start_E] = self._special.cls
        ids[second_start_E - 1] = self._special.sep
        ids[offsets[1:] - 1] = self._special.sep
        return _Tokens(ids, types, maskable, offsets)

    def _rows(
        self,
        tokens: "_Tokens",
        counts_R: Integers,
        examples: Examples,
        num_rows: int,
        masked_M: Integers,
        labels_M: Integers,
    ) -> Batch:
        length, real = self._spec.sequence_length, len(counts_R)
        row_offsets = np.concatenate([[0], np.cumsum(counts_R)])
        row_E = np.repeat(np.arange(real), counts_R)
        first_of_row_E = row_offsets[row_E]
        slot_E = row_E * length + tokens.offsets[:-1] - tokens.offsets[first_of_row_E]
        lengths_E = np.diff(tokens.offsets)
        slot_T = ranges(slot_E, lengths_E)
        shape = (num_rows, length)
        input_ids = np.full(shape, self._special.pad, dtype=np.int64)
        token_types, attention, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        input_ids.reshape(-1)[slot_T] = tokens.ids_T
        token_types.reshape(-1)[slot_T] = tokens.types_T
        number_E = np.arange(len(row_E)) - first_of_row_E + 1
        attention.reshape(-1)[slot_T] = np.repeat(number_E, lengths_E)
        if self._spec.packed:
            positions.reshape(-1)[slot_T] = ranges(np.zeros_like(slot_E), lengths_E)
            positions[real:, 1] = 1
        input_ids[real:, :2] = self._special.cls, self._special.sep
        attention[real:, :2] = 1
        without_weight = np.arange(real, num_rows) * length
        nothing = np.full(num_rows - real, IGNORE_INDEX, dtype=np.int64)
        has_second_E = examples.second_length_E > 0
        label_E = np.where(has_second_E, examples.is_random_E.astype(np.int64), IGNORE_INDEX)
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(token_types),
            torch.from_numpy(attention),
            torch.from_numpy(positions) if self._spec.packed else None,
            torch.from_numpy(slot_T[masked_M]),
            torch.from_numpy(labels_M),
            torch.from_numpy(np.concatenate([slot_E, without_weight])),
            torch.from_numpy(np.concatenate([label_E, nothing])),
            torch.from_numpy(np.concatenate([slot_T, (without_weight[:, None] + [0, 1]).ravel()])),
        )


@dataclass(frozen=True)
class _Tokens:
    """Example e is [offsets[e], offsets[e + 1]) of each array."""

    ids_T: Integers
    types_T: Integers
    maskable_T: NDArray[np.bool_]
    offsets: Integers

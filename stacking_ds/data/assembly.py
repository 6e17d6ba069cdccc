"""Examples to rows of tensors: frame them by [CLS] and [SEP], mask them, cut them into batches.

Shapes: R rows with weight, B rows, S positions, E examples, T tokens of all examples one after the
other, M masked positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stacking_ds.data.batches import IGNORE_INDEX, Batch, RankStep
from stacking_ds.data.counter_random import Words
from stacking_ds.data.examples import Examples
from stacking_ds.data.masking import MaskingName, MaskingVocabulary, mask_tokens
from stacking_ds.data.rows import LayoutSpec, ranges
from stacking_ds.data.shards import TokenSplit

__all__ = ["Assembler"]

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

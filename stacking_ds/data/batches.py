"""Micro-batches, what one rank computes on: the tokens of its rows without padding.

Shapes: R rows, T tokens, E examples, M masked positions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from stacking_ds.config.sections import DataSection
from stacking_ds.data.counter_random import Integers, Words
from stacking_ds.data.examples import Examples, concatenate, empty_examples, ranges
from stacking_ds.data.masking import MaskingVocabulary, mask_tokens
from stacking_ds.data.shards import TokenSplit
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX


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
    """The tokens of rows, such as a micro-batch's, one example behind the other.

    A row holds one example, or several where rows are packed. Rows without weight, which fill up
    what does not divide by the ranks, are one example of [CLS] [SEP]: no masked position, and the
    next-sentence label -100.

    All is int32 as a loader hands it on, and int64, but for the sequences, where `to` has put it.
    """

    sequences: Sequences  # where the examples begin
    input_ids_T: torch.Tensor
    token_type_ids_T: torch.Tensor  # 0 for [CLS] A [SEP], 1 for B [SEP]
    position_ids_T: torch.Tensor  # counted within each example
    mlm_positions_M: torch.Tensor  # which of the T tokens are masked, ascending
    mlm_labels_M: torch.Tensor  # the tokens that stood there
    next_sentence_label_E: torch.Tensor  # 0: B follows A, 1: it is random, -100: no weight

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`, ready for the model."""
        sequences, *parts = (getattr(self, field.name) for field in fields(self))
        starts_E1 = sequences.starts_E1.to(device, non_blocking=True)
        # widened there: fewer bytes cross, and none waits for a conversion in unpinned memory
        wide = (part.to(device, non_blocking=True).long() for part in parts)
        return Batch(replace(sequences, starts_E1=starts_E1), *wide)

    @property
    def model_inputs(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequences, torch.Tensor]:
        """The arguments of the model's forward, in its order."""
        ids = self.input_ids_T, self.token_type_ids_T, self.position_ids_T
        return *ids, self.sequences, self.mlm_positions_M


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a global batch: as many micro-batches, of as many rows, on each rank. The
    counts are this rank's; summed over the ranks they are what the losses are divided by."""

    content: torch.Tensor
    """int32: the tensors of all micro-batches in one, which a loader's process hands on as one
    piece. Pinned as a whole, they go to a GPU without waiting for it."""
    sizes: tuple[tuple[int, int, int], ...]
    """T, M and E of each micro-batch."""
    longest: int
    """Slots of a row."""
    slots: int
    """Of a micro-batch: of all its rows."""
    mlm_targets: int
    nsp_targets: int
    real_tokens: int
    """Tokens of the rows with weight, [CLS] and [SEP] included."""

    @classmethod
    def of(cls, micro_batches: Sequence[Batch], real_tokens: int) -> "RankStep":
        """The step of these micro-batches, `real_tokens` of whose tokens carry weight."""
        parts, sizes, nsp_targets = [], [], 0
        for batch in micro_batches:
            starts_E1, label_E = batch.sequences.starts_E1, batch.next_sentence_label_E
            parts += [starts_E1, batch.input_ids_T, batch.token_type_ids_T, batch.position_ids_T]
            parts += [batch.mlm_positions_M, batch.mlm_labels_M, label_E]
            sizes.append((len(batch.input_ids_T), len(batch.mlm_labels_M), len(label_E)))
            nsp_targets += int((label_E != IGNORE_INDEX).sum())
        content = np.concatenate([part.numpy() for part in parts], dtype=np.int32, casting="unsafe")
        return cls(
            torch.from_numpy(content),
            tuple(sizes),
            micro_batches[0].sequences.longest,
            micro_batches[0].sequences.slots,
            mlm_targets=sum(masked for _, masked, _ in sizes),
            nsp_targets=nsp_targets,
            real_tokens=real_tokens,
        )

    @property
    def micro_batches(self) -> list[Batch]:
        """Views of the content; `to` moves them one by one."""
        lengths = [n for T, M, E in self.sizes for n in (E + 1, T, T, T, M, M, E)]
        parts = iter(torch.split(self.content, lengths))
        return [
            Batch(Sequences(next(parts), self.longest, self.slots), *itertools.islice(parts, 6))
            for _ in self.sizes
        ]

    def pin_memory(self) -> "RankStep":
        """The step in page-locked memory."""
        return replace(self, content=self.content.pin_memory())


# ---- Examples to micro-batches: framed by [CLS] and [SEP], masked, cut.


class Assembler:
    """Makes the rows of one split."""

    def __init__(self, split: TokenSplit, section: DataSection) -> None:
        self._split, self._section = split, section
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
        """The micro-batches of rows that hold `counts_R` of the `examples` each, filled up by rows
        without weight."""
        real, length = len(examples), self._section.sequence_length
        without_weight = micro_batch_size * num_micro_batches - len(counts_R)
        nothing = np.zeros(without_weight, dtype=np.int64)
        examples = concatenate([examples, empty_examples(without_weight)])
        ids_T, types_T, maskable_T, offsets = self._frame(examples)
        masked_M, labels_M = mask_tokens(
            ids_T,
            maskable_T,
            offsets,
            np.append(mask_key_E, nothing.astype(np.uint64)),
            masking=self._section.masking,
            mlm_probability=self._section.mlm_probability,
            vocabulary=self._vocabulary,
        )
        is_random_E = examples.is_random_E.astype(np.int64)
        label_E = np.where(examples.second_length_E > 0, is_random_E, IGNORE_INDEX)
        place_T = ranges(np.zeros(len(examples), dtype=np.int64), np.diff(offsets))
        first_of_row = np.cumsum([0, *counts_R, *(nothing + 1)])
        micro_batches = []
        for first, stop in itertools.pairwise(first_of_row[::micro_batch_size].tolist()):
            start, end = offsets[[first, stop]].tolist()
            masked = slice(*np.searchsorted(masked_M, (start, end)).tolist())
            parts = (
                ids_T[start:end],
                types_T[start:end],
                place_T[start:end],
                masked_M[masked] - start,
                labels_M[masked],
                label_E[first:stop],
            )
            starts_E1 = torch.from_numpy(offsets[first : stop + 1] - start).int()
            sequences = Sequences(starts_E1, length, micro_batch_size * length)
            micro_batches.append(Batch(sequences, *map(torch.from_numpy, parts)))
        return RankStep.of(micro_batches, real_tokens=int(offsets[real]))

    def _frame(self, examples: Examples) -> tuple[Integers, Integers, NDArray[np.bool_], Integers]:
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], of each example: ids, types and what may be
        masked of all tokens, and at [E + 1] offsets where examples begin."""
        first_E, second_E = examples.first_length_E, examples.second_length_E
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
        return ids, types, maskable, offsets

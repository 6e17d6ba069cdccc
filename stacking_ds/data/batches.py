"""What one rank computes on: micro-batches of rows.

Shapes: B rows, S positions, T tokens, M masked positions, E examples.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

__all__ = ["IGNORE_INDEX", "Batch", "RankStep"]

# The label that carries no weight, as in Hugging Face and torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


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

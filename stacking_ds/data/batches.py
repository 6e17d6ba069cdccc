"""What one rank computes on: micro-batches of tensors of fixed shape.

Shapes: B rows, S positions, M masked positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

__all__ = ["IGNORE_INDEX", "Batch", "RankStep"]

# The label that carries no weight, as in Hugging Face and torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Rows without weight, which fill up what does not divide by the ranks, are [CLS] [SEP] and
    padding: they have no masked position, and the next-sentence label -100.
    """

    input_ids_BS: torch.Tensor  # int64
    token_type_ids_BS: torch.Tensor  # int64; 0 for [CLS] A [SEP], 1 for B [SEP], 0 for padding
    attention_mask_BS: torch.Tensor  # bool; True where there is a token
    mlm_positions_M: torch.Tensor  # int64; b * S + s, ascending
    mlm_labels_M: torch.Tensor  # int64; the tokens that stood at these positions
    next_sentence_label_B: torch.Tensor  # int64; 0: B follows A, 1: it is random, -100: no weight
    real_tokens: int  # tokens of the rows with weight, [CLS] and [SEP] included

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {
            field.name: function(getattr(self, field.name))
            for field in fields(self)
            if field.name != "real_tokens"
        }
        return Batch(**tensors, real_tokens=self.real_tokens)


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a global batch: as many micro-batches, of the same shape, on each rank.

    The counts are this rank's; summed over the ranks they are what the losses are divided by.
    """

    micro_batches: tuple[Batch, ...]
    mlm_targets: int
    nsp_targets: int
    real_tokens: int

    def pin_memory(self) -> "RankStep":
        return RankStep(
            tuple(batch.pin_memory() for batch in self.micro_batches),
            self.mlm_targets,
            self.nsp_targets,
            self.real_tokens,
        )

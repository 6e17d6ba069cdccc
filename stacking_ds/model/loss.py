"""The two losses of BERT pre-training, as sums.

Sums, because a mean over one rank's or one micro-step's targets would weigh targets unequally:
the caller divides by the target counts of the global batch.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

__all__ = ["IGNORED_LABEL", "PretrainingLoss", "pretraining_loss"]

IGNORED_LABEL = -100


class PretrainingLoss(NamedTuple):
    """Summed cross-entropies in nats: fp32 scalars, exactly 0 where there is no target."""

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor


def pretraining_loss(
    mlm_logits: torch.Tensor,
    mlm_labels: torch.Tensor,
    nsp_logits_E2: torch.Tensor,
    nsp_labels_E: torch.Tensor,
) -> PretrainingLoss:
    """Masked-word and next-sentence cross-entropy (Devlin et al. 2019 §3.1), computed in fp32.

    Args:
        mlm_logits: (..., V), either at the M masked positions or at all B x S.
        mlm_labels: (...), vocabulary ids.
        nsp_logits_E2: next-sentence logits.
        nsp_labels_E: 0 where the second sentence follows the first, 1 where it does not.

    A label of -100 is no target. Without any target a sum is 0 and has a gradient of 0, so a
    rank that holds padding rows only runs the same backward pass as the others.
    """
    return PretrainingLoss(
        mlm_sum=_cross_entropy_sum(mlm_logits, mlm_labels),
        nsp_sum=_cross_entropy_sum(nsp_logits_E2, nsp_labels_E),
    )


def _cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )

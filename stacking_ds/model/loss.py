"""The two losses of BERT pre-training, as sums.

Sums, because a mean over one rank's or one micro-step's targets would weigh targets unequally:
the caller divides by the target counts of the global batch.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from stacking_ds.kernels.cross_entropy import IGNORE_INDEX
from stacking_ds.kernels.operations import Operations


class PretrainingLoss(NamedTuple):
    """Summed cross-entropies in nats: fp32 scalars, exactly 0 where there is no target."""

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor


def pretraining_loss(
    mlm_logits: torch.Tensor,
    mlm_labels: torch.Tensor,
    nsp_logits_E2: torch.Tensor,
    nsp_labels_E: torch.Tensor,
    operations: Operations | None = None,
) -> PretrainingLoss:
    """Masked-word and next-sentence cross-entropy (Devlin et al. 2019 §3.1), computed in fp32.

    Args:
        mlm_logits: (..., V), either at the M masked positions or at all B x S. The backward pass
            overwrites them with their gradient.
        mlm_labels: (...), vocabulary ids.
        nsp_logits_E2: next-sentence logits.
        nsp_labels_E: 0 where the second sentence follows the first, 1 where it does not.
        operations: the model's, for the form of the cross-entropy.

    A label of -100 is no target. Without any target a sum is 0 and has a gradient of 0, so a
    rank that holds padding rows only runs the same backward pass as the others.
    """
    return PretrainingLoss(
        mlm_sum=(operations or Operations()).cross_entropy_sum(
            mlm_logits.flatten(0, -2), mlm_labels.flatten()
        ),
        nsp_sum=functional.cross_entropy(
            nsp_logits_E2.float(), nsp_labels_E, ignore_index=IGNORE_INDEX, reduction="sum"
        ),
    )

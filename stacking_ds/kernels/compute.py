"""How a model computes: the form of its operations and of its attention, and what it keeps."""

from dataclasses import dataclass, field

import torch

from stacking_ds.config.sections import ActivationCheckpointing
from stacking_ds.kernels.attention.loops import attend_loops
from stacking_ds.kernels.attention.padded import attend_padded
from stacking_ds.kernels.attention.sequences import Attend, Sequences
from stacking_ds.kernels.operations import Operations

__all__ = ["Compute", "attend_anywhere"]


def attend_anywhere(
    qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float
) -> torch.Tensor:
    """`Attend` that runs wherever the tokens are, for a model that nobody chose kernels for."""
    attend = attend_loops if qkv_T3ND.device.type == "cpu" else attend_padded
    return attend(qkv_T3ND, sequences, dropout_prob)


@dataclass(frozen=True)
class Compute:
    """What a `BertForPreTraining` computes with; by default, what runs everywhere."""

    operations: Operations = field(default_factory=Operations)
    attend: Attend = attend_anywhere
    activation_checkpointing: ActivationCheckpointing = "none"
    cuda_graphs: bool = False

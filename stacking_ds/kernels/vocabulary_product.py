"""The product with the vocabulary, in rows that begin where a GPU's matrix units can load them.

BERT's 30,522 words make rows of bf16 logits that begin at multiples of 4 bytes, for which cuBLAS
has slow kernels only. Padding the vocabulary would change the model; padding the memory does not.

Shapes: M rows, H hidden size, V vocabulary.
"""

import torch
from torch.nn import functional

__all__ = ["vocabulary_logits"]

_ALIGNED_ELEMENTS = 64  # 128 bytes of bf16: a cache line


def vocabulary_logits(
    hidden_MH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor
) -> torch.Tensor:
    """hidden W' + b. Shape [M, V]; on a GPU a view of rows a little longer."""
    if hidden_MH.device.type == "cpu":
        return functional.linear(hidden_MH, weight_VH, bias_V)
    logits_MV: torch.Tensor = AlignedLogits.apply(hidden_MH, weight_VH, bias_V)  # type: ignore[no-untyped-call]
    return logits_MV


class AlignedLogits(torch.autograd.Function):
    """Of two dimensions alone."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden_MH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_MH, weight_VH)
        classes = len(weight_VH)
        width = -(-classes // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
        logits_MV = hidden_MH.new_empty(len(hidden_MH), width)[:, :classes]
        return torch.addmm(bias_V, hidden_MH, weight_VH.t(), out=logits_MV)

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad_MV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_MH, weight_VH = ctx.saved_tensors
        return grad_MV @ weight_VH, grad_MV.t() @ hidden_MH, grad_MV.sum(0)

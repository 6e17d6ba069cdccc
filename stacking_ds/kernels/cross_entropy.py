"""Summed cross-entropy whose gradient takes the place of the logits.

The logits of a masked-LM head are the largest tensor of a step. Autograd's chain holds them three
times over, as fp32 copy, log-probabilities and gradient; here they exist once. Both passes go
over rows in chunks, so that the fp32 numbers in between are few, and in cache on a CPU.

Shapes: M rows, V classes.
"""

import torch
from torch.nn import functional

IGNORE_INDEX = -100
"""The label that carries no weight, as in Hugging Face and `torch.nn.functional.cross_entropy`."""
LOGITS_GONE = (
    "the backward pass has put the gradient in the place of the logits, so it cannot run twice; "
    "compute the loss again from a new forward pass"
)
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}


def cross_entropy_sum(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label], summed over the rows whose label is not -100: an fp32 scalar.

    The backward pass overwrites `logits_MV`.

    Raises:
        RuntimeError: a second backward pass.
    """
    loss: torch.Tensor = _CrossEntropy.apply(logits_MV, labels_M)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        lse_M = torch.empty(len(labels_M), device=logits_MV.device)
        for rows in _chunks(logits_MV):
            torch.logsumexp(logits_MV[rows].float(), dim=1, out=lse_M[rows])
        wanted_M = labels_M != IGNORE_INDEX
        classes_M1 = labels_M.where(wanted_M, 0).unsqueeze(1)
        ctx.save_for_backward(classes_M1, wanted_M, lse_M)
        # kept aside from autograd, which would forbid the change that the backward pass makes
        ctx.logits_MV = logits_MV.detach()
        losses_M = lse_M - logits_MV.gather(1, classes_M1).squeeze(1).float()
        return losses_M.where(wanted_M, 0.0).sum()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        logits_MV, ctx.logits_MV = ctx.logits_MV, None
        if logits_MV is None:
            raise RuntimeError(LOGITS_GONE)
        classes_M1, wanted_M, lse_M = ctx.saved_tensors
        scale_M1 = torch.where(wanted_M, grad, 0.0).unsqueeze(1)
        for rows in _chunks(logits_MV):
            chunk = logits_MV[rows].float()  # the logits themselves where they are fp32
            chunk.sub_(lse_M[rows, None]).exp_()
            chunk.scatter_add_(1, classes_M1[rows], chunk.new_full((len(chunk), 1), -1.0))
            chunk.mul_(scale_M1[rows])
            if chunk.dtype != logits_MV.dtype:
                logits_MV[rows] = chunk
        return logits_MV, None


def _chunks(logits_MV: torch.Tensor) -> list[slice]:
    rows, classes = logits_MV.shape
    step = max(1, _CHUNK_ELEMENTS.get(logits_MV.device.type, 1 << 18) // classes)
    return [slice(start, start + step) for start in range(0, rows, step)]


# 128 bytes of bf16, a cache line, where a GPU's matrix units can load: rows of 30,522 words begin
# anywhere, and get slower kernels
_ALIGNED_ELEMENTS = 64


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

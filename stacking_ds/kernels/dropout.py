"""Dropout, and dropout with the sum that follows it.

On a CPU torch draws one Bernoulli number at a time, which takes longer than the matrix product
before it. Here a 64-bit random word decides on four elements, each by 16 of its bits.
"""

import torch
from torch.nn import functional

__all__ = ["dropout", "dropout_add", "keep_mask"]

_LEVELS = 1 << 16
_LANES = 4  # of 16 bits in a random word


def keep_mask(shape: torch.Size, dropout_prob: float, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU: 1 with probability 1 - dropout_prob, to the nearest 65536th, else 0; drawn from
    torch's global generator."""
    if dropout_prob == 0.0:
        return torch.ones(shape, dtype=dtype)
    numel = shape.numel()
    words = torch.empty(-(-numel // _LANES), dtype=torch.int64).random_(-(1 << 63), None)
    numbers = words.view(torch.int16)[:numel].view(shape)
    lowest_kept = min(round(dropout_prob * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    if lowest_kept == -_LEVELS // 2:
        return torch.ones(shape, dtype=dtype)
    # a comparison would give bools, which torch multiplies and converts ten times slower
    return numbers.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(dtype)


def dropout(inner: torch.Tensor, dropout_prob: float) -> torch.Tensor:
    """Each element 0 with probability `dropout_prob`, else divided by 1 - dropout_prob
    (Srivastava et al. 2014)."""
    if dropout_prob == 0.0 or inner.device.type != "cpu":
        return functional.dropout(inner, dropout_prob)
    dropped: torch.Tensor = _Dropout.apply(inner, dropout_prob)  # type: ignore[no-untyped-call]
    return dropped


def dropout_add(inner: torch.Tensor, residual: torch.Tensor, dropout_prob: float) -> torch.Tensor:
    """residual + dropout(inner), of one shape."""
    if dropout_prob == 0.0 or inner.device.type != "cpu":
        return residual + functional.dropout(inner, dropout_prob)
    added: torch.Tensor = _DropoutAdd.apply(inner, residual, dropout_prob)  # type: ignore[no-untyped-call]
    return added


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inner: torch.Tensor, dropout_prob: float) -> torch.Tensor:  # type: ignore[no-untyped-def]
        keep = keep_mask(inner.shape, dropout_prob, inner.dtype)
        ctx.save_for_backward(keep)
        ctx.scale = 1.0 / (1.0 - dropout_prob)
        return (inner * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, inner: torch.Tensor, residual: torch.Tensor, dropout_prob: float
    ) -> torch.Tensor:
        keep = keep_mask(inner.shape, dropout_prob, inner.dtype)
        ctx.save_for_backward(keep)
        ctx.scale = 1.0 / (1.0 - dropout_prob)
        return torch.add(residual, inner * keep, alpha=ctx.scale)

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), grad, None

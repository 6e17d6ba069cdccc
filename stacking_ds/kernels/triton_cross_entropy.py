"""Cross-entropy in Triton: the logits are read once forward, and become their gradient backward.

    loss = sum over rows of log(sum_v exp(x_v)) - x_label
    d_x_v = (softmax(x)_v - [v = label]) d_loss

The gradient is written where x was, so that logits, often the largest tensor of a step, exist
once. All arithmetic is fp32.

Shapes: M masked positions, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language import constexpr, tensor

from stacking_ds.kernels.cross_entropy import IGNORE_INDEX, LOGITS_GONE
from stacking_ds.kernels.triton_parts import jit, launch

_IGNORED = constexpr(IGNORE_INDEX)

# 16 elements a thread: what several programs on a processor have on the way at once keeps memory
# busy while each one waits for its maximum. A vocabulary of 30522 leaves 6 % of a row to the last,
# partly covered, block.
_BLOCK = 4096


# --------------------------------------------------------------------------- on the device


@jit
def _fold(highest: tensor, total: tensor, x: tensor) -> tensor:
    """Maximum, and sum of exp(x - maximum), of what was seen and x (Milakov & Gimelshein 2018)."""
    seen, highest = highest, tl.maximum(highest, tl.max(x, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, total * tl.exp(seen - base) + tl.sum(tl.exp(x - base), 0)


@jit
def cross_entropy_kernel(
    logits_MV: tensor, labels_M: tensor, highest_M: tensor, rest_M: tensor, loss_M: tensor,
    stride: tensor, V: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One row. A label that is neither ignored nor a word makes its loss NaN.

    The maximum and what the logarithm adds to it stay apart: in their sum large logits would leave
    few digits to the second.
    """
    row = tl.program_id(0)
    line = logits_MV + row.to(tl.int64) * stride
    lanes = tl.arange(0, BLOCK)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    WHOLE: constexpr = V // BLOCK * BLOCK
    for start in range(0, WHOLE, BLOCK):
        x = tl.load(line + start + lanes).to(tl.float32)
        highest, total = _fold(highest, total, x)
    if WHOLE < V:
        at = WHOLE + lanes
        x = tl.load(line + at, mask=at < V, other=float("-inf")).to(tl.float32)
        highest, total = _fold(highest, total, x)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    rest = tl.log(total)
    label = tl.load(labels_M + row)
    of_label = tl.load(line + label, mask=(label >= 0) & (label < V), other=float("nan"))
    tl.store(highest_M + row, highest)
    tl.store(rest_M + row, rest)
    loss = highest - of_label.to(tl.float32) + rest
    tl.store(loss_M + row, tl.where(label == _IGNORED, 0.0, loss))


@jit
def cross_entropy_backward_kernel(
    logits_MV: tensor, labels_M: tensor, highest_M: tensor, rest_M: tensor, d_loss: tensor,
    stride: tensor, V: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One block of a row, in place."""
    row, start = tl.program_id(0), tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK)
    pointers = logits_MV + row.to(tl.int64) * stride + at
    highest, rest = tl.load(highest_M + row), tl.load(rest_M + row)
    label = tl.load(labels_M + row)
    factor = tl.load(d_loss).to(tl.float32)
    whole = start + BLOCK <= V
    if whole:
        x = tl.load(pointers).to(tl.float32)
    else:
        x = tl.load(pointers, mask=at < V, other=0.0).to(tl.float32)
    d_x = (tl.exp(x - highest - rest) - tl.where(at == label, 1.0, 0.0)) * factor
    d_x = tl.where(label == _IGNORED, 0.0, d_x)
    if whole:
        tl.store(pointers, d_x)
    else:
        tl.store(pointers, d_x, mask=at < V)


# --------------------------------------------------------------------------- on the host


def options(vocabulary: int) -> dict[str, Any]:
    """The constants by which the kernels are compiled and cut, for so many logits a row."""
    block = min(_BLOCK, max(16, triton.next_power_of_2(vocabulary)))
    warps = max(1, min(8, block // 256))
    return {"V": vocabulary, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def cross_entropy_sum(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats: an fp32 scalar.

    Args:
        logits_MV: fastest where rows begin at multiples of 16 bytes (a stride of 30528 for 30522
            words). Backward, and nothing before it, overwrites them with their gradient.
        labels_M: words; -100 is no target, and has neither loss nor gradient. Any other that is no
            word makes the sum NaN: checking would wait for the device.

    Raises:
        RuntimeError: a second backward pass, since the logits are gone.
    """
    assert logits_MV.ndim == 2, logits_MV.shape
    assert labels_M.shape == logits_MV.shape[:1], (labels_M.shape, logits_MV.shape)
    if logits_MV.stride(1) != 1 or logits_MV.stride(0) < logits_MV.shape[1]:
        logits_MV = logits_MV.contiguous()
    made = _CrossEntropySum.apply(logits_MV, labels_M.contiguous())  # type: ignore[no-untyped-call]
    loss: torch.Tensor = made
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        rows, vocabulary = logits_MV.shape
        # parts of one tensor would be aligned for some numbers of rows alone
        numbers = [logits_MV.new_empty(rows, dtype=torch.float32) for _ in range(3)]
        highest_M, rest_M, loss_M = numbers
        tensors, stride = (logits_MV, labels_M, *numbers), logits_MV.stride(0)
        launch(cross_entropy_kernel, (rows,), *tensors, stride, **options(vocabulary))
        ctx.save_for_backward(logits_MV, labels_M, highest_M, rest_M)
        ctx.overwritten = False
        return loss_M.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.overwritten:
            raise RuntimeError(LOGITS_GONE)
        logits_MV, *known = ctx.saved_tensors
        ctx.overwritten = True
        d_logits_MV, (rows, vocabulary) = logits_MV.detach(), logits_MV.shape
        how, tensors = options(vocabulary), (d_logits_MV, *known, d_loss)
        grid = rows, triton.cdiv(vocabulary, how["BLOCK"])
        launch(cross_entropy_backward_kernel, grid, *tensors, logits_MV.stride(0), **how)
        if rows:
            # for autograd, who has not seen it: what else needs the logits must not read this
            torch.autograd.graph.increment_version(logits_MV)
        return d_logits_MV, None

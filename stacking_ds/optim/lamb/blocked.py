"""The LAMB step in blocks that stay in a core's cache: each number crosses memory once a pass.

Where a GPU computes the update again in pass 2, a core keeps it: it takes the place of the
gradient, which nobody needs any more.
"""

from collections.abc import Sequence

import torch

from stacking_ds.optim.lamb.contract import Hyper, Item, blocks, trust_ratio

# small enough that what one block needs stays in cache, large enough that Python's part is small
_BLOCK_ELEMENTS = 1 << 17


class BlockedLamb:
    """`LambKernel` for the CPU; right on other devices, and slow there."""

    def __init__(self) -> None:
        self._wide = torch.empty(0)

    def accumulate(
        self, items: Sequence[Item], squares_2P: torch.Tensor, gradient_scale: torch.Tensor | None
    ) -> None:
        for item in items:
            tensors = (item.shard.flat, item.exp_avg, item.exp_avg_sq, item.gradient)
            for span, (weight, exp_avg, exp_avg_sq, grad) in blocks(item, tensors, _BLOCK_ELEMENTS):
                if gradient_scale is not None:
                    grad.mul_(gradient_scale)
                exp_avg.lerp_(grad, 1 - item.hyper.beta1)
                exp_avg_sq.mul_(item.hyper.beta2)
                exp_avg_sq.addcmul_(grad, grad, value=1 - item.hyper.beta2)
                update = _update(weight, exp_avg, exp_avg_sq, item.hyper, out=grad)
                squares_2P[0, span.index] += self._square(weight)
                squares_2P[1, span.index] += self._square(update)

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        weight_squares, update_squares = squares_2P.tolist()
        for item in items:
            flat, low = item.shard.flat, item.shard.low
            elsewhere = low is not None and low.device != flat.device
            tensors = (flat, item.gradient, None if elsewhere else low)
            for span, (weight, update, *copies) in blocks(item, tensors, _BLOCK_ELEMENTS):
                squares = weight_squares[span.index], update_squares[span.index]
                ratio = trust_ratio(*squares, item.hyper)
                weight.add_(update, alpha=-item.hyper.learning_rate * ratio)
                for copy in copies:
                    copy.copy_(weight)
            if low is not None and elsewhere:
                low.copy_(flat.detach().view_as(low))  # in one transfer

    def _square(self, values: torch.Tensor) -> torch.Tensor:
        if self._wide.device != values.device or not self._wide.numel():
            self._wide = torch.empty(_BLOCK_ELEMENTS, dtype=torch.float64, device=values.device)
        wide = self._wide[: len(values)].copy_(values)
        return wide.dot(wide)


def _update(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: Hyper,
    out: torch.Tensor,
) -> torch.Tensor:
    # both bias corrections on the divisor: m / c1 / (sqrt(v / c2) + eps)
    correction = hyper.bias_correction1
    divisor = torch.sqrt(exp_avg_sq, out=out)
    divisor.mul_(correction / hyper.bias_correction2**0.5).add_(correction * hyper.eps)
    update = torch.div(exp_avg, divisor, out=out)
    return update.add_(weight, alpha=hyper.weight_decay) if hyper.weight_decay else update

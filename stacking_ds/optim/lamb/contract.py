"""Contract of the LAMB step: what each form of it takes and gives.

You et al. 2020, algorithm 2, for one parameter w with gradient g at step t, in two passes:

    pass 1   m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2          (kept)
             u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w     (not kept)
             sums of squares of w and of u
    between  the sums of all ranks are added: what a parameter's ratio is made of
    pass 2   ratio = |w| / |u|              u is computed again from m, v and w
             w = w - learning_rate ratio u  low = w, rounded

Nothing of pass 1 but the sums and the moments has to survive until pass 2.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from stacking_ds.sharding.fragments import Shard, Span


@dataclass(frozen=True)
class Hyper:
    """The numbers of one parameter group at one step.

    `trust_ratio` below says what `layer_adaptation`, `min_coeff` and `max_coeff` do.
    """

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    layer_adaptation: bool
    min_coeff: float
    max_coeff: float
    step: int
    """The step that is being taken, from 1."""

    @property
    def bias_correction1(self) -> float:
        return 1.0 - math.pow(self.beta1, self.step)

    @property
    def bias_correction2(self) -> float:
        return 1.0 - math.pow(self.beta2, self.step)


class Item(NamedTuple):
    """A shard in one step; moments and gradient have its flat tensor's shape and are fp32 too.

    The gradient is the kernel's: what is in it after the step is not said. Items with the same
    numbers should share one `Hyper`.
    """

    shard: Shard
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    hyper: Hyper
    gradient: torch.Tensor


class LambKernel(Protocol):
    """One form of the two passes.

    A step is one call of `accumulate` with all items, then one of `apply` with the very same list;
    where there are no items, of `apply` alone, which then does nothing.

    `squares_2P` (fp64, on the shards' device) has for each parameter the sums of squares of its
    weights, in row 0, and of its update u, in row 1. Only what spans cover is read and written.
    """

    def accumulate(
        self, items: Sequence[Item], squares_2P: torch.Tensor, gradient_scale: torch.Tensor | None
    ) -> None:
        """Pass 1: update the moments, and write this rank's sums to `squares_2P`, which is zero.

        Gradients are multiplied by `gradient_scale` (fp32, one element) where there is one.
        """

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        """Pass 2: the weights and their low-precision copies, by the sums over all ranks."""


def trust_ratio(weight_square: float, update_square: float, hyper: Hyper) -> float:
    """The factor of the learning rate, from the sums of squares of weights and update.

    |w| / |u| held within [min_coeff, max_coeff], and 1 where either norm is 0, whatever the bounds
    (You et al. 2020, algorithm 2, as their code has it; the bounds as in DeepSpeed's FusedLamb);
    1 for a group without `layer_adaptation`.
    """
    if not (hyper.layer_adaptation and weight_square > 0.0 and update_square > 0.0):
        return 1.0
    ratio = math.sqrt(weight_square) / math.sqrt(update_square)
    return min(max(ratio, hyper.min_coeff), hyper.max_coeff)


class ReferenceLamb:
    """`LambKernel` on any device."""

    def accumulate(
        self, items: Sequence[Item], squares_2P: torch.Tensor, gradient_scale: torch.Tensor | None
    ) -> None:
        for item in items:
            hyper = item.hyper
            tensors = (item.shard.flat, item.exp_avg, item.exp_avg_sq, item.gradient)
            for span, (weight, exp_avg, exp_avg_sq, grad) in blocks(item, tensors):
                if gradient_scale is not None:
                    grad = grad * gradient_scale  # noqa: PLW2901 - the caller's stays as it is
                exp_avg.mul_(hyper.beta1).add_(grad, alpha=1 - hyper.beta1)
                exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
                update = _update(weight, exp_avg, exp_avg_sq, hyper)
                wide = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (weight, update)]
                squares_2P[:, span.index] += torch.stack(wide).square()

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        weight_squares, update_squares = squares_2P.tolist()
        for item in items:
            hyper = item.hyper
            tensors = (item.shard.flat, item.exp_avg, item.exp_avg_sq, item.shard.low)
            for span, (weight, exp_avg, exp_avg_sq, *low) in blocks(item, tensors):
                ratio = trust_ratio(weight_squares[span.index], update_squares[span.index], hyper)
                update = _update(weight, exp_avg, exp_avg_sq, hyper)
                weight.add_(update, alpha=-hyper.learning_rate * ratio)
                for copy in low:
                    copy.copy_(weight)


def _update(
    weight: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, hyper: Hyper
) -> torch.Tensor:
    mean = exp_avg / hyper.bias_correction1
    deviation = (exp_avg_sq / hyper.bias_correction2).sqrt_()
    return mean.div_(deviation.add_(hyper.eps)).add_(weight, alpha=hyper.weight_decay)


def blocks(
    item: Item, tensors: Sequence[torch.Tensor | None], most_elements: int = sys.maxsize
) -> Iterator[tuple[Span, list[torch.Tensor]]]:
    """The elements of each span in those tensors that are there, `most_elements` at a time."""
    flats = [tensor.detach().view(-1) for tensor in tensors if tensor is not None]
    for span in item.shard.spans:
        end = span.offset + span.numel
        for start in range(span.offset, end, most_elements):
            stop = min(end, start + most_elements)
            yield span, [flat[start:stop] for flat in flats]

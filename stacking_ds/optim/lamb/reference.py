"""The LAMB step in plain torch, one parameter after the other: the definition."""

from collections.abc import Iterator, Sequence

import torch

from stacking_ds.optim.lamb.contract import Hyper, Item, trust_ratio
from stacking_ds.sharding.fragments import Span

__all__ = ["ReferenceLamb"]


class ReferenceLamb:
    """`LambKernel` on any device."""

    def accumulate(
        self,
        items: Sequence[Item],
        gradients: Sequence[torch.Tensor],
        squares_2P: torch.Tensor,
        gradient_scale: torch.Tensor | None,
    ) -> None:
        for item, gradient in zip(items, gradients, strict=True):
            hyper = item.hyper
            for span, (weight, exp_avg, exp_avg_sq, grad) in _views(item, gradient):
                if gradient_scale is not None:
                    grad = grad * gradient_scale  # noqa: PLW2901 - the caller's stays as it is
                exp_avg.mul_(hyper.beta1).add_(grad, alpha=1 - hyper.beta1)
                exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
                update = _update(weight, exp_avg, exp_avg_sq, hyper)
                squares_2P[0, span.index] += _square(weight)
                squares_2P[1, span.index] += _square(update)

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        weight_squares, update_squares = squares_2P.tolist()
        for item in items:
            hyper = item.hyper
            for span, (weight, exp_avg, exp_avg_sq, *low) in _views(item, item.shard.low):
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


def _square(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _views(
    item: Item, further: torch.Tensor | None
) -> Iterator[tuple[Span, tuple[torch.Tensor, ...]]]:
    """The elements of each span in the weights, the moments and, where there is one, `further`."""
    tensors = [item.shard.flat, item.exp_avg, item.exp_avg_sq]
    tensors += [] if further is None else [further]
    for span in item.shard.spans:
        yield (
            span,
            tuple(
                tensor.detach().view(-1)[span.offset : span.offset + span.numel]
                for tensor in tensors
            ),
        )

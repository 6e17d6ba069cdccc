"""The LAMB step of NVIDIA's apex, where its compiled part is there; whole tensors on a GPU only."""

from collections.abc import Sequence

import torch

from stacking_ds.kernels.operations import find_apex
from stacking_ds.optim.lamb.contract import Item

_CHUNK_ELEMENTS = 2048 * 32  # apex's own choice for all its multi-tensor functions


class ApexLamb:
    """`LambKernel` by `amp_C.multi_tensor_lamb`, for shards that are whole tensors.

    It overwrites the gradients with the updates, and bounds no ratio.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError where apex's compiled part is absent or wrong."""
        needed = ["multi_tensor_lamb", "multi_tensor_l2norm"]
        self._amp_C = find_apex("optimizer.lamb.kernel", "amp_C", "amp_C", needed)
        self._no_overflow = torch.zeros(1, dtype=torch.int, device=device)
        self._no_norm = torch.zeros(1, device=device)

    def accumulate(
        self, items: Sequence[Item], squares_2P: torch.Tensor, gradient_scale: torch.Tensor | None
    ) -> None:
        """No more than the sums: apex takes both passes at once."""
        if gradient_scale is not None:
            torch._foreach_mul_([item.gradient for item in items], gradient_scale)
        self._add_squares(items, [item.shard.flat for item in items], squares_2P[0])

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        if not items:
            return
        by_hyper: dict[object, list[Item]] = {}
        for item in items:
            by_hyper.setdefault(item.hyper, []).append(item)
        for group in by_hyper.values():
            self._step(group)
        self._add_squares(items, [item.gradient for item in items], squares_2P[1])
        for item in items:
            if item.shard.low is not None:
                item.shard.low.copy_(item.shard.flat.detach().view_as(item.shard.low))

    def _step(self, group: Sequence[Item]) -> None:
        hyper = group[0].hyper
        assert hyper.layer_adaptation or hyper.weight_decay == 0.0, "apex adapts all that decays"
        rows = ((i.gradient, i.shard.flat.detach(), i.exp_avg, i.exp_avg_sq) for i in group)
        lists = [list(tensors) for tensors in zip(*rows, strict=True)]
        self._amp_C.multi_tensor_lamb(
            _CHUNK_ELEMENTS,
            self._no_overflow,
            lists,
            hyper.learning_rate,
            hyper.beta1,
            hyper.beta2,
            hyper.eps,
            hyper.step,
            1,  # bias correction
            hyper.weight_decay,
            1,  # gradient averaging: the gradient enters with 1 - beta1
            1,  # decoupled weight decay
            self._no_norm,  # of the gradient: none, so nothing is clipped
            1.0,  # the norm to clip to
            hyper.layer_adaptation,  # also where nothing decays
        )

    def _add_squares(
        self, items: Sequence[Item], tensors: Sequence[torch.Tensor], squares_P: torch.Tensor
    ) -> None:
        places = torch.tensor([item.shard.spans[0].index for item in items])
        norms = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors]))
        squares_P[places.to(squares_P.device, non_blocking=True)] = norms.double().square()

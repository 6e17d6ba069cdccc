"""Who takes the LAMB step: this package's forms, NVIDIA's apex and DeepSpeed's FusedLamb.

All of them on parameters of the same sizes, in the same job: fp32 masters, moments and gradients,
and at the end bf16 copies of the new weights. Nobody computes the gradient's norm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds.config.sections import LambKernelName, LambSection
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.optim.lamb.apex import ApexLamb
from stacking_ds.optim.lamb.contract import Hyper, Item
from stacking_ds.optim.lamb.optimizer import Lamb
from stacking_ds.sharding.fragments import Shard, Span

Step = Callable[[], Any]

_LEARNING_RATE, _BETAS, _EPS, _WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-6, 0.01
_WEIGHTS, _GRADIENTS = 0.02, 1e-3  # standard deviations
_LATER_STEP = 10  # nobody's time depends on which step it is


@dataclass(frozen=True)
class Tensors:
    """A BERT's parameters as an optimizer gets them, with gradients and low-precision copies."""

    groups: Sequence[Mapping[str, Any]]
    """As `parameter_groups` makes them; "params" are flat tensors with a gradient."""
    shards: Sequence[Shard]

    @classmethod
    def of(cls, config: BertConfig, device: torch.device, *, flat_groups: bool) -> "Tensors":
        """One flat tensor for each parameter, as at ZeRO 0, or for each group, as at ZeRO 1, 2."""
        generator = torch.Generator(device).manual_seed(0)
        groups, shards, index = [], [], 0
        for group in parameter_groups(_named_parameters(config), _WEIGHT_DECAY):
            numels = [parameter.numel() for parameter in group["params"]]
            flats = []
            for sizes in [numels] if flat_groups else [[numel] for numel in numels]:
                spans, offset = [], 0
                for numel in sizes:
                    spans.append(Span(str(index), index, offset, numel))
                    index, offset = index + 1, offset + numel
                flat = torch.nn.Parameter(_normal(offset, _WEIGHTS, generator))
                flat.grad = _normal(offset, _GRADIENTS, generator)
                low = torch.zeros(offset, dtype=torch.bfloat16, device=device)
                shards.append(Shard(flat, tuple(spans), low))
                flats.append(flat)
            groups.append({**group, "params": flats})
        return cls(groups, shards)

    @property
    def numel(self) -> int:
        return sum(shard.flat.numel() for shard in self.shards)

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [shard.flat.grad for shard in self.shards if shard.flat.grad is not None]

    def copy_low(self) -> None:
        """What our kernels do in passing, by torch's own function for many tensors."""
        copies = [shard.low for shard in self.shards if shard.low is not None]
        torch._foreach_copy_(copies, [shard.flat.detach() for shard in self.shards])

    def require_stepped(self, step: Step) -> None:
        """Take the step, and see that it did its work: no time is worth anything otherwise."""
        before = [shard.flat.detach().clone() for shard in self.shards]
        step()
        for shard, old in zip(self.shards, before, strict=True):
            assert shard.low is not None
            flat = shard.flat.detach()
            assert bool(flat.isfinite().all()), "a step made weights that are not finite"
            assert not torch.equal(flat, old), "a step left weights as they were"
            # bf16 has 8 bits
            assert torch.allclose(shard.low.float(), flat, rtol=2**-7), "stale bf16 copies"


def _named_parameters(config: BertConfig) -> list[tuple[str, torch.nn.Parameter]]:
    return list(BertForPreTraining(config, seed=None).named_parameters())


def _normal(numel: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(numel, device=generator.device)
    return values.normal_(0.0, deviation, generator=generator)


# ------------------------------------------------------------------------------- ours


def our_step(
    tensors: Tensors, kernel: LambKernelName, beside: Lamb | None = None
) -> tuple[Lamb, Step]:
    """One call for all tensors, as DeepSpeed makes at ZeRO 0; `beside` shares its moments."""
    optimizer = Lamb(
        tensors.groups, _LEARNING_RATE, _BETAS, _EPS, _WEIGHT_DECAY, LambSection(kernel=kernel)
    )
    optimizer.bind(tensors.shards, None, None)
    if beside is not None:
        optimizer.state = beside.state
    return optimizer, optimizer.step


def our_step_by_group(tensors: Tensors, kernel: LambKernelName) -> Step:
    """A call for each group, as DeepSpeed makes at ZeRO 1 and 2."""
    optimizer, _ = our_step(tensors, kernel)

    def step() -> None:
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups

    return step


# ------------------------------------------------------------------------------ theirs


class _BareApex(ApexLamb):
    """What apex itself does in its step: the norms are for our metrics alone."""

    def _add_squares(
        self, items: Sequence[Item], tensors: Sequence[torch.Tensor], squares_P: torch.Tensor
    ) -> None:
        pass


def apex_step(tensors: Tensors) -> Step:
    """`amp_C.multi_tensor_lamb` for each pair of hyperparameters, then the bf16 copies.

    Raises:
        ConfigError: apex's compiled part is absent or wrong.
    """
    device = tensors.shards[0].flat.device
    kernel, no_squares_2P = _BareApex(device), torch.empty(2, 0, device=device)
    items = []
    for group in tensors.groups:
        hyper = Hyper(
            learning_rate=_LEARNING_RATE,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            eps=_EPS,
            weight_decay=group["weight_decay"],
            layer_adaptation=group["layer_adaptation"],
            min_coeff=0.0,
            max_coeff=math.inf,
            step=_LATER_STEP,
        )
        for flat in group["params"]:
            shard, moments = Shard(flat, ()), (torch.zeros_like(flat), torch.zeros_like(flat))
            items.append(Item(shard, *moments, hyper, flat.grad))

    def step() -> None:
        kernel.accumulate(items, no_squares_2P, None)
        kernel.apply(items, no_squares_2P)
        tensors.copy_low()

    return step


def deepspeed_step(tensors: Tensors) -> Step:
    """DeepSpeed's FusedLamb on fp32 gradients (it has no bf16), then the bf16 copies.

    Compiles its kernels at first use, which takes about a minute.
    """
    from deepspeed.ops.lamb import FusedLamb

    optimizer = FusedLamb(
        [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for group in tensors.groups
        ],
        lr=_LEARNING_RATE,
        betas=_BETAS,
        eps=_EPS,
        min_coeff=0.0,
        max_coeff=math.inf,
    )

    def step() -> None:
        optimizer.step()
        tensors.copy_low()

    return step


def reason_of(error: Exception) -> str:
    """Why somebody cannot step here, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")

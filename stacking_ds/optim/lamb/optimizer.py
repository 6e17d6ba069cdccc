"""LAMB whose trust ratios are right where ZeRO gives each rank a part of every tensor.

Without an engine it is a plain torch optimizer. Bound to one, it steps on the flat tensors that
DeepSpeed gave it in place of the parameters:

    DeepSpeed          step(group 0)   step(group 1)  …  step(last group)
    this optimizer     waits           waits             pass 1, one all-reduce, pass 2, of all

The only communication is that of 2 sums for each parameter. Until the last call the gradients that
came earlier stay allocated: 4 bytes for each element of this rank's.
"""

import math
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from stacking_ds.config.sections import LambKernelName, LambSection
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.registry import Forms
from stacking_ds.optim.groups import place_of
from stacking_ds.optim.lamb.apex import ApexLamb
from stacking_ds.optim.lamb.blocked import BlockedLamb
from stacking_ds.optim.lamb.contract import Hyper, Item, LambKernel, ReferenceLamb, trust_ratio
from stacking_ds.sharding.fragments import MOMENTS, Shard, Span


def choose_kernel(name: LambKernelName, device: torch.device) -> LambKernel:
    """As `Forms.choose`, for masters on `device`."""
    return _KERNELS.choose(name, device)


def _triton(device: torch.device) -> LambKernel:
    def tried() -> LambKernel:
        from stacking_ds.optim.lamb.triton_lamb import TritonLamb

        kernel = TritonLamb()
        hyper = Hyper(1e-3, 0.9, 0.999, 1e-6, 0.01, True, 0.0, math.inf, step=1)
        weight, gradient, exp_avg, exp_avg_sq = (torch.ones(1, device=device) for _ in range(4))
        shard = Shard(weight, (Span("", 0, 0, 1),))
        items = [Item(shard, exp_avg, exp_avg_sq, hyper, gradient)]
        squares_2P = torch.zeros(2, 1, dtype=torch.float64, device=device)
        kernel.accumulate(items, squares_2P, None)
        kernel.apply(items, squares_2P)
        if not 0.9 < float(weight) < 1.0:
            raise ArithmeticError(f"a weight of 1 became {float(weight)}")
        return kernel

    need = "Triton needs an NVIDIA GPU (with offload to the host the step runs there)"
    return _KERNELS.by_triton(device, need, tried)


def _apex(device: torch.device) -> LambKernel:
    _KERNELS.require_gpu("apex", device, "apex steps on an NVIDIA GPU alone")
    return ApexLamb(device)


_KERNELS = Forms[LambKernel](
    key="optimizer.lamb.kernel",
    log_name="LAMB kernel",
    on="the masters are",
    leave="leave the kernel to auto",
    slow="blocked",
    makers={
        "reference": lambda device: ReferenceLamb(),
        "blocked": lambda device: BlockedLamb(),
        "triton": _triton,
        "apex": _apex,
    },
)


class LambStatistics(NamedTuple):
    """One parameter in the last step; the same on every rank."""

    name: str
    weight_norm: float
    """2-norm of the weights before the step."""
    update_norm: float
    """2-norm of what was subtracted from them, learning rate included."""
    trust_ratio: float
    adapted: bool
    """Where False the ratio is 1 by decree."""


def require_whole_tensors(kernel: str, *, sharded: bool) -> None:
    """Raises ConfigError if the kernel steps on those only, and ranks have parts of them."""
    if kernel == "apex" and sharded:
        raise ConfigError(
            "optimizer.lamb.kernel=apex: apex's LAMB takes what it is given for a whole tensor, so "
            "it is right at ZeRO 0 alone; use engine.deepspeed=zero0, or leave the kernel to auto"
        )


class Lamb(torch.optim.Optimizer):
    """LAMB as in You et al. 2020, algorithm 2: layer-wise trust ratios over Adam's update with
    decoupled weight decay, moments corrected for their bias before the ratio is taken.

    A group may say `layer_adaptation: False`; its parameters then move as under AdamW.

    Args:
        params: as for any torch optimizer; fp32.
        lr, betas, eps, weight_decay: as for AdamW; betas, eps and decay default to those of You et
            al. 2020, section 4 and code.
        options: what LAMB has besides. `always_adapt` is said by the groups.

    Raises:
        ConfigError: a value out of range.
    """

    state_names = MOMENTS
    _kernel: LambKernel | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        options: LambSection | None = None,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ConfigError(
                f"LAMB needs lr >= 0, eps > 0, weight_decay >= 0 and betas in [0, 1); got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "layer_adaptation": True})
        self.options = options or LambSection()
        own = [p for group in self.param_groups for p in group["params"]]
        whole = [Shard(p, (Span(str(index), index, 0, p.numel()),)) for index, p in enumerate(own)]
        self._know(whole, None, None)

    def bind(
        self,
        shards: Sequence[Shard],
        add_over_ranks: Callable[[torch.Tensor], None] | None,
        gradient_norm: Callable[[], torch.Tensor] | None,
        is_same_on_all_ranks: Callable[[float], bool] | None = None,
    ) -> None:
        """As `optimizers.ShardedOptimizer` says.

        Raises:
            ConfigError: the kernel asked for cannot run on these shards, or other ranks have
                chosen another one.
        """
        require_whole_tensors(self.options.kernel, sharded=add_over_ranks is not None)
        self._know(shards, add_over_ranks, gradient_norm)
        self._kernel = choose_kernel(self.options.kernel, shards[0].flat.device)
        number = zlib.crc32(self.kernel.encode())
        if is_same_on_all_ranks is not None and not is_same_on_all_ranks(number):
            raise ConfigError(
                f"the ranks would take LAMB's step by different kernels (this one by "
                f"{self.kernel}) and drift apart: install the same torch and Triton on all "
                f"nodes, or name one that all have as optimizer.lamb.kernel"
            )

    def _know(
        self,
        shards: Sequence[Shard],
        add_over_ranks: Callable[[torch.Tensor], None] | None,
        gradient_norm: Callable[[], torch.Tensor] | None,
    ) -> None:
        self._shards = {id(shard.flat): shard for shard in shards}
        spans = sorted((span for shard in shards for span in shard.spans), key=lambda s: s.index)
        assert [span.index for span in spans] == list(range(len(spans)))
        self._names = tuple(span.name for span in spans)
        self._add_over_ranks = add_over_ranks
        self._gradient_norm = gradient_norm
        self._kernel = None  # before the first step parameters may yet move
        self._offered: set[int] = set()
        self._waiting: list[tuple[Shard, dict[str, Any], torch.Tensor]] = []
        self._last: tuple[dict[int, Hyper], torch.Tensor] | None = None

    @property
    def kernel(self) -> str:
        """The form of the step that runs; "" before one is chosen."""
        return type(self._kernel).__name__ if self._kernel is not None else ""

    def unbind(self) -> None:
        """Let go of every tensor."""
        self._shards, self._waiting = {}, []
        self._last = self._kernel = None
        self._add_over_ranks = self._gradient_norm = None

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Keep the gradients of the groups at hand; once every shard has been, step. What is in
        the gradients afterwards is not said: some kernels work in their place.

        Raises:
            RuntimeError: a tensor that is not the optimizer's own and was never bound, or one that
                comes twice before the others have come.
        """
        assert closure is None, "LAMB takes no closure: an engine has computed the gradients"
        for group in self.param_groups:
            for flat in group["params"]:
                shard = self._offer(flat)
                if flat.grad is not None:
                    self._waiting.append((shard, group, flat.grad))
        if len(self._offered) == len(self._shards):
            waiting, self._waiting = self._waiting, []
            self._offered.clear()
            self._take(self._items(waiting))

    def _take(self, items: list[Item]) -> None:
        device = next(iter(self._shards.values())).flat.device
        if self._kernel is None:
            self._kernel = choose_kernel(self.options.kernel, device)
        squares_2P = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)
        if items:
            scale = self._gradient_scale([item.gradient for item in items])
            self._kernel.accumulate(items, squares_2P, scale)
        if self._add_over_ranks is not None:
            self._add_over_ranks(squares_2P)
        self._kernel.apply(items, squares_2P)
        hypers = {span.index: item.hyper for item in items for span in item.shard.spans}
        self._last = hypers, squares_2P

    def _offer(self, flat: torch.Tensor) -> Shard:
        shard = self._shards.get(id(flat))
        if shard is None:
            raise RuntimeError(
                f"LAMB was given a flat tensor of {flat.numel()} elements that it knows nothing "
                f"about: a ratio over it would be no parameter's. Build the engine with "
                f"stacking_ds.engine.build.build_engine, which binds the optimizer"
            )
        if id(flat) in self._offered:
            raise RuntimeError(
                f"LAMB was given a flat tensor of {flat.numel()} elements twice, and "
                f"{len(self._shards) - len(self._offered)} others not yet: a step was broken off "
                f"before this rank's weights moved, but others' may have; resume from the last "
                f"checkpoint"
            )
        self._offered.add(id(flat))
        return shard

    def _items(self, waiting: Sequence[tuple[Shard, dict[str, Any], torch.Tensor]]) -> list[Item]:
        """Those of one group at the same step share their numbers."""
        states = [self.state[shard.flat] for shard, _, _ in waiting]
        for (shard, _, _), state in zip(waiting, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)  # on the host, where corrections are computed
                flat = shard.flat
                state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.contiguous_format)
                state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        one = torch.tensor(1.0)  # of a plain number torch would make a tensor for each count
        if states:
            torch._foreach_add_([state["step"] for state in states], [one] * len(states))
        items, hypers, most = [], dict[tuple[int, int], Hyper](), self.options.max_coeff
        for (shard, group, gradient), state in zip(waiting, states, strict=True):
            key = id(group), int(state["step"].item())
            if key not in hypers:
                hypers[key] = Hyper(
                    learning_rate=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    layer_adaptation=group["layer_adaptation"],
                    min_coeff=self.options.min_coeff,
                    max_coeff=math.inf if most is None else most,
                    step=key[1],
                )
            moments = state["exp_avg"], state["exp_avg_sq"]
            items.append(Item(shard, *moments, hypers[key], gradient))
        return items

    def _gradient_scale(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        if not self.options.grad_pre_normalization:
            return None
        if self._gradient_norm is not None:
            norm = self._gradient_norm()
        else:
            norm = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).norm()
        norm = norm.to(gradients[0].device, torch.float32, non_blocking=True)
        return torch.where(norm > 0, 1 / norm, torch.ones_like(norm))

    # ------------------------------------------------------------------ what is told of it

    def metrics(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Of the last step: norms and trust ratios, and all of these as a histogram."""
        found = self.statistics()
        if found is None:
            return {}, {}
        return lamb_metrics(found), {TRUST_RATIOS: _adapted_ratios(found)}

    def statistics(self) -> list[LambStatistics] | None:
        """Norms and ratios of the last completed step; None before the first."""
        if self._last is None:
            return None
        hypers, squares_2P = self._last
        found, squares = [], squares_2P.t().tolist()
        for index, hyper in sorted(hypers.items()):
            weight, update = squares[index]
            ratio = trust_ratio(weight, update, hyper)
            step = hyper.learning_rate * ratio * math.sqrt(update)
            norms = math.sqrt(weight), step
            found.append(LambStatistics(self._names[index], *norms, ratio, hyper.layer_adaptation))
        return found


TRUST_RATIOS = "optim/trust_ratio"


def lamb_metrics(found: Sequence[LambStatistics]) -> dict[str, float]:
    """`optim/weight_norm` and `optim/update_norm` over the whole model (the latter is that of what
    the step subtracted, learning rate included), and smallest, mean and largest trust ratio: over
    all parameters that are adapted, and over those of each layer, as in
    "optim/trust_ratio/layer.3/mean"."""
    metrics = {
        "optim/weight_norm": math.hypot(*(one.weight_norm for one in found)),
        "optim/update_norm": math.hypot(*(one.update_norm for one in found)),
    }
    by_place = {"all": _adapted_ratios(found)}
    for one in found:
        if one.adapted:
            by_place.setdefault(place_of(one.name), []).append(one.trust_ratio)
    for place, ratios in by_place.items():
        if ratios:
            for name, of in (("min", min), ("mean", statistics.fmean), ("max", max)):
                metrics[f"{TRUST_RATIOS}/{place}/{name}"] = of(ratios)
    return metrics


def _adapted_ratios(found: Sequence[LambStatistics]) -> list[float]:
    return [one.trust_ratio for one in found if one.adapted]

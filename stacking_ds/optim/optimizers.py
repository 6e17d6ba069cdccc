"""Optimizers by name, over the one grouping of parameters, and what an engine asks of one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from stacking_ds.config.sections import OptimizerSection
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.optim.lamb.optimizer import Lamb, require_whole_tensors
from stacking_ds.sharding.fragments import MOMENTS, Shard


@runtime_checkable
class ShardedOptimizer(Protocol):
    """An optimizer that knows of ZeRO: it is right on flat partitions, of which a tensor of its
    own may be a part, and has metrics. One that steps on each element by itself, such as torch's
    AdamW, need not be one.

    For each tensor its `state` has `step`, a count, and a tensor like it for each state name.
    """

    state_names: tuple[str, ...]

    def bind(
        self,
        shards: Sequence[Shard],
        add_over_ranks: Callable[[torch.Tensor], None] | None,
        gradient_norm: Callable[[], torch.Tensor] | None,
        is_same_on_all_ranks: Callable[[float], bool] | None,
    ) -> None:
        """Step on `shards` from now on, which every rank lists with the same spans in order.

        Args:
            shards: what the engine put in place of the parameters, whole. A span is empty where
                this rank holds nothing of a parameter.
            add_over_ranks: sums a tensor over the ranks, in place; None where every rank holds
                whole parameters.
            gradient_norm: the global 2-norm of the gradients that `step` is about to get; None
                where one call of `step` gets all of them, which are then enough to know it.
            is_same_on_all_ranks: compares a number that every rank gives; None on one process.

        Raises:
            ConfigError: it cannot step on these, or the ranks would do so in different ways.
        """

    def unbind(self) -> None:
        """Let go of every tensor, so that a released engine's memory comes back."""

    def metrics(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Of the last step: numbers by name, and histograms; empty before the first."""


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors it keeps for each tensor it steps on; Adam's where it does not say."""
    names: tuple[str, ...] = getattr(optimizer, "state_names", MOMENTS)
    return names


def build_optimizer(
    config: OptimizerSection, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters, grouped by `parameter_groups`.

    Raises:
        ConfigError: a LAMB kernel that cannot run here.
    """
    lamb = config.lamb
    always_adapt = lamb is not None and lamb.always_adapt
    groups = parameter_groups(named_parameters, config.weight_decay, always_adapt=always_adapt)
    # weight decay is each group's own, and the learning rate is set before every step
    if lamb is None:
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps
        )
    return Lamb(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, options=lamb)


def require_optimizer(config: OptimizerSection, *, sharded: bool) -> None:
    """Raises ConfigError if it steps on whole tensors only, and ranks have parts of them."""
    if config.lamb is not None:
        require_whole_tensors(config.lamb.kernel, sharded=sharded)

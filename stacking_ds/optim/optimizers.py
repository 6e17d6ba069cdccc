"""Optimizers by name, over the one grouping of parameters."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from stacking_ds.config.sections import OptimizerSection
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.optim.lamb.optimizer import Lamb, require_whole_tensors


def build_optimizer(
    config: OptimizerSection, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters, grouped by `parameter_groups`.

    Raises:
        ConfigError: a LAMB kernel that cannot run here.
    """
    lamb = config.lamb
    groups = parameter_groups(
        named_parameters,
        config.weight_decay,
        always_adapt=lamb is not None and lamb.always_adapt,
    )
    # weight decay is each group's own, and the learning rate is set before every step
    if lamb is None:
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps
        )
    return Lamb(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        min_coeff=lamb.min_coeff,
        max_coeff=math.inf if lamb.max_coeff is None else lamb.max_coeff,
        grad_pre_normalization=lamb.grad_pre_normalization,
        kernel=lamb.kernel,
    )


def require_optimizer(config: OptimizerSection, *, sharded: bool) -> None:
    """Raises:
    ConfigError: the recipe's optimizer steps on whole tensors only, and ranks have parts of them.
    """
    if config.lamb is not None:
        require_whole_tensors(config.lamb.kernel, sharded=sharded)

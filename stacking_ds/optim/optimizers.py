"""Optimizers by name, over the one grouping of parameters."""

from collections.abc import Iterable

import torch
from torch import nn

from stacking_ds.config.sections import OptimizerSection
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.optim.lamb.optimizer import Lamb


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
    return Lamb(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, options=lamb)

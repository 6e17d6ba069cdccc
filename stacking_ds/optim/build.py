"""Optimizers by name."""

from collections.abc import Sequence
from typing import Any

import torch

from stacking_ds.errors import ConfigError

__all__ = ["OPTIMIZERS", "build_optimizer"]

# DeepSpeed compares the exact type with those it knows to be safe under ZeRO: no subclasses.
OPTIMIZERS: dict[str, type[torch.optim.AdamW]] = {"adamw": torch.optim.AdamW}


def build_optimizer(
    name: str,
    groups: Sequence[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer `name` over `groups`, each of which brings its own weight_decay.

    Raises:
        ConfigError: no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} does not exist; there is: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](list(groups), lr=learning_rate, betas=betas, eps=eps)

"""Which form of the LAMB step runs: the one asked for, or the fastest that can."""

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from typing import get_args

import torch

from stacking_ds.config.sections import LambKernelName
from stacking_ds.errors import ConfigError
from stacking_ds.optim.lamb.apex import ApexLamb
from stacking_ds.optim.lamb.blocked import BlockedLamb
from stacking_ds.optim.lamb.contract import Hyper, Item, LambKernel
from stacking_ds.optim.lamb.reference import ReferenceLamb
from stacking_ds.sharding.fragments import Shard, Span

__all__ = ["choose_kernel"]

logger = logging.getLogger("stacking_ds")


def choose_kernel(name: LambKernelName, device: torch.device) -> LambKernel:
    """The form called `name` for tensors on `device`; "auto" says in the log what it chose.

    Raises:
        ConfigError: no such form, or it cannot run here.
    """
    if name not in get_args(LambKernelName):
        raise ConfigError(f"LAMB kernel {name!r} must be one of {get_args(LambKernelName)}")
    chosen, why = (name, "") if name != "auto" else _fastest(device)
    made = _MAKERS[chosen](device)
    if why:
        logger.info("LAMB kernel: %s (%s)", chosen, why)
    return made


def _fastest(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "blocked", f"the masters are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "blocked", "Triton is not installed: expect a slow step on this GPU"
    return "triton", "the masters are on a GPU"


def _triton(device: torch.device) -> LambKernel:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "optimizer.lamb.kernel=triton, but Triton is not installed; it comes with torch for "
            "CUDA. Install that, or leave the kernel to auto"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"optimizer.lamb.kernel=triton, but the masters are on {device.type}: Triton needs an "
            f"NVIDIA GPU (with offload to the host the step runs there); leave the kernel to auto"
        )
    try:
        from stacking_ds.optim.lamb.triton_lamb import TritonLamb

        _try_out(TritonLamb(), device)
    except Exception as error:
        raise ConfigError(
            f"Triton cannot run LAMB here ({type(error).__name__}: {error}); mend that (it needs a "
            f"C compiler and Triton 3.6 or later), or set optimizer.lamb.kernel=blocked, which is "
            f"slow on a GPU"
        ) from error
    return TritonLamb()


def _try_out(kernel: LambKernel, device: torch.device) -> None:
    """One step on one number: what cannot run says so before training has begun."""
    hyper = Hyper(1e-3, 0.9, 0.999, 1e-6, 0.01, True, 0.0, math.inf, step=1)
    weight, gradient, exp_avg, exp_avg_sq = (torch.ones(1, device=device) for _ in range(4))
    items = [Item(Shard(weight, (Span("", 0, 0, 1),)), exp_avg, exp_avg_sq, hyper)]
    squares_2P = torch.zeros(2, 1, dtype=torch.float64, device=device)
    kernel.accumulate(items, [gradient], squares_2P, None)
    kernel.apply(items, squares_2P)
    if not 0.9 < float(weight) < 1.0:
        raise ArithmeticError(f"a weight of 1 became {float(weight)}")


def _apex(device: torch.device) -> LambKernel:
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer.lamb.kernel=apex, but the masters are on {device.type}: apex steps on an "
            f"NVIDIA GPU alone; leave the kernel to auto"
        )
    return ApexLamb(device)


_MAKERS: dict[str, Callable[[torch.device], LambKernel]] = {
    "reference": lambda device: ReferenceLamb(),
    "blocked": lambda device: BlockedLamb(),
    "triton": _triton,
    "apex": _apex,
}

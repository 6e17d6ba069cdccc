"""Which form of the LAMB step runs: the one asked for, or the fastest that can."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.lamb.apex import ApexLamb
from stacking_ds.kernels.lamb.blocked import BlockedLamb
from stacking_ds.kernels.lamb.contract import LambKernel
from stacking_ds.kernels.lamb.reference import ReferenceLamb

__all__ = ["LambKernelName", "choose_kernel"]

LambKernelName = Literal["auto", "reference", "blocked", "triton", "apex"]

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
    from stacking_ds.kernels.lamb.fused import TritonLamb

    return TritonLamb()


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

"""Registry of kernels: on a device those that the recipe names, or the fastest that can run."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, get_args

import torch
from torch.nn import functional

from stacking_ds.config.sections import ActivationCheckpointing, EngineSection, KernelsName
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.choice import choose_attention
from stacking_ds.kernels.attention.padded import attend_padded
from stacking_ds.kernels.attention.sequences import Attend, Sequences, attend_loops
from stacking_ds.kernels.fp8 import linear_fp8, require_fp8
from stacking_ds.kernels.operations import (
    ApexOperations,
    CompiledOperations,
    LinearForm,
    Norm,
    Operations,
    find_fused_layer_norm,
)

# ---- How a model computes: the form of its operations and of its attention, and what it
# keeps.


def attend_anywhere(
    qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float
) -> torch.Tensor:
    """`Attend` that runs wherever the tokens are, for a model that nobody chose kernels for."""
    attend = attend_loops if qkv_T3ND.device.type == "cpu" else attend_padded
    return attend(qkv_T3ND, sequences, dropout_prob)


@dataclass(frozen=True)
class Compute:
    """The kernels that a `BertForPreTraining` computes with; by default, those that run
    everywhere."""

    operations: Operations = field(default_factory=Operations)
    attend: Attend = attend_anywhere
    activation_checkpointing: ActivationCheckpointing = "none"
    cuda_graphs: bool = False


logger = logging.getLogger("stacking_ds")

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""By the recipe's name of the precision."""


class Sizes(Protocol):
    """The sizes of a model that decide which kernels can run."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_probs_dropout_prob(self) -> float: ...


def choose_compute(engine: EngineSection, device: torch.device, sizes: Sizes) -> Compute:
    """Choose kernels by a recipe's engine section, for a model of `sizes` on `device`.

    Raises:
        ConfigError: something is named that cannot run here.
    """
    linear: LinearForm = functional.linear
    if engine.fp8:
        require_fp8(device, sizes.hidden_size, sizes.intermediate_size)
        linear = linear_fp8
    if engine.cuda_graphs and device.type != "cuda":
        raise ConfigError(
            f"engine.cuda_graphs=true, but the model is on {device.type}: set it to false"
        )
    return Compute(
        choose_operations(engine.kernels, device, linear),
        choose_attention(
            engine.attention,
            device,
            DTYPES[engine.precision],
            sizes.hidden_size // sizes.num_attention_heads,
            sizes.attention_probs_dropout_prob,
        ),
        engine.activation_checkpointing,
        engine.cuda_graphs,
    )


def choose_operations(
    name: KernelsName, device: torch.device, linear: LinearForm = functional.linear
) -> Operations:
    """The form called `name` for tensors on `device`; "auto" says in the log what it chose.

    Raises:
        ConfigError: no such form, or it cannot run here.
    """
    if name not in get_args(KernelsName):
        raise ConfigError(f"engine.kernels={name!r} must be one of {get_args(KernelsName)}")
    chosen, why = (name, "") if name != "auto" else _fastest(device)
    made = _MAKERS[chosen](device, linear)
    if why:
        logger.info("kernels: %s (%s)", chosen, why)
    return made


def _fastest(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "torch", f"the model is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "torch", "Triton is not installed: expect a slow step on this GPU"
    return "triton", "the model is on a GPU"


def _triton(device: torch.device, linear: LinearForm) -> Operations:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "engine.kernels=triton, but Triton is not installed; it comes with torch for CUDA. "
            "Install that, or leave the kernels to auto"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"engine.kernels=triton, but the model is on {device.type}: Triton needs an NVIDIA "
            f"GPU; leave the kernels to auto"
        )
    try:
        from stacking_ds.kernels.triton_operations import TritonOperations

        made = TritonOperations(linear)
        _try_out(made, device)
    except Exception as error:
        raise ConfigError(
            f"Triton cannot run a layer's kernels here ({type(error).__name__}: {error}); mend "
            f"that (it needs a C compiler and Triton 3.6 or later), or set engine.kernels=torch, "
            f"which is slower"
        ) from error
    return made


def _try_out(operations: Operations, device: torch.device) -> None:
    """One norm of a few numbers: what cannot run says so before training has begun."""
    x_TH = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
    one_H = torch.ones(4, device=device)
    found = operations.norm(x_TH, Norm(one_H, 0 * one_H, 1e-12))
    if not 1.3 < float(found[0, -1]) < 1.4:
        raise ArithmeticError(f"the norm of 1, 2, 3, 4 became {found.tolist()}")


def _compile(device: torch.device, linear: LinearForm) -> Operations:
    compilers = ("cc", "gcc", "clang") if device.type == "cuda" else ("c++", "g++", "clang++")
    asked = os.environ.get("CC" if device.type == "cuda" else "CXX")
    if not any(map(shutil.which, (*compilers, *filter(None, [asked])))):
        raise ConfigError(
            f"engine.kernels=compile needs one of {', '.join(compilers)} on the PATH: install a "
            f"compiler, or leave the kernels to auto"
        )
    return CompiledOperations(linear)


def _apex(device: torch.device, linear: LinearForm) -> Operations:
    if device.type != "cuda":
        raise ConfigError(
            f"engine.kernels=apex, but the model is on {device.type}: apex runs on an NVIDIA GPU "
            f"alone; leave the kernels to auto"
        )
    return ApexOperations(linear, find_fused_layer_norm())


_MAKERS: dict[str, Callable[[torch.device, LinearForm], Operations]] = {
    "torch": lambda device, linear: Operations(linear),
    "triton": _triton,
    "compile": _compile,
    "apex": _apex,
}

"""Registry of kernels: on a device those that the recipe names, or the fastest that can run."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.nn import functional

from stacking_ds.config.sections import (
    ActivationCheckpointing,
    EngineSection,
    KernelsName,
    ModelSection,
)
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
    find_apex,
)


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
Form = TypeVar("Form")

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""By the recipe's name of the precision."""


def choose_compute(engine: EngineSection, device: torch.device, model: ModelSection) -> Compute:
    """Choose kernels by a recipe's engine section, for a model of these sizes on `device`.

    Raises:
        ConfigError: something is named that cannot run here.
    """
    linear: LinearForm = functional.linear
    if engine.fp8:
        require_fp8(device, model.hidden_size, model.intermediate_size)
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
            model.hidden_size // model.num_attention_heads,
            model.attention_probs_dropout_prob,
        ),
        engine.activation_checkpointing,
        engine.cuda_graphs,
    )


@dataclass(frozen=True)
class Forms(Generic[Form]):
    """Forms of one part of the step, of which a recipe names one or leaves it to "auto"."""

    key: str
    """The recipe's."""
    log_name: str
    on: str
    """What must lie on a form's device: the beginning of a sentence."""
    leave: str
    """The remedy that always helps."""
    slow: str
    """The form where Triton cannot run."""
    makers: Mapping[str, Callable[..., Form]]
    """By name; of the device, and whatever else `choose` is given."""

    def choose(self, name: str, device: torch.device, *arguments: Any) -> Form:
        """The form called `name` for tensors on `device`; "auto" says in the log what it chose.

        Raises:
            ConfigError: no such form, or it cannot run here.
        """
        names = (*self.makers, "auto")
        if name not in names:
            raise ConfigError(f"{self.key}={name!r} must be one of {names}")
        if name != "auto":
            return self.makers[name](device, *arguments)
        name, why = self.slow, f"{self.on} on {device.type}"
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            name, why = "triton", f"{self.on} on a GPU"
        elif device.type == "cuda":
            why = "Triton is not installed: expect a slow step on this GPU"
        made = self.makers[name](device, *arguments)
        logger.info("%s: %s (%s)", self.log_name, name, why)
        return made

    def require_gpu(self, name: str, device: torch.device, need: str) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"{self.key}={name}, but {self.on} on {device.type}: {need}; {self.leave}"
            )

    def by_triton(self, device: torch.device, need: str, tried: Callable[[], Form]) -> Form:
        """The form that `tried` makes and has had a try with, so that what cannot run says so
        before training has begun."""
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                f"{self.key}=triton, but Triton is not installed; it comes with torch for CUDA. "
                f"Install that, or {self.leave}"
            )
        if os.environ.get("TRITON_INTERPRET") != "1":
            self.require_gpu("triton", device, need)
        try:
            return tried()
        except Exception as error:
            raise ConfigError(
                f"{self.key}=triton cannot run here ({type(error).__name__}: {error}); mend that "
                f"(it needs a C compiler and Triton 3.6 or later), or set {self.key}={self.slow}, "
                f"which is slower"
            ) from error


def choose_operations(
    name: KernelsName, device: torch.device, linear: LinearForm = functional.linear
) -> Operations:
    """As `Forms.choose`, with `linear` for the layers' matrix products."""
    return _OPERATIONS.choose(name, device, linear)


def _triton(device: torch.device, linear: LinearForm) -> Operations:
    def tried() -> Operations:
        from stacking_ds.kernels.triton_operations import TritonOperations

        made, one_H = TritonOperations(linear), torch.ones(4, device=device)
        x_TH = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
        found = made.norm(x_TH, Norm(one_H, 0 * one_H, 1e-12))
        if not 1.3 < float(found[0, -1]) < 1.4:
            raise ArithmeticError(f"the norm of 1, 2, 3, 4 became {found.tolist()}")
        return made

    return _OPERATIONS.by_triton(device, "Triton needs an NVIDIA GPU", tried)


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
    _OPERATIONS.require_gpu("apex", device, "apex runs on an NVIDIA GPU alone")
    module, function = "apex.normalization.fused_layer_norm", "fused_layer_norm_affine"
    apex = find_apex("engine.kernels", "fused_layer_norm_cuda", module, [function])
    return ApexOperations(linear, getattr(apex, function))


_OPERATIONS = Forms[Operations](
    key="engine.kernels",
    log_name="kernels",
    on="the model is",
    leave="leave the kernels to auto",
    slow="torch",
    makers={
        "torch": lambda device, linear: Operations(linear),
        "triton": _triton,
        "compile": _compile,
        "apex": _apex,
    },
)

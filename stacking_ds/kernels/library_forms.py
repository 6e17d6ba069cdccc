"""The torch form with the LayerNorm of NVIDIA's apex, where its compiled part is there."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.operations import Function, Norm, Operations, Weights

# ---- The operations of a BERT by torch.compile: the rival that the hand-written kernels
# have to beat.


@dataclass(frozen=True)
class CompiledOperations(Operations):
    """Needs a C++ compiler on the CPU, Triton and a C compiler on a GPU."""

    name = "compile"

    def linear_add(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TO: torch.Tensor,
        dropout_prob: float,
    ) -> torch.Tensor:
        # torch's own dropout, which the compiler knows
        return residual_TO + functional.dropout(self.linear(x_TI, *weights), dropout_prob)

    def between_attentions(self, function: Function) -> Function:
        compiled: Any = _compiled(function)
        return compiled  # type: ignore[no-any-return]


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled = torch.compile(function)

    def run(operations: Operations, context_TH: torch.Tensor, *rest: Any) -> torch.Tensor:
        # every micro-batch has another number of tokens
        torch._dynamo.maybe_mark_dynamic(context_TH, 0)
        torch._dynamo.maybe_mark_dynamic(rest[0], 0)
        found: torch.Tensor = compiled(operations, context_TH, *rest)
        return found

    return run


# ---- The torch form with the LayerNorm of NVIDIA's apex, where its compiled part is there.


_REMEDY = (
    "build NVIDIA's apex from its repository with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or leave "
    "engine.kernels to auto"
)


def find_fused_layer_norm() -> Any:
    """apex's function of input, weight, bias, shape and eps.

    PyPI's `apex` is another project, and NVIDIA's may lack its compiled part: so that part,
    `fused_layer_norm_cuda`, is looked for first.

    Raises:
        ConfigError: it is not there, or not what it should be.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        found = importlib.import_module("apex.normalization.fused_layer_norm")
    except ImportError as error:
        raise ConfigError(f"engine.kernels=apex: {error}; {_REMEDY}") from None
    function = getattr(found, "fused_layer_norm_affine", None)
    if not callable(function):
        raise ConfigError(
            f"engine.kernels=apex: {found.__name__} has no fused_layer_norm_affine: it is not "
            f"NVIDIA's, or an old one; {_REMEDY}"
        )
    return function


@dataclass(frozen=True)
class ApexOperations(Operations):
    """On an NVIDIA GPU. Give it what `find_fused_layer_norm` found."""

    layer_norm: Any = None

    name = "apex"

    def norm(self, x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight_H, bias_H, eps = norm
        normed_TH: torch.Tensor = self.layer_norm(x_TH, weight_H, bias_H, weight_H.shape, eps)
        return normed_TH

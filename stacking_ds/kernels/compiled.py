"""The operations of a BERT by torch.compile: the rival that the hand-written kernels have to beat.

What a layer does after its attention is one compiled function of its weights, so that all layers,
of all depths that a model grows to, run the same code, which is compiled once a process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from stacking_ds.kernels.operations import Function, Operations, Weights

__all__ = ["CompiledOperations"]


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

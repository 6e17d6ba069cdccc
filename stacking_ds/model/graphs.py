"""Layers as CUDA graphs: one launch each, for micro-batches too small to hide the host's work.

A graph computes on fixed addresses and shapes. So tokens are filled up to the slots of the
micro-batch's rows, by sequences of filling that no example sees, and examples to a fixed number.

Shapes: T tokens, H hidden size, E examples; slots = rows x longest.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from stacking_ds.kernels.attention.sequences import Sequences

Graphed = Callable[..., torch.Tensor]
Capture = Callable[[tuple[Callable[..., torch.Tensor], ...], tuple[Any, ...]], tuple[Graphed, ...]]

logger = logging.getLogger("stacking_ds")

_SPARE_EXAMPLES = 2  # times as many as the first micro-batch had, before a step runs without graph


class _Captured(NamedTuple):
    layers: tuple[Graphed, ...]
    examples: int
    """No micro-batch may have more, filling included."""


class GraphedLayers:
    """All layers of an encoder, captured at the first call for each shape of rows."""

    def __init__(self, layers: nn.ModuleList, capture: Capture | None = None) -> None:
        self._layers = layers
        self._capture = capture or _capture_beside_other_threads
        self._by_shape: dict[tuple[int, int], _Captured] = {}
        self._has_warned = False

    def __call__(self, hidden_TH: torch.Tensor, sequences: Sequences) -> torch.Tensor | None:
        """The encoder's output, or None where this micro-batch does not fit what was captured."""
        tokens, examples = len(hidden_TH), len(sequences.starts_E1) - 1
        slots, longest = sequences.slots, sequences.longest
        captured = self._by_shape.get((slots, longest))
        if captured is None:
            most = _SPARE_EXAMPLES * examples + slots // longest
            captured = _Captured(self._captured(hidden_TH, most, slots, longest), most)
            self._by_shape[slots, longest] = captured
        filling = -(-(slots - tokens) // longest)
        if examples + filling > captured.examples:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "a micro-batch of %d examples has more than its CUDA graph was made for, and "
                    "runs without; others may too",
                    examples,
                )
            return None
        starts_E1 = fill_up(sequences.starts_E1, captured.examples, slots, longest)
        filled_TH = torch.cat([hidden_TH, hidden_TH.new_zeros(slots - tokens, hidden_TH.shape[1])])
        for layer, graphed in zip(self._layers, captured.layers, strict=True):
            weights = [_FreshGradient.apply(p) for p in layer.parameters()]  # type: ignore[no-untyped-call]
            filled_TH = graphed(filled_TH, starts_E1, *weights)
        return filled_TH[:tokens]

    def _captured(
        self, hidden_TH: torch.Tensor, examples: int, slots: int, longest: int
    ) -> tuple[Graphed, ...]:
        device = hidden_TH.device
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        starts_E1 = fill_up(nothing, examples, slots, longest)
        samples = tuple(
            # the weights' own memory, so that a replay need not copy them
            (
                hidden_TH.new_zeros(slots, hidden_TH.shape[1]).requires_grad_(),
                starts_E1,
                *(p.detach().requires_grad_() for p in layer.parameters()),
            )
            for layer in self._layers
        )
        functions = tuple(_function_of(layer, longest) for layer in self._layers)
        # capturing draws numbers; a resumed run, which captures elsewhere, must not notice
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._capture(functions, samples)


def _capture_beside_other_threads(
    functions: tuple[Callable[..., torch.Tensor], ...], samples: tuple[Any, ...]
) -> tuple[Graphed, ...]:
    """The loader's thread pins memory meanwhile, which breaks a capture that watches all threads;
    torch's function has no argument for that."""
    watching_all = torch.cuda.graph
    torch.cuda.graph = partial(watching_all, capture_error_mode="thread_local")  # type: ignore[assignment,misc]
    try:
        graphed: Any = torch.cuda.make_graphed_callables(functions, samples)
    finally:
        torch.cuda.graph = watching_all  # type: ignore[misc]
    return tuple(graphed)


def fill_up(starts_E1: torch.Tensor, examples: int, slots: int, longest: int) -> torch.Tensor:
    """`examples` sequences that cover all slots: the given ones, filling, and then empty ones."""
    more = examples + 1 - len(starts_E1)
    behind = longest * torch.arange(1, more + 1, dtype=torch.int32, device=starts_E1.device)
    return torch.cat([starts_E1, (starts_E1[-1:] + behind).clamp(max=slots)])


def _function_of(layer: nn.Module, longest: int) -> Callable[..., torch.Tensor]:
    """The layer as a function of tensors alone."""
    names = [name for name, _ in layer.named_parameters()]

    def run(
        hidden_TH: torch.Tensor, starts_E1: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        sequences = Sequences(starts_E1, longest)
        given = dict(zip(names, weights, strict=True))
        computed_TH: torch.Tensor = functional_call(layer, given, (hidden_TH, sequences))
        return computed_TH

    return run


class _FreshGradient(torch.autograd.Function):
    """The weight itself; its gradient in memory of its own.

    A graph writes gradients to the same place at each replay, which autograd would take over as
    the parameter's gradient: the next micro-step would then overwrite what it should add to.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return grad.clone()

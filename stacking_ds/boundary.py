"""The sharded state across a boundary: off one engine, into the next.

old engine ── capture_engine ──> HostState ── release, build ──> install_state ──> new engine
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds import zero
from stacking_ds.growth.exchange import Ranks
from stacking_ds.growth.operators import source_name
from stacking_ds.growth.state import CapturedState, Moments, capture, install

__all__ = ["HostState", "capture_engine", "install_state"]


@dataclass(frozen=True)
class HostState:
    """What a boundary carries, independent of any engine."""

    captured: CapturedState
    """Host copies of this rank's masters and moments."""
    optimizer_step: int
    """The optimizer's own count, which its bias correction needs."""
    loss_scale: float
    """The factor fp16 has settled on; a new engine would skip its first steps to find it again."""
    weights: Mapping[str, torch.Tensor]
    """At ZeRO 1 and 2 the low-precision weights, whole on every rank: the old engine's own tensors,
    not copies. Without them every rank would have to send its share of them to all others."""


def capture_engine(engine: Any, captured: CapturedState | None = None) -> HostState:
    """Take from `engine` what the next one needs, so that it can be released. No communication.

    `captured` is the host copy of the fragments where the caller has just made one.
    """
    return HostState(
        captured=captured or capture(zero.fragments(engine)),
        optimizer_step=zero.optimizer_step(engine),
        loss_scale=zero.loss_scale(engine),
        weights=zero.whole_weights(engine),
    )


def install_state(
    engine: Any,
    state: HostState,
    layers: Sequence[int] | None,
    moments: Moments,
    ranks: Ranks,
) -> None:
    """Make `engine`, new and of another depth or ZeRO stage, go on from `state`. A collective.

    Raises:
        StageError: the state that arrived is not the one the growth operator predicts.
    """
    if moments == "carry" and state.optimizer_step:
        zero.seed_moments(engine, state.optimizer_step)
    install(zero.fragments(engine), state.captured, layers, moments, ranks)
    weights = zero.whole_weights(engine)
    if _same_dtype(weights, state.weights):
        names = {name: source_name(name, layers) for name in weights}
        zero.write_whole_weights(
            engine, {name: state.weights[source] for name, source in names.items()}
        )
    else:
        zero.refresh(engine)
    zero.set_loss_scale(engine, state.loss_scale)


def _same_dtype(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> bool:
    dtypes = {weight.dtype for weights in (new, old) for weight in weights.values()}
    return bool(new) and bool(old) and len(dtypes) == 1

"""The sharded state across a boundary: off one engine, into the next.

old engine ── capture_engine ──> CarriedState ── release, build ──> install_state ──> new engine
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds.engine.zero import loss_scale as engine_zero_loss_scale
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import StageError
from stacking_ds.growth.operators import source_name
from stacking_ds.growth.transfer import CapturedState, Moments, capture, install
from stacking_ds.sharding.fragments import MASTER
from stacking_ds.sharding.reshard import Ranks

__all__ = ["CarriedState", "capture_engine", "install_state"]


@dataclass(frozen=True)
class CarriedState:
    """What a boundary carries while there is no engine."""

    captured: CapturedState
    """Host copies of this rank's masters and moments."""
    optimizer_step: int
    """The optimizer's own count, which its bias correction needs."""
    loss_scale: float
    """The factor fp16 has settled on; a new engine would skip its first steps to find it again."""
    weights: Mapping[str, torch.Tensor]
    """At ZeRO 1 and 2 the low-precision weights, whole on every rank: the old engine's own tensors
    on its device, which stay for as long as this does. Without them every rank would have to send
    its share of them to all others."""


def capture_engine(engine: Any, captured: CapturedState | None = None) -> CarriedState:
    """Take from `engine` what the next one needs, so that it can be released. No communication.

    `captured` is the host copy of the fragments where the caller has just made one.
    """
    return CarriedState(
        captured=captured or capture(sharded_state.fragments(engine)),
        optimizer_step=sharded_state.optimizer_step(engine),
        loss_scale=engine_zero_loss_scale.loss_scale(engine),
        weights=sharded_state.whole_weights(engine),
    )


def install_state(
    engine: Any,
    state: CarriedState,
    layers: Sequence[int] | None,
    moments: Moments,
    world: Ranks,
) -> None:
    """Make `engine`, new and of another depth or ZeRO stage, go on from `state`. A collective.

    Raises:
        StageError: on every rank, if the state that arrived anywhere is not the one the growth
            operator predicts.
    """
    if moments == "carry" and state.optimizer_step:
        sharded_state.seed_moments(engine, state.optimizer_step)
    install(sharded_state.fragments(engine), state.captured, layers, moments, world)
    weights = sharded_state.whole_weights(engine)
    if _same_dtype(weights, state.weights):
        names = {name: source_name(name, layers) for name in weights}
        sharded_state.write_whole_weights(
            engine, {name: state.weights[source] for name, source in names.items()}
        )
        _check_weights(engine, world)
    else:
        sharded_state.refresh(engine)
    engine_zero_loss_scale.set_loss_scale(engine, state.loss_scale)


def _check_weights(engine: Any, world: Ranks) -> None:
    """The checksums are of the masters: that these weights are their rounding shows only here."""
    weights = sharded_state.whole_weights(engine)
    wrong = []
    for fragment in sharded_state.fragments(engine):
        weight = weights[fragment.name].reshape(-1)[fragment.start : fragment.stop]
        if not torch.equal(weight, fragment.views[MASTER].to(weight.dtype)):
            wrong.append(fragment.name)
    if world.sum([len(wrong)])[0]:
        raise StageError(
            f"the weights of the forward pass are not the rounding of the masters"
            f"{f' (first: {wrong[0]})' if wrong else ', on another rank'}; do not train on from "
            f"this state, resume from the last checkpoint"
        )


def _same_dtype(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> bool:
    dtypes = {weight.dtype for weights in (new, old) for weight in weights.values()}
    return bool(new) and bool(old) and len(dtypes) == 1

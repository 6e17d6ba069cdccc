"""The boundary between two stages: capture the old engine's state, grow it, install it.

    old engine ──capture──> TrainingState ──────install──────> new engine, deeper
    masters, moments         on the host     named and repeated   masters, moments, low-precision
    count, loss scale                        by the layer map     weights, count, loss scale

A checkpoint is written from the same captured state. No rank ever holds a whole model.

A copied layer has its source's shape, and every layer has parameter groups of its own, so at the
same world size and ZeRO stage what a rank needs of a new layer is what it held of the old one:
nothing is communicated but the checksums. Where the layouts differ only what differs moves.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds.config.sections import Moments
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import StageError
from stacking_ds.growth.operators import source_name
from stacking_ds.sharding.fragments import MASTER, Fragment
from stacking_ds.sharding.reshard import Ranks, copy_own, exchange

_TOLERANCE = 1e-9  # of the fp64 sums, which the ranks may add up in another order
_PIECE_ELEMENTS = 1 << 18
_STATISTICS = 3  # count, sum, sum of squares


@dataclass(frozen=True)
class TrainingState:
    """This rank's part of the state of training, while there is no engine."""

    fragments: tuple[Fragment, ...]
    """Host copies of masters and moments."""
    optimizer_step: int
    """The optimizer's own count, which its bias correction needs."""
    loss_scale: float
    """The factor fp16 has settled on; a new engine would skip its first steps to find it again."""
    weights: Mapping[str, torch.Tensor]
    """At ZeRO 1 and 2 the low-precision weights, whole on every rank: the old engine's own tensors
    on its device, which stay for as long as this does. Without them every rank would have to send
    its share of them to all others."""


def capture(engine: Any, answering_rank: int | None = None) -> TrainingState:
    """Copy to the host what `engine` knows and the next one needs, so that it can be released.

    With `answering_rank`, that rank's, only of the elements that it answers for, which is all that
    a checkpoint needs; a boundary needs all that a rank holds. No communication.
    """
    held = sharded_state.fragments(engine)
    if answering_rank is not None:
        held = [fragment.owned_by(answering_rank) for fragment in held]
    return TrainingState(
        fragments=tuple(fragment.on_host() for fragment in held),
        optimizer_step=sharded_state.optimizer_step(engine),
        loss_scale=sharded_state.loss_scale(engine),
        weights=sharded_state.whole_weights(engine),
    )


def install(
    state: TrainingState,
    engine: Any,
    layers: Sequence[int] | None,
    moments: Moments,
    world: Ranks,
) -> None:
    """Make `engine`, new and of another depth or ZeRO stage, go on from `state`. A collective.

    Args:
        layers: for each new layer the old one it copies (`operators.layer_map`); None where the
            depth stays.

    Raises:
        StageError: on every rank, if the state that arrived anywhere is not the one the growth
            operator predicts.
    """
    if moments == "carry" and state.optimizer_step:
        sharded_state.seed_moments(engine, state.optimizer_step)
    fill(sharded_state.fragments(engine), state.fragments, layers, moments, world)
    weights = sharded_state.whole_weights(engine)
    if _same_dtype(weights, state.weights):
        names = {name: source_name(name, layers) for name in weights}
        sharded_state.write_whole_weights(
            engine, {name: state.weights[source] for name, source in names.items()}
        )
        _check_weights(engine, world)
    else:
        sharded_state.refresh(engine)
    sharded_state.set_loss_scale(engine, state.loss_scale)


@torch.no_grad()
def fill(
    targets: Sequence[Fragment],
    held: Sequence[Fragment],
    layers: Sequence[int] | None,
    moments: Moments,
    world: Ranks,
) -> None:
    """Write the values `held` on the host into the live fragments `targets` of the new engine.

    Every rank calls it. It sends one small all-reduce of checksums, and the elements, if any,
    that a rank needs and another one has. With moments "carry" the targets must have moments if
    `held` has; with "reset" those they have become zero. The caller refreshes the low-precision
    copies afterwards.

    Raises:
        StageError: on every rank, if the new model has a parameter that the old one cannot fill,
            or if what arrived anywhere is not what the layer map predicts (count, sum and sum of
            squares of every parameter over all ranks).
    """
    keys = sorted({key for target in targets for key in target.views})
    has_moments = any(key != MASTER for fragment in held for key in fragment.views)
    carried = moments == "carry" and has_moments
    assert not carried or len(keys) > 1, "seed the moments of the new engine first"
    filled = keys if carried else [MASTER]
    sources = _sources(targets, held, layers)
    for target in targets:
        copy_own(target, sources[target.name], filled)
        for key in keys:
            if key not in filled:
                target.views[key].zero_()
    exchange(targets, sources, filled, world)
    totals = world.sum([*_statistics(targets, filled, world), *_statistics(held, filled, world)])
    _compare(targets, held, layers, filled, totals)


def _sources(
    targets: Sequence[Fragment], held: Sequence[Fragment], layers: Sequence[int] | None
) -> dict[str, Fragment]:
    """For each new parameter this rank's fragment of the old one that it copies."""
    by_name = {fragment.name: fragment for fragment in held}
    found = {}
    for target in targets:
        name = source_name(target.name, layers)
        source = by_name.get(name)
        if source is None or source.shape != target.shape:
            there = f"has {name} as {source.shape}" if source else f"has no {name}"
            raise StageError(
                f"{target.name} {target.shape} cannot be grown: the old model {there}; stages may "
                f"differ in depth alone"
            )
        found[target.name] = source
    return found


def _statistics(fragments: Iterable[Fragment], keys: Sequence[str], world: Ranks) -> list[float]:
    """For each fragment and key, in order: count, sum and sum of squares of the owned elements."""
    counts, sums = [], []
    wide = torch.empty(0)
    for fragment in fragments:
        owned = fragment.owned_by(world.rank)
        for key in keys:
            view = owned.views[key]
            if wide.device != view.device or not wide.numel():
                wide = torch.empty(_PIECE_ELEMENTS, dtype=torch.float64, device=view.device)
            counts.append(float(owned.numel))
            sums.append(_sums(view, wide))
    # together: reading them one by one would wait for the device each time
    pairs = torch.stack(sums).tolist()
    return [value for count, pair in zip(counts, pairs, strict=True) for value in (count, *pair)]


def _sums(view: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares in fp64, through `wide`, a piece at a time that stays in the cache."""
    parts = []
    for piece in torch.split(view, len(wide)):
        widened = wide[: len(piece)].copy_(piece)
        parts.append(torch.stack([widened.sum(), widened.dot(widened)]))
    return torch.stack(parts).sum(0)


def _compare(
    targets: Sequence[Fragment],
    held: Sequence[Fragment],
    layers: Sequence[int] | None,
    keys: Sequence[str],
    totals: Sequence[float],
) -> None:
    values = iter(zip(*[iter(totals)] * _STATISTICS, strict=True))
    arrived = {(target.name, key): next(values) for target in targets for key in keys}
    left = {(fragment.name, key): next(values) for fragment in held for key in keys}
    for target in targets:
        source = source_name(target.name, layers)
        for key in keys:
            found, expected = arrived[target.name, key], left[source, key]
            if found[0] != math.prod(target.shape) or not _equal(found, expected):
                raise StageError(
                    f"{key} of {target.name} did not arrive whole from {source}: (count, sum, sum "
                    f"of squares) is {found}, and was {expected}; do not train on from this state, "
                    f"resume from the last checkpoint"
                )


def _equal(found: Sequence[float], expected: Sequence[float]) -> bool:
    count, total, squares = expected
    scale = math.sqrt(count * squares)  # bounds the sum of the absolute values
    return (
        found[0] == count
        and abs(found[1] - total) <= _TOLERANCE * scale
        and abs(found[2] - squares) <= _TOLERANCE * squares
    )


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

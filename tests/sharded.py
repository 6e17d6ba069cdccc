"""Engines on ranks, and whole parameters put together from their fragments."""

from typing import Any

import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, build_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.sharding.fragments import Fragment
from tests.tiny import SAMPLES, tiny_batch, tiny_loss, tiny_model, tiny_optimizer, tiny_settings

__all__ = ["State", "start_engine", "train_engine", "train_losses", "whole_state"]

State = dict[str, dict[str, torch.Tensor]]


def start_engine(
    world: World,
    zero_stage: int,
    precision: str = "fp32",
    *,
    depth: int = 2,
    gas: int = 1,
    clipping: float = 0.0,
    seed: int = 0,
) -> Any:
    model = tiny_model(depth, seed)
    settings = tiny_settings(zero_stage, precision, world.size, gas, clipping)
    return build_engine(model, tiny_optimizer(model), settings)


def train_engine(world: World, engine: Any, steps: range, gas: int = 1) -> list[float | None]:
    """Train on the same batches as `tiny.train_tiny`; the gradient norm of every step."""
    return [_train_step(world, engine, step, gas)[1] for step in steps]


def train_losses(world: World, engine: Any, steps: range) -> list[float]:
    """Train likewise; the loss of every step, over the batches of all ranks."""
    return [world.sum([_train_step(world, engine, step, 1)[0]])[0] for step in steps]


def _train_step(world: World, engine: Any, step: int, gas: int) -> tuple[float, float | None]:
    """This rank's share of the loss, and the gradient norm."""
    share = SAMPLES // (world.size * gas)
    loss = 0.0
    for micro_step in range(gas):
        first = (micro_step * world.size + world.rank) * share
        batch = {key: tensor.to(world.device) for key, tensor in tiny_batch(step).items()}
        part = tiny_loss(engine, batch, slice(first, first + share))
        engine.backward(part * world.size * gas)
        norm = advance(engine)
        assert (norm is None) == (micro_step < gas - 1)
        loss += part.item()
    return loss, norm


def whole_state(world: World, engine: Any) -> State:
    """Every parameter's whole master and moments, on every rank, from all ranks' fragments.

    Fails unless each element is owned exactly once.
    """
    owned = [f.owned_by(world.rank) for f in sharded_state.fragments(engine)]
    state: State = {}
    holes: dict[str, int] = {}
    for parts in world.gather([_plain(fragment) for fragment in owned]):
        for name, shape, start, stop, views in parts:
            numel = torch.Size(shape).numel()
            holes[name] = holes.get(name, numel) - (stop - start)
            for key, values in views.items():
                whole = state.setdefault(name, {}).setdefault(key, torch.full((numel,), torch.nan))
                assert whole[start:stop].isnan().all(), f"{name} is owned twice"
                whole[start:stop] = values
    assert not any(holes.values()), f"not owned exactly once: {holes}"
    shapes = {name: shape for parts in world.gather([_plain(f) for f in owned])
              for name, shape, *_ in parts}  # fmt: skip
    return {
        name: {key: whole.view(shapes[name]) for key, whole in views.items()}
        for name, views in state.items()
    }


def _plain(fragment: Fragment) -> tuple[Any, ...]:
    # copies: a view would be pickled with the whole flat buffer it looks into
    views = {key: view.clone() for key, view in fragment.views.items()}
    return fragment.name, fragment.shape, fragment.start, fragment.stop, views

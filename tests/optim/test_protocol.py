"""An optimizer of a user's own, with other state than Adam's: the engine knows nothing of it."""

from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.growth.transfer import capture, install
from stacking_ds.optim.optimizers import ShardedOptimizer
from stacking_ds.sharding.fragments import MASTER
from tests.ranks import run_ranks
from tests.sharded import State, train_engine, whole_state
from tests.tiny import tiny_model, tiny_optimizer, tiny_settings, train_tiny

LAYERS = layer_map("stack", 2, 4)


class Momentum(torch.optim.Optimizer):
    """The mean of gradients, which is all its state."""

    state_names = ("exp_avg",)

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.spans = 0

    def bind(self, shards: Any, *surroundings: Any) -> None:
        self.spans = sum(len(shard.spans) for shard in shards)

    def unbind(self) -> None:
        self.spans = 0

    def metrics(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        return {"optim/spans": float(self.spans)}, {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 0.1)
                p.sub_(state["exp_avg"], alpha=group["lr"])


def _engine(world: World, zero_stage: int, depth: int) -> Any:
    model = tiny_model(depth)
    # one group a layer and kind, as all engines need
    groups = [{"params": group["params"]} for group in tiny_optimizer(model).param_groups]
    return build_engine(model, Momentum(groups), tiny_settings(zero_stage, "fp32", world.size))


def _train_and_grow(world: World, zero_stage: int) -> tuple[State, State]:
    engine = _engine(world, zero_stage, 2)
    metrics = engine.basic_optimizer.metrics()[0]
    assert metrics == {"optim/spans": len(list(engine.module.parameters()))}
    train_engine(world, engine, range(3))
    before, state = whole_state(world, engine), capture(engine)
    optimizer = engine.basic_optimizer
    release_engine(engine)
    assert optimizer.spans == 0, "it was unbound"
    engine = _engine(world, zero_stage, 4)
    install(state, engine, LAYERS, "carry", world)
    after = whole_state(world, engine)
    train_engine(world, engine, range(3, 4))
    assert sharded_state.optimizer_step(engine) == 4
    release_engine(engine)
    return before, after


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_it_trains_and_grows_as_on_one_process(zero_stage: int) -> None:
    model = tiny_model(2)
    optimizer = Momentum(model.parameters())
    assert isinstance(optimizer, ShardedOptimizer)
    train_tiny(model, optimizer, range(3))
    before, after = run_ranks(_train_and_grow, 2, zero_stage)[0]
    for name, p in model.named_parameters():
        assert set(before[name]) == {MASTER, "exp_avg"}
        torch.testing.assert_close(before[name][MASTER], p.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            before[name]["exp_avg"], optimizer.state[p]["exp_avg"], rtol=1e-4, atol=1e-6
        )
    for name, values in after.items():
        for key, value in values.items():
            assert torch.equal(value, before[source_name(name, LAYERS)][key]), (name, key)
    assert len(after) > len(before)


def test_torchs_own_need_not_know_of_shards() -> None:
    assert not isinstance(tiny_optimizer(tiny_model(1)), ShardedOptimizer)

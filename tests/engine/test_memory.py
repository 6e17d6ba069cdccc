"""A released engine gives its memory back, at every ZeRO stage."""

import gc
import math
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import capture, install
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine
from tests.tiny import tiny_config, tiny_optimizer, tiny_settings

GROWTHS = 10
SMALL_BYTES = 100  # a few scalars; the models below have 9 to 16 kB of parameters


def _rebuild(world: World, zero_stage: int, cycles: int) -> list[int]:
    tensor_bytes = []
    for _ in range(cycles):
        engine = start_engine(world, zero_stage, "bf16", depth=4)
        train_engine(world, engine, range(1))
        release_engine(engine)  # the name `engine` still holds what is left of it
        tensor_bytes.append(_settled_tensor_bytes())
    return tensor_bytes


def _settled_tensor_bytes() -> int:
    """Live bytes when the threads of gloo have let go of the last tensors they sent, which they do
    when they run next."""
    deadline = time.monotonic() + 5
    while (found := _live_tensor_bytes()) >= SMALL_BYTES and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _live_tensor_bytes() -> int:
    storages = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor) and not candidate.is_meta:
            storage = candidate.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.parametrize("zero_stage", range(4))
def test_released_engines_leave_no_tensors(zero_stage: int) -> None:
    for tensor_bytes in run_ranks(_rebuild, 2, zero_stage, 3):
        assert max(tensor_bytes) < SMALL_BYTES


def _grow_tiny(world: World, zero_stage: int, precision: str) -> list[int]:
    tensor_bytes = []
    for _ in range(GROWTHS):
        engine = start_engine(world, zero_stage, precision, depth=2)
        train_engine(world, engine, range(1))
        engine = _grow(world, engine, tiny_config(4), zero_stage, precision)
        train_engine(world, engine, range(1, 2))
        release_engine(engine)
        tensor_bytes.append(_settled_tensor_bytes())
    return tensor_bytes


def _grow(world: World, engine: Any, config: BertConfig, zero_stage: int, precision: str) -> Any:
    """The boundary of a run: the new model has no values before they are installed."""
    old_depth = engine.module.config.num_hidden_layers
    state = capture(engine)
    release_engine(engine)
    model = BertForPreTraining(config, seed=None)
    settings = tiny_settings(zero_stage, precision, world.size)
    engine = build_engine(model, tiny_optimizer(model), settings)
    layers = layer_map("stack", old_depth, config.num_hidden_layers)
    install(state, engine, layers, "carry", world)
    return engine


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (0, "fp32"),
        pytest.param(0, "bf16", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        (2, "bf16"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_ten_growths_leave_no_tensors(zero_stage: int, precision: str) -> None:
    for tensor_bytes in run_ranks(_grow_tiny, 2, zero_stage, precision):
        assert max(tensor_bytes) < SMALL_BYTES


def _large_config(depth: int) -> BertConfig:
    return BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )


def _grow_large(world: World, zero_stage: int, precision: str) -> tuple[list[float], float]:
    """The resident MiB after each cycle, and the MiB of the grown model's masters and moments."""
    settings = tiny_settings(zero_stage, precision, world.size)
    resident_mib = []
    for _ in range(GROWTHS):
        model = BertForPreTraining(_large_config(2), seed=0)
        engine = build_engine(model, tiny_optimizer(model), settings)
        del model
        train_engine(world, engine, range(2))
        engine = _grow(world, engine, _large_config(4), zero_stage, precision)
        state_mib = 12 * sum(math.prod(f.shape) for f in sharded_state.fragments(engine)) / 2**20
        train_engine(world, engine, range(2, 4))
        release_engine(engine)
        resident_mib.append(_resident_mib())
    return resident_mib, state_mib


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", range(4))
def test_resident_memory_is_flat_over_ten_growths(zero_stage: int, precision: str) -> None:
    for resident_mib, state_mib in run_ranks(_grow_large, 2, zero_stage, precision):
        # one leaked engine would add its share of the state at every cycle
        assert resident_mib[-1] - resident_mib[1] < 0.5 * state_mib

"""A released engine gives its memory back, at every ZeRO stage."""

import gc
import resource
from pathlib import Path

import pytest
import torch

from stacking_ds.distributed import World
from stacking_ds.engine import build_engine, release_engine
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.config import BertConfig
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine
from tests.tiny import tiny_batch, tiny_loss, tiny_model, tiny_optimizer, tiny_settings


def _rebuild(world: World, zero_stage: int, cycles: int) -> list[int]:
    tensor_bytes = []
    for _ in range(cycles):
        engine = start_engine(world, zero_stage, "bf16", depth=4)
        train_engine(world, engine, range(1))
        release_engine(engine)  # the name `engine` still holds what is left of it
        tensor_bytes.append(_live_tensor_bytes())
    return tensor_bytes


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
    model_bytes = 4 * sum(p.numel() for p in tiny_model(4).parameters())
    for tensor_bytes in run_ranks(_rebuild, 2, zero_stage, 3):
        assert max(tensor_bytes) < model_bytes / 10
        # an autograd thread may hold the last small tensor it met a moment longer
        assert tensor_bytes[-1] < tensor_bytes[0] + model_bytes / 20


def _rebuild_large(world: World, zero_stage: int, precision: str) -> tuple[list[float], float]:
    config = BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    settings = tiny_settings(zero_stage, precision, world.size)
    resident_mib = []
    for _ in range(10):
        model = BertForPreTraining(config, seed=0)
        state_mib = 12 * sum(p.numel() for p in model.parameters()) / 2**20
        engine = build_engine(model, tiny_optimizer(model), settings)
        for step in range(2):
            batch = tiny_batch(step)
            engine.backward(tiny_loss(engine, batch, slice(None)))
            engine.step()
        del model
        release_engine(engine)
        resident_mib.append(_resident_mib())
    return resident_mib, state_mib


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", range(4))
def test_resident_memory_is_flat_over_ten_engines(zero_stage: int, precision: str) -> None:
    for resident_mib, state_mib in run_ranks(_rebuild_large, 2, zero_stage, precision):
        # one leaked engine would add its share of the state at every cycle
        assert resident_mib[-1] - resident_mib[1] < 0.5 * state_mib

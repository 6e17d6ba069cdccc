"""Activation checkpointing computes again what it does not keep, and changes nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, build_engine, release_engine
from stacking_ds.kernels.registry import Compute
from stacking_ds.model import layer
from stacking_ds.model.bert import BertForPreTraining, pretraining_loss
from tests.bert_samples import TINY, Batch, telling_model
from tests.ranks import run_ranks
from tests.sharded import whole_state
from tests.tiny import tiny_batch, tiny_config, tiny_loss, tiny_optimizer, tiny_settings

CONFIG = TINY.changed(
    num_hidden_layers=3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
)
KINDS = ["none", "selective", "full"]
positions = pytest.mark.parametrize("position", ["post", "pre"])


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def _trained(kind: Any, position: Any) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Every gradient of one step, and the operations that it took."""
    config = CONFIG.changed(layer_norm_position=position)
    model = telling_model(config, compute=Compute(activation_checkpointing=kind))
    batch = Batch(config, (16, 5, 9))
    torch.manual_seed(3)
    with _Calls() as calls:
        logits_MV, nsp_B2 = model(*batch.inputs(), batch.positions_M)
        loss = pretraining_loss(logits_MV, batch.labels_M, nsp_B2, batch.nsp_labels_B)
        (loss.mlm_sum + loss.nsp_sum).backward()
    return {name: p.grad for name, p in model.named_parameters()}, calls.of


@positions
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_the_same_with_dropout(kind: str, position: str) -> None:
    expected, _ = _trained("none", position)
    found, _ = _trained(kind, position)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@positions
def test_what_is_computed_again(position: str) -> None:
    none, selective, full = (_trained(kind, position)[1] for kind in KINDS)
    layers, products = CONFIG.num_hidden_layers, 4  # query-key-value, projection, up, down
    assert selective["addmm"] == none["addmm"]
    assert full["addmm"] == none["addmm"] + layers * products
    for calls in (selective, full):
        assert calls["gelu"] == none["gelu"] + layers
        assert calls["_softmax"] == none["_softmax"] * 2


def test_nothing_is_computed_again_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "checkpoint", None)  # nobody calls it
    model = telling_model(CONFIG, compute=Compute(activation_checkpointing="full"))
    plain = telling_model(CONFIG)
    batch = Batch(CONFIG, (16, 5))
    with torch.no_grad():
        model.eval()
        plain.eval()
        assert torch.equal(model(*batch.inputs())[0], plain(*batch.inputs())[0])


def _state_after_steps(world: World, zero_stage: int, precision: str, kind: Any) -> Any:
    config = tiny_config(2).changed(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = BertForPreTraining(config, seed=0, compute=Compute(activation_checkpointing=kind))
    settings = tiny_settings(zero_stage, precision, world.size)
    engine = build_engine(model, tiny_optimizer(model), settings)
    for step in range(3):
        torch.manual_seed(7 * step + world.rank)
        engine.backward(tiny_loss(engine, tiny_batch(step), slice(None)))
        advance(engine)
    state = whole_state(world, engine)
    release_engine(engine)
    return state


def _same_under_zero(world: World, zero_stage: int, precision: str) -> None:
    expected = _state_after_steps(world, zero_stage, precision, "none")
    for kind in ("selective", "full"):
        found = _state_after_steps(world, zero_stage, precision, kind)
        for name, views in expected.items():
            for key, value in views.items():
                assert torch.equal(found[name][key], value), (kind, name, key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_weights_are_the_same_under_zero(zero_stage: int, precision: str) -> None:
    run_ranks(_same_under_zero, 2, zero_stage, precision)

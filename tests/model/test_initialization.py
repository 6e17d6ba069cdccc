"""First values: their statistics, and that they depend on seed and name alone."""

import pytest
import torch

from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig

CONFIG = BertConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    initializer_range=0.05,
)


def _tensors(config: BertConfig, seed: int) -> dict[str, torch.Tensor]:
    return {
        name: value.detach() for name, value in BertForPreTraining(config, seed).named_parameters()
    }


def test_statistics() -> None:
    drawn = []
    for name, value in _tensors(CONFIG, seed=0).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "LayerNorm" in name:
            assert (value == 1).all(), name
        else:
            drawn.append(value.flatten())
            assert value.std().item() == pytest.approx(0.05, rel=5 / value.numel() ** 0.5), name
            assert abs(value.mean().item()) < 5 * 0.05 / value.numel() ** 0.5, name
    values = torch.cat(drawn) / 0.05
    assert values.abs().max() > 3.5  # not cut off
    assert (values.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.005)


def test_every_weight_is_drawn_on_its_own() -> None:
    firsts = [value[0, :4] for value in _tensors(CONFIG, seed=0).values() if value.ndim == 2]
    assert len({tuple(first.tolist()) for first in firsts}) == len(firsts)


def test_the_seed_decides() -> None:
    one, same, other = (_tensors(CONFIG, seed) for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim == 2)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    one, state = _tensors(CONFIG, seed=7), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(value, one[name]) for name, value in _tensors(CONFIG, seed=7).items())


def test_a_layer_starts_alike_at_any_depth() -> None:
    shallow, deep = _tensors(CONFIG, seed=7), _tensors(CONFIG.changed(num_hidden_layers=5), seed=7)
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())


def test_a_fixed_value() -> None:
    # a change here makes every recipe another run
    tensors = _tensors(CONFIG, seed=0)
    first = tensors["bert.encoder.layer.1.attention.self.query.weight"][0, :3]
    torch.testing.assert_close(
        first, torch.tensor([-0.0306318, -0.0291097, 0.0073866]), rtol=0, atol=1e-6
    )


def test_without_a_seed_nothing_is_allocated() -> None:
    model = BertForPreTraining(CONFIG, seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())

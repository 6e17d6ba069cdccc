"""Sizes: what is refused, and the counts that follow from them."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from stacking_ds.config.mistakes import checked
from stacking_ds.errors import ConfigError
from stacking_ds.model.bert import BertForPreTraining, parameter_shapes
from stacking_ds.model.bert_config import BertConfig

BASE = BertConfig(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)
ODD = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=9,
    type_vocab_size=3,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, not -1"),
        ({"num_attention_heads": 5}, "hidden_size=768 is not divisible by num_attention_heads=5"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be below 1, not 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob must be at least 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0, not 0.0"),
        ({"initializer_range": math.nan}, "initializer_range must be a finite number, not nan"),
        ({"layer_norm_position": "sandwich"}, "must be 'post' or 'pre', not 'sandwich'"),
    ],
)
def test_impossible_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(BertConfig, **{**dict(BASE), **change})
    assert message in str(caught.value)
    with pytest.raises(ValidationError):
        BASE.changed(**change)


@pytest.mark.parametrize("config", [ODD, ODD.changed(layer_norm_position="pre")])
def test_num_parameters_counts_the_models_parameters(config: BertConfig) -> None:
    model = BertForPreTraining(config, seed=0)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_num_parameters_of_bert_base() -> None:
    # the 110M of Devlin et al. 2019, with both heads
    assert BASE.num_parameters == 110_106_428


def test_parameter_shapes_are_the_models() -> None:
    model = BertForPreTraining(ODD, seed=0)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert parameter_shapes(ODD) == expected
    assert list(parameter_shapes(ODD)) == list(expected)


# 72 H^2 L + 12 S H L + 6 (H^2 + H V) f, in GFLOP, for V = 30528 and f = 0.15
PUBLISHED = [(3, 128, 0.1526), (6, 128, 0.2835), (12, 128, 0.5454), (12, 512, 0.5879)]


@pytest.mark.parametrize(("depth", "sequence_length", "gigaflops"), PUBLISHED)
def test_flops_of_bert_base(depth: int, sequence_length: int, gigaflops: float) -> None:
    config = BASE.changed(vocab_size=30528, num_hidden_layers=depth)
    assert config.flops_per_token(sequence_length, 0.15) / 1e9 == pytest.approx(gigaflops, abs=1e-4)


def test_flops_count_the_feed_forward_width() -> None:
    wider = BASE.changed(intermediate_size=4072)
    extra = wider.flops_per_token(128, 0.15) - BASE.flops_per_token(128, 0.15)
    assert extra == pytest.approx(3 * 2 * 12 * 2 * 768 * 1000)

"""Optimizers by name, from a recipe's section."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stacking_ds.config.sections import LambSection, OptimizerSection
from stacking_ds.optim.lamb.optimizer import Lamb
from stacking_ds.optim.optimizers import build_optimizer


def _build(module: nn.Module, **section: object) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSection.model_validate(section), module.named_parameters())


def test_adamw_is_the_exact_type_with_the_groups_own_decay() -> None:
    optimizer = _build(
        nn.Linear(2, 3), learning_rate=0.02, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.3
    )
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-5)


def test_one_step_moves_by_the_formula() -> None:
    # Loshchilov & Hutter 2019, algorithm 2: at step 1 both bias-corrected moments are the gradient
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = _build(module, learning_rate=0.1, betas=(0.9, 0.99), eps=1.0, weight_decay=0.5)
    module.weight.grad = torch.tensor([3.0])
    optimizer.step()
    assert module.weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1 * 3.0 / (3.0 + 1.0))


def test_lamb_has_the_recipes_options_and_adapts_weights_alone() -> None:
    optimizer = _build(
        nn.Linear(2, 3),
        name="lamb",
        learning_rate=0.02,
        betas=(0.8, 0.9),
        weight_decay=0.3,
        lamb={"min_coeff": 0.01, "max_coeff": 0.3},
    )
    assert type(optimizer) is Lamb
    weight, bias = optimizer.param_groups
    assert (weight["weight_decay"], weight["layer_adaptation"]) == (0.3, True)
    assert (bias["weight_decay"], bias["layer_adaptation"]) == (0.0, False)
    for group in (weight, bias):
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-6)
    assert optimizer.options == LambSection(min_coeff=0.01, max_coeff=0.3)


def test_lamb_is_unbounded_unless_asked_and_adapts_biases_when_asked() -> None:
    optimizer = _build(
        nn.Linear(2, 3), name="lamb", learning_rate=0.02, lamb={"always_adapt": True}
    )
    assert all(group["layer_adaptation"] for group in optimizer.param_groups)
    assert isinstance(optimizer, Lamb)
    assert (optimizer.options.min_coeff, optimizer.options.max_coeff) == (0.0, None)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "adam"}, "'adamw' or 'lamb'"),
        ({"name": "adamw", "lamb": {}}, "does not go with name=adamw"),
        ({"name": "lamb", "lamb": None}, "does not go with name=lamb"),
        ({"name": "lamb", "lamb": {"min_coeff": 2.0, "max_coeff": 1.0}}, "above max_coeff=1.0"),
        ({"name": "lamb", "lamb": {"kernel": "apex", "max_coeff": 1.0}}, "does not bound"),
        ({"name": "lamb", "lamb": {"grad_pre_normalization": True}}, "set max_grad_norm=0"),
    ],
)
def test_what_does_not_fit_is_refused(section: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OptimizerSection.model_validate({"learning_rate": 0.1, **section})


def test_lamb_alone_is_enough() -> None:
    assert OptimizerSection(name="lamb", learning_rate=0.1).lamb == LambSection()


def test_the_peak_follows_the_square_root_of_the_batch() -> None:
    section = OptimizerSection(learning_rate=5e-3, learning_rate_batch_size=32768)
    assert section.peak_learning_rate(32768) == 5e-3
    assert section.peak_learning_rate(8192) == pytest.approx(2.5e-3)
    assert OptimizerSection(learning_rate=5e-3).peak_learning_rate(8192) == 5e-3

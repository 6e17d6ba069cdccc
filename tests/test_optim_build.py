"""Optimizers by name."""

import pytest
import torch
from torch import nn

from stacking_ds.errors import ConfigError
from stacking_ds.optim.build import build_optimizer
from stacking_ds.optim.groups import parameter_groups


def test_adamw_is_the_exact_type_with_the_groups_own_decay() -> None:
    linear = nn.Linear(2, 3)
    groups = parameter_groups(linear.named_parameters(), 0.3)
    optimizer = build_optimizer("adamw", groups, learning_rate=0.02, betas=(0.8, 0.9), eps=1e-5)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-5)


def test_one_step_moves_by_the_formula() -> None:
    # Loshchilov & Hutter 2019, algorithm 2: at step 1 both bias-corrected moments are the gradient
    weight = nn.Parameter(torch.tensor([2.0]))
    groups = parameter_groups([("weight", weight)], 0.5)
    optimizer = build_optimizer("adamw", groups, learning_rate=0.1, betas=(0.9, 0.99), eps=1.0)
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1 * 3.0 / (3.0 + 1.0))


def test_an_unknown_name_says_what_exists() -> None:
    with pytest.raises(ConfigError, match="'adam' does not exist; there is: adamw"):
        build_optimizer("adam", [], learning_rate=0.1, betas=(0.9, 0.99), eps=1e-6)

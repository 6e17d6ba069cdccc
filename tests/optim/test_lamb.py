"""LAMB on whole parameters: the paper's numbers, on problems of every kind."""

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.config.sections import LambSection
from stacking_ds.errors import ConfigError
from stacking_ds.optim.lamb import blocked
from stacking_ds.optim.lamb.optimizer import Lamb, choose_kernel
from stacking_ds.sharding.fragments import Shard, Span
from tests.lamb_paper import PaperLamb

KERNELS = ("reference", "blocked")
STEPS = 4


@st.composite
def _problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, magnitudes from 0 over 1e-25 to 1e3, and hyper-parameters."""
    magnitude = st.sampled_from([0.0, 1e-25, 1e-12, 1e-3, 1.0, 1e3])
    parameters = draw(
        st.lists(
            st.fixed_dictionaries({
                "shape": st.lists(st.integers(1, 7), min_size=1, max_size=3),
                "weight": magnitude,
                "gradient": magnitude,
                "decay": st.sampled_from([0.0, 0.01, 0.5]),
                "adapt": st.booleans(),
            }),
            min_size=1,
            max_size=5,
        )
    )  # fmt: skip
    lower = draw(st.sampled_from([0.0, 0.01, 0.5]))
    return {
        "parameters": parameters,
        "seed": draw(st.integers(0, 2**16)),
        "eta": draw(st.sampled_from([1e-4, 1e-2, 1.0])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.6, 0.85)])),
        "epsilon": draw(st.sampled_from([1e-6, 1e-3])),
        "bounds": (lower, draw(st.sampled_from([lower or 0.1, 1.0, 10.0, math.inf]))),
        "normalize": draw(st.booleans()),
    }


def _compare(problem: dict[str, Any], kernel: Any) -> None:
    generator = np.random.default_rng(problem["seed"])
    kinds = problem["parameters"]
    # what fp32 can hold: the two sides then start from the same numbers
    start = [
        (kind["weight"] * generator.standard_normal(kind["shape"])).astype(np.float32)
        for kind in kinds
    ]
    lower, upper = problem["bounds"]
    paper = PaperLamb(
        x=[w.astype(np.float64) for w in start],
        eta=problem["eta"],
        beta_1=problem["betas"][0],
        beta_2=problem["betas"][1],
        epsilon=problem["epsilon"],
        weight_decay=[kind["decay"] for kind in kinds],
        adapt=[kind["adapt"] for kind in kinds],
        lowest_ratio=lower,
        highest_ratio=max(lower, upper),
        normalize=problem["normalize"],
    )
    weights = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    optimizer = Lamb(
        [
            {"params": [w], "weight_decay": kind["decay"], "layer_adaptation": kind["adapt"]}
            for w, kind in zip(weights, kinds, strict=True)
        ],
        lr=problem["eta"],
        betas=problem["betas"],
        eps=problem["epsilon"],
        options=LambSection(
            min_coeff=lower,
            max_coeff=max(lower, upper) if upper < math.inf else None,
            grad_pre_normalization=problem["normalize"],
            kernel=kernel,
        ),
    )
    for _ in range(STEPS):
        gradients = [
            (kind["gradient"] * generator.standard_normal(kind["shape"])).astype(np.float32)
            for kind in kinds
        ]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.from_numpy(gradient)
        # each step from the same numbers: a weight of one element may step onto 0 exactly, and what
        # rounding leaves of it would decide on everything after
        before = [weight.detach().double().numpy().copy() for weight in weights]
        paper.x = list(before)
        paper.step([gradient.astype(np.float64) for gradient in gradients])
        optimizer.step()
        _require_same(optimizer, weights, before, paper)


def _require_same(
    optimizer: Lamb, weights: list[torch.nn.Parameter], before: list[Any], paper: PaperLamb
) -> None:
    found = optimizer.statistics()
    assert found is not None
    for i, weight in enumerate(weights):
        state = optimizer.state[weight]
        for ours, theirs in ((state["exp_avg"], paper.m[i]), (state["exp_avg_sq"], paper.v[i])):
            largest = max(paper.largest[i], paper.largest[i] ** 2, 1e-31)
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-6 * largest)
        paper.m[i] = state["exp_avg"].double().numpy()
        paper.v[i] = state["exp_avg_sq"].double().numpy()
        if 0 < paper.norms[i] < 1e-34:
            continue  # what is left of a weight that stepped onto 0: fp32 has no digits there
        # where momentum and decay cancel, rounding grows by as much as they do
        error = 2e-6 * paper.cancellation[i]
        assert found[i].trust_ratio == pytest.approx(paper.ratios[i], rel=error)
        assert found[i].weight_norm == pytest.approx(paper.norms[i], rel=1e-9)
        norm = np.linalg.norm(paper.moved[i].ravel())
        assert found[i].update_norm == pytest.approx(norm, rel=error)
        # beside the movement's own error there is that of rounding the new weight to fp32
        moved = before[i] - weight.detach().double().numpy()
        rounding = np.finfo(np.float32).eps * np.abs(paper.x[i]).max()
        far = np.abs(moved - paper.moved[i]).max()
        assert far <= error * np.abs(paper.moved[i]).max() + rounding


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_papers(kernel: str) -> None:
    @settings(max_examples=150)
    @given(_problems())
    def compare(problem: dict[str, Any]) -> None:
        _compare(problem, kernel)

    compare()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1e-25, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_norms_of_zero_and_nearly_zero(kernel: str, weight: float, gradient: float) -> None:
    kind = {"shape": [3, 5], "weight": weight, "gradient": gradient, "decay": 0.0, "adapt": True}
    problem = {
        "parameters": [kind],
        "seed": 0,
        "eta": 1e-2,
        "betas": (0.9, 0.999),
        "epsilon": 1e-6,
        "bounds": (0.0, math.inf),
        "normalize": False,
    }
    _compare(problem, kernel)


def test_blocks_of_a_parameter_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_BLOCK_ELEMENTS", 4)
    for size in ([1], [4], [5], [3, 7], [8]):
        kind = {"shape": size, "weight": 1.0, "gradient": 1.0, "decay": 0.1, "adapt": True}
        problem = {
            "parameters": [kind, kind],
            "seed": 1,
            "eta": 0.1,
            "betas": (0.9, 0.99),
            "epsilon": 1e-6,
            "bounds": (0.0, math.inf),
            "normalize": False,
        }
        _compare(problem, "blocked")


# ------------------------------------------------------------------ flat tensors


def _flat_optimizer(kernel: Any = "blocked") -> tuple[Lamb, torch.Tensor, torch.Tensor]:
    """Two parameters and padding in one flat tensor, as ZeRO makes them, with a bf16 copy."""
    optimizer = Lamb([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))],
                     lr=0.1, options=LambSection(kernel=kernel))  # fmt: skip
    flat = torch.tensor([math.nan, 1.0, 2.0, 3.0, 0.1, 0.2, math.nan])
    low = torch.full((7,), math.nan, dtype=torch.bfloat16)
    spans = (Span("a", 0, 1, 3), Span("b", 1, 4, 2), Span("c", 2, 0, 0))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.bind([Shard(flat, spans, low)], None, None)
    return optimizer, flat, low


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_is_neither_read_nor_written(kernel: str) -> None:
    optimizer, flat, low = _flat_optimizer(kernel)
    flat.grad = torch.full((7,), math.nan)
    flat.grad[1:6] = torch.tensor([0.5, -0.5, 1.0, 2.0, 3.0])
    whole = [torch.nn.Parameter(flat[1:4].clone()), torch.nn.Parameter(flat[4:6].clone())]
    for weight, gradient in zip(whole, (flat.grad[1:4], flat.grad[4:6]), strict=True):
        weight.grad = gradient.clone()
    optimizer.step()
    unsharded = Lamb(whole, lr=0.1, options=LambSection(kernel="reference"))
    unsharded.step()
    assert flat[[0, 6]].isnan().all()
    assert low[[0, 6]].isnan().all()
    for key in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[flat][key][[0, 6]].any()
    torch.testing.assert_close(flat[1:6], torch.cat([w.detach() for w in whole]), rtol=1e-6, atol=0)
    assert torch.equal(low[1:6], flat[1:6].bfloat16())
    found, expected = optimizer.statistics(), unsharded.statistics()
    assert found is not None
    assert expected is not None
    assert [one.name for one in found] == ["a", "b", "c"]
    ratios = [one.trust_ratio for one in expected]
    assert [one.trust_ratio for one in found[:2]] == pytest.approx(ratios)


def test_a_flat_tensor_it_was_not_bound_to_is_an_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = Lamb([parameter])
    flat = parameter.detach().clone()
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"knows nothing about.*build_engine"):
        optimizer.step()
    assert flat.tolist() == [1.0] * 4


def test_a_step_that_was_broken_off_is_an_error() -> None:
    optimizer, flat, _ = _flat_optimizer()
    other = torch.ones(2)
    optimizer.bind(
        [Shard(flat, (Span("a", 0, 1, 3),)), Shard(other, (Span("b", 1, 0, 2),))], None, None
    )
    flat.grad = torch.ones(7)
    optimizer.step()
    assert optimizer.statistics() is None
    assert flat[1] == 1.0, "it moved before all sums were known"
    with pytest.raises(RuntimeError, match="twice, and 1 others not yet"):
        optimizer.step()


def test_gradients_may_be_freed_between_the_calls() -> None:
    """DeepSpeed frees each group's after its call; nothing moves before the last."""
    optimizer, flat, _ = _flat_optimizer()
    other = torch.ones(2)
    shards = [Shard(flat, (Span("a", 0, 1, 3),)), Shard(other, (Span("b", 1, 0, 2),))]
    sums: list[torch.Tensor] = []
    optimizer.bind(shards, sums.append, None)
    for tensor in (flat, other):
        tensor.grad = torch.ones_like(tensor)
        optimizer.param_groups[0]["params"] = [tensor]
        optimizer.step()
        tensor.grad = None
    assert [tuple(total.shape) for total in sums] == [(2, 2)]
    assert flat[1] != 1.0
    assert other[0] != 1.0


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    still, moving = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([still, moving])
    moving.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moving[0] != 1.0
    found = optimizer.statistics()
    assert found is not None
    assert [one.name for one in found] == ["1"]


def test_it_is_saved_and_loaded_like_any_torch_optimizer() -> None:
    def train(optimizer: Lamb, weight: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.tensor([1.0, -2.0, 3.0]) * (step + 1)
            optimizer.step()

    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = Lamb([weight], lr=0.1)
    train(optimizer, weight, range(3))
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    copy = torch.nn.Parameter(weight.detach().clone())
    restored = Lamb([copy], lr=0.5)
    restored.load_state_dict(deepcopy(optimizer.state_dict()))
    train(optimizer, weight, range(3, 5))
    train(restored, copy, range(3, 5))
    assert torch.equal(copy, weight)


def test_before_a_step_there_is_nothing_to_tell() -> None:
    assert Lamb([torch.nn.Parameter(torch.ones(2))]).statistics() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"eps": 0.0},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -0.1},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Lamb([torch.nn.Parameter(torch.ones(2))], **wrong)


def test_a_kernel_that_does_not_exist_or_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        choose_kernel("fast", torch.device("cpu"))  # type: ignore[arg-type]

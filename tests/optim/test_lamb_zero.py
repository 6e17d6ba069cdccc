"""LAMB under ZeRO is LAMB: at every stage and number of ranks, as if nothing were sharded."""

import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stacking_ds.checkpoint import load, manifest
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.engine.zero.compatibility import Masters
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import capture, install
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from tests.checkpoints import contents, save_now
from tests.lamb_following import (
    AFTER,
    STEPS,
    Cases,
    follow_unsharded,
    grown_by_hand,
    lamb_engine,
    largest_differences,
    unsharded_lamb,
)
from tests.ranks import RankError, run_ranks
from tests.sharded import State, train_engine, whole_state
from tests.tiny import tiny_model, tiny_optimizer, tiny_settings, train_tiny

COVERING: list[tuple[int, Cases]] = [
    (1, [(0, "fp32", "blocked"), (2, "bf16", "reference")]),
    (2, [(1, "fp32", "reference"), (3, "bf16", "blocked")]),
]


@pytest.mark.parametrize(("ranks", "cases"), COVERING)
def test_given_the_same_gradients_the_weights_are_the_same(ranks: int, cases: Cases) -> None:
    _expect_same(run_ranks(follow_unsharded, ranks, cases), cases)


def _expect_same(by_rank: list[Any], cases: Cases) -> None:
    for rank in by_rank:
        for (_, _, kernel), stages in zip(cases, rank, strict=True):
            for relative, key_bias, absolute in stages:
                assert relative <= 1e-6
                assert key_bias <= 1e-6
                assert absolute <= 1e-5
                # sharding alone costs no bit: the sums over ranks are fp64, the ratio is one number
                assert kernel != "reference" or absolute == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_they_are_at_every_zero_stage(ranks: int, zero_stage: int) -> None:
    cases: Cases = [
        (zero_stage, precision, kernel)
        for precision in ("fp32", "bf16")
        for kernel in ("blocked", "reference")
    ]
    test_given_the_same_gradients_the_weights_are_the_same(ranks, cases)


def _normalized(world: World, cases: Cases) -> list[Any]:
    return follow_unsharded(world, cases, grad_pre_normalization=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(1, "bf16", "blocked"), (3, "bf16", "blocked")]),
        pytest.param(3, [("2_offload", "bf16", "blocked")], marks=pytest.mark.slow),
    ],
)
def test_the_norm_they_are_divided_by_is_theirs(ranks: int, cases: Cases) -> None:
    _expect_same(run_ranks(_normalized, ranks, cases), cases)


def _norms_in_fp16(world: World, zero_stage: int) -> list[float]:
    """Of the gradients after normalisation, while the loss scale doubles every other step."""
    _allow_fp16()
    model = tiny_model(2)
    settings = tiny_settings(zero_stage, "fp16", world.size)
    settings["fp16"] |= {"loss_scale_window": 2, "initial_scale_power": 4}
    optimizer = tiny_optimizer(model, name="lamb", grad_pre_normalization=True)
    engine = build_engine(model, optimizer, settings)
    squares: list[float] = []
    accumulate = optimizer._kernel.accumulate

    def watched(items: Any, squares_2P: Any, scale: Any) -> None:
        squares.append(sum(float((scale * item.gradient).square().sum()) for item in items))
        accumulate(items, squares_2P, scale)

    optimizer._kernel.accumulate = watched
    train_engine(world, engine, range(6))
    assert engine.skipped_steps == 0
    assert sharded_state.loss_scale(engine) > 2**4
    release_engine(engine)
    if zero_stage > 0:
        squares = world.sum(squares)
    return [square**0.5 for square in squares]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_norm_is_theirs_also_when_the_loss_scale_grows(zero_stage: int) -> None:
    assert run_ranks(_norms_in_fp16, 2, zero_stage)[0] == pytest.approx([1.0] * 6, rel=1e-5)


# ------------------------------------------------------------------ end to end


def _end_to_end(world: World, zero_stage: int, options: dict[str, Any]) -> Any:
    engine = lamb_engine(world, zero_stage, **options)
    gas = options.get("gas", 1)
    norms = train_engine(world, engine, range(STEPS), gas)
    state = capture(engine)
    before = whole_state(world, engine)
    release_engine(engine)
    engine = lamb_engine(world, zero_stage, **options, depth=4, seed=99)
    install(state, engine, layer_map("stack", 2, 4), "carry", world)
    train_engine(world, engine, range(STEPS, STEPS + AFTER), gas)
    after = whole_state(world, engine)
    release_engine(engine)
    return norms, before, after


def _expect_end_to_end(ranks: int, zero_stage: int, options: dict[str, Any]) -> None:
    norms, before, after = run_ranks(_end_to_end, ranks, zero_stage, options)[0]
    lamb = {key: value for key, value in options.items() if key not in ("gas", "clipping")}
    clipping = options.get("clipping", 0.0)
    model, optimizer = unsharded_lamb(2, **lamb)
    expected = train_tiny(model, optimizer, range(STEPS), clipping)
    assert norms == pytest.approx(expected, rel=1e-4)
    assert largest_differences(before, model)[2] <= 1e-6
    model, optimizer = grown_by_hand(model, optimizer, 2, **lamb)
    train_tiny(model, optimizer, range(STEPS, STEPS + AFTER), clipping)
    assert largest_differences(after, model)[2] <= 1e-6


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "options"),
    [
        pytest.param(2, 0, {"clipping": 0.5, "gas": 2}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"clipping": 0.5}, marks=pytest.mark.slow),
        pytest.param(3, 2, {"clipping": 0.5, "gas": 2}, marks=pytest.mark.slow),
        pytest.param(4, 3, {"clipping": 0.5}, marks=pytest.mark.slow),
        pytest.param(2, 3, {"grad_pre_normalization": True}, marks=pytest.mark.slow),
        (3, 1, {"grad_pre_normalization": True}),
        pytest.param(2, 0, {"grad_pre_normalization": True, "gas": 3}, marks=pytest.mark.slow),
        (2, 2, {"min_coeff": 0.9, "max_coeff": 1.1}),
        pytest.param(3, 3, {"always_adapt": True}, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_plain_torch(ranks: int, zero_stage: int, options: Any) -> None:
    _expect_end_to_end(ranks, zero_stage, options)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_training_is_at_every_zero_stage(ranks: int, zero_stage: int) -> None:
    _expect_end_to_end(ranks, zero_stage, {})


def _in_bf16(world: World) -> list[State]:
    states = []
    for zero_stage in (0, 1, 2):
        engine = lamb_engine(world, zero_stage, "bf16")
        train_engine(world, engine, range(STEPS))
        states.append(whole_state(world, engine))
        release_engine(engine)
    return states


def test_training_in_bf16_is_the_same_where_gradients_are() -> None:
    """On one rank. On others, and at ZeRO 3, bf16 rounds other sums, and gradients differ by more
    than any optimizer makes of them."""
    unsharded, *sharded = run_ranks(_in_bf16, 1)[0]
    for state in sharded:
        for name, views in unsharded.items():
            torch.testing.assert_close(state[name][MASTER], views[MASTER], rtol=0, atol=1e-5)


def test_the_options_tell_on_the_weights() -> None:
    """Or the comparisons above would not see whether an engine passes them on."""
    results = []
    options: list[dict[str, Any]] = [
        {},
        {"grad_pre_normalization": True},
        {"min_coeff": 0.9, "max_coeff": 1.1},
        {"always_adapt": True},
        {"name": "adamw"},
    ]
    for choice in options:
        model = tiny_model(2)
        train_tiny(model, tiny_optimizer(model, **{"name": "lamb", **choice}), range(5))
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    for place, one in enumerate(results):
        for other in results[:place]:
            assert float((one - other).abs().max()) > 1e-4


# ------------------------------------------------------------------ what it sends


def _all_reduces(world: World, zero_stage: int, precision: str) -> list[int]:
    """Bytes of each all-reduce that the optimizer makes in one step."""
    engine = lamb_engine(world, zero_stage, precision)
    train_engine(world, engine, range(1))
    sent: list[int] = []
    all_reduce, step = dist.all_reduce, engine.basic_optimizer.step

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    def watched() -> None:
        dist.all_reduce = counted
        try:
            step()
        finally:
            dist.all_reduce = all_reduce

    engine.basic_optimizer.step = watched
    train_engine(world, engine, range(1, 2))
    del engine.basic_optimizer.step
    groups = len(engine.basic_optimizer.param_groups)
    release_engine(engine)
    assert groups == 6
    return sent


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_all_reduce_a_step_however_many_groups(zero_stage: int) -> None:
    parameters = len(list(tiny_model(2).parameters()))
    expected = [] if zero_stage == 0 else [2 * parameters * 8]
    assert run_ranks(_all_reduces, 2, zero_stage, "bf16") == [expected] * 2


def test_sums_on_the_host_are_added_by_nccl_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded state: nccl does not reach the host's memory."""
    reduced: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        reduced.append(tensor)
        tensor.mul_(2)

    monkeypatch.setattr(sharded_state, "masters_of", lambda engine: Masters.GROUPS)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    sums = torch.ones(2, 3, dtype=torch.float64)
    add = sharded_state.adder_over_ranks(None)
    assert add is not None
    add(sums)
    assert reduced[0] is not sums
    assert torch.equal(sums, torch.full((2, 3), 2.0, dtype=torch.float64))


def _kernels_differ(world: World) -> None:
    lamb_engine(world, 0, kernel="reference" if world.rank else "blocked")


def test_ranks_that_would_step_by_different_kernels_are_told() -> None:
    with pytest.raises(RankError, match=r"different kernels .* and drift apart"):
        run_ranks(_kernels_differ, 2)


# ------------------------------------------------------------------ in a run


def _weights_are_rounded_masters(world: World, zero_stage: int | str, precision: str) -> None:
    engine = lamb_engine(world, zero_stage, precision)
    for step in range(3):
        train_engine(world, engine, range(step, step + 1))
        masters = whole_state(world, engine)
        for name, weight in _forward_weights(engine).items():
            assert torch.equal(weight, masters[name][MASTER].to(weight.dtype)), (step, name)
    release_engine(engine)


def _forward_weights(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        gather = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gather):
            weights[name] = parameter.detach().clone()
    return weights


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "fp32", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        (3, "fp32"),
        (0, "bf16"),
    ],
)
def test_every_group_trains_on_with_its_new_weights(zero_stage: int, precision: str) -> None:
    """DeepSpeed copies each group right after its call, when only the last one has moved."""
    run_ranks(_weights_are_rounded_masters, 3, zero_stage, precision)


@pytest.mark.parametrize(
    ("ranks", "zero_stage"), [(2, 2), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_offloaded_to_the_host_it_is_the_same(ranks: int, zero_stage: int) -> None:
    cases: Cases = [(f"{zero_stage}_offload", "bf16", "auto")]
    _expect_same(run_ranks(follow_unsharded, ranks, cases), cases)
    run_ranks(_weights_are_rounded_masters, ranks, f"{zero_stage}_offload", "bf16")


def _untouched_by_initialize(world: World, zero_stage: int) -> None:
    engine = lamb_engine(world, zero_stage, "bf16")
    state = whole_state(world, engine)
    for name, parameter in tiny_model(2).named_parameters():
        assert torch.equal(state[name][MASTER], parameter.detach()), name
    assert sharded_state.optimizer_step(engine) == 0
    train_engine(world, engine, range(1))
    assert sharded_state.optimizer_step(engine) == 1
    release_engine(engine)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_initialize_takes_no_step(zero_stage: int) -> None:
    run_ranks(_untouched_by_initialize, 2, zero_stage)


def _allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # a CPU can, slowly


def _fp16(world: World, zero_stage: int) -> None:
    _allow_fp16()
    engine = lamb_engine(world, zero_stage, "fp16")
    train_engine(world, engine, range(2))
    before = whole_state(world, engine)
    sharded_state.set_loss_scale(engine, 2.0**40)  # too large for fp16: the step is skipped
    assert train_engine(world, engine, range(2, 3)) == [float("inf")]
    assert sharded_state.optimizer_step(engine) == 2
    assert _same(whole_state(world, engine), before)
    sharded_state.set_loss_scale(engine, 256.0)
    train_engine(world, engine, range(3, 5))
    assert (engine.skipped_steps, sharded_state.optimizer_step(engine)) == (1, 4)
    after = whole_state(world, engine)
    assert not _same(after, before)
    assert all(views[MASTER].isfinite().all() for views in after.values())
    release_engine(engine)


def _same(one: State, other: State) -> bool:
    return all(
        torch.equal(views[key], other[name][key])
        for name, views in one.items()
        for key in (MASTER, *MOMENTS)
    )


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_step_that_loss_scaling_skips_leaves_no_trace(zero_stage: int) -> None:
    run_ranks(_fp16, 2, zero_stage)


def _resume(world: World, folder: Path, saved_at: int, loaded_at: int) -> Any:
    engine = lamb_engine(world, saved_at)
    train_engine(world, engine, range(3))
    found = save_now(folder, sharded_state.fragments(engine), world, contents(3))
    train_engine(world, engine, range(3, 6))
    uninterrupted = whole_state(world, engine)
    release_engine(engine)
    engine = lamb_engine(world, loaded_at, seed=99)
    sharded_state.seed_moments(engine, manifest.read_manifest(found).optimizer_step)
    load.load(found, sharded_state.fragments(engine), world=world)
    sharded_state.refresh(engine)
    train_engine(world, engine, range(3, 6))
    resumed = whole_state(world, engine)
    release_engine(engine)
    return uninterrupted, resumed


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 2), (3, 3), (1, 3), (3, 0)])
def test_its_state_goes_through_a_checkpoint(tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    uninterrupted, resumed = run_ranks(_resume, 2, tmp_path, saved_at, loaded_at)[0]
    if saved_at == loaded_at:
        assert _same(uninterrupted, resumed)
    for name, views in uninterrupted.items():
        torch.testing.assert_close(resumed[name][MASTER], views[MASTER], rtol=0, atol=1e-6)


def _left_after_release(world: World, zero_stage: int) -> int:
    engine = lamb_engine(world, zero_stage, "bf16")
    train_engine(world, engine, range(2))
    optimizer = engine.basic_optimizer  # which a caller may still hold
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    flats = [shard.flat for shard in sharded_state.shards(engine)]
    alive = [weakref.ref(tensor) for tensor in (*flats, *state)]
    assert len(alive) == 4 * len(flats)
    del state, flats
    release_engine(engine)
    left = sum(reference() is not None for reference in alive)
    assert optimizer.statistics() is None
    return left


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_released_engine_leaves_nothing_in_its_optimizer(zero_stage: int) -> None:
    assert run_ranks(_left_after_release, 2, zero_stage) == [0, 0]


# ------------------------------------------------------------------ what DeepSpeed says of it


def _warnings(world: World, zero_stage: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("DeepSpeed").addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine = lamb_engine(world, zero_stage, "bf16")
        train_engine(world, engine, range(2))
        release_engine(engine)
    return said + [str(warning.message) for warning in warned]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_has_nothing_to_warn_of(zero_stage: int) -> None:
    assert run_ranks(_warnings, 2, zero_stage) == [[], []]


def _apex_at(world: World, zero_stage: int) -> None:
    lamb_engine(world, zero_stage, kernel="apex")


def test_apex_is_for_zero_0_alone() -> None:
    with pytest.raises(RankError, match=r"right at ZeRO 0 alone; use engine\.deepspeed=zero0"):
        run_ranks(_apex_at, 2, 1)
    with pytest.raises(RankError, match="the masters are on cpu"):
        run_ranks(_apex_at, 1, 0)

"""DeepSpeed's layouts as fragments: every element once, the right one, at every ZeRO stage."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.zero import lifecycle, sharded_state
from stacking_ds.engine.zero.compatibility import masters_of, require_pinned_deepspeed
from stacking_ds.engine.zero.flat_buffers import flat_tensors, predicted_layout
from stacking_ds.errors import ConfigError
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.sharding.fragments import MASTER, MOMENTS, Layout
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import (
    tiny_batch,
    tiny_config,
    tiny_inputs,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
    train_tiny,
)

EVERY_STAGE = [(0, 2), (1, 3), (2, 2), (3, 3)]
PRECISIONS = ["fp32", "bf16"]


def _fresh(world: World, zero_stage: int) -> Any:
    found = []
    for precision in PRECISIONS:
        engine = start_engine(world, zero_stage, precision)
        views = {key for fragment in sharded_state.fragments(engine) for key in fragment.views}
        found.append((whole_state(world, engine), sharded_state.optimizer_step(engine), views))
        lifecycle.release(engine)
    return found


@pytest.mark.parametrize(("zero_stage", "ranks"), EVERY_STAGE)
def test_a_new_engines_masters_are_the_models_values(zero_stage: int, ranks: int) -> None:
    # in bf16 DeepSpeed takes masters from the rounded module; at ZeRO 0 it also runs a phantom
    # step inside initialize, which decays every weight and counts one step
    expected = dict(tiny_model(2).named_parameters())
    for found in run_ranks(_fresh, ranks, zero_stage):
        for state, step, views in found:
            assert state.keys() == expected.keys()
            for name, parameter in expected.items():
                assert torch.equal(state[name][MASTER], parameter), name
            assert step == 0
            assert views == {MASTER}


def _trained(world: World, zero_stage: int) -> Any:
    engine = start_engine(world, zero_stage)
    train_engine(world, engine, range(3))
    return whole_state(world, engine), sharded_state.optimizer_step(engine)


@pytest.mark.parametrize(("zero_stage", "ranks"), EVERY_STAGE)
def test_masters_and_moments_are_those_of_plain_torch(zero_stage: int, ranks: int) -> None:
    model = tiny_model(2)
    optimizer = tiny_optimizer(model)
    train_tiny(model, optimizer, range(3))
    for state, step in run_ranks(_trained, ranks, zero_stage):
        assert step == 3
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name][MASTER], parameter, rtol=0, atol=1e-6)
            for key in MOMENTS:
                theirs = optimizer.state[parameter][key]
                torch.testing.assert_close(state[name][key], theirs, rtol=1e-4, atol=1e-7)


def _written(world: World, zero_stage: int) -> Any:
    return [_written_in(world, zero_stage, precision) for precision in PRECISIONS]


def _written_in(world: World, zero_stage: int, precision: str) -> Any:
    engine = start_engine(world, zero_stage, precision)
    before = _logits(engine)  # a forward pass leaves gathered, soon stale, weights behind
    donor = dict(tiny_model(2, seed=5).named_parameters())
    sharded_state.seed_moments(engine, 11)
    for fragment in sharded_state.fragments(engine):
        whole = donor[fragment.name].detach().view(-1)[fragment.start : fragment.stop]
        fragment.views[MASTER].copy_(whole)
        fragment.views["exp_avg"].copy_(whole * 2)
        fragment.views["exp_avg_sq"].copy_(whole * whole)
    sharded_state.refresh(engine)
    state = whole_state(world, engine)
    after = _logits(engine)
    train_engine(world, engine, range(2))
    step = sharded_state.optimizer_step(engine)
    lifecycle.release(engine)
    return before, after, state, step


def _logits(model: Any) -> torch.Tensor:
    batch = tiny_batch(0)
    with torch.no_grad():
        mlm_logits, _ = model(*tiny_inputs(batch))
    return mlm_logits.clone()


@pytest.mark.parametrize(("zero_stage", "ranks"), EVERY_STAGE)
def test_what_is_written_is_what_trains_on(zero_stage: int, ranks: int) -> None:
    donor = tiny_model(2, seed=5)
    expected = {name: p.detach().clone() for name, p in donor.named_parameters()}
    logits = [_logits(donor), _logits(donor.bfloat16())]
    for found in run_ranks(_written, ranks, zero_stage):
        for (before, after, state, step), target in zip(found, logits, strict=True):
            assert not torch.equal(before, target)
            assert torch.equal(after, target)
            for name, parameter in expected.items():
                assert torch.equal(state[name][MASTER], parameter)
                assert torch.equal(state[name]["exp_avg"], parameter * 2)
                assert torch.equal(state[name]["exp_avg_sq"], parameter * parameter)
            assert step == 13  # one count per flat tensor: a shared one would run ahead


def _cuts(world: World, zero_stage: int) -> Any:
    engine = start_engine(world, zero_stage, "bf16")
    found = sharded_state.fragments(engine)
    lifecycle.release(engine)
    return Layout.of(found, world.size), [(f.start, f.stop) for f in found]


@pytest.mark.parametrize(("zero_stage", "ranks"), [*EVERY_STAGE, (1, 4), (3, 4)])
def test_the_layout_is_the_predicted_one(zero_stage: int, ranks: int) -> None:
    model = BertForPreTraining(tiny_config(2), seed=None)
    names = {p: name for name, p in model.named_parameters()}
    groups = [
        [(names[p], p.numel()) for p in group["params"]]
        for group in parameter_groups(model.named_parameters(), 0.1)
    ]
    predicted = predicted_layout(zero_stage, groups, ranks)
    for rank, (layout, held) in enumerate(run_ranks(_cuts, ranks, zero_stage)):
        assert layout == predicted
        ends = [predicted.held(name) for name in predicted.cuts]
        assert held == [(starts[rank], stops[rank]) for starts, stops in ends]


def _leak(world: World, zero_stage: int) -> tuple[int, int]:
    engine = start_engine(world, zero_stage, "bf16")
    held = flat_tensors(engine)
    leaked = lifecycle.release(engine)
    expected = sum(flat.nbytes for flat in held)
    del held
    return leaked - expected, lifecycle.release(start_engine(world, zero_stage, "bf16"))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_release_says_what_did_not_come_back(zero_stage: int) -> None:
    assert run_ranks(_leak, 2, zero_stage) == [(0, 0)] * 2


def _norms(world: World, cases: list[tuple[int, int, float]]) -> Any:
    norms = {}
    for zero_stage, gas, clipping in cases:
        engine = start_engine(world, zero_stage, gas=gas, clipping=clipping)
        norms[zero_stage, gas, clipping] = train_engine(world, engine, range(3), gas)
        lifecycle.release(engine)
    return norms


@pytest.mark.parametrize(
    ("ranks", "shapes"), [(1, [(0, 3)]), (2, [(0, 1), (1, 3), (3, 3)]), (3, [(2, 2), (3, 1)])]
)
def test_gradient_norm_is_that_of_plain_torch_before_clipping(
    ranks: int, shapes: list[tuple[int, int]]
) -> None:
    cases = [(stage, gas, clipping) for stage, gas in shapes for clipping in (0.0, 0.05)]
    expected = {}
    for clipping in (0.0, 0.05):
        model = tiny_model(2)
        expected[clipping] = train_tiny(model, tiny_optimizer(model), range(3), clipping)
    assert min(expected[0.0]) > 0.05  # so that clipping does something
    for norms in run_ranks(_norms, ranks, cases):
        for case in cases:
            assert norms[case] == pytest.approx(expected[case[2]], rel=2e-5), case


def _bf16_step(world: World, zero_stage: int) -> Any:
    sent = _record_reductions()
    engine = start_engine(world, zero_stage, "bf16", clipping=0.05)
    sent.clear()
    return train_engine(world, engine, range(2)), sent


def _record_reductions() -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        original = getattr(torch.distributed, name)

        def recording(tensor: Any, *rest: Any, original: Any = original, **named: Any) -> Any:
            if tensor.numel() > 100:  # gradients, not the norms and flags beside them
                seen.add(tensor.dtype)
            return original(tensor, *rest, **named)

        setattr(torch.distributed, name, recording)
    return seen


@pytest.mark.parametrize(("zero_stage", "ranks"), EVERY_STAGE)
def test_bf16_reduces_in_fp32_and_its_norm_is_near(zero_stage: int, ranks: int) -> None:
    model = tiny_model(2)
    expected = train_tiny(model, tiny_optimizer(model), range(2), 0.05)
    for norms, sent in run_ranks(_bf16_step, ranks, zero_stage):
        assert norms == pytest.approx(expected, rel=3e-2)
        assert sent == {torch.float32}


def _averaged_gradient(world: World) -> Any:
    engine = start_engine(world, 2, "bf16")
    row = slice(world.rank, world.rank + 1)
    engine.backward(tiny_loss(engine, tiny_batch(0), row) * world.size)
    engine.step()
    reference = tiny_model(2).bfloat16()
    (tiny_loss(reference, tiny_batch(0), row) * world.size).backward()
    mine = {name: p.grad.clone() for name, p in reference.named_parameters()}
    return whole_state(world, engine), mine


def test_bf16_gradients_reach_the_optimizer_unrounded() -> None:
    results = run_ranks(_averaged_gradient, 2)
    state = results[0][0]
    differs_in_bf16 = 0
    for name, views in state.items():
        mean = torch.stack([gradients[name].float() for _, gradients in results]).mean(dim=0)
        # Adam's first exp_avg is (1 - beta1) of the gradient it was given
        torch.testing.assert_close(views["exp_avg"] / 0.1, mean, rtol=1e-5, atol=1e-8)
        differs_in_bf16 += int((mean.bfloat16().float() != mean).sum())
    assert differs_in_bf16 > 100


def _with_fused_adam(world: World) -> Any:
    from deepspeed.runtime import engine as engine_module

    engine_module.FusedAdam = torch.optim.AdamW  # FP16_Optimizer without compiling an op
    engine = start_engine(world, 0, "bf16")
    kind = masters_of(engine).name
    fresh = whole_state(world, engine)
    train_engine(world, engine, range(1))
    moved = {name: p.detach() + 1.0 for name, p in tiny_model(2).named_parameters()}
    sharded_state.write_masters(engine, lambda name, shape: moved[name])
    sharded_state.refresh(engine)
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return kind, fresh, weights


def test_flat_masters_of_a_fused_optimizer_are_read_and_written() -> None:
    expected = dict(tiny_model(2).named_parameters())
    for kind, fresh, weights in run_ranks(_with_fused_adam, 2):
        assert kind == "FUSED"
        for name, parameter in expected.items():
            assert torch.equal(fresh[name][MASTER], parameter)
            assert torch.equal(weights[name], (parameter + 1.0).bfloat16())


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.__version__", "0.20.0")
    with pytest.raises(ConfigError, match=r"0\.20\.0.*pip install deepspeed==0\.19\.8"):
        require_pinned_deepspeed()


def test_another_deepspeed_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    # as a later release would be: another version, and a module that moved
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, deepspeed\n"
        "deepspeed.__version__ = '0.20.0'\n"
        "sys.modules['deepspeed.runtime.zero.parameter_offload'] = None\n"
    )
    command = [sys.executable, "-m", "stacking_ds", "train", "--recipe", "demo"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "DeepSpeed 0.20.0 is installed" in errors[0]
    assert "pip install deepspeed==0.19.8" in errors[0]


def test_a_private_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK")
    with pytest.raises(ConfigError, match=r"FWD_MODULE_STACK.*reinstall that version"):
        require_pinned_deepspeed()


class _Engine:
    def __init__(self, wrapper: Any) -> None:
        self.basic_optimizer = None
        self.optimizer = wrapper


def test_an_unknown_or_changed_layout_is_refused() -> None:
    unknown = type("BF16_Optimizer", (), {})()
    with pytest.raises(ConfigError, match="BF16_Optimizer"):
        masters_of(_Engine(unknown))
    changed = type("DeepSpeedZeroOptimizer_Stage3", (), {"fp16_groups": []})()
    with pytest.raises(ConfigError, match="grad_position"):
        masters_of(_Engine(changed))

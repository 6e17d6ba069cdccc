"""Engines: all that a JSON gets wrong at once, and plain torch's update."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, build_engine, release_engine, set_learning_rate
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import ConfigError
from stacking_ds.sharding.fragments import MASTER
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import tiny_batch, tiny_loss, tiny_model, tiny_optimizer, tiny_settings, train_tiny

# ------------------------------------------------------------------ configuration


def _resolve(ds_json: dict[str, Any], **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "world_size": 3,
        "gradient_clipping": 1.0,
        "precision": "bf16",
        "source": "my.json",
    }
    return resolve_ds_config(ds_json, **{**recipe, **changes})


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bundled_jsons_are_filled_from_the_recipe(name: str, precision: str) -> None:
    raw = load_ds_config(name)
    before = json.dumps(raw)
    resolved = _resolve(raw, precision=precision)
    assert json.dumps(raw) == before
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 96
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["bf16"]["enabled"] is (precision == "bf16")
    assert resolved["fp16"]["enabled"] is (precision == "fp16")
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["zero_optimization"]["stage"] == int(name[-1])
    assert resolved["zero_optimization"]["memory_efficient_linear"] is False
    sums_in_fp32 = precision == "fp32" or name in ("zero2", "zero3")
    expected = "fp32" if sums_in_fp32 else precision
    assert resolved["data_types"]["grad_accum_dtype"] == expected


def test_an_empty_json_gets_everything_that_matters() -> None:
    resolved = _resolve({}, gradient_clipping=0.0)
    assert resolved["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip at 1.0
    assert resolved["zero_optimization"]["memory_efficient_linear"] is False
    assert resolved["bf16"] == {"enabled": True}


def test_a_json_may_insist_on_what_the_recipe_says_and_on_bf16_sums() -> None:
    resolved = _resolve(
        {
            "train_batch_size": 96,
            "gradient_clipping": 1,
            "communication_data_type": "bf16",
            "data_types": {"grad_accum_dtype": "bf16"},
            "zero_optimization": {"stage": 2},
        }
    )
    assert resolved["communication_data_type"] == "bf16"
    assert resolved["data_types"]["grad_accum_dtype"] == "bf16"


def test_everything_wrong_is_said_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(
            {
                "train_batch_size": 64,
                "gradient_clipping": 0.5,
                "gradient_cliping": 1.0,
                "bf16": {"enabled": False},
                "optimizer": {"type": "AdamW"},
                "elasticity": {"enabled": True},
                "steps_per_print": "auto",
                "zero_optimization": {
                    "stage": 1,
                    "round_robin_gradients": True,
                    "reduce_bucket": 5,
                    "contiguous_gradients": "perhaps",
                },
            }
        )
    message = str(caught.value)
    for expected in (
        "my.json cannot be used with this recipe",
        '"train_batch_size" is 64, but the recipe makes it 96',
        '"gradient_clipping" is 0.5, but the recipe makes it 1.0',
        '"gradient_cliping": DeepSpeed has no such key; did you mean "gradient_clipping"?',
        '"bf16.enabled" is false, but the recipe makes it true',
        '"optimizer": the recipe owns it',
        '"elasticity": DeepSpeed 0.19.8 has removed it',
        '"steps_per_print" is "auto", which nobody fills in',
        '"zero_optimization.round_robin_gradients" is true: it must be false, since true corrupts',
        '"zero_optimization.reduce_bucket": DeepSpeed has no such key; did you mean "reduce_',
        '"zero_optimization.contiguous_gradients" is "perhaps": it must be true or false',
    ):
        assert expected in message
    assert len(message.splitlines()) == 11


@pytest.mark.parametrize(
    ("ds_json", "what"),
    [
        ({"zero_optimization": {"memory_efficient_linear": True}}, "memory_efficient_linear"),
        # what selects BF16_Optimizer, whose state no tool of DeepSpeed's own can read either
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype",
        ),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
        ({"bf16": {"immediate_grad_update": True}}, "BF16_Optimizer"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": True}, "must be an object"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "hpz"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param",
        ),
        ({"data_types": {"buffer_dtype": "fp32"}}, "data_types.buffer_dtype"),
        ({"communication_data_type": "fp16"}, "fp32 or bf16"),
        ({"tensorboard": {"enabled": True}}, "metrics"),
        ({"bfloat16": {"enabled": True}}, 'its name is now "bf16"'),
    ],
)
def test_what_trains_wrongly_or_cannot_be_read_is_refused(
    ds_json: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        _resolve(ds_json)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"bf16": {}, "bf16": {}}', "bf16 is written twice"),
        ("[1]", "must be an object"),
        ("{,}", "cannot use DeepSpeed JSON .*broken.json: Expecting"),
        ("", "Expecting value"),
        ('{"a": ' * 20 + "1" + "}" * 20, "nested deeper than 8 levels"),
        ('{"a": ' * 5000, "nested too deeply"),
        ('{"steps_per_print": ' + "1" * 5000 + "}", "a number of thousands of digits"),
        ("{}" + " " * 2**18, "more than 262,144 bytes"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        load_ds_config(str(path))


def test_what_is_no_regular_file_is_no_json(tmp_path: Path) -> None:
    fifo, folder = tmp_path / "fifo.json", tmp_path / "folder.json"
    os.mkfifo(fifo)
    folder.mkdir()
    for path in (fifo, folder):
        with pytest.raises(ConfigError, match=f"cannot use DeepSpeed JSON {path}: it is not a reg"):
            load_ds_config(str(path))


def test_a_missing_file_lists_the_bundled_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no DeepSpeed JSON 'zero9'.*zero0, zero1, .*zero3, zero3_offload"
    ):
        load_ds_config("zero9")


# ------------------------------------------------------------------ training


def _train(world: World, cases: list[tuple[int, int, float]]) -> Any:
    states = {}
    for zero_stage, gas, clipping in cases:
        engine = start_engine(world, zero_stage, gas=gas, clipping=clipping)
        train_engine(world, engine, range(2), gas)
        set_learning_rate(engine, 1e-3)
        train_engine(world, engine, range(2, 3), gas)
        states[zero_stage, gas, clipping] = whole_state(world, engine)
        release_engine(engine)
    return states if world.is_first else None


def _expected(clipping: float) -> dict[str, torch.Tensor]:
    model = tiny_model(2)
    optimizer = tiny_optimizer(model)
    train_tiny(model, optimizer, range(2), clipping)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    train_tiny(model, optimizer, range(2, 3), clipping)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("ranks", "accumulations"),
    [
        pytest.param(1, (1, 3), marks=pytest.mark.slow),
        (2, (1, 3)),
        pytest.param(3, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_updates_are_those_of_plain_torch_on_the_whole_batch(
    ranks: int, accumulations: tuple[int, int]
) -> None:
    one, several = accumulations
    cases = [(stage, several, 0.0) for stage in range(4)] + [(ranks, one, 0.05)]
    states = run_ranks(_train, ranks, cases)[0]
    expected = {clipping: _expected(clipping) for clipping in (0.0, 0.05)}
    for case in cases:
        for name, parameter in expected[case[2]].items():
            found = states[case][name][MASTER]
            torch.testing.assert_close(found, parameter, rtol=0, atol=1e-6)


def _ranks_differ(world: World) -> str:
    model = tiny_model(2, seed=world.rank)
    try:
        build_engine(model, tiny_optimizer(model), tiny_settings(1, "fp32", world.size))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_ranks_that_built_different_models_are_told_so() -> None:
    for message in run_ranks(_ranks_differ, 2):
        assert "same seed on every rank" in message


def _not_finite(world: World, cases: list[tuple[int, str]]) -> Any:
    found = []
    for zero_stage, precision in cases:
        engine = start_engine(world, zero_stage, precision, clipping=1.0)
        train_engine(world, engine, range(1))
        before = whole_state(world, engine)
        scale = float("nan") if world.rank == 0 else 1.0  # one rank's trouble is everyone's
        engine.backward(tiny_loss(engine, tiny_batch(1), slice(0, 1)) * scale)
        norm = advance(engine)
        after = whole_state(world, engine)
        train_engine(world, engine, range(1, 2))
        found.append((before, norm, after, sharded_state.optimizer_step(engine)))
        release_engine(engine)
    return found if world.is_first else None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(precision: str) -> None:
    for before, norm, after, step in run_ranks(
        _not_finite, 2, [(stage, precision) for stage in range(4)]
    )[0]:
        assert norm == float("inf")
        for name, views in before.items():
            for key in views:
                assert torch.equal(after[name][key], views[key])
        assert step == 2


def _without_fp16(world: World) -> str:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    try:
        start_engine(world, 1, "fp16")
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_precision_the_device_lacks_is_a_config_error() -> None:
    assert "fp16 is not supported" in run_ranks(_without_fp16, 1)[0]


def _fp16(world: World) -> Any:
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        return None
    found = []
    for zero_stage in range(4):
        engine = start_engine(world, zero_stage, "fp16", clipping=1.0)
        first = whole_state(world, engine)
        norms = train_engine(world, engine, range(3))
        sharded_state.set_loss_scale(engine, 1024.0)
        state, scale = whole_state(world, engine), sharded_state.loss_scale(engine)
        found.append((first, norms, state, scale, sharded_state.optimizer_step(engine)))
        release_engine(engine)
    return found


def test_fp16_trains_with_its_loss_scale_at_every_stage() -> None:
    # at ZeRO 0 DeepSpeed divides by a scale it never multiplied by
    results = run_ranks(_fp16, 2)
    if results[0] is None:
        pytest.skip("this CPU has no fp16 matrix product")
    model = tiny_model(2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = train_tiny(model, tiny_optimizer(model), range(3), 1.0)
    for first, norms, state, scale, step in results[0]:
        assert norms == pytest.approx(expected, rel=2e-2)
        assert (scale, step) == (1024.0, 3)
        for name, parameter in model.named_parameters():
            assert torch.equal(first[name][MASTER], start[name])
            torch.testing.assert_close(state[name][MASTER], parameter, rtol=0, atol=5e-3)


def _linear_is_untouched(world: World) -> bool:
    before = torch.nn.functional.linear
    release_engine(start_engine(world, 3))
    return torch.nn.functional.linear is before


def test_torch_is_left_as_it_was() -> None:
    assert run_ranks(_linear_is_untouched, 1)[0]

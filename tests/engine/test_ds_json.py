"""What a DeepSpeed JSON may say, that whatever may be said can be trained with, and that
DeepSpeed's own reports are seen when asked for."""

import contextlib
import io
import logging
from typing import Any

import pytest

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine
from stacking_ds.engine.ds_json import resolve_ds_config
from stacking_ds.engine.ds_settings import (
    FLOPS_PROFILER,
    KNOWN_KEYS,
    OFFLOAD_OPTIMIZER,
    REFUSED_KEYS,
    SECTIONS,
    problems_of,
)
from stacking_ds.errors import ConfigError
from tests.ranks import run_ranks
from tests.sharded import train_engine
from tests.tiny import tiny_model, tiny_optimizer, tiny_settings


def test_the_removed_keys_are_deepspeeds_own() -> None:
    from deepspeed.runtime import config

    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= REFUSED_KEYS.keys()
    assert not set(KNOWN_KEYS) & REFUSED_KEYS.keys()


def test_the_keys_of_the_sections_are_deepspeeds_own() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    for section, model in models.items():
        fields = model.model_fields
        aliases = {field.alias for field in fields.values() if field.alias}
        assert SECTIONS[section].keys() == fields.keys() | aliases
    assert OFFLOAD_OPTIMIZER.keys() == DeepSpeedZeroOffloadOptimizerConfig.model_fields.keys()
    assert FLOPS_PROFILER.keys() == vars(DeepSpeedFlopsProfilerConfig({})).keys()


@pytest.mark.parametrize(
    ("ds_json", "problem"),
    [
        (
            {"zero_optimization": {"stage": "2"}},
            '"zero_optimization.stage" is "2": it must be a whole number from 0 to 3',
        ),
        (
            {"zero_optimization": {"stage": True}},
            '"zero_optimization.stage" is true: it must be a whole number from 0 to 3',
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            '"bf16.check_grad_overflow" is false: it must be true, since DeepSpeed would step on '
            "gradients that are not finite",
        ),
        (
            {"comms_logger": {"prof_al": True}},
            '"comms_logger.prof_al": DeepSpeed has no such key; did you mean "prof_all"?',
        ),
        (
            {"comms_logger": {"prof_ops": "all_reduce"}},
            '"comms_logger.prof_ops" is "all_reduce": it must be a list of names',
        ),
        ({"comms_logger": True}, '"comms_logger" is true: it must be an object in braces'),
        (
            {"flops_profiler": {"profile_stp": 3}},
            '"flops_profiler.profile_stp": DeepSpeed has no such key; did you mean "profile_step"?',
        ),
        ({"flops_profiler": 1}, '"flops_profiler" is 1: it must be an object in braces'),
    ],
)
def test_what_is_wrong_inside_a_section_is_one_line(ds_json: dict[str, Any], problem: str) -> None:
    assert problems_of(ds_json) == [problem]


def test_a_number_that_no_float_holds_is_one_line_too() -> None:
    (problem,) = problems_of({"zero_optimization": {"reduce_bucket_size": 10**400}})
    assert "it must be a whole number from 1 to 2,000,000,000" in problem


def test_a_stage_written_as_a_string_stops_the_run() -> None:
    with pytest.raises(ConfigError, match=r'stage" is "2": it must be a whole number'):
        resolve_ds_config(
            {"zero_optimization": {"stage": "2"}},
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            world_size=1,
            gradient_clipping=0.0,
            precision="bf16",
        )


def test_right_sections_pass() -> None:
    right = {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "flops_profiler": {"enabled": True, "profile_step": 3, "output_file": "flops.txt"},
    }
    assert problems_of(right) == []


def _logged_and_printed(world: World, reports: dict[str, Any]) -> tuple[str, str]:
    (handler,) = logging.getLogger("DeepSpeed").handlers
    log, printed = io.StringIO(), io.StringIO()
    handler.setStream(log)
    model = tiny_model(2)
    settings = {**tiny_settings(1, "fp32", world.size), **reports}
    with contextlib.redirect_stdout(printed):
        train_engine(world, build_engine(model, tiny_optimizer(model), settings), range(1))
    return log.getvalue(), printed.getvalue()


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        ({"steps_per_print": 1}, "step=1"),
        ({"dump_state": True}, "DeepSpeedEngine:"),
        ({"comms_logger": {"enabled": True, "verbose": True}}, "comm op: all_reduce"),
    ],
)
def test_a_report_that_was_asked_for_is_seen(reports: dict[str, Any], line: str) -> None:
    ((logged, _),) = run_ranks(_logged_and_printed, 1, reports)
    assert line in logged


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        ({}, ""),
        ({"wall_clock_breakdown": True}, "fwd_microstep"),
        ({"memory_breakdown": True}, "Engine before forward"),
        ({"flops_profiler": {"enabled": True, "profile_step": 0}}, "Profile Summary"),
    ],
)
def test_nothing_else_opens_the_log(reports: dict[str, Any], line: str) -> None:
    ((logged, printed),) = run_ranks(_logged_and_printed, 1, reports)
    assert logged == ""
    assert line in printed


def _zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def _offload(stage: int, **settings: Any) -> dict[str, Any]:
    return _zero(stage, offload_optimizer={"device": "cpu", **settings})


def _profile(**settings: Any) -> dict[str, Any]:
    return {"flops_profiler": {"enabled": True, "profile_step": 0, **settings}}


# Each is refused before a run or trained with; which of the two is the second half's matter.
_REFUSED: list[dict[str, Any]] = [
    *({"steps_per_print": value} for value in (0, -1, 2.5, True, "10", [1])),
    *({"wall_clock_breakdown": value} for value in ("yes", 1, None)),
    {"memory_breakdown": "no"},
    {"dump_state": 3},
    {"flops_profiler": {"enabled": "yes"}},
    _profile(module_depth=50),
    _profile(top_modules="x"),
    _profile(top_modules=-3),
    _profile(output_file=5),
    _profile(output_file="/nowhere/there"),
    _profile(recompute_fwd_factor="x"),
    _profile(detailed="x"),
    _profile(profile_step="0"),
    {"comms_logger": {"enabled": True, "prof_all": False, "prof_ops": [1]}},
    *({"train_batch_size": value} for value in (True, "1", [1])),
    {"bf16": {"enabled": 0}},
    {"gradient_clipping": False},
    {"communication_data_type": ["fp32"]},
    {"zero_force_ds_cpu_optimizer": 0},
    {"data_types": None},
    {"zero_optimization": None},
    *(_zero(stage) for stage in (-1, 4)),
    *(_zero(1, allgather_bucket_size=value) for value in (0, 1, 3, "4", 5e8 + 1)),
    *(_zero(2, reduce_bucket_size=value) for value in (0, 1.5, "100", True, 10**16)),
    _zero(2, contiguous_gradients=1),
    _zero(2, overlap_comm="false"),
    _zero(3, stage3_prefetch_bucket_size=-1),
    _zero(3, sub_group_size=float("nan")),
    _zero(3, leaf_module={"names": ["encoder"]}),
    _zero(3, stage3_module_granularity_threshold=100),
    _offload(2, pin_memory="no"),
    _offload(3, ratio=2),
    {"fp16": {"loss_scale_window": 0}},
    {"fp16": {"min_loss_scale": 0}},
    {"fp16": {"initial_scale_power": 2000}},
    {"fp16": {"loss_scale": float("inf")}},
]
_TRAINED: list[dict[str, Any]] = [
    {
        "steps_per_print": 1e9,
        "dump_state": True,
        "train_batch_size": 1.0,
        "gradient_clipping": 0,
        "comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]},
        **_profile(module_depth=6, top_modules=1, output_file=None, recompute_fwd_factor=0.5),
    },
    {"steps_per_print": None, **_zero(1, allgather_bucket_size=2, reduce_bucket_size=1)},
    _zero(1, contiguous_gradients=False, reduce_scatter=False, parameter_alignment=True),
    _zero(2, allgather_bucket_size=5e8, reduce_bucket_size=2e5, overlap_comm=True),
    _offload(2, pin_memory=False, buffer_count=0, nvme_path="/x"),
    _zero(3, sub_group_size=1, stage3_prefetch_bucket_size=0, stage3_max_live_parameters=0),
    _offload(3, pipeline_read=True, fast_init=True),
]


def _outcomes(world: World, cases: list[dict[str, Any]]) -> list[str]:
    return [_outcome(world, ds_json) for ds_json in cases]


def _outcome(world: World, ds_json: dict[str, Any]) -> str:
    try:
        settings = resolve_ds_config(
            ds_json,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            world_size=1,
            gradient_clipping=0.0,
            precision="fp32",
        )
    except ConfigError as error:
        words = ("Input should", "validation error", "None", "True", "False")
        return f"refused{''.join(word for word in words if word in str(error))}"
    model = tiny_model(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine = build_engine(model, tiny_optimizer(model), settings)
            train_engine(world, engine, range(1))
    except Exception as error:  # noqa: BLE001 - whatever it is, the run would end with it
        return f"fails with {error!r}"
    return "trained"


def test_what_the_dry_run_lets_pass_can_be_trained_with() -> None:
    (outcomes,) = run_ranks(_outcomes, 1, _REFUSED + _TRAINED, timeout_seconds=280)
    expected = ["refused"] * len(_REFUSED) + ["trained"] * len(_TRAINED)
    others = zip(_REFUSED + _TRAINED, outcomes, expected, strict=True)
    assert [(case, got) for case, got, wanted in others if got != wanted] == []

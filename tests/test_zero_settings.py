"""What a DeepSpeed JSON may say, and that DeepSpeed's own reports are seen when asked for."""

import contextlib
import io
import logging
from typing import Any

import pytest

from stacking_ds.distributed import World
from stacking_ds.engine import build_engine, resolve_ds_config
from stacking_ds.errors import ConfigError
from stacking_ds.zero.settings import KNOWN_KEYS, REFUSED_KEYS, section_problems
from tests.ranks import run_ranks
from tests.sharded import train_engine
from tests.tiny import tiny_model, tiny_optimizer, tiny_settings


def test_the_removed_keys_are_deepspeeds_own() -> None:
    from deepspeed.runtime import config

    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= REFUSED_KEYS.keys()
    assert not set(KNOWN_KEYS) & REFUSED_KEYS.keys()


@pytest.mark.parametrize(
    ("ds_json", "problem"),
    [
        (
            {"zero_optimization": {"stage": "2"}},
            "\"zero_optimization.stage\" is '2': write it as a number, 0, 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": True}},
            '"zero_optimization.stage" is True: write it as a number, 0, 1, 2 or 3',
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            '"bf16.check_grad_overflow" is False: DeepSpeed would step on gradients that are not '
            "finite; delete it or write True",
        ),
        (
            {"comms_logger": {"prof_al": True}},
            '"comms_logger.prof_al": DeepSpeed has no such key; did you mean "prof_all"?',
        ),
        (
            {"comms_logger": {"prof_ops": "all_reduce"}},
            "\"comms_logger.prof_ops\" is 'all_reduce': Input should be a valid list",
        ),
        ({"comms_logger": True}, '"comms_logger" is True: it must be an object in braces'),
        (
            {"flops_profiler": {"profile_stp": 3}},
            '"flops_profiler.profile_stp": DeepSpeed has no such key; did you mean "profile_step"?',
        ),
        ({"flops_profiler": 1}, '"flops_profiler" is 1: it must be an object in braces'),
    ],
)
def test_what_is_wrong_inside_a_section_is_one_line(ds_json: dict[str, Any], problem: str) -> None:
    assert section_problems(ds_json) == [problem]


def test_a_stage_written_as_a_string_stops_the_run() -> None:
    with pytest.raises(ConfigError, match=r"stage\" is '2': write it as a number"):
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
    assert section_problems(right) == []


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

"""What each setting of a DeepSpeed JSON may be: its type and its bounds.

DeepSpeed 0.19.8 checks some of this when the first engine is built, some where it is used, steps
later, and some never; its own schemas take "2" for a number and 1 for true.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FLOPS_PROFILER", "OFFLOAD_OPTIMIZER", "SECTIONS", "TOP_LEVEL", "Rule"]


@dataclass(frozen=True)
class Rule:
    """`must_be` completes a sentence."""

    must_be: str
    accepts: Callable[[Any], bool]


def _number(least: float, most: float) -> Rule:
    return Rule(
        f"a number from {least:,} to {most:,}",
        lambda value: type(value) in (int, float) and least <= value <= most,
    )


def _whole(least: int, most: int, multiple_of: int = 1) -> Rule:
    """5e8 is one too, as people write bucket sizes: DeepSpeed's schemas read it so, and where it
    has none, steps are divided by it."""
    kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
    return Rule(
        f"{kind} from {least:,} to {most:,}",
        lambda value: (
            type(value) in (int, float)
            and math.isfinite(value)
            and least <= value <= most
            and value % multiple_of == 0
        ),
    )


def _count(least: int, most: int) -> Rule:
    """A whole number where DeepSpeed has no schema, and takes what stands there."""
    return Rule(
        f"a whole number from {least:,} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.must_be}, or null", lambda value: value is None or rule.accepts(value))


def _is_writable_file(value: Any) -> bool:
    """In a folder that is there, since DeepSpeed opens it steps later."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    folder = os.path.dirname(os.path.abspath(value))
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and not os.path.isdir(value)


_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = Rule("text", lambda value: isinstance(value, str))
_NAMES = Rule(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
_FILE = Rule("the path of a file in a folder where you can write", _is_writable_file)
_ELEMENTS = _whole(0, 2**63 - 1)
_BUCKET = _whole(1, 2 * 10**9)  # so much is allocated
_MOST_STEPS = 10**12

TOP_LEVEL: Mapping[str, Rule] = {
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "dump_state": _SWITCH,
    "steps_per_print": _or_null(_whole(1, _MOST_STEPS)),
}

OFFLOAD_OPTIMIZER: Mapping[str, Rule] = {
    "device": Rule(
        '"cpu" or "none", since growth and checkpoints read no state that lies elsewhere',
        lambda value: value in ("cpu", "none"),
    ),
    "pin_memory": _SWITCH,
    "pipeline_read": _SWITCH,
    "pipeline_write": _SWITCH,
    "fast_init": _SWITCH,
    "super_offload": _SWITCH,
    "ratio": _number(0, 1),
    "cpuadam_cores_perc": _number(0, 1),
    "buffer_count": _whole(0, 10**6),
    "nvme_path": _or_null(_TEXT),
}

FLOPS_PROFILER: Mapping[str, Rule] = {
    "enabled": _SWITCH,
    "detailed": _SWITCH,
    "profile_step": _count(0, _MOST_STEPS),
    # deeper than the model is, DeepSpeed looks for modules that are not there
    "module_depth": _count(-1, 6),
    "top_modules": _count(1, 10**6),
    "recompute_fwd_factor": _number(0, 100),
    "output_file": _or_null(_FILE),
}

_STAGE_3: Mapping[str, Rule] = {
    "prefetch_bucket_size": _ELEMENTS,
    "param_persistence_threshold": _ELEMENTS,
    "model_persistence_threshold": _ELEMENTS,
    "max_live_parameters": _ELEMENTS,
    "max_reuse_distance": _ELEMENTS,
    "gather_16bit_weights_on_model_save": _SWITCH,
    "use_all_reduce_for_fetch_params": _SWITCH,
    "allgather_sequential": _SWITCH,
}

SECTIONS: Mapping[str, Mapping[str, Rule]] = {
    "zero_optimization": {
        "contiguous_gradients": _SWITCH,
        "reduce_scatter": _SWITCH,
        "reduce_bucket_size": _BUCKET,
        "use_multi_rank_bucket_allreduce": _SWITCH,
        "allgather_partitions": _SWITCH,
        # ZeRO 1 and 2 cut it at addresses that two elements share
        "allgather_bucket_size": _whole(2, 2**62, multiple_of=2),
        "overlap_comm": _or_null(_SWITCH),
        "load_from_fp32_weights": _SWITCH,
        "sub_group_size": _whole(1, 2**63 - 1),
        "cpu_offload_use_pin_memory": _or_null(_SWITCH),
        "stage3_gather_fp16_weights_on_model_save": _SWITCH,
        "ignore_unused_parameters": _SWITCH,
        "parameter_alignment": _SWITCH,
        "pipeline_loading_checkpoint": _SWITCH,
        "override_module_apply": _SWITCH,
        "log_trace_cache_warnings": _SWITCH,
        "enable_sanity_checks": _SWITCH,
        "save_muon_momentum_buffer_in_memory": _SWITCH,
        **_STAGE_3,
        **{f"stage3_{key}": rule for key, rule in _STAGE_3.items()},
    },
    "bf16": {},
    "fp16": {
        "loss_scale": _number(0, 2**32),
        "initial_scale_power": _whole(0, 32),
        "loss_scale_window": _whole(1, 10**9),
        "hysteresis": _whole(1, 10**6),
        "consecutive_hysteresis": _SWITCH,
        "min_loss_scale": _whole(1, 2**32),
    },
    "comms_logger": {
        "enabled": _SWITCH,
        "prof_all": _SWITCH,
        "prof_ops": _NAMES,
        "verbose": _SWITCH,
        "debug": _SWITCH,
    },
    "flops_profiler": FLOPS_PROFILER,
}

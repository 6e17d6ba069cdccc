"""Check DeepSpeed settings: which ones a run may use, and why the others are refused.

DeepSpeed 0.19.8 ignores an unknown top-level key in silence and lets some settings train wrongly;
so every key is looked at here first.
"""

import difflib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stacking_ds.console import shortened


def as_json(value: Any) -> str:
    """`value` as it stands in the JSON, in one line and not longer than a line."""
    return shortened(json.dumps(value, ensure_ascii=False, default=repr))


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


def _whole(
    least: int, most: int, multiple_of: int = 1, types: tuple[type, ...] = (int, float)
) -> Rule:
    """5e8 is one too, as people write bucket sizes: DeepSpeed's schemas read it so, and where it
    has none, steps are divided by it. Of `types` (int,) where it takes what stands there."""
    kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
    return Rule(
        f"{kind} from {least:,} to {most:,}",
        lambda value: type(value) in types and least <= value <= most and value % multiple_of == 0,
    )


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.must_be}, or null", lambda value: value is None or rule.accepts(value))


def _only(*right: Any, since: str) -> Rule:
    """What growth, checkpoints or the loss rely on."""
    return Rule(
        f"{' or '.join(map(as_json, right))}, since {since}",
        # to Python 1 and true are equal
        lambda value: any(type(value) is type(one) and value == one for one in right),
    )


def _is_writable_file(value: Any) -> bool:
    """In a folder that is there, since DeepSpeed opens it steps later."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    folder = os.path.dirname(os.path.abspath(value))
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and not os.path.isdir(value)


_SETTLED = Rule("", lambda value: True)
"""Looked at where the recipe's own value is known, or by itself."""
_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = Rule("text", lambda value: isinstance(value, str))
_NAMES = Rule(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
_FILE = Rule("the path of a file in a folder where you can write", _is_writable_file)
_MOST_STEPS = 10**12


def _each(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


TOP_LEVEL: Mapping[str, Rule] = {
    **_each(
        _SETTLED,
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "gradient_clipping zero_force_ds_cpu_optimizer communication_data_type",
    ),
    **_each(_SWITCH, "wall_clock_breakdown memory_breakdown dump_state"),
    "steps_per_print": _or_null(_whole(1, _MOST_STEPS)),
}

OFFLOAD_OPTIMIZER: Mapping[str, Rule] = {
    "device": Rule(
        '"cpu" or "none", since growth and checkpoints read no state that lies elsewhere',
        lambda value: value in ("cpu", "none"),
    ),
    **_each(_SWITCH, "pin_memory pipeline_read pipeline_write fast_init super_offload"),
    **_each(_number(0, 1), "ratio cpuadam_cores_perc"),
    "buffer_count": _whole(0, 10**6),
    "nvme_path": _or_null(_TEXT),
}

FLOPS_PROFILER: Mapping[str, Rule] = {
    **_each(_SWITCH, "enabled detailed"),
    "profile_step": _whole(0, _MOST_STEPS, types=(int,)),
    # deeper than the model is, DeepSpeed looks for modules that are not there
    "module_depth": _whole(-1, 6, types=(int,)),
    "top_modules": _whole(1, 10**6, types=(int,)),
    "recompute_fwd_factor": _number(0, 100),
    "output_file": _or_null(_FILE),
}

_STAGE_3: Mapping[str, Rule] = {
    **_each(
        _whole(0, 2**63 - 1),
        "prefetch_bucket_size param_persistence_threshold model_persistence_threshold "
        "max_live_parameters max_reuse_distance",
    ),
    **_each(
        _SWITCH,
        "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential",
    ),
}

_GATHERS_ITSELF = "the model says itself which of its modules ZeRO 3 gathers whole"
_NOT_SHARDED_SO = "growth and checkpoints do not read state laid out that way"

SECTIONS: Mapping[str, Mapping[str, Rule]] = {
    "data_types": {"grad_accum_dtype": _SETTLED},
    "zero_optimization": {
        "stage": _whole(0, 3, types=(int,)),
        **_each(_SETTLED, "offload_optimizer memory_efficient_linear"),
        "round_robin_gradients": _only(
            False, since="true corrupts the map from weights to masters"
        ),
        "compute_grad_norm": _only(True, since="the run reports the gradient norm at every step"),
        "legacy_stage1": _only(False, since="DeepSpeed no longer has it"),
        "elastic_checkpoint": _only(False, since="checkpoints here load at any world size anyway"),
        **_each(_only(None, False, since=_NOT_SHARDED_SO), "cpu_offload cpu_offload_param"),
        "offload_param": _only(None, {"device": "none"}, since=_NOT_SHARDED_SO),
        "zenflow": _only(None, since=_NOT_SHARDED_SO),
        "leaf_module": _only({}, since=_GATHERS_ITSELF),
        **_each(
            _only(0, since=_GATHERS_ITSELF),
            "module_granularity_threshold stage3_module_granularity_threshold",
        ),
        "zero_hpz_partition_size": _only(1, since=_NOT_SHARDED_SO),
        **_each(
            _only(False, since=_NOT_SHARDED_SO),
            "zero_quantized_weights zero_quantized_nontrainable_weights",
        ),
        "zero_quantized_gradients": _only(False, since="gradients are reduced in fp32"),
        "reduce_bucket_size": _whole(1, 2 * 10**9),  # so much is allocated
        # ZeRO 1 and 2 cut it at addresses that two elements share
        "allgather_bucket_size": _whole(2, 2**62, multiple_of=2),
        "sub_group_size": _whole(1, 2**63 - 1),
        **_each(_or_null(_SWITCH), "overlap_comm cpu_offload_use_pin_memory"),
        **_each(
            _SWITCH,
            "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce "
            "allgather_partitions load_from_fp32_weights stage3_gather_fp16_weights_on_model_save "
            "ignore_unused_parameters parameter_alignment pipeline_loading_checkpoint "
            "override_module_apply log_trace_cache_warnings enable_sanity_checks "
            "save_muon_momentum_buffer_in_memory",
        ),
        **_STAGE_3,
        **{f"stage3_{key}": rule for key, rule in _STAGE_3.items()},
    },
    "bf16": {
        "enabled": _SETTLED,
        "check_grad_overflow": _only(
            True, since="DeepSpeed would step on gradients that are not finite"
        ),
        "immediate_grad_update": _only(
            False, since="it belongs to BF16_Optimizer, which is not used"
        ),
        "bf16_master_weights_and_grads": _only(False, since="masters are fp32"),
        "bf16_optimizer_states": _only(False, since="moments are fp32"),
    },
    "fp16": {
        "enabled": _SETTLED,
        "auto_cast": _only(False, since="the model's inputs are token ids"),
        "fp16_master_weights_and_grads": _only(False, since="masters are fp32"),
        "loss_scale": _number(0, 2**32),
        "initial_scale_power": _whole(0, 32),
        "loss_scale_window": _whole(1, 10**9),
        "hysteresis": _whole(1, 10**6),
        "consecutive_hysteresis": _SWITCH,
        "min_loss_scale": _whole(1, 2**32),
    },
    "comms_logger": {**_each(_SWITCH, "enabled prof_all verbose debug"), "prof_ops": _NAMES},
    "flops_profiler": FLOPS_PROFILER,
}


KNOWN_KEYS = (*TOP_LEVEL, *SECTIONS)

_NAMES_BY_REASON = {
    "DeepSpeed 0.19.8 has removed it; delete it": (
        "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting "
        "nebula progressive_layer_drop quantize_training sparse_attention sparse_gradients"
    ),
    "the recipe owns it; delete it": "optimizer scheduler",
    "its timer waits for the device in every micro-step, and is off; delete it": "timers",
    "the run writes its metrics once, by itself; delete it": "tensorboard wandb csv_monitor comet",
    "the loss is scaled for gradients averaged over ranks in fp32; delete it": (
        "prescale_gradients gradient_predivide_factor gradient_allreduce_op"
    ),
    "this package trains by data parallelism alone and does not use it; delete it": (
        "activation_checkpointing aio autotuning checkpoint compile data_efficiency "
        "data_parallel_size expert_parallel hybrid_engine managed_gradient_accumulation pipeline "
        "sequence_parallel_size tensor_parallel torch_autocast weight_quantization "
        "zero_allow_untested_optimizer"
    ),
    'its name is now "bf16"; rename it': "bfloat16",
}
REFUSED_KEYS: Mapping[str, str] = {
    key: reason for reason, names in _NAMES_BY_REASON.items() for key in names.split()
}


def problems_of(json: Mapping[str, Any]) -> list[str]:
    """One line for every key, at the top or inside a section such as `zero_optimization`, that is
    refused or unknown, and for every value that DeepSpeed or this package cannot work with."""
    problems = []
    for key in json:
        if key in REFUSED_KEYS:
            problems.append(f'"{key}": {REFUSED_KEYS[key]}')
        elif key not in KNOWN_KEYS:
            problems.append(f'"{shortened(key)}": {_unknown(key, KNOWN_KEYS)}')
    problems += _value_problems("", json, TOP_LEVEL)
    for section, rules in SECTIONS.items():
        problems += _problems_inside(section, json.get(section, {}), rules)
    zero_optimization = json.get("zero_optimization", {})
    if isinstance(zero_optimization, dict):
        problems += _offload_problems(zero_optimization)
    return problems


def _problems_inside(section: str, values: Any, rules: Mapping[str, Rule]) -> list[str]:
    if not isinstance(values, dict):
        return [f'"{section}" is {as_json(values)}: it must be an object in braces']
    unknown = [
        f'"{section}.{shortened(key)}": {_unknown(key, rules)}'
        for key in values
        if key not in rules
    ]
    return unknown + _value_problems(f"{section}.", values, rules)


def _offload_problems(zero_optimization: Mapping[str, Any]) -> list[str]:
    """Masters and moments may live in host memory, and nowhere else but on the device."""
    section = "zero_optimization.offload_optimizer"
    offload = zero_optimization.get("offload_optimizer")
    if offload is None:
        return []
    problems = _problems_inside(section, offload, OFFLOAD_OPTIMIZER)
    if not isinstance(offload, dict) or offload.get("device", "none") != "cpu":
        return problems
    if zero_optimization.get("stage", 0) == 0:
        problems.append(
            f'"{section}": at ZeRO 0 DeepSpeed offloads nothing; write "stage": 1, 2 or 3, or '
            f"delete it"
        )
    for key, right in (("ratio", 1.0), ("super_offload", False)):
        if OFFLOAD_OPTIMIZER[key].accepts(offload.get(key)) and offload[key] != right:
            problems.append(
                f'"{section}.{key}" is {as_json(offload[key])}: {_NOT_SHARDED_SO}; write '
                f"{as_json(right)}"
            )
    return problems


def _value_problems(prefix: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    return [
        f'"{prefix}{key}" is {as_json(values[key])}: it must be {rule.must_be}'
        for key, rule in rules.items()
        if key in values and values[key] != "auto" and not rule.accepts(values[key])
    ]


def asks_for_log(json: Mapping[str, Any]) -> bool:
    """True if a setting asks for something that DeepSpeed says in log lines of level INFO.

    It prints the rest (`wall_clock_breakdown`, `memory_breakdown`, `flops_profiler`) past its log.
    """
    communication = json.get("comms_logger", {})
    return bool(
        json.get("steps_per_print")
        or json.get("dump_state")
        or (communication.get("enabled") and communication.get("verbose"))
    )


def _unknown(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f'did you mean "{near[0]}"?' if near else "delete it"
    return f"DeepSpeed has no such key; {hint}"

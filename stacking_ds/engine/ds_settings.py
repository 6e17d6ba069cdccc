"""Which DeepSpeed settings a run may use, and why the others are refused.

DeepSpeed 0.19.8 ignores an unknown top-level key in silence and lets some settings train wrongly;
so every key is looked at here first.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from stacking_ds.console import shortened
from stacking_ds.engine.ds_values import OFFLOAD_OPTIMIZER, SECTIONS, TOP_LEVEL, Rule

__all__ = [
    "KNOWN_KEYS",
    "REFUSED_KEYS",
    "as_json",
    "asks_for_log",
    "known_in_section",
    "section_problems",
    "top_level_problems",
]

KNOWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "data_types",
    "comms_logger",
    "flops_profiler",
    *TOP_LEVEL,
)

_REMOVED = "DeepSpeed 0.19.8 has removed it; delete it"
_RECIPE = "the recipe owns it; delete it"
_METRICS = "the run writes its metrics once, by itself; delete it"
_SCALING = "the loss is scaled for gradients averaged over ranks in fp32; delete it"
_ELSEWHERE = "this package trains by data parallelism alone and does not use it; delete it"

REFUSED_KEYS: Mapping[str, str] = {
    **dict.fromkeys(("optimizer", "scheduler"), _RECIPE),
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        _REMOVED,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _METRICS),
    **dict.fromkeys(
        ("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"), _SCALING
    ),
    **dict.fromkeys(
        (
            "activation_checkpointing",
            "aio",
            "autotuning",
            "checkpoint",
            "compile",
            "data_efficiency",
            "data_parallel_size",
            "expert_parallel",
            "hybrid_engine",
            "managed_gradient_accumulation",
            "pipeline",
            "sequence_parallel_size",
            "tensor_parallel",
            "torch_autocast",
            "weight_quantization",
            "zero_allow_untested_optimizer",
        ),
        _ELSEWHERE,
    ),
    "bfloat16": 'its name is now "bf16"; rename it',
}

# what the engine settles with the recipe, or what is looked at by itself
_ALSO_KNOWN = {
    "zero_optimization": ("stage", "offload_optimizer", "memory_efficient_linear"),
    "bf16": ("enabled",),
    "fp16": ("enabled",),
}

_GATHERS_ITSELF = "the model says itself which of its modules ZeRO 3 gathers whole"
_NOT_SHARDED_SO = "growth and checkpoints do not read state laid out that way"
# section -> key -> (the values that are right, why)
_ONLY: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "zero_optimization": {
        "round_robin_gradients": ((False,), "it corrupts the map from weights to masters"),
        "compute_grad_norm": ((True,), "the run reports the gradient norm at every step"),
        "legacy_stage1": ((False,), "DeepSpeed no longer has it"),
        "elastic_checkpoint": ((False,), "checkpoints here load at any world size anyway"),
        "cpu_offload": ((None, False), _NOT_SHARDED_SO),
        "cpu_offload_param": ((None, False), _NOT_SHARDED_SO),
        "offload_param": ((None, {"device": "none"}), _NOT_SHARDED_SO),
        "zenflow": ((None,), _NOT_SHARDED_SO),
        "leaf_module": (({},), _GATHERS_ITSELF),
        "module_granularity_threshold": ((0,), _GATHERS_ITSELF),
        "stage3_module_granularity_threshold": ((0,), _GATHERS_ITSELF),
        "zero_hpz_partition_size": ((1,), _NOT_SHARDED_SO),
        "zero_quantized_weights": ((False,), _NOT_SHARDED_SO),
        "zero_quantized_nontrainable_weights": ((False,), _NOT_SHARDED_SO),
        "zero_quantized_gradients": ((False,), "gradients are reduced in fp32"),
    },
    "bf16": {
        "check_grad_overflow": ((True,), "DeepSpeed would step on gradients that are not finite"),
        "immediate_grad_update": ((False,), "it belongs to BF16_Optimizer, which is not used"),
        "bf16_master_weights_and_grads": ((False,), "masters are fp32"),
        "bf16_optimizer_states": ((False,), "moments are fp32"),
    },
    "fp16": {
        "auto_cast": ((False,), "the model's inputs are token ids"),
        "fp16_master_weights_and_grads": ((False,), "masters are fp32"),
    },
}


def top_level_problems(json: Mapping[str, Any]) -> list[str]:
    """One line for every top-level key that is refused or unknown."""
    problems = []
    for key in json:
        if key in REFUSED_KEYS:
            problems.append(f'"{key}": {REFUSED_KEYS[key]}')
        elif key not in KNOWN_KEYS:
            problems.append(f'"{shortened(key)}": {_unknown(key, KNOWN_KEYS)}')
    return problems


def section_problems(json: Mapping[str, Any]) -> list[str]:
    """One line for every value that is not what DeepSpeed or this package can work with, and for
    every unknown key inside a section such as `zero_optimization` or `bf16`."""
    problems = _value_problems("", json, TOP_LEVEL)
    data_types = json.get("data_types", {})
    if not isinstance(data_types, dict):
        problems.append(_no_object("data_types", data_types))
    else:
        others = sorted(data_types.keys() - {"grad_accum_dtype"})
        problems += [f'"data_types.{shortened(key)}": {_ELSEWHERE}' for key in others]
    for section, rules in SECTIONS.items():
        values = json.get(section, {})
        if not isinstance(values, dict):
            problems.append(_no_object(section, values))
            continue
        problems += _unknown_keys(section, values, known_in_section(section))
        problems += _value_problems(f"{section}.", values, rules)
        problems += _only_problems(section, values)
    zero_optimization = json.get("zero_optimization", {})
    if isinstance(zero_optimization, dict):
        problems += _stage_problems(zero_optimization) + _offload_problems(zero_optimization)
    return problems


def known_in_section(section: str) -> set[str]:
    """All keys that a section may have, those that may have one value alone included."""
    return {*SECTIONS[section], *_ONLY.get(section, {}), *_ALSO_KNOWN.get(section, ())}


def as_json(value: Any) -> str:
    """`value` as it stands in the JSON, in one line and not longer than a line."""
    return shortened(json.dumps(value, ensure_ascii=False, default=repr))


def _only_problems(section: str, values: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, (right, reason) in _ONLY.get(section, {}).items():
        value = values.get(key, "auto")
        # to Python 1 and true are equal
        fits = any(type(value) is type(one) and value == one for one in right)
        if value != "auto" and not fits:
            problems.append(
                f'"{section}.{key}" is {as_json(value)}: {reason}; delete it or write '
                f"{as_json(right[0])}"
            )
    return problems


def _stage_problems(zero_optimization: Mapping[str, Any]) -> list[str]:
    stage = zero_optimization.get("stage", 0)
    if stage == "auto" or (type(stage) is int and 0 <= stage <= 3):
        return []
    return [f'"zero_optimization.stage" is {as_json(stage)}: write it as a number, 0, 1, 2 or 3']


def _offload_problems(zero_optimization: Mapping[str, Any]) -> list[str]:
    """Masters and moments may live in host memory, and nowhere else but on the device."""
    section = "zero_optimization.offload_optimizer"
    offload = zero_optimization.get("offload_optimizer")
    if offload is None:
        return []
    if not isinstance(offload, dict):
        return [_no_object(section, offload)]
    problems = _unknown_keys(section, offload, OFFLOAD_OPTIMIZER)
    problems += _value_problems(f"{section}.", offload, OFFLOAD_OPTIMIZER)
    if offload.get("device", "none") != "cpu":
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


def _no_object(section: str, values: Any) -> str:
    return f'"{section}" is {as_json(values)}: it must be an object in braces'


def asks_for_log(json: Mapping[str, Any]) -> bool:
    """Whether a setting asks for something that DeepSpeed says in log lines of level INFO.

    It prints the rest (`wall_clock_breakdown`, `memory_breakdown`, `flops_profiler`) past its log.
    """
    communication = json.get("comms_logger", {})
    return bool(
        json.get("steps_per_print")
        or json.get("dump_state")
        or (communication.get("enabled") and communication.get("verbose"))
    )


def _unknown_keys(section: str, values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    return [
        f'"{section}.{shortened(key)}": {_unknown(key, known)}'
        for key in values
        if key not in known
    ]


def _unknown(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f'did you mean "{near[0]}"?' if near else "delete it"
    return f"DeepSpeed has no such key; {hint}"

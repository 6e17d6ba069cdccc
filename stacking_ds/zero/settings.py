"""Which DeepSpeed settings a run may use, and why the others are refused.

DeepSpeed 0.19.8 ignores an unknown top-level key in silence and lets some settings train wrongly;
so every key is looked at here first.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

__all__ = [
    "KNOWN_KEYS",
    "REFUSED_KEYS",
    "asks_for_log",
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
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
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

_MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
}
# the one section without a schema
_FLOPS_PROFILER_KEYS = tuple(vars(DeepSpeedFlopsProfilerConfig({})))

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
            problems.append(f'"{key}": {_unknown(key, KNOWN_KEYS)}')
    return problems


def section_problems(json: Mapping[str, Any]) -> list[str]:
    """One line for everything wrong inside a section such as `zero_optimization` or `bf16`."""
    problems = []
    data_types = json.get("data_types", {})
    if not isinstance(data_types, dict):
        problems.append(f'"data_types" is {data_types!r}: it must be an object in braces')
    elif others := sorted(data_types.keys() - {"grad_accum_dtype"}):
        problems += [f'"data_types.{key}": {_ELSEWHERE}' for key in others]
    for section in (*_MODELS, "flops_profiler"):
        values = json.get(section, {})
        if not isinstance(values, dict):
            problems.append(f'"{section}" is {values!r}: it must be an object in braces')
            continue
        problems += _key_problems(section, values)
        for key, (right, reason) in _ONLY.get(section, {}).items():
            if key in values and values[key] not in (*right, "auto"):
                problems.append(
                    f'"{section}.{key}" is {values[key]!r}: {reason}; '
                    f"delete it or write {right[0]!r}"
                )
    return problems + _offload_problems(json.get("zero_optimization", {}))


def _offload_problems(zero_optimization: Any) -> list[str]:
    """Masters and moments may live in host memory, and nowhere else but on the device."""
    if not isinstance(zero_optimization, dict):
        return []
    offload = zero_optimization.get("offload_optimizer")
    if not isinstance(offload, dict) or offload.get("device", "none") == "none":
        return []
    problems = []
    if zero_optimization.get("stage", 0) == 0:
        problems.append(
            '"zero_optimization.offload_optimizer": at ZeRO 0 DeepSpeed offloads nothing; write '
            '"stage": 1, 2 or 3, or delete it'
        )
    only = {"device": ("cpu",), "ratio": (1.0,), "super_offload": (False,)}
    for key, right in only.items():
        if key in offload and offload[key] not in right:
            problems.append(
                f'"zero_optimization.offload_optimizer.{key}" is {offload[key]!r}: '
                f"{_NOT_SHARDED_SO}; write {right[0]!r}"
            )
    return problems


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


def _key_problems(section: str, values: Mapping[str, Any]) -> list[str]:
    if section not in _MODELS:
        return _unknown_keys(section, values, _FLOPS_PROFILER_KEYS)
    stage = values.get("stage", 0)
    if section == "zero_optimization" and type(stage) is not int and stage != "auto":
        # the schema reads "2" and True as numbers; whoever looks at the JSON itself does not
        wrong = f'"zero_optimization.stage" is {stage!r}: write it as a number, 0, 1, 2 or 3'
        rest = {key: value for key, value in values.items() if key != "stage"}
        return [wrong, *_schema_problems(section, rest)]
    return _schema_problems(section, values)


def _schema_problems(section: str, values: Mapping[str, Any]) -> list[str]:
    model: Any = _MODELS[section]
    fields = model.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    problems = _unknown_keys(section, values, known)
    present = {key: value for key, value in values.items() if key in known}
    try:
        model(**present)
    except ValidationError as error:
        problems += [
            f'"{".".join([section, *map(str, found["loc"])])}" is {found["input"]!r}: '
            f"{found['msg']}"
            for found in error.errors()
        ]
    return problems


def _unknown_keys(section: str, values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    return [f'"{section}.{key}": {_unknown(key, known)}' for key in values if key not in known]


def _unknown(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f'did you mean "{near[0]}"?' if near else "delete it"
    return f"DeepSpeed has no such key; {hint}"

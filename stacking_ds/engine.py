"""The only builder and releaser of DeepSpeed engines, and the one place that fills `"auto"`.

A DeepSpeed JSON says how the engine works (ZeRO stage, bucket sizes); the recipe says what is
trained (batch, clipping, precision). What both could say is `"auto"` in the JSON and filled here;
where the JSON says it all the same, the two must agree.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist

from stacking_ds import zero
from stacking_ds.bundled import ds_config_path
from stacking_ds.errors import ConfigError
from stacking_ds.zero.settings import asks_for_log, section_problems, top_level_problems

__all__ = [
    "Precision",
    "build_engine",
    "load_ds_config",
    "release_engine",
    "resolve_ds_config",
    "set_learning_rate",
    "take_step",
]

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class _Owned:
    """A setting the JSON may leave out or call "auto", and the value it then gets."""

    key: str
    value: Any
    also: tuple[Any, ...] = ()  # what a JSON may insist on instead
    reason: str = ""  # where it is not the recipe that decides


def load_ds_config(path_or_name: str) -> dict[str, Any]:
    """The DeepSpeed JSON at a path, or a bundled one by name (`zero0` … `zero3`).

    Raises:
        ConfigError: no such file, not JSON, a key written twice, or not an object.
    """
    path = ds_config_path(path_or_name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use DeepSpeed JSON {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"cannot use DeepSpeed JSON {path}: it must be an object in braces")
    return raw


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(twice)} is written twice; keep one")
    return dict(pairs)


def resolve_ds_config(
    ds_json: Mapping[str, Any],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    gradient_clipping: float,
    precision: Precision,
    source: str = "the DeepSpeed JSON",
) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize`; `ds_json` itself is not changed.

    `micro_batch_size` is in sequences per rank and micro step, `gradient_clipping` the largest
    2-norm of a gradient (0.0 = off). `source` names the file in messages.

    Raises:
        ConfigError: all that is wrong, in one message: unknown, removed and refused keys, values
            that contradict the recipe, and "auto" where nobody fills it in.
    """
    train_batch_size = micro_batch_size * gradient_accumulation_steps * world_size
    owned = [
        _Owned("train_batch_size", train_batch_size),
        _Owned("train_micro_batch_size_per_gpu", micro_batch_size),
        _Owned("gradient_accumulation_steps", gradient_accumulation_steps),
        # written even when off: left out, DeepSpeed 0.19.8 clips at 1.0
        _Owned("gradient_clipping", float(gradient_clipping)),
        _Owned("bf16.enabled", precision == "bf16"),
        _Owned("fp16.enabled", precision == "fp16"),
        *_engine_defaults(_zero_stage(ds_json), precision),
    ]
    resolved: dict[str, Any] = deepcopy(dict(ds_json))
    problems = top_level_problems(ds_json) + section_problems(ds_json)
    for setting in owned:
        problems += _settle(resolved, setting)
    problems += [
        f'"{key}" is "auto", which nobody fills in: write a value or delete it'
        for key in _autos(resolved)
    ]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{source} cannot be used with this recipe:\n{lines}")
    return resolved


def _zero_stage(ds_json: Mapping[str, Any]) -> int:
    section = ds_json.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if type(stage) is int else 0  # section_problems complains of anything else


def _engine_defaults(zero_stage: int, precision: Precision) -> list[_Owned]:
    """What this package sets where the JSON leaves the choice."""
    low = precision != "fp32"
    if low and zero_stage >= 2:
        accumulation = _Owned(
            "data_types.grad_accum_dtype", "fp32", (precision,), f"it is fp32 or {precision}"
        )
    else:
        accumulation = _Owned(
            "data_types.grad_accum_dtype",
            precision,
            reason=f"at ZeRO {zero_stage} DeepSpeed sums the gradients of micro-steps rightly in "
            f"{precision} alone (fp32 would select BF16_Optimizer, or nothing at all)",
        )
    return [
        accumulation,
        # small contributions would be lost when many ranks' gradients are summed in bf16
        _Owned(
            "communication_data_type",
            "fp32",
            (precision,) if low else (),
            f"gradients are summed over the ranks in fp32{f' or {precision}' if low else ''}",
        ),
        _Owned(
            "zero_optimization.memory_efficient_linear",
            False,
            reason="it replaces torch's linear for the whole process and rounds bf16 differently",
        ),
    ]


def _settle(resolved: dict[str, Any], owned: _Owned) -> list[str]:
    """Fill one setting in, or say how the JSON contradicts it."""
    *parents, key = owned.key.split(".")
    section: Any = resolved
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            return []  # the schema's complaint
    written = section.get(key, "auto")
    if written == "auto":
        section[key] = owned.value
    elif written != owned.value and written not in owned.also:
        if owned.reason:
            advice = f"{owned.reason}; delete it or write {owned.value!r}"
            return [f'"{owned.key}" is {written!r}: {advice}']
        return [
            f'"{owned.key}" is {written!r}, but the recipe makes it {owned.value!r}: '
            f'write "auto" there, or change the recipe'
        ]
    return []


def _autos(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key


def build_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any]
) -> Any:
    """A `DeepSpeedEngine` for `model`, whose fp32 masters are the model's values bit for bit.

    `model` and `optimizer` are new for every engine (DeepSpeed's hooks stay on a module for
    ever), and every rank builds the same model. `ds_config` comes from `resolve_ds_config`. The
    process group must be running.

    Raises:
        ConfigError: another DeepSpeed than the pinned one, a precision this device lacks, or
            models that differ between ranks.
    """
    zero.require_pinned_deepspeed()
    _check_same_model(model)
    # DeepSpeed rounds the module first and takes the masters from the rounded copy; it replaces
    # the parameters' storage, so that the fp32 values live on here without a copy
    exact = {}
    if _low_precision(ds_config):
        exact = {name: p.detach() for name, p in model.named_parameters()}
    zero.follow_process_group()
    _prepare_process(show_log=asks_for_log(ds_config))
    with zero.without_stepping(optimizer):
        try:
            # [0]: a name for the rest of the tuple would keep the optimizer alive for ever
            engine = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepcopy(dict(ds_config))
            )[0]
        except ValueError as error:
            raise ConfigError(f"DeepSpeed cannot build this engine: {error}") from error
    zero.reset_moments(engine)
    zero.mend_loss_scaling(engine)
    if exact:
        # the forward weights are the rounding of these values already
        zero.write_masters(engine, exact)
    return engine


def release_engine(engine: Any) -> None:
    """Destroy `engine` and give its memory back; drop every reference to its model as well."""
    zero.release(engine)


def take_step(engine: Any) -> float | None:
    """`engine.step()` after each `engine.backward`.

    Returns the global 2-norm of the gradient, before clipping, when this completed an optimizer
    step, else None. A gradient that is not finite never reaches the weights: the step is skipped
    and its norm given as infinite.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = zero.norm_before_step(engine)
    if norm is None:
        engine.step()
        return zero.gradient_norm(engine)
    if math.isfinite(norm):
        engine.step()
        return norm
    # here alone DeepSpeed would step all the same
    with zero.without_stepping(engine.basic_optimizer):
        engine.step()
    return math.inf


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The learning rate of every parameter group, from the next step on."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = learning_rate


def _low_precision(ds_config: Mapping[str, Any]) -> bool:
    return any(ds_config.get(key, {}).get("enabled", False) for key in ("bf16", "fp16"))


@torch.no_grad()
def _check_same_model(model: torch.nn.Module) -> None:
    total = sum(
        float(p.sum(dtype=torch.float64)) * place for place, p in enumerate(model.parameters(), 1)
    )
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([total, -total], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ConfigError(
            "the ranks built models with different weights; build the model with the same seed "
            "on every rank"
        )


def _prepare_process(*, show_log: bool) -> None:
    """No JIT build of an op that training never calls, no log line below a warning unless asked."""
    # Asked for the first time, DeepSpeed probes every op with a compiler; and one that it then
    # finds on a CPU, init_distributed compiles for half a minute, or fails without a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    level = logging.INFO if show_log else logging.WARNING
    log = logging.getLogger("DeepSpeed")
    log.setLevel(level)
    for handler in log.handlers:  # DeepSpeed gives its handler a level as well
        handler.setLevel(level)
    # raised inside DeepSpeed at every step, so the filter has to last
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)\."
    )

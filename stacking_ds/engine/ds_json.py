"""Read a DeepSpeed JSON, fill in its "auto", and refuse what contradicts the recipe."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from stacking_ds.config.recipe import ds_config_path
from stacking_ds.config.sections import Precision
from stacking_ds.console import shortened
from stacking_ds.engine.ds_settings import as_json, problems_of
from stacking_ds.errors import ConfigError
from stacking_ds.files import DamagedFileError, is_nested_deeper, read_text

_MOST_BYTES = 2**18
_DEEPEST = 8


class _TwiceError(ValueError):
    pass


def load_ds_config(path_or_name: str) -> dict[str, Any]:
    """The DeepSpeed JSON at a path, or a bundled one by name (`zero0` … `zero3`).

    Raises:
        ConfigError: no such file, not JSON, a key written twice, not an object, nested deeper than
            8 levels or larger than 256 KiB.
    """
    path = ds_config_path(path_or_name)
    try:
        text = read_text(path, _MOST_BYTES).removeprefix("\ufeff")
        raw = json.loads(text, object_pairs_hook=_each_key_once)
        reason = "" if isinstance(raw, dict) else "it must be an object in braces"
    except OSError as error:
        reason = str(error.strerror)
    except DamagedFileError as error:
        reason = error.reason
    except (json.JSONDecodeError, _TwiceError) as error:
        reason = str(error)
    except (ValueError, RecursionError):  # Python's limit of digits, or of depth
        reason = "it holds a number of thousands of digits, or is nested too deeply"
    if not reason and is_nested_deeper(raw, _DEEPEST):
        reason = f"it is nested deeper than {_DEEPEST} levels"
    if reason:
        raise ConfigError(f"cannot use DeepSpeed JSON {path}: {reason}")
    assert isinstance(raw, dict)
    return raw


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise _TwiceError(f"{shortened(twice)} is written twice; keep one")
    return found


@dataclass(frozen=True)
class _Owned:
    """A setting the JSON may leave out or call "auto", and the value it then gets."""

    key: str
    value: Any
    also: tuple[Any, ...] = ()  # what a JSON may insist on instead
    reason: str = ""  # where it is not the recipe that decides


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
    problems = problems_of(ds_json)
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
    return stage if type(stage) is int else 0  # problems_of complains of anything else


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
            "zero_force_ds_cpu_optimizer",
            False,
            reason="the recipe's optimizer steps on offloaded state too; DeepSpeed's own would be "
            "compiled at first use",
        ),
        _Owned(
            "timers.throughput.enabled",
            False,
            reason="it waits for the device twice in every micro-step; the log has tokens/s",
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
    # to Python 1, 1.0 and true are equal
    is_same = written == owned.value and isinstance(written, bool) == isinstance(owned.value, bool)
    if written == "auto" or is_same:
        section[key] = owned.value
    elif written not in owned.also:
        if owned.reason:
            advice = f"{owned.reason}; delete it or write {as_json(owned.value)}"
            return [f'"{owned.key}" is {as_json(written)}: {advice}']
        return [
            f'"{owned.key}" is {as_json(written)}, but the recipe makes it '
            f'{as_json(owned.value)}: write "auto" there, or change the recipe'
        ]
    return []


def _autos(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key

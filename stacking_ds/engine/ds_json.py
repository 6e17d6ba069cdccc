"""Read a DeepSpeed JSON."""

import json
from typing import Any

from stacking_ds.config.bundled import ds_config_path
from stacking_ds.console import shortened
from stacking_ds.errors import ConfigError
from stacking_ds.files import DamagedFileError, read_text

__all__ = ["load_ds_config"]

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
    if not reason and _is_deeper(raw, _DEEPEST):
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


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children)

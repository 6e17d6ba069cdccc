"""A YAML recipe and dotted overrides become a `RunConfig`; every mistake becomes a sentence.

The order is: defaults of the sections, then the recipe, then `--set section.key=value`. What
results is written into the run directory, so that a run says by itself what it was.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from stacking_ds.bundled import recipe_path
from stacking_ds.config import RunConfig
from stacking_ds.errors import ConfigError

__all__ = ["load_run_config"]


def load_run_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of a bundled one) and apply `key=value` overrides.

    Raises:
        ConfigError: no such recipe, not YAML, unknown keys (with the nearest right one), values
            of the wrong type or range; all of them in one message.
    """
    path = recipe_path(recipe)
    raw = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return RunConfig.model_validate_json(json.dumps(raw))
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"recipe {path} holds what no recipe can ({error})") from None
    except ValidationError as error:
        problems = "; ".join(_sentence(problem) for problem in error.errors())
        raise ConfigError(f"recipe {path}: {problems}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} must look like section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, leaf = key.strip().split(".")
    container: Any = raw
    for parent in parents:
        if isinstance(container, dict):
            container = container.setdefault(parent, {})
        else:
            container = container[_position(container, parent, override)]
    if isinstance(container, dict):
        container[leaf] = value
    else:
        container[_position(container, leaf, override)] = value


def _position(container: Any, text: str, override: str) -> int:
    if not isinstance(container, list):
        raise ConfigError(f"override {override!r}: {text!r} is inside a plain value")
    if not text.isdigit() or int(text) >= len(container):
        raise ConfigError(
            f"override {override!r}: {text!r} is not one of the positions 0 to {len(container) - 1}"
        )
    return int(text)


def _sentence(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "the recipe"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{where} is not a key; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, dict | list) else f" (got {value!r})"
    return f"{where}: {message}{shown}"


def _fields_at(location: Sequence[str]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        if part.isdigit():
            continue  # a place in a list, whose field has led to its elements' section
        annotation = section.model_fields[part].annotation
        # a section that may be null has a union of itself and None, a list its elements
        kinds = get_args(annotation) or (annotation,)
        section = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return list(section.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody who writes a learning rate means it, a date is
    text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(twice)} is written twice; keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

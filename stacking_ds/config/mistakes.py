"""Sentences about a recipe's mistakes: which key, what it must be, what was typed, and in which
line or which `--set`."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from stacking_ds.config.overrides import Override, declared, meant
from stacking_ds.config.yaml_text import Scalar, Tree, leaves
from stacking_ds.console import shortened
from stacking_ds.errors import ConfigError
from stacking_ds.records import Record

R = TypeVar("R", bound=Record)

_Location = tuple[str, ...]

_OVERRIDE, _WITH_OVERRIDES = "--set ", "with --set "
_IS = {
    "missing": " is missing; give it a value",
    "too_short": " needs at least {min_length} of its parts",
    "too_long": " can have at most {max_length} parts",
    "value_error": ": {error}",
}
_MUST_BE = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string_unicode": "text in UTF-8",
    "string": "text",
    **dict.fromkeys(("tuple", "list"), "a list, in brackets"),
    **dict.fromkeys(("model", "dict"), "a section of keys"),
}
"""By pydantic's name of the error, or how it begins."""


def sentences(
    problems: Sequence[Mapping[str, Any]],
    tree: Tree | None = None,
    overrides: Sequence[Override] = (),
) -> list[str]:
    """One for each problem that the sections found in `tree` after `overrides`, and for each value
    that YAML takes for another than everybody means; those of the file first."""
    tree = {} if tree is None else tree
    told: dict[_Location, str] = {}
    for problem in problems:
        if not _only_follows(problem, problems):
            location = _location(problem)
            told[location] = _predicate(problem, location, tree)
    for location, scalar in leaves(tree):
        # as text it is either complained of above, or taken as it stands
        if scalar.surprise and location not in told and declared(location) is not str:
            told[location] = (
                f": YAML reads {shortened(scalar.text)} as {scalar.surprise}; write it in decimal "
                f"digits, without a leading zero"
            )
    said = [_placed(location, told[location], tree, overrides) for location in told]
    return sorted(said, key=lambda sentence: sentence.startswith(_OVERRIDE))


def checked(kind: type[R], **values: Any) -> R:
    """`kind(**values)`, of values that somebody typed who knows of no sections. Raises
    `ConfigError`: all that is wrong, in sentences."""
    try:
        return kind(**values)
    except ValidationError as error:
        typed: Tree = {name: Scalar(value, str(value)) for name, value in values.items()}
        raise ConfigError("; ".join(sentences(error.errors(), typed))) from None


def is_of_file(sentence: str) -> bool:
    """True if the file is to blame, and not what `--set` gave."""
    return not sentence.startswith((_OVERRIDE, _WITH_OVERRIDES))


def _location(problem: Mapping[str, Any]) -> _Location:
    return tuple(str(part) for part in problem["loc"])


def _only_follows(problem: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another problem is the reason: lamb's default is not computed where the name beside
    it is wrong, and a list lacks the parts that are wrong themselves."""
    if problem["type"] == "default_factory_not_called":
        return True
    place = _location(problem)
    return problem["type"] == "too_short" and any(
        _location(other)[:-1][: len(place)] == place for other in problems if other is not problem
    )


def _placed(location: _Location, predicate: str, tree: Tree, overrides: Sequence[Override]) -> str:
    """The predicate after its key, and who is to blame."""
    key = shortened(".".join(location))
    sentence = f"{key}{predicate}" if key else predicate.removeprefix(": ")
    for override in reversed(overrides):
        if location[: len(override.path)] == override.path:
            return f"{_OVERRIDE}{shortened(override.text)}: {sentence}"
    inside = [one for one in overrides if one.path[: len(location)] == location]
    if inside:
        given = " --set ".join(shortened(one.text) for one in inside[-3:])
        return f"{_WITH_OVERRIDES}{given}: {sentence}"
    scalar = _at(tree, location)
    if isinstance(scalar, Scalar) and scalar.line:
        return f"line {scalar.line}: {sentence}"
    return sentence


def _predicate(problem: Mapping[str, Any], location: _Location, tree: Tree) -> str:
    """What follows the key: " must be a number, not 'x'"."""
    kind, given = problem["type"], _at(tree, location)
    context = {name: _shown(value) for name, value in problem.get("ctx", {}).items()}
    if kind == "extra_forbidden":
        return f" is not a key; {meant(location)}"
    if kind in _IS:
        return _IS[kind].format(**context)
    if isinstance(given, Scalar) and given.text == "" and given.value is None:
        return " has no value; give it one, or leave the key out"
    must = _MUST_BE.get(kind) or _MUST_BE.get(kind.split("_")[0])
    said = f"must be {must.format(**context)}" if must else "cannot have this value"
    return f" {said}{_but_is(given, kind)}"


def _but_is(given: Tree | None, kind: str) -> str:
    if given is None:
        return ""
    if not isinstance(given, Scalar):
        return ", not a section" if isinstance(given, dict) else ", not a list"
    text = shortened(given.text)
    if isinstance(given.value, str):
        return f", not '{text}'"
    if kind == "string_type":
        return f', and YAML reads {text} as {_what(given.value)}: write "{text}" in quotes'
    if kind.startswith("int") and isinstance(given.value, float) and given.value.is_integer():
        return f", not {text}: write {int(given.value)}"
    meaning = _what(given.value)
    if meaning.endswith("number") or text == meaning:
        return f", not {text}"
    return f", not {text}, which YAML reads as {meaning}"


def _what(value: bool | int | float | str | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "a number"


def _shown(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{int(value):,}" if int(value) == value else f"{value:g}"
    return str(value)


def _at(tree: Tree, location: _Location) -> Tree | None:
    """What the recipe has there, None where it has nothing."""
    here: Any = tree
    with suppress(LookupError, ValueError, TypeError):
        for part in location:
            here = here[int(part) if isinstance(here, list) else part]
        found: Tree = here
        return found
    return None

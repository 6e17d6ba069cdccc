"""YAML as recipes use it: sections, lists and plain values, bounded, each with what was typed.

It is read by PyYAML's events, not by a loader of PyYAML's: those follow aliases without end, raise
whatever a constructor happens to raise, and keep nothing of the text that a message could show.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from stacking_ds.console import shortened

_MOST_VALUES = 10_000
_DEEPEST = 32
_MOST_DIGITS = 64

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
}
# 1e-3 is a number, as everybody who writes a learning rate means it
_EXPONENT = r"[eE][-+]?[0-9]+"
_FLOAT = (
    rf"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:{_EXPONENT})?|[-+]?[0-9][0-9_]*{_EXPONENT}"
)


def _base_60(digits: str) -> int | float:
    value: int | float = 0
    for part in digits.lstrip("+-").split(":"):
        value = value * 60 + (float(part) if "." in part else int(part))
    return -value if digits.startswith("-") else value


_NUMBERS: tuple[tuple[str, Callable[[str], int | float], str], ...] = (
    (r"[-+]?(?:0|[1-9][0-9_]*)", int, ""),
    (r"[-+]?0x_*[0-9a-fA-F][0-9a-fA-F_]*", lambda digits: int(digits, 16), ""),
    (r"[-+]?0b_*[01][01_]*", lambda digits: int(digits, 2), ""),
    (r"[-+]?0_*[0-7][0-7_]*", lambda digits: int(digits, 8), "an octal number"),
    (_FLOAT, float, ""),
    (r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", lambda word: float(word.replace(".", "")), ""),
    (r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", _base_60, "a number in base 60"),
)
"""What a number's text matches, how it is read without its underscores, and as what if hardly
anybody means that."""


class YamlTextError(ValueError):
    """A text that is not such YAML; the message says what, and in which line."""


@dataclass(frozen=True)
class Scalar:
    """A plain value: what it is, and what was typed."""

    value: bool | int | float | str | None
    text: str
    line: int = 0
    """Counted from 1; 0 where there are no lines."""
    surprise: str = ""
    """What YAML makes of the text where hardly anybody means it."""


Tree = Scalar | list["Tree"] | dict[str, "Tree"]


def read_yaml(text: str) -> Tree:
    """The one document in `text`. A date is text, keys are text and stand once, and of tags there
    are only those of text, lists and mappings. Aliases are copied, and count as often.

    Raises:
        YamlTextError: it is something else, nested deeper than 32 levels, or has more than 10,000
            values.
    """
    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except YamlTextError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlTextError(
            f"{line}{shortened(str(error.problem or error.context), 160)}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise YamlTextError(f"character {error.position + 1} is not for text files") from None
    # PyYAML's scanner raises more than its own, e.g. for "\UFFFFFFFF"
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        raise YamlTextError(shortened(str(error), 160)) from None


def plain(tree: Tree) -> Any:
    """The values alone."""
    if isinstance(tree, dict):
        return {key: plain(child) for key, child in tree.items()}
    return [plain(child) for child in tree] if isinstance(tree, list) else tree.value


def leaves(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no mapping and no list, after the place where it stands in them."""
    if isinstance(tree, dict | list):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(child, (*place, str(key)))
    else:
        yield place, tree


def write_yaml(data: Any) -> str:
    """`data` as a text that `read_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


class _Reader:
    """Turns events into a tree, counting."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._values = 0
        self._anchors: dict[str, tuple[Tree, int]] = {}

    def document(self) -> Tree:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return Scalar(None, "")
        tree = self._node(next(self._events), 0)
        next(self._events)  # the document's end
        if not isinstance(following := next(self._events), yaml.StreamEndEvent):
            raise _error(following, "a second document begins; keep one")
        return tree

    def _node(self, event: Any, depth: int) -> Tree:
        if depth > _DEEPEST:
            raise _error(event, f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(event, yaml.AliasEvent):
            # an anchor is known when its value is complete, so that there are no circles
            name = str(event.anchor)
            if name not in self._anchors:
                raise _error(event, f"*{shortened(name)} repeats no value that ends before it")
            original, size = self._anchors[name]
            self._count(event, size)
            return copy.deepcopy(original)
        before = self._values
        self._count(event, 1)
        tree: Tree
        if isinstance(event, yaml.ScalarEvent):
            tree = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            _require_tag(event, "tag:yaml.org,2002:seq")
            tree = [self._node(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        else:
            _require_tag(event, "tag:yaml.org,2002:map")
            tree = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (tree, self._values - before)
        return tree

    def _mapping(self, depth: int) -> dict[str, Tree]:
        mapping: dict[str, Tree] = {}
        merged: dict[str, Tree] = {}
        for event in self._until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _error(event, "a key has to be plain text")
            value = self._node(next(self._events), depth + 1)
            if event.value == "<<" and event.style is None:
                for source in value if isinstance(value, list) else [value]:
                    if not isinstance(source, dict):
                        raise _error(event, "<< takes over the keys of a mapping, and this is none")
                    merged = {**source, **merged}
            elif event.value in mapping:
                raise _error(event, f"{shortened(event.value)} is written twice; keep one")
            else:
                mapping[event.value] = value
        return {**merged, **mapping}

    def _until(self, end: type[yaml.Event]) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _count(self, event: Any, values: int) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _error(event, f"it has more than {_MOST_VALUES:,} values, aliases counted")


def _error(event: Any, reason: str) -> YamlTextError:
    return YamlTextError(f"line {event.start_mark.line + 1}: {reason}")


def _require_tag(event: Any, *allowed: str) -> None:
    if event.tag not in (None, "!", *allowed):
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        raise _error(event, f"the tag {shortened(tag)} is not for recipes; delete it")


def _scalar(event: Any) -> Scalar:
    _require_tag(event, "tag:yaml.org,2002:str")
    is_plain = event.style is None and event.tag is None
    value, surprise = _meaning(event.value) if is_plain else (event.value, "")
    return Scalar(value, event.value, event.start_mark.line + 1, surprise)


def _meaning(text: str) -> tuple[bool | int | float | str | None, str]:
    """What YAML 1.1 makes of unquoted text, and in which way that is a surprise."""
    if text in _WORDS:
        return _WORDS[text], ""
    digits = text.replace("_", "")
    for pattern, number, surprise in _NUMBERS:
        if re.fullmatch(pattern, text):
            if len(digits) > _MOST_DIGITS:
                return text, f"a number of {len(digits):,} characters"
            value = number(digits)
            return value, f"{value}, {surprise}" if surprise else ""
    return text, ""


class _Dumper(yaml.SafeDumper):
    """Quotes all text that would be read as something else."""

    def represent_text(self, text: str) -> yaml.Node:
        style = None if _meaning(text) == (text, "") else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

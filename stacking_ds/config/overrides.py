"""The keys of a recipe, and overrides of them: `--set section.key=value`."""

import difflib
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from stacking_ds.config.run import RunConfig
from stacking_ds.config.yaml_text import Scalar, Tree, YamlTextError, read_yaml
from stacking_ds.console import shortened

# what other programs call it, and no likeness of letters finds
_OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "global_batch_size",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "seq_len": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_layers": "num_hidden_layers",
    "max_steps": "steps",
}


def declared(path: Sequence[str]) -> Any:
    """The type of the key at `path`, None if there is no such key. A place in a list is a part of
    the path: ("stages", "0", "steps")."""
    return reduce(_inside, path, RunConfig)


def is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def meant(path: Sequence[str]) -> str:
    """Advice for a `path` whose last part is unknown: what to write instead."""
    *parents, leaf = path
    leaf = _OTHER_NAMES.get(leaf.lower(), leaf)
    section = _section(declared(parents))
    if section is None:
        return f"{'.'.join(parents)} has no keys of its own"
    elsewhere = [key for key in _all_keys(RunConfig) if key.split(".")[-1] == leaf]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    prefix = "".join(f"{part}." for part in parents)
    known = list(section.model_fields)
    if near := difflib.get_close_matches(leaf, known, n=1, cutoff=0.5):
        return f"did you mean {prefix}{near[0]}?"
    leaves = {key.split(".")[-1]: key for key in _all_keys(RunConfig)}
    if near := difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7):
        return f"did you mean {leaves[near[0]]}?"
    return f"known here: {', '.join(known)}"


def _section(kind: Any) -> Any:
    """The section among the choices of `kind`: one that may be null has a union of both."""
    choices = (kind, *get_args(kind)) if not is_list(kind) else ()
    return next((one for one in choices if hasattr(one, "model_fields")), None)


def _inside(kind: Any, part: str) -> Any:
    if is_list(kind):
        if not (part.isascii() and part.isdecimal()):
            return None
        element = get_args(kind)[0]
        return get_args(element)[0] if get_origin(element) is Annotated else element
    field = getattr(_section(kind), "model_fields", {}).get(part)
    return None if field is None else field.annotation


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind, place = field.annotation, f"{prefix}{name}"
        if is_list(kind) and (section := _section(get_args(kind)[0])):
            yield from _all_keys(section, f"{place}.0.")
        elif section := _section(kind):
            yield from _all_keys(section, f"{place}.")
        else:
            yield place


class OverrideError(ValueError):
    """An override that cannot be applied; the message goes after its text."""


class Override(NamedTuple):
    """An override that a recipe has taken: its text, and the key."""

    text: str
    path: tuple[str, ...]

    @classmethod
    def into(cls, tree: dict[str, Tree], text: str) -> "Override":
        """Put `key=value` into a recipe. Where the key takes text, the value is all that follows
        the first =, as it is; elsewhere it is YAML. Raises `OverrideError`: it has another form,
        names an unknown key or a place that a list does not have, or its value is not YAML."""
        key, separator, written = text.partition("=")
        if not separator:
            raise OverrideError("it has no =; write section.key=value")
        path = tuple(key.strip().split("."))
        if not all(path):
            raise OverrideError("its key is not complete; write section.key=value")
        for depth in range(len(path)):
            if declared(path[: depth + 1]) is None:
                raise _unknown(path[: depth + 1])
        *parents, leaf = path
        container: Any = tree
        value = _value(path, written if key == key.rstrip() else written.strip())
        for depth, part in enumerate(parents):
            place = _key(container, part, path[:depth])
            if isinstance(container, dict):
                child = container.get(part)
                if child is None or (isinstance(child, Scalar) and child.value is None):
                    container[part] = [] if is_list(declared(path[: depth + 1])) else {}
            container = container[place]
        container[_key(container, leaf, path[:-1])] = value
        return cls(text, path)


def _value(path: tuple[str, ...], written: str) -> Tree:
    if declared(path) is str:
        return Scalar(written, written)
    try:
        return read_yaml(written)
    except YamlTextError as error:
        reason = str(error).removeprefix("line 1: ")
        raise OverrideError(f"{shortened(written)} is not a YAML value ({reason})") from None


def _unknown(path: tuple[str, ...]) -> OverrideError:
    *parents, part = path
    if is_list(declared(parents)):
        return OverrideError(f"{shortened(part)} is not a position in the list {'.'.join(parents)}")
    return OverrideError(f"{shortened('.'.join(path))} is not a key; {meant(path)}")


def _key(container: Tree, part: str, path: tuple[str, ...]) -> str | int:
    """What leads from the container, which is at `path`, to its `part`."""
    if isinstance(container, dict):
        return part
    if isinstance(container, Scalar):
        raise OverrideError(
            f"the recipe has {'.'.join(path)}: {shortened(container.text)}, which holds no keys; "
            f"override that"
        )
    if not container:
        raise OverrideError("the recipe writes no such list; give the whole list, in brackets")
    if len(part) > 9 or not part.isdecimal() or int(part) >= len(container):
        raise OverrideError(
            f"{shortened(part)} is not one of the list's positions 0 to {len(container) - 1}"
        )
    return int(part)

"""Which keys a recipe has, of which type, and which one somebody may have meant."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

from stacking_ds.config.run import RunConfig

__all__ = ["declared", "is_list", "meant", "unknown_part"]

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
    kind: Any = RunConfig
    for part in path:
        kind = _inside(kind, part)
        if kind is None:
            return None
    return kind


def is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def unknown_part(path: Sequence[str]) -> int | None:
    """Which part of `path` is the first that no key has; None if all are known."""
    return next((n for n in range(len(path)) if declared(path[: n + 1]) is None), None)


def meant(path: Sequence[str]) -> str:
    """What to write instead of a `path` whose last part is unknown."""
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
    section = _section(kind)
    field = None if section is None else section.model_fields.get(part)
    return None if field is None else field.annotation


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if is_list(kind):
            inner, step = _section(get_args(kind)[0]), f"{prefix}{name}.0."
        else:
            inner, step = _section(kind), f"{prefix}{name}."
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _all_keys(inner, step)

"""Growth operators: pure maps from the layers of the deeper model to those of the shallower one.

old layers           0 1 2
stack, to 6          0 1 2 | 0 1 2          the whole encoder again on top of itself
stack, to 8          0 1 2 | 0 1 2 | 0 1    the last copy may be cut short, at its top
interleave, to 6     0 0 | 1 1 | 2 2        every layer repeated where it stands
"""

import difflib
from collections.abc import Callable, Mapping, Sequence

from stacking_ds.errors import StageError
from stacking_ds.model.bert_config import split_at_layer


def _stack(old_depth: int, new_depth: int) -> tuple[int, ...]:
    return tuple(new % old_depth for new in range(new_depth))


def _interleave(old_depth: int, new_depth: int) -> tuple[int, ...]:
    copies, rest = divmod(new_depth, old_depth)
    if rest:
        below = f"{copies * old_depth} or " if copies > 1 else ""
        raise StageError(
            f"interleave repeats every layer equally often, so {old_depth} layers do not reach "
            f"{new_depth}; make the depth {below}{(copies + 1) * old_depth}, or use the operator "
            f"stack, which reaches any larger depth"
        )
    return tuple(new // copies for new in range(new_depth))


OPERATORS: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "stack": _stack,
    "interleave": _interleave,
}


def layer_map(operator: str, old_depth: int, new_depth: int) -> tuple[int, ...]:
    """For each layer of the new model, bottom to top, the old layer it copies.

    `stack` is progressive stacking (Gong et al. 2019, §3.1: new layer j is old layer j mod L);
    `interleave` repeats each layer in place.

    Raises:
        StageError: no such operator, a depth that does not grow, or one it cannot reach.
    """
    if operator not in OPERATORS:
        near = difflib.get_close_matches(operator, OPERATORS, n=1, cutoff=0.0)[0]
        raise StageError(
            f"growth operator {operator!r} does not exist; there is: {', '.join(OPERATORS)} "
            f"(nearest: {near})"
        )
    if not 1 <= old_depth < new_depth:
        raise StageError(
            f"a stage of {new_depth} layers cannot grow from one of {old_depth}: each stage must "
            f"be deeper than the one before, here at least {max(old_depth, 1) + 1} layers"
        )
    return OPERATORS[operator](old_depth, new_depth)


def source_name(name: str, layers: Sequence[int] | None) -> str:
    """The old parameter that the new parameter `name` copies; itself outside the layers.

    Without `layers` nothing grows and every name stays.

    Raises:
        StageError: the layer is not one of the new model's.
    """
    found = split_at_layer(name)
    if found is None or layers is None:
        return name
    before, new, behind = found
    if new >= len(layers):
        raise StageError(f"{name} is not in a model grown to {len(layers)} layers")
    return f"{before}{layers[new]}{behind}"

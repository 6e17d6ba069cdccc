"""Parameter groups: the one grouping that makes stacking free, and which parameters decay.

ZeRO 1 and 2 flatten each parameter group and cut the flat buffer into equal parts, one a rank.
With groups of its own, a layer is cut the same way whatever stands beside it, so the part of new
layer i + L that a rank holds is the part of old layer i that it already held.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from stacking_ds.model.bert_config import split_at_layer

OUTSIDE = "outside"
_LAYER_PLACE = "layer."


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    *,
    always_adapt: bool = False,
) -> list[dict[str, Any]]:
    """One {decay, no decay} pair of groups for what is outside the layers, then one per layer.

    Biases and LayerNorm weights do not decay (Devlin et al. 2019, A.2, as their code has it), and
    LAMB does not adapt their learning rate (You et al. 2020, as their code has it) unless it is to
    `always_adapt`. A parameter that appears under several names belongs to the first. Empty groups
    are left out.

    Returns:
        For `torch.optim`: dicts of "params", "weight_decay", "layer_adaptation" and "name", the
        last being "outside/decay", "outside/no_decay", "layer.0/decay" and so on, in this order.
    """
    groups: dict[str, dict[str, Any]] = {}
    layers: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        place = place_of(name)
        layers[place] = -1 if place == OUTSIDE else int(place.removeprefix(_LAYER_PLACE))
        decays = _decays(name)
        group = groups.setdefault(
            f"{place}/{'decay' if decays else 'no_decay'}",
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "layer_adaptation": decays or always_adapt,
            },
        )
        group["params"].append(parameter)
    order = [
        f"{place}/{kind}"
        for place in sorted(layers, key=layers.__getitem__)
        for kind in ("decay", "no_decay")
    ]
    return [{**groups[name], "name": name} for name in order if name in groups]


def place_of(name: str) -> str:
    """The place of a parameter: "layer.3", or OUTSIDE of the layers."""
    found = split_at_layer(name)
    return f"{_LAYER_PLACE}{found[1]}" if found else OUTSIDE


def _decays(name: str) -> bool:
    # by name, not by shape: under ZeRO 3 a parameter may already be an empty placeholder
    return not (name.endswith("bias") or "LayerNorm" in name)

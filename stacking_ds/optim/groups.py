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
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        found, decays = split_at_layer(name), _decays(name)
        group = groups.setdefault(
            (found[1] if found else -1, not decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "layer_adaptation": decays or always_adapt,
                "name": f"{place_of(name)}/{'decay' if decays else 'no_decay'}",
            },
        )
        group["params"].append(parameter)
    return [groups[place] for place in sorted(groups)]


def place_of(name: str) -> str:
    """The place of a parameter: "layer.3", or OUTSIDE of the layers."""
    found = split_at_layer(name)
    return f"layer.{found[1]}" if found else OUTSIDE


def _decays(name: str) -> bool:
    # by name, not by shape: under ZeRO 3 a parameter may already be an empty placeholder
    return not (name.endswith("bias") or "LayerNorm" in name)

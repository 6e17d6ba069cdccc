"""LAMB's last step as metrics: norms, and trust ratios by layer."""

import math
import statistics
from collections.abc import Sequence

from stacking_ds.optim.groups import place_of
from stacking_ds.optim.lamb.optimizer import LambStatistics

__all__ = ["TRUST_RATIOS", "adapted_ratios", "lamb_metrics"]

TRUST_RATIOS = "optim/trust_ratio"


def lamb_metrics(found: LambStatistics) -> dict[str, float]:
    """`optim/weight_norm` and `optim/update_norm` over the whole model (the latter is that of what
    the step subtracted, learning rate included), and smallest, mean and largest trust ratio: over
    all parameters that are adapted, and over those of each layer, as in
    "optim/trust_ratio/layer.3/mean"."""
    metrics = {
        "optim/weight_norm": math.hypot(*found.weight_norms),
        "optim/update_norm": math.hypot(*found.update_norms),
    }
    by_place: dict[str, list[float]] = {}
    for name, ratio, adapted in zip(found.names, found.trust_ratios, found.adapted, strict=True):
        if adapted:
            by_place.setdefault(place_of(name), []).append(ratio)
    for place, ratios in [("all", adapted_ratios(found)), *by_place.items()]:
        metrics |= _spread(f"{TRUST_RATIOS}/{place}", ratios)
    return metrics


def adapted_ratios(found: LambStatistics) -> list[float]:
    """The ratios that were taken, those that are 1 by decree left out."""
    pairs = zip(found.trust_ratios, found.adapted, strict=True)
    return [ratio for ratio, adapted in pairs if adapted]


def _spread(name: str, ratios: Sequence[float]) -> dict[str, float]:
    if not ratios:
        return {}
    return {
        f"{name}/min": min(ratios),
        f"{name}/mean": statistics.fmean(ratios),
        f"{name}/max": max(ratios),
    }

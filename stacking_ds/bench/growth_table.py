"""The figures of `stacking-ds bench growth` for people: one table, and the targets."""

from collections.abc import Mapping, Sequence
from typing import Any

from stacking_ds.bench.growth import affine_fit, growth_ratio
from stacking_ds.bench.step_clock import how_timed
from stacking_ds.bench.targets import Target, grid

Figures = Mapping[str, Any]
"""What `bench growth` has measured: "machine", "device", and what `measure_growth` returns."""

_BASE_HIDDEN_SIZE = 768
_MOST_OUTSIDE = 0.15


def growth_targets(figures: Figures) -> list[Target]:
    """What was promised of the cost of depth, one row each, measured or not."""
    seconds = _seconds(figures)
    shallow, middle, deep = sorted(seconds)
    name = f"(t{deep} - t{middle}) / (t{middle} - t{shallow})"
    ratio = growth_ratio(seconds)
    # twice as many layers are added the second time, wherever the depth doubles twice
    expected = (deep - middle) / (middle - shallow)
    return [
        Target(name, ">=", 0.95 * expected, ratio, ""),
        Target(name, "<=", 1.05 * expected, ratio, ""),
        _outside_target(figures, seconds),
        _plain_target(figures),
    ]


def _outside_target(figures: Figures, seconds: Mapping[int, float]) -> Target:
    share = affine_fit(seconds)[0] / seconds[max(seconds)]
    is_base = figures["hidden_size"] == _BASE_HIDDEN_SIZE and max(seconds) == 12
    name = "embedding, head and their update: share of the deepest step"
    note = "" if is_base else f"promised of BERT-base; here it is {share:.0%}"
    return Target(name, "<=", _MOST_OUTSIDE, share if is_base else None, note)


def _plain_target(figures: Figures) -> Target:
    name = "time in the engine / plain loop, at the worst depth"
    ratios = [
        _time(depth, "engine") / _time(depth, "plain")
        for depth in figures["depths"]
        if "plain" in depth
    ]
    note = "" if ratios else f"the plain loop is fp32, these engines are {figures['precision']}"
    return Target(name, "<=", 1.05, max(ratios, default=None), note)


def _seconds(figures: Figures, who: str = "engine") -> dict[int, float]:
    return {depth["layers"]: _time(depth, who) for depth in figures["depths"]}


def _time(depth: Figures, who: str) -> float:
    return float(depth[who]["step_seconds"])


def growth_table(figures: Figures) -> str:
    """All of it, as text."""
    seconds = _seconds(figures)
    outside, layer = affine_fit(seconds)
    clock = how_timed(figures["device"], figures["keeps_memory"])
    return "\n\n".join(
        [
            f"One training step at each depth: hidden size {figures['hidden_size']}, vocabulary "
            f"{figures['vocab_size']:,}; {figures['micro_steps']} x {figures['rows']} full rows of "
            f"{figures['sequence_length']},\n{figures['precision']}, AdamW at ZeRO "
            f"{figures['zero_stage']}, dropout 0.1; matmul peak "
            f"{figures['peak_flops_per_second'] / 1e12:.3g} TFLOP/s;\n{clock} of "
            f"{figures['rounds']} rounds in which all take turns.",
            "\n".join(f"{key}: {value}" for key, value in figures["machine"].items()),
            _depths(figures["depths"], outside, layer),
            f"{1e3 * outside:,.1f} ms + {1e3 * layer:,.1f} ms a layer: "
            f"{outside / seconds[max(seconds)]:.0%} of the deepest step is outside the layers",
            "\n".join(target.line() for target in growth_targets(figures)),
        ]
    )


def _depths(depths: Sequence[Figures], outside: float, layer: float) -> str:
    rows = []
    for depth in depths:
        seconds, plain = _time(depth, "engine"), depth.get("plain")
        rows.append(
            [
                f"{depth['layers']} layers",
                f"{depth['parameters'] / 1e6:.1f}",
                f"{1e3 * seconds:,.1f}",
                f"{1e3 * (outside + layer * depth['layers']):,.1f}",
                f"{depth['engine']['tokens_per_second']:,.0f}",
                f"{100 * depth['engine']['model_flops_utilization']:.1f}",
                "-" if plain is None else f"{1e3 * plain['step_seconds']:,.1f}",
                "-" if plain is None else f"{seconds / plain['step_seconds']:.3f}",
            ]
        )
    head = ["", "M parameters", "ms", "line's ms", "tokens/s", "% of peak", "plain ms", "/ plain"]
    return grid(head, rows)

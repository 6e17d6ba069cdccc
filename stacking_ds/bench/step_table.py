"""The figures of `stacking-ds bench step` for people: a table a case, and the targets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stacking_ds.bench.step_clock import how_timed
from stacking_ds.bench.targets import Target, grid

Figures = Mapping[str, Any]
"""What `bench step` has measured: "machine", "device" ("cpu" or "cuda"), "cases" as
`measure_cases` has them, and "accumulation" as `measure_accumulation` has it."""

_LABELS = {
    "ours": "ours",
    "transformers": "transformers, SDPA, same engine",
    "compile": "ours, layers compiled by torch",
    "plain": "ours in a plain torch loop",
    "zero0": "ours, at ZeRO 0",
    "dense": "ours, full rows of as many tokens",
}
_LENGTH = 128
_PROMISED = "promised of 4 layers, hidden size 256, rows of 128, ZeRO 1"
_ALL_MODELS = ("base-3L", "base-6L", "base-12L", "large-24L")
_UTILIZATION = {"base-3L": 0.42, "base-12L": 0.48, "large-24L": 0.55}
_AGAINST_TRANSFORMERS = {"base-3L": 1.8, "base-6L": 1.5, "base-12L": 1.35, "large-24L": 1.15}


def step_targets(figures: Figures) -> list[Target]:
    """What was promised of the step, one row each, measured or not."""
    on_gpu, cases = figures["device"] == "cuda", figures["cases"]
    is_promised = not on_gpu and figures["zero_stage"] == 1
    why = "hide the GPUs for it" if on_gpu else ""
    return [
        *_cpu_targets(cases if is_promised else [], why),
        _accumulation_target(figures["accumulation"]),
        *_gpu_targets(cases if on_gpu else [], "" if on_gpu else "no GPU"),
    ]


def _cpu_targets(cases: Sequence[Figures], why: str) -> list[Target]:
    usual = [case for case in cases if case["sequence_length"] == _LENGTH]
    full, filled = _where(usual, "small", True), _where(usual, "small", False)
    why = why or ("" if full or filled else _PROMISED)
    speed = _ratio_of("tokens_per_second")
    return [
        _worst("CPU: fp32, full rows: ours / transformers, tokens/s", ">=", 2.3, full,
               lambda case: speed(case, "ours", "transformers"), why),
        _worst("CPU: bf16, filled rows: ours / transformers, tokens/s", ">=", 2.5, filled,
               lambda case: speed(case, "ours", "transformers"), why),
        _worst("CPU: time of a token, filled rows / full rows of as many tokens", "<=", 1.08,
               filled, lambda case: speed(case, "dense", "ours"), why),
        _worst("CPU: fp32, full rows: time in the engine at ZeRO 0 / plain loop", "<=", 1.05, full,
               lambda case: speed(case, "plain", "zero0"), why),
        _worst("CPU: fp32, full rows: time in the engine / plain loop", "<=", 1.05, full,
               lambda case: speed(case, "plain", "ours"), why),
    ]  # fmt: skip


def _accumulation_target(found: Figures) -> Target:
    value = None
    if "step_seconds" in found:
        value = found["step_seconds"] / found["expected_seconds"]
    name = "CPU: time of a step / a step of one micro-step and the others"
    return Target(name, "<=", 1.02, value, found.get("not_measured", ""))


def _gpu_targets(cases: Sequence[Figures], why: str) -> list[Target]:
    speed = _ratio_of("tokens_per_second")
    rows = [
        _worst(f"GPU: {model}: share of the measured matmul peak", ">=", limit,
               _where(cases, model, True), _utilization, why)
        for model, limit in _UTILIZATION.items()
    ]  # fmt: skip
    rows += [
        _worst(f"GPU: {model}: full rows: ours / transformers, tokens/s", ">=", limit,
               _where(cases, model, True), lambda case: speed(case, "ours", "transformers"), why)
        for model, limit in _AGAINST_TRANSFORMERS.items()
    ]  # fmt: skip
    full = {(case["model"], case["sequence_length"]): case for case in cases if case["is_full"]}

    def further(case: Figures) -> float | None:
        same = full.get((case["model"], case["sequence_length"]))
        at_fill = speed(case, "ours", "transformers")
        at_full = speed(same, "ours", "transformers") if same else None
        return at_fill / at_full if at_fill and at_full else None

    judged = [case for case in cases if case["model"] in _ALL_MODELS]
    filled = [case for case in judged if not case["is_full"]]
    return [
        *rows,
        _worst("GPU: ours / transformers at filled rows / the same at full rows", ">=", 1.3,
               filled, further, why),
        _worst("GPU: ours / ours with layers compiled by torch, tokens/s", ">=", 1.0, judged,
               lambda case: speed(case, "ours", "compile"), why),
    ]  # fmt: skip


def _where(cases: Iterable[Figures], model: str, is_full: bool) -> list[Figures]:
    return [case for case in cases if case["model"] == model and case["is_full"] == is_full]


def _ratio_of(key: str) -> Callable[[Figures, str, str], float | None]:
    """Of a case: one's figure over another's, None where one of them has none."""

    def ratio(case: Figures, one: str, other: str) -> float | None:
        above, below = (case["steps"].get(name, {}).get(key) for name in (one, other))
        return above / below if above and below else None

    return ratio


def _utilization(case: Figures) -> float | None:
    value: float | None = case["steps"].get("ours", {}).get("model_flops_utilization")
    return value


def _worst(
    name: str,
    relation: str,
    limit: float,
    cases: Sequence[Figures],
    value_of: Callable[[Figures], float | None],
    why: str,
) -> Target:
    """The target for the case that is furthest from it; the note says which one, and why others
    have no figure."""
    found = {case["name"]: value_of(case) for case in cases}
    values = {case: value for case, value in found.items() if value is not None}
    if not values:
        return Target(name, relation, limit, None, why or _reason(cases) or "left out")
    pick = min if relation == ">=" else max
    worst = pick(values, key=lambda case: values[case])
    missing = [case for case in found if case not in values]
    note = worst
    if missing:
        note = f"{worst}; without {', '.join(missing)}"
    return Target(name, relation, limit, values[worst], note)


def _reason(cases: Sequence[Figures]) -> str:
    reasons = [
        f"{_LABELS[name]}: {step['not_measured']}"
        for case in cases
        for name, step in case["steps"].items()
        if "not_measured" in step
    ]
    return reasons[0] if reasons else ""


# ------------------------------------------------------------------------------- text


def step_table(figures: Figures) -> str:
    """All of it, as text."""
    how = how_timed(figures["device"], figures["keeps_memory"])
    return "\n\n".join(
        [
            "One training step of a BERT: forward and backward of its micro-steps, clipping and "
            f"AdamW at ZeRO {figures['zero_stage']}, dropout 0.1;\n{how} of {figures['rounds']} "
            "rounds in which all take turns; tokens without padding, MLM on 15 % of them.",
            "\n".join(f"{key}: {value}" for key, value in figures["machine"].items()),
            *(_case(case) for case in figures["cases"]),
            _accumulation(figures["accumulation"]),
            "\n".join(target.line() for target in step_targets(figures)),
        ]
    )


def _case(case: Figures) -> str:
    speed = _ratio_of("tokens_per_second")
    rows, reasons = [], []
    for name, step in case["steps"].items():
        if "not_measured" in step:
            reasons.append(f"{_LABELS[name]}: not measured: {step['not_measured']}")
            continue
        against = speed(case, name, "transformers")
        rows.append(
            [
                _LABELS[name],
                f"{step['tokens']:,}",
                f"{1e3 * step['step_seconds']:,.1f}",
                f"{step['tokens_per_second']:,.0f}",
                f"{100 * step['model_flops_utilization']:.1f}",
                "-" if against is None else f"{against:.2f}",
            ]
        )
    head = ["", "tokens", "ms", "tokens/s", "% of peak", "x transformers"]
    peak = case["peak_flops_per_second"] / 1e12
    return (
        f"{case['name']}: {case['layers']} layers, hidden size {case['hidden_size']}, vocabulary "
        f"{case['vocab_size']:,}; {case['micro_steps']} x {case['rows']} rows of "
        f"{case['sequence_length']}, {case['fill']:.0%} filled; {case['precision']}, matmul peak "
        f"{peak:,.3g} TFLOP/s\n" + "\n".join([*([grid(head, rows)] if rows else []), *reasons])
    )


def _accumulation(found: Figures) -> str:
    if "not_measured" in found:
        return f"Gradient accumulation: not measured: {found['not_measured']}"
    return (
        f"Gradient accumulation: the parts of a step of {found['micro_steps']} micro-steps add up "
        f"to {1e3 * found['step_seconds']:,.1f} ms; those of a step of one "
        f"({1e3 * found['step_of_one_seconds']:,.1f} ms) and {found['micro_steps'] - 1} further "
        f"micro-steps ({1e3 * found['micro_step_seconds']:,.1f} ms each) to "
        f"{1e3 * found['expected_seconds']:,.1f} ms"
    )

"""The figures of `stacking-ds bench data` for people: a table a part, and the targets."""

from collections.abc import Mapping
from typing import Any

from stacking_ds.bench.targets import Target, grid

Figures = Mapping[str, Any]
"""By part, what its `measure_…` returns, or {"not_measured": why}."""

_MOST_GROWTH = 1.1


def data_targets(figures: Figures) -> list[Target]:
    """What was promised, one row each, measured or not."""
    prepare, memory = figures["prepare"], figures["memory"]
    masking, loader = figures["masking"], figures["loader"]
    speed = None if "hf" not in prepare else _least(prepare, "hf") / _least(prepare, "ours")
    growth = None
    if "whole" in memory:
        growth = memory["fourfold"]["peak_gib"] / memory["whole"]["peak_gib"]
    tokens = min(masking.get("tokens_per_second", {}).get("tokens", {}).values(), default=None)
    loaded = min((case["wall_tokens_per_second"] for case in _by_token(loader)), default=None)
    fill = min(
        (case["fill"] for case in _by_token(loader) if case["sequence_length"] == 512),
        default=None,
    )
    return [
        Target("prepare: usual path's wall time / ours", ">=", 2, speed, _why(prepare)),
        Target(
            "prepare: peak memory, four times the corpus / once", "<=", _MOST_GROWTH, growth,
            _why(memory),
        ),
        Target("masking tokens: tokens/s of one thread", ">=", 50e6, tokens, _why(masking)),
        Target("loader: real tokens/s, packed and masked", ">=", 6e6, loaded, _why(loader)),
        Target("loader: fill of packed rows of 512 slots", ">=", 0.98, fill, _why(loader)),
    ]  # fmt: skip


def data_table(figures: Figures, machine: Mapping[str, str]) -> str:
    """All of it, as text."""
    parts = (
        ("Preparing", figures["prepare"], _prepare),
        ("Memory", figures["memory"], _memory),
        ("Masking", figures["masking"], _masking),
        ("Loading", figures["loader"], _loader),
    )
    return "\n\n".join(
        [
            "\n".join(f"{key}: {value}" for key, value in machine.items()),
            *(
                f"{title}: " + (f"not measured: {_why(found)}" if _why(found) else text(found))
                for title, found, text in parts
            ),
            "\n".join(target.line() for target in data_targets(figures)),
        ]
    )


def _why(found: Figures) -> str:
    return str(found.get("not_measured", ""))


def _by_token(loader: Figures) -> list[Figures]:
    return [case for case in loader.get("cases", ()) if case["masking"] == "tokens"]


def _least(found: Figures, name: str, key: str = "wall_seconds") -> float:
    return min(float(one[key]) for one in found[name])


def _prepare(found: Figures) -> str:
    megabytes = found["text_bytes"] / 1e6
    ours = _least(found, "ours")
    rows = [
        [
            label,
            f"{_least(found, name):.1f}",
            f"{megabytes / _least(found, name):.1f}",
            f"{_least(found, name, 'cpu_seconds'):.1f}",
            f"{megabytes / _least(found, name, 'cpu_seconds'):.1f}",
            f"{_least(found, name) / ours:.2f}",
            f"{max(one['peak_gib'] for one in found[name]):.2f}",
        ]
        for name, label in (
            ("ours", "stacking-ds prepare"),
            ("hf", "datasets.map, group_texts, save"),
        )
    ]
    head = ["", "wall s", "MB/s", "CPU s", "MB/s and core", "/ ours", "GiB, largest process"]
    return (
        f"{megabytes:.1f} MB of text in {found['documents']:,} documents, {found['workers']} "
        f"processes; start of Python included,\nleast of {found['rounds']} rounds in which both "
        f"take turns\n" + grid(head, rows)
    )


def _memory(found: Figures) -> str:
    rows = [
        [
            label,
            f"{found[f'{name}_bytes'] / 1e6:.1f}",
            f"{found[name]['peak_gib']:.3f}",
        ]
        for name, label in (("whole", "the corpus"), ("fourfold", "four times as much"))
    ]
    return f"of the process that needs most while preparing, {found['workers']} processes\n" + grid(
        ["", "MB", "peak GiB"], rows
    )


def _masking(found: Figures) -> str:
    speeds = found["tokens_per_second"]
    lengths = sorted(next(iter(speeds.values())), key=int)
    rows = [
        [name, *(f"{each[length] / 1e6:.0f}" for length in lengths)]
        for name, each in speeds.items()
    ]
    return (
        f"million tokens/s of one thread, {found['tokens']:,} tokens at once; examples of\n"
        + grid(["", *lengths], rows)
    )


def _loader(found: Figures) -> str:
    rows = [
        [
            f"{case['sequence_length']}, {case['masking']}",
            str(case["rows"]),
            f"{100 * case['fill']:.1f}",
            f"{case['wall_tokens_per_second'] / 1e6:.1f}",
            f"{case['cpu_tokens_per_second'] / 1e6:.1f}",
        ]
        for case in found["cases"]
    ]
    head = ["slots, masking", "rows a step", "fill %", "loaded", "built by one process"]
    return (
        f"million real tokens/s: out of the loader with {found['workers']} workers, by the "
        f"clock,\nand built by one process in its own CPU time; packed pairs\n" + grid(head, rows)
    )

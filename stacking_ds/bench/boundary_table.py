"""The figures of `stacking-ds bench boundary` for people: three tables, and the targets."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Case = Mapping[str, Any]
"""What `measure_boundary` returns."""

_MB = 1e6


class Target(NamedTuple):
    """A figure that must not be above `limit`; `worst` is the largest, in the case `where`."""

    name: str
    limit: float
    worst: float
    where: str

    @property
    def met(self) -> bool:
        return self.worst <= self.limit

    def line(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        return f"{self.name}: target <= {self.limit:g}: {self.worst:.3g} {verdict} ({self.where})"


def boundary_targets(cases: Sequence[Case]) -> list[Target]:
    """What was promised of a boundary; a figure that could not be measured is left out."""
    sharded = [case for case in cases if case["zero_stage"] > 0]
    found = [
        _worst("MB of state that leave a rank at ZeRO 1, 2, 3", 0, sharded, _moved_mb),
        _worst("peak host memory / (captured + new engine)", 1.1, cases, _peak_ratio),
        _worst("capture + install / save + load, old depth", 0.5, cases, _install_ratio),
        _worst("capture + install / save + load, grown depth", 0.5, cases, _install_ratio_grown),
        _worst("whole boundary / the way through the disk", 0.8, cases, _boundary_ratio),
        _worst("whole boundary / one step of the grown model", 1, cases, _step_ratio),
        *(_falling(stage, sharded) for stage in sorted({case["zero_stage"] for case in sharded})),
    ]
    return [target for target in found if target is not None]


def _worst(
    name: str, limit: float, cases: Sequence[Case], value_of: Callable[[Case], float | None]
) -> Target | None:
    values = [(value_of(case), f"ZeRO {case['zero_stage']}, {_ranks(case)}") for case in cases]
    known = [(value, where) for value, where in values if value is not None]
    if not known:
        return None
    worst, where = max(known)
    return Target(name, limit, worst, where if len(known) == 1 else f"worst at {where}")


def _falling(zero_stage: int, cases: Sequence[Case]) -> Target | None:
    """Our peak with most ranks against that with fewest; it has to fall at each step between."""
    here = sorted((c for c in cases if c["zero_stage"] == zero_stage), key=lambda c: c["ranks"])
    peaks = [_peak_mb(case, "ours") for case in here]
    if len(peaks) < 2:
        return None
    ratio = max(after / before for before, after in pairwise(peaks))
    gathered = ", ".join(f"{_peak_mb(case, 'gathering'):.0f}" for case in here)
    where = f"{', '.join(f'{peak:.0f}' for peak in peaks)} MB; gathering {gathered} MB"
    name = f"peak at ZeRO {zero_stage} / peak with a rank less"
    return Target(name, 1, ratio, where)


def _ranks(case: Case) -> str:
    return f"{case['ranks']} rank{'s' if case['ranks'] > 1 else ''}"


def _moved_mb(case: Case) -> float:
    return float(case["ours"]["sent_bytes"].get("state moved", 0)) / _MB


def _peak_mb(case: Case, way: str) -> float:
    return float(case[way]["peak_bytes"]["minimum"]) / _MB


def _peak_ratio(case: Case) -> float | None:
    ratio = case["ours"]["peak_ratio"]
    return None if ratio is None else float(ratio["minimum"])


def _seconds(case: Case, way: str, name: str) -> float:
    return float(case[way]["seconds"][name]["minimum"])


def _install_ratio(case: Case) -> float:
    ours = _seconds(case, "ours", "capture + install")
    return ours / _seconds(case, "through_disk", "save + load")


def _install_ratio_grown(case: Case) -> float:
    ours = _seconds(case, "ours", "capture + install")
    return ours / _seconds(case, "through_disk", "save + load grown")


def _boundary_ratio(case: Case) -> float:
    return _seconds(case, "ours", "boundary") / _seconds(case, "through_disk", "boundary")


def _step_ratio(case: Case) -> float:
    return _seconds(case, "ours", "boundary") / _seconds(case, "ours", "step")


# ------------------------------------------------------------------------------- text


def boundary_table(cases: Sequence[Case], machine: Mapping[str, str], rounds: int) -> str:
    """All of it, as text."""
    case = cases[0]
    old, new = (f"{count / 1e6:.1f} M" for count in case["parameters"])
    return "\n\n".join(
        [
            f"A boundary from {case['layers']} to {case['new_layers']} layers ({old} to {new} "
            f"parameters): hidden size {case['hidden_size']}, vocabulary {case['vocab_size']:,}, "
            f"{case['precision']}, moments carried.\n"
            f"Best of {rounds} rounds, in which our boundary, gathering and the way through the "
            f"disk take turns; of the ranks the slowest or largest. MB = 10^6 bytes.",
            "\n".join(f"{key}: {value}" for key, value in machine.items()),
            _bytes_table(cases),
            _memory_table(cases),
            _time_table(cases),
            "\n".join(target.line() for target in boundary_targets(cases)),
        ]
    )


def _bytes_table(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        ours = case["ours"]["sent_bytes"]
        counted = ("state moved", "checksums", "install", "build")
        rest = sum(size for label, size in ours.items() if label not in counted)
        gathering = case.get("gathering", {}).get("sent_bytes")
        rows.append(
            [
                *(ours.get(label, 0) for label in counted),
                rest,
                case["ours"]["written_bytes"],
                case["through_disk"]["sent_bytes"].get("initialize", 0),
                sum(gathering.values()) if gathering else None,
            ]
        )
    head = ("state moved", "checksums", "refresh", "our build", "other", "as the kernel counts",
            "stock initialize", "gathering, in all")  # fmt: skip
    return (
        "MB that leave a rank: the boundary in its parts, and as the kernel counts what the "
        "process writes;\nbeside it what stock deepspeed.initialize sends, and the whole way by "
        "gathering\n" + _grid(cases, head, [[_mb(cell) for cell in row] for row in rows])
    )


def _memory_table(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        ours, ratio = case["ours"], _peak_ratio(case)
        rows.append(
            [
                f"{_peak_mb(case, 'ours'):.0f}",
                f"{_peak_mb(case, 'gathering'):.0f}" if "gathering" in case else "-",
                _mb(ours["captured_bytes"], 0),
                _mb(ours["engine_bytes"], 0),
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        )
    head = ("ours", "gathering", "captured", "new engine", "peak / (captured + new engine)")
    return (
        "MB of host memory: peak of a rank above the start of the boundary; what ours has to hold, "
        "and its peak\nabove a process without engines against that\n" + _grid(cases, head, rows)
    )


def _time_table(cases: Sequence[Case]) -> str:
    phases = ("capture", "release", "build", "install", "boundary")
    rows = [
        [
            *(f"{_seconds(case, 'ours', name):.2f}" for name in phases),
            f"{_seconds(case, 'through_disk', 'save + load'):.2f}",
            f"{_seconds(case, 'through_disk', 'save + load grown'):.2f}",
            f"{_seconds(case, 'through_disk', 'boundary'):.2f}",
            f"{_seconds(case, 'gathering', 'boundary'):.2f}" if "gathering" in case else "-",
            f"{_seconds(case, 'ours', 'step'):.2f}",
            f"{_install_ratio(case):.2f}",
            f"{_install_ratio_grown(case):.2f}",
            f"{_boundary_ratio(case):.2f}",
            f"{_step_ratio(case):.2f}",
        ]
        for case in cases
    ]
    head = (*phases, "save + load", "save + load grown", "through disk", "gathering", "step",
            "a", "a'", "b", "c")  # fmt: skip
    return (
        "seconds: our boundary in its phases; DeepSpeed's save_checkpoint + load_checkpoint of the "
        "old depth\n(it cannot load into another; with a load of the grown depth beside it); that "
        "of the old depth with release,\nmodel and deepspeed.initialize between; gathering; one "
        f"step of the grown model on {cases[0]['global_batch_size']} sequences of "
        f"{cases[0]['sequence_length']} tokens\n"
        "a = (capture + install) / (save + load), a' = the same / (save + load grown), "
        "b = boundary / through disk, c = boundary / step\n" + _grid(cases, head, rows)
    )


def _mb(size: float | None, digits: int = 2) -> str:
    return "-" if size is None else f"{size / _MB:.{digits}f}"


def _grid(cases: Sequence[Case], head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    lines = [["ZeRO", "ranks", *head]]
    for case, row in zip(cases, rows, strict=True):
        lines.append([str(case["zero_stage"]), str(case["ranks"]), *row])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)

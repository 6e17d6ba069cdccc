"""Write what `make gpu-check` found: gpu-check.json for machines, gpu-check.md for people."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Report", "Result"]

COMMAND = "make gpu-check"
ELSEWHERE = ("targets", "as_measured")
SHORT = 30  # characters of a value that stands with others in a line


@dataclass(frozen=True)
class Result:
    """One part: how it went, its figures, and the end of its output if it failed."""

    name: str
    status: Literal["passed", "failed", "not run"]
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Plain values; a list of mappings with the same keys becomes a table. "targets" of all parts
    become one; "as_measured" is for the JSON alone."""
    reason: str = ""
    """Why it failed or was not run."""
    output: str = ""


@dataclass(frozen=True)
class Report:
    """All parts on one machine; `machine` says card, driver and versions."""

    date: str
    commit: str
    machine: Mapping[str, str]
    seconds: float
    results: Sequence[Result]

    @property
    def passed(self) -> bool:
        return all(result.status == "passed" for result in self.results)

    def write(self, folder: Path) -> None:
        """`gpu-check.json` and `gpu-check.md` in `folder`, each whole or as it was before."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"command": COMMAND, "passed": self.passed, **asdict(self)}
        _replace(folder / "gpu-check.json", json.dumps(content, indent=1) + "\n")
        _replace(folder / "gpu-check.md", self.markdown())

    def markdown(self) -> str:
        lines = [
            f"# {self.machine['card']}, {self.date}, commit {self.commit}, `{COMMAND}`",
            "",
            f"{'Passed' if self.passed else 'NOT passed'} in {self.seconds:.0f} s.",
            "",
            ", ".join(f"{name} {value}" for name, value in self.machine.items()),
            "",
            *_table(
                [
                    {"part": r.name, "result": r.status, "s": f"{r.seconds:.1f}", "why": r.reason}
                    for r in self.results
                ]
            ),
        ]
        lines += _targets(self.targets())
        for result in self.results:
            if result.output or result.figures.keys() - set(ELSEWHERE):
                lines += ["", f"## {result.name}", *_section(result)]
        return "\n".join(lines) + "\n"

    def targets(self) -> list[Mapping[str, Any]]:
        """Of all parts; what one part did not measure and another did is told once."""
        found: dict[tuple[str, str], Mapping[str, Any]] = {}
        for result in self.results:
            for row in result.figures.get("targets", ()):
                key = row["target"], row["should_be"]
                is_first = key not in found or found[key]["is"] == "-"
                if is_first or row["verdict"].startswith("MISSED"):  # no later part makes it good
                    found[key] = row
        return list(found.values())


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that were measured in a table, the others by the reason why not."""
    measured = [row for row in rows if row["is"] != "-"]
    missed = sum(row["verdict"].startswith("MISSED") for row in measured)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["is"] == "-":
            reasons.setdefault(row["verdict"], []).append(row["target"])
    if not rows:
        return []
    return [
        *("", "## Targets", "", f"{len(measured) - missed} met, {missed} missed."),
        *([""] if measured else []),
        *(_table(measured) if measured else []),
        *([""] if reasons else []),
        *(f"- {why}: {'; '.join(names)}" for why, names in reasons.items()),
    ]


def _section(result: Result) -> list[str]:
    lines: list[str] = []
    single: list[str] = []
    for name, value in result.figures.items():
        if name in ELSEWHERE or value == []:
            continue
        if isinstance(value, list) and isinstance(value[0], Mapping):
            lines += ["", f"{_words(name)}:", "", *_table(value)]
        elif isinstance(value, list) or len(str(value)) > SHORT:
            lines += ["", f"{_words(name)}: {_shown(value)}"]
        else:
            single.append(f"{_words(name)}: {_shown(value)}")
    if single:
        lines = ["", "; ".join(single), *lines]
    if result.output:
        lines += ["", "```text", result.output.replace("```", "'''"), "```"]
    return lines


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Its columns line up as plain text too; those of numbers alone to the right."""
    names = list(rows[0])
    columns = [[_words(name), *(_shown(row[name]) for row in rows)] for name in names]
    right = [all(_is_number(row[name]) for row in rows) for name in names]
    widths = [max(3, *map(len, column)) for column in columns]
    aligned = [
        [cell.rjust(width) if is_right else cell.ljust(width) for cell in column]
        for column, width, is_right in zip(columns, widths, right, strict=True)
    ]
    rules = [
        "-" * (width - is_right) + ":" * is_right
        for width, is_right in zip(widths, right, strict=True)
    ]
    head, *body = zip(*aligned, strict=True)
    return [f"| {' | '.join(row)} |" for row in (head, rules, *body)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value == "-"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""Write what `make gpu-check` found: gpu-check.json for machines, gpu-check.md for people."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Report", "Result"]

COMMAND = "make gpu-check"


@dataclass(frozen=True)
class Result:
    """One part: how it went, its figures, and the end of its output if it failed."""

    name: str
    status: Literal["passed", "failed", "not run"]
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Plain values; a list of mappings with the same keys becomes a table."""
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
        for result in self.results:
            if result.figures or result.output:
                lines += ["", f"## {result.name}", *_section(result)]
        return "\n".join(lines) + "\n"


def _section(result: Result) -> list[str]:
    lines = []
    for name, value in result.figures.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += ["", *_table(value)]
        else:
            lines += ["", f"{_words(name)}: {_shown(value)}"]
    if result.output:
        lines += ["", "```text", result.output.replace("```", "'''"), "```"]
    return lines


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[_words(name) for name in rows[0]], ["---"] * len(rows[0])]
    cells += [[_shown(value) for value in row.values()] for row in rows]
    return [f"| {' | '.join(row)} |" for row in cells]


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

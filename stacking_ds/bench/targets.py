"""What a bench promises, whether it was kept, and its figures in columns."""

from collections.abc import Sequence
from typing import NamedTuple


class Target(NamedTuple):
    """A figure, and what it should be; `value` is None where it was not measured, and `note` then
    says why."""

    name: str
    relation: str
    limit: float
    value: float | None
    note: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self._holds(self.value) else "MISSED"

    def _holds(self, value: float) -> bool:
        if self.relation == "=":
            return value == self.limit
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def line(self) -> str:
        value = "" if self.value is None else f"{self.value:.3g} "
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: target {self.relation} {self.limit:g}: {value}{self.verdict}{note}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; the first one holds names."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)

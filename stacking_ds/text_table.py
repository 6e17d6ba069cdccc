"""Sizes and columns for people."""

from collections.abc import Sequence

__all__ = ["aligned", "readable_size"]


def readable_size(size_bytes: int) -> str:
    """In the largest binary unit that gives at least one."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size_bytes >= 1024**power:
            return f"{size_bytes / 1024**power:,.2f} {unit}"
    return f"{size_bytes} bytes"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines with the columns `left` aligned to the left, the others, numbers, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

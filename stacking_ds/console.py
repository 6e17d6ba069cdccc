"""Sizes, columns, and lists and values of any length, for people."""

from collections.abc import Sequence


def first_of(names: Sequence[object], most: int = 5, between: str = ", ") -> str:
    """The first `most` of the names, and how many more there are."""
    more = len(names) - most
    return between.join(map(str, names[:most])) + (f" and {more:,} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """The count with its noun, which takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def join_names(names: Sequence[str]) -> str:
    """The first three as a sentence lists them, and how many more there are."""
    first, more = list(names[:3]), len(names) - 3
    if more > 0:
        return f"{', '.join(first)} and {more:,} more"
    return " and ".join(filter(None, (", ".join(first[:-1]), first[-1])))


def shortened(value: str, most: int = 80) -> str:
    """The value for a message: in one line, without control characters, and cut off where it is
    longer than `most` characters."""
    cut = value if len(value) <= most else f"{value[: most - 3]}..."
    return cut if cut.isprintable() else repr(cut)[1:-1]


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

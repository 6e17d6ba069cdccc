"""The console: lines that are said, sizes, columns and lists for people, names that are not UTF-8.

Python keeps the bytes of a name that it cannot decode as lone surrogates, which nothing can print
or keep in JSON.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stacking_ds.errors import ConfigError


def say(text: str) -> None:
    """Print to stdout at once. Where its reader has read enough (`| head`) the rest goes nowhere:
    the exit code is still to come, and other ranks may wait."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_on_stderr(text: str) -> None:
    """Print to stderr at once, or nowhere if the launcher or terminal that read it is gone."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def end_streams() -> None:
    """Flush stdout and stderr. What a reader or a terminal that is gone has not taken goes nowhere,
    where Python would end with exit code 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def first_of(names: Sequence[object], most: int = 5, between: str = ", ") -> str:
    """The first `most` of the names, and how many more there are."""
    more = len(names) - most
    return between.join(map(str, names[:most])) + (f" and {more:,} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """The count with its noun, which takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def join_names(names: Sequence[str]) -> str:
    """The first three as a sentence lists them, and how many more there are."""
    if len(names) > 3:
        return first_of(names, 3)
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


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


def is_utf8(name: str | Path) -> bool:
    """True if the name can be written as text."""
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def readable_name(name: str | Path) -> str:
    """The name as a person may read it: what is not UTF-8 as `\\xe9`."""
    if is_utf8(name):
        return str(name)
    return os.fsencode(str(name)).decode("utf-8", errors="backslashreplace")


def check_names(words: Sequence[str]) -> None:
    """Check the words of a command, and the directory it runs in. Raises `ConfigError`: one of them
    is not UTF-8, or the directory is gone."""
    for word in words:
        if not is_utf8(word):
            raise ConfigError(
                f"{readable_name(word)} is not UTF-8 (in the encoding "
                f"{sys.getfilesystemencoding()} of this session); rename the file, or its folder, "
                "to letters that are"
            )
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory is gone; change to another one") from None
    if not is_utf8(here):
        raise ConfigError(
            f"the name of the working directory {readable_name(here)} is not UTF-8; rename it, or "
            "change to another one"
        )


def steady_streams() -> None:
    """Make the standard streams take any text, and be there.

    A character that the console's encoding lacks is written as `\\u2265`. A stream that was closed
    leads nowhere: else the next file to be opened would get its number, and what is printed.
    """
    while (found := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(found, True)
    os.close(found)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")

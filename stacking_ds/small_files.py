"""Small files that may be damaged: text, JSON and JSON lines, bounded in size and depth.

Only a regular file is read: a FIFO or a device in its place would be waited for, or never end. What
cannot be read (a permission, a stale handle) stays an OSError; everything else is damage.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "DamagedFileError",
    "open_regular",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_text",
]

_MOST_BYTES = 2**30
_LONGEST_LINE_BYTES = 2**24
# what no name of a regular file leads to, whoever asks
_NO_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENOTDIR, errno.EISDIR}


class DamagedFileError(ValueError):
    """A file that is there and is not what was written; the message names it, without a remedy."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path, self.reason = path, reason


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading bytes; never waits for a writer.

    Raises:
        DamagedFileError: it is a folder, a FIFO, a device, or a link in a circle.
        OSError: it is not there, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise DamagedFileError(path, f"{error.strerror}".lower()) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError(path, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a UTF-8 file of at most `most_bytes`.

    Raises:
        DamagedFileError: it is longer, not UTF-8 or no regular file.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise DamagedFileError(path, f"it has more than {most_bytes:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"byte {error.start} is not UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> Any:
    """The value of a JSON file of at most `most_bytes`.

    Raises:
        DamagedFileError: it is longer, no JSON, nested too deeply or no regular file.
        OSError: it is not there, or cannot be read.
    """
    text = read_text(path, most_bytes)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DamagedFileError(path, str(error)) from None


def read_json_lines(
    path: Path, on_damage: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line, in constant memory.

    `on_damage` is told of each line that is none: what and where. The last line may be cut off by a
    crash; it is told of too.

    Raises:
        DamagedFileError: it is no regular file.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path) as file:
        number, in_long_line = 0, False
        while line := file.readline(_LONGEST_LINE_BYTES):
            whole = line.endswith(b"\n")
            if not in_long_line:
                number += 1
                record = _record_of(line)
                if record is not None:
                    yield record
                elif line.strip():
                    on_damage(f"line {number} of {path} is not a JSON object")
            in_long_line = not whole and len(line) == _LONGEST_LINE_BYTES


def _record_of(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:  # also what is not UTF-8
        return None
    return value if isinstance(value, dict) else None

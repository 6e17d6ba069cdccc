"""Files read with a bound, and files and folders written whole or not at all.

Only a regular file is read: a FIFO or a device in its place would be waited for, or never end. What
cannot be read (a permission, a stale handle) stays an OSError; everything else is damage.

What is written appears under its name when all of it is on disk, whatever moment the process is
killed at or the machine loses power; what a killed process has left is under another name.
"""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**30
_LONGEST_LINE_BYTES = 2**24
# far deeper than what is written here, and far from what json, pydantic or repr cannot follow
_DEEPEST = 64
# what links in a circle, or to a name that none can have, lead to, and a device without a driver
_NO_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV}


class DamagedFileError(ValueError):
    """A file that is there and is not what was written; the message names it, without a remedy."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path, self.reason = path, reason


class PassedOver:
    """Counts the lines of a file that are no records, for the one sentence that tells of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self._first = path, 0, 0

    def add(self, line: int) -> None:
        """`line` counts from 1."""
        self._first = self._first or line
        self.lines += 1

    @property
    def sentence(self) -> str | None:
        """A sentence on what was passed over, and where it begins; None if nothing was."""
        if not self.lines:
            return None
        what = "1 line, which is" if self.lines == 1 else f"{self.lines:,} lines, which are"
        where = "line" if self.lines == 1 else "the first is line"
        return f"{self.path}: passed over {what} no record ({where} {self._first:,})"


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading bytes; never waits for a writer.

    Raises, as all who read by it:
        DamagedFileError: it is a folder, a FIFO, a device, or a link in a circle.
        OSError: it is not there, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise DamagedFileError(path, f"{error.strerror}".lower()) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError(path, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def without_waiting(path: str, flags: int) -> int:
    """An `opener` for what is written: a FIFO that nobody reads is an OSError, and not waited
    for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)


def read_bytes(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """The bytes of a file; a `DamagedFileError` where it has more than `most_bytes`."""
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise DamagedFileError(path, f"it has more than {most_bytes:,} bytes")
    return content


def read_text(path: Path, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file of at most `most_bytes`; a `DamagedFileError` where it is not UTF-8."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"byte {error.start} is not UTF-8") from None


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text. Raises `ValueError`: it is no JSON, or nested more than 64 deep, as
    what is near the interpreter's own bound breaks whoever writes or checks it."""
    with suppress(RecursionError):
        value = json.loads(text)
        if not is_nested_deeper(value, _DEEPEST):
            return value
    raise ValueError("it is nested too deeply")


def is_nested_deeper(value: Any, levels: int) -> bool:
    """True for more than so many lists and dictionaries, one in another."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    containers = [each for each in inside if isinstance(each, dict | list)]
    return levels < 1 or any(is_nested_deeper(each, levels - 1) for each in containers)


def is_count(value: Any) -> bool:
    """True for a whole number from 0 on, no larger than any that is counted to."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """True for a finite number, if it is no whole one that is too large for a float."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> Any:
    """The value of a file of at most `most_bytes`; a `DamagedFileError` where it is no JSON, or
    nested too deeply."""
    text = read_text(path, most_bytes)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DamagedFileError(path, str(error)) from None


def read_json_lines(
    path: Path,
    passed_over: PassedOver | None = None,
    is_record: Callable[[dict[str, Any]], bool] = lambda found: True,
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that are records, one a line, in constant memory.

    Lines that hold something else, as the last one does that a crash has cut off, are added to
    `passed_over`; empty ones are nothing.
    """
    with open_regular(path) as file:
        number, in_long_line = 0, False
        while line := file.readline(_LONGEST_LINE_BYTES):
            if not in_long_line:
                number += 1
                try:
                    found = parse_json(line)
                except ValueError:  # also what is not UTF-8
                    found = None
                if isinstance(found, dict) and is_record(found):
                    yield found
                elif line.strip() and passed_over is not None:
                    passed_over.add(number)
            in_long_line = len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n")


# --------------------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Have the file's contents, or the folder's entries, on disk before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder, and need not
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_whole(
    path: Path, content: str | bytes | memoryview, by_way_of: Path | None = None
) -> None:
    """Write the file `path`, or replace it, by way of another name on the same file system: hidden
    beside it, if it is not `by_way_of`. Raises `OSError`: it cannot be written, and is as it was.

    Its new name outlasts a crash of the machine once its folder is synced, which is the caller's to
    do: several files may share one `sync`.
    """
    unfinished = by_way_of or path.with_name(f".{path.name}.partial")
    try:
        with open(unfinished, "wb", opener=without_waiting) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def replace_folder(partial: Path, folder: Path, previous: Path) -> None:
    """Give the folder `partial`, all of which is on disk, the name `folder`. What had it is moved
    to `previous`, for the caller to remove."""
    is_replaced = os.path.lexists(folder)
    if is_replaced:
        _remove(previous)
        folder.rename(previous)
    try:
        partial.rename(folder)
    except OSError:
        if is_replaced:
            previous.rename(folder)
        raise
    sync(folder.parent)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A new hidden folder to fill with files; it becomes `folder`, in place of what is there, when
    it is left. After an error nothing of it stays. Raises `OSError`: it cannot be written; `folder`
    is as it was."""
    partial = folder.with_name(f".{folder.name}.partial")
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        replace_folder(partial, folder, previous)
        _remove(previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room

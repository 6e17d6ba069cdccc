"""Reads .txt and .jsonl files, plain or gzipped, in bounded memory, whole or between two bytes.

.txt: a blank line ends a document; the lines between are joined, so that wrapped lines do no
harm. .jsonl: one object a line; blank lines do not count.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from stacking_ds.data.sources.documents import (
    Document,
    Fault,
    Item,
    Piece,
    Reading,
    check_text,
    text_of_row,
    too_long,
)

__all__ = ["TEXT_SUFFIXES", "TextFile", "cut_text_file"]

TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_SKIP_BYTES = 2**20
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line with its end; `fault` where it cannot be used, then `content` is empty."""

    number: int
    content: str
    source_bytes: int
    text_bytes: int = 0
    fault: Fault | None = None


class TextFile:
    """A piece of a text file; numbers are those of lines."""

    def __init__(self, path: Path, piece: Piece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading
        self._zipped = path.suffix == ".gz"

    def items(self) -> Iterator[Item]:
        is_text = self._path.name.removesuffix(".gz").endswith(".txt")
        return self._paragraphs() if is_text else self._json_lines()

    def place(self, number: int) -> tuple[str, str]:
        number += self._lines_before
        return f"{self._path.name}:{number}", f"{self._path}, line {number}"

    @cached_property
    def _lines_before(self) -> int:
        return 0 if self._zipped else _count_lines(self._path, self._piece.start)

    def _json_lines(self) -> Iterator[Item]:
        for line in self._lines():
            if line.fault is not None:
                yield line.fault
            elif not line.content.isspace() and line.content:
                yield self._parsed(line)

    def _parsed(self, line: _Line) -> Item:
        try:
            row = json.loads(line.content)
        except (ValueError, RecursionError) as error:
            return Fault("not JSON", f"is not JSON: {error}", line.number, line.source_bytes)
        text = text_of_row(row, self._reading.text_key)
        if not isinstance(text, str):
            return Fault(*text, line.number, line.source_bytes)
        return check_text(text, line.number, line.source_bytes, self._reading.max_bytes)

    def _paragraphs(self) -> Iterator[Item]:
        """Documents of a .txt file; a fault in any of its lines is the whole document's."""
        parts: list[str] = []
        start = size = length = 0
        fault: Fault | None = None
        for line in self._lines():
            size += line.source_bytes
            if line.fault is not None:
                fault = fault or line.fault
                if line.fault.rest_is_lost:
                    break
                continue
            content = line.content.strip()
            if content:
                start = start or line.number
                length += line.text_bytes
                if length > self._reading.max_bytes and not fault:
                    fault = too_long(start, 0, self._reading.max_bytes)
                if fault:
                    parts.clear()
                else:
                    parts.append(content)
                continue
            if fault or parts:
                yield _ended(parts, start, size, fault)
            parts, start, size, length, fault = [], 0, 0, 0, None
        if fault or parts:
            yield _ended(parts, start, size, fault)

    def _lines(self) -> Iterator[_Line]:
        """The lines, decoded. Never more than the limit of a document is in memory."""
        with self._path.open("rb") as raw:
            file: BinaryIO = gzip.GzipFile(fileobj=raw) if self._zipped else raw  # type: ignore[assignment]
            position = self._piece.start
            if not self._zipped:
                raw.seek(position)
            elif not self._path.stat().st_size:
                yield _broken(1, "it is empty")
                return
            number, end, limit = 0, self._piece.stop, self._reading.max_bytes
            while self._zipped or position < end:
                number += 1
                try:
                    line = file.readline(limit + 1)
                    length = len(line)
                    if length > limit:
                        length += _skip_line(file, line)
                except _GZIP_ERRORS as error:
                    yield _broken(number, error)
                    return
                if not line:
                    return
                before = position
                position = raw.tell() if self._zipped else position + length
                yield self._decoded(line, number, position - before)

    def _decoded(self, line: bytes, number: int, source_bytes: int) -> _Line:
        if len(line) > self._reading.max_bytes:
            fault = too_long(number, source_bytes, self._reading.max_bytes)
            return _Line(number, "", source_bytes, fault=fault)
        first = number == 1 and self._piece.start == 0
        try:
            content = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            sentence = f"is not UTF-8 (byte {error.start} of the line)"
            fault = Fault("not UTF-8", sentence, number, source_bytes)
            return _Line(number, "", source_bytes, fault=fault)
        return _Line(number, content, source_bytes, len(line))


def cut_text_file(path: Path, file: int, piece_bytes: int) -> list[Piece]:
    """The pieces of a text file: cut where a document starts, a gzipped one not at all."""
    size = path.stat().st_size
    count = max(1, round(size / piece_bytes))
    if path.suffix == ".gz":
        return [Piece(file=file, start=0, stop=size, source_bytes=size, text_bytes=3 * size)]
    cuts = [0]
    with path.open("rb") as raw:
        for index in range(1, count):
            target = size * index // count
            if target > cuts[-1]:
                cuts.append(_next_start(raw, target, path.suffix == ".txt"))
    starts = sorted({cut for cut in cuts if cut < size} or {0})
    return [
        Piece(file=file, start=start, stop=stop, source_bytes=stop - start, text_bytes=stop - start)
        for start, stop in zip(starts, [*starts[1:], size], strict=True)
    ]


def _broken(number: int, reason: object) -> _Line:
    sentence = f"is in a broken gzip file: {reason}; from there on nothing can be read"
    return _Line(number, "", 0, fault=Fault("broken gzip", sentence, number, 0, True))


def _ended(parts: list[str], start: int, source_bytes: int, fault: Fault | None) -> Item:
    if fault is None:
        return Document(" ".join(parts), start, source_bytes)
    return Fault(fault.reason, fault.sentence, fault.number, source_bytes, fault.rest_is_lost)


def _next_start(raw: BinaryIO, target: int, after_blank: bool) -> int:
    """The first byte at or behind `target` where a line starts, in a .txt file after a blank one;
    the end of the file if there is none."""
    raw.seek(target - 1)
    _skip_line(raw, b"")
    while after_blank:
        line = raw.readline(_SKIP_BYTES)
        if not line or (line.endswith(b"\n") and not line.strip()):
            break
        _skip_line(raw, line)
    return raw.tell()


def _skip_line(file: BinaryIO, last: bytes) -> int:
    """Reads to the end of the line of which `last` was read; the number of bytes skipped."""
    skipped = 0
    while not last.endswith(b"\n"):
        last = file.readline(_SKIP_BYTES)
        if not last:
            break
        skipped += len(last)
    return skipped


def _count_lines(path: Path, stop: int) -> int:
    """The newlines in the first `stop` bytes."""
    count = 0
    with path.open("rb") as raw:
        while stop > 0:
            block = raw.read(min(stop, _SKIP_BYTES))
            if not block:
                break
            count += block.count(b"\n")
            stop -= len(block)
    return count

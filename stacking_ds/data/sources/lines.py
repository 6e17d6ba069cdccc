"""Reads the lines of a file, plain or compressed, in bounded memory; whatever ends them.

Lines end with a newline, carriage returns before it included. A file without any newline may end
them with a carriage return instead, or, where it has no carriage return either, with the next-line
character or the line and paragraph separators of Unicode; where newlines are there, all of these
are blanks. The byte order mark that a file may begin with is no part of it.

Everything here raises DamagedFileError for what is no regular file, OSError for what the system
does not let us read.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from stacking_ds.data.sources.documents import Fault, SourcePiece, too_long
from stacking_ds.files import open_regular

_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED_SUFFIXES = tuple(_NAMES)
_BLOCK_BYTES, _ARROW_BLOCK_BYTES = 2**17, 2**13
_BROKEN = (EOFError, zlib.error, lzma.LZMAError)
_BLANKS = b" \t\n\r\v\f"

Ends = tuple[tuple[bytes, ...], ...]
# what ends lines where there is no newline: the first of these groups that the file has
TEXT_ENDS: Ends = ((b"\r",), ("\u2028".encode(), "\u2029".encode(), "\x85".encode()))
# the separators may stand in a JSON string as they are, a carriage return may not
JSON_ENDS: Ends = ((b"\r",),)


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its end; `fault` where it cannot be used, then `content` is empty."""

    number: int
    content: str
    source_bytes: int
    text_bytes: int = 0
    fault: Fault | None = None


class Start(NamedTuple):
    """The text that a file begins with, the bytes that hold it, and whether that is all."""

    text: str
    content_bytes: int
    is_all: bool


class RestIsLostError(Exception):
    """The file cannot be read any further, for the reason that `fault` states of line 0."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence)
        self.fault = fault


def content_suffix(path: Path) -> str:
    """The suffix that says what is in the file, however it is packed: `.txt` of `A.TXT.GZ`."""
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


def is_packed(path: Path) -> bool:
    """True if the file is compressed as a whole, by its name."""
    return path.suffix.lower() in PACKED_SUFFIXES


def whole(path: Path, file: int) -> SourcePiece:
    """All of a file, which has that number in its source."""
    size = path.stat().st_size
    # what is compressed, as Parquet is in itself, has about three times as much text
    text_bytes = 3 * size if is_packed(path) or content_suffix(path) == ".parquet" else size
    return SourcePiece(file=file, start=0, stop=size, source_bytes=size, text_bytes=text_bytes)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file as it lies there. Raises RestIsLostError for what then fails to be unpacked."""
    with open_regular(path) as raw:
        try:
            if is_packed(path) and not os.fstat(raw.fileno()).st_size:
                raise EOFError("it is empty")
            yield raw
        except (*_BROKEN, OSError) as error:
            # what a file system says has a number
            if getattr(error, "errno", None) is not None or not is_packed(path):
                raise
            kind = _NAMES[path.suffix.lower()]
            sentence = f"is in a broken {kind} file: {error}; from there on nothing can be read"
            raise RestIsLostError(Fault(f"broken {kind}", sentence, 0, 0, True)) from error


def lines_of(
    path: Path, piece: SourcePiece, max_bytes: int, ends: Ends = TEXT_ENDS
) -> Iterator[Line]:
    """The lines of a piece. Never more than `max_bytes` of one is in memory, and of a run of blank
    lines only the first two are given. A broken compressed file ends with a fault."""
    number = 1
    try:
        with _opened(path) as raw:
            raw.seek(piece.start)
            file, translated = raw, False
            if begins := piece.start == 0:
                file, translated = _from_start(raw, path, max_bytes, ends)
            to_the_end = translated or is_packed(path)
            for line, lines, size in _raw_lines(file, raw, piece, max_bytes, to_the_end):
                yield _decoded(line, number, size, max_bytes, begins and number == 1)
                number += lines
    except RestIsLostError as lost:
        yield Line(number, "", 0, fault=replace(lost.fault, number=number))


def start_of(path: Path, most_bytes: int, ends: Ends = TEXT_ENDS) -> Start:
    """The beginning of the file, its lines ended by newlines; what is not UTF-8 is replaced, and
    where a compressed file is broken its text ends."""
    content = b""
    with suppress(RestIsLostError), _opened(path) as raw:
        file = cast("io.BufferedReader", _from_start(raw, path, most_bytes, ends)[0])
        # one byte too many tells that there is more
        while block := file.read1(most_bytes + 1 - len(content)):
            content += block
    used = content[:most_bytes]
    text = re.sub(r"\r*\n|\r", "\n", used.decode("utf-8-sig", errors="replace"))
    return Start(text, len(used), is_all=used == content)


def text_blocks(path: Path) -> Iterator[str]:
    """All the text of a file, in blocks. Raises RestIsLostError where it cannot go on."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _opened(path) as raw:
        file = _unpacked(raw, path)
        try:
            while block := file.read(_BLOCK_BYTES):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            fault = Fault("not UTF-8", f"is not UTF-8: {error.reason}", 0, 0, True)
            raise RestIsLostError(fault) from error


def has_newlines(path: Path, max_bytes: int, ends: Ends = TEXT_ENDS) -> bool:
    """True if the lines of the file end with newlines, or it has but one."""
    with open_regular(path) as raw:
        return not _other_ends(_unpacked(raw, path), max_bytes, ends)


def skip_line(file: BinaryIO, last: bytes) -> int:
    """Reads to the end of the line of which `last` was read; the number of bytes skipped."""
    skipped = 0
    while not last.endswith(b"\n") and (last := file.readline(_BLOCK_BYTES)):
        skipped += len(last)
    return skipped


def _raw_lines(
    file: BinaryIO, raw: BinaryIO, piece: SourcePiece, limit: int, to_the_end: bool
) -> Iterator[tuple[bytes, int, int]]:
    """The lines, cut off behind the limit, each with the number of lines that it stands for and the
    bytes of the source that these took."""
    position, blank = piece.start, False
    while to_the_end or position < piece.stop:
        line = file.readline(limit + 1)
        if not line:
            return
        length, lines = len(line), 1
        if length > limit:
            length += skip_line(file, line)
        elif blank and line.isspace():
            # of a text that is nothing but newlines each would take a microsecond
            left = 2**62 if to_the_end else piece.stop - position - length
            skipped, more = _skip_blank_lines(file, left)
            length, lines = length + skipped, lines + more
        else:
            blank = line.isspace()
        before = position
        position = raw.tell() if to_the_end else position + length
        yield line, lines, position - before


def _skip_blank_lines(file: BinaryIO, left: int) -> tuple[int, int]:
    """Reads blank lines in the next `left` bytes; how many bytes and lines these were."""
    skipped = lines = 0
    while skipped < left:
        ahead = cast("io.BufferedReader", file).peek(1)[: left - skipped]
        blanks = len(ahead) - len(ahead.lstrip(_BLANKS))
        end = ahead.rfind(b"\n", 0, blanks) + 1
        if not end:
            break
        file.read(end)
        skipped += end
        lines += ahead.count(b"\n", 0, end)
    return skipped, lines


def _decoded(line: bytes, number: int, source_bytes: int, limit: int, first: bool) -> Line:
    try:
        if len(line) <= limit:
            content = line.decode("utf-8-sig" if first else "utf-8")
            return Line(number, content, source_bytes, len(line))
        fault = too_long(number, source_bytes, limit)
    except UnicodeDecodeError as error:
        sentence = f"is not UTF-8 (byte {error.start} of the line)"
        fault = Fault("not UTF-8", sentence, number, source_bytes)
    return Line(number, "", source_bytes, fault=fault)


# ------------------------------------------------------------- unpacking, and other line ends


def _from_start(raw: BinaryIO, path: Path, max_bytes: int, ends: Ends) -> tuple[BinaryIO, bool]:
    """What the file holds; and whether its line ends had to be made newlines."""
    other = _other_ends(_unpacked(raw, path), max_bytes, ends)
    raw.seek(0)
    file = _unpacked(raw, path)
    if other:
        file = io.BufferedReader(_AsItComes(file, other), _BLOCK_BYTES)
    return file, bool(other)


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    if not is_packed(path):
        return raw
    if (suffix := path.suffix.lower()) == ".zst":
        # Arrow closes what it reads from
        own = os.fdopen(os.dup(raw.fileno()), "rb", buffering=0)
        stream = pa.CompressedInputStream(pa.PythonFile(own, mode="r"), "zstd")
        # it gives all that is asked for or nothing, also of a file that ends too soon
        return io.BufferedReader(stream, _ARROW_BLOCK_BYTES)
    return io.BufferedReader(_AsItComes(_OPENERS[suffix](raw)), _BLOCK_BYTES)


def _other_ends(file: BinaryIO, max_bytes: int, ends: Ends) -> tuple[bytes, ...]:
    """What ends lines instead of newlines, as far as a longest line tells; empty if these do."""
    if b"\n" in cast("io.BufferedReader", file).peek(1):
        return ()
    seen, last = 0, b""
    found: set[int] = set()
    while seen <= max_bytes and (block := file.read(_BLOCK_BYTES)):
        if b"\n" in block:
            return ()
        seen += len(block)
        found |= {n for n, group in enumerate(ends) if any(end in last + block for end in group)}
        last = block[-2:]
    return ends[min(found)] if found else ()


class _AsItComes(io.RawIOBase):
    """The bytes of a file, no more at a time than are there, so that what comes before damage is
    read; each of `ends` is made a newline."""

    def __init__(self, file: Any, ends: tuple[bytes, ...] = ()) -> None:
        self._file, self._ends, self._held = file, ends, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = b""
        while not content:
            block = self._file.read1(max(1, len(buffer) - 2))
            content = self._held + block
            if not content:
                return 0
            if self._ends:
                # the first bytes of what may be an end wait for its last
                held = 2 if content.endswith(b"\xe2\x80") else content[-1:] in (b"\xe2", b"\xc2")
                cut = len(content) - held if block else len(content)
                self._held, content = content[cut:], content[:cut]
        for end in self._ends:
            content = content.replace(end, b"\n")
        buffer[: len(content)] = content
        return len(content)

"""Reads .txt, JSON lines and .json, plain or compressed, in bounded memory, and in pieces.

.txt: a document is what stands between blank lines, a line, or the file, as `Reading.documents`
says; wrapped lines are joined. JSON lines: one object a line; blank lines do not count. .json: an
object a line, objects one after another, or in one array.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from stacking_ds.console import shortened
from stacking_ds.data.sources.documents import (
    Document,
    Fault,
    FileReader,
    Item,
    Reading,
    SourcePiece,
    item_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import (
    JSON_ENDS,
    TEXT_ENDS,
    Ends,
    Line,
    has_newlines,
    is_packed,
    lines_of,
    skip_line,
    start_of,
    text_blocks,
)
from stacking_ds.errors import DataError

_SKIP_BYTES = _LOOK_BYTES = 2**20
_JSON_BLANKS = re.compile(r"[ \t\n\r]*")
_ROWS_LOOKED_AT = _KEYS_NAMED = 20
# what a line may begin and end with that nobody sees
_INVISIBLE = "\ufeff\u200b"


class LineReader(FileReader):
    """A piece of a file of lines, which are numbered."""

    @cached_property
    def before(self) -> int:  # type: ignore[override]
        return 0 if is_packed(self.path) else _count_lines(self.path, self.piece.start)


class TextFile(LineReader):
    """A piece of a .txt file."""

    @classmethod
    def cut(cls, path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        if reading.documents == "file":
            return [whole(path, file)]
        after_blank = reading.documents == "blank-line"
        return _cut_lines(path, file, piece_bytes, reading, TEXT_ENDS, after_blank)

    def read(self) -> Iterator[Item]:
        return self._each_line() if self.reading.documents == "line" else self._paragraphs()

    def _each_line(self) -> Iterator[Item]:
        for line in self._lines():
            if line.fault is not None:
                yield line.fault
            elif content := _visible(line.content):
                yield Document(content, line.number, line.source_bytes)

    def _paragraphs(self) -> Iterator[Item]:
        """Documents that end at a blank line, or with the file, whose blank lines then end its
        paragraphs; a fault in any of its lines is the whole document's."""
        whole_file, max_bytes = self.reading.documents == "file", self.reading.max_bytes
        parts: list[str] = []
        start = size = length = 0
        fault: Fault | None = None
        for line in self._lines():
            size += line.source_bytes
            if line.fault is not None:
                fault = fault or line.fault
                if line.fault.rest_is_lost:
                    break
            elif content := _visible(line.content):
                start = start or line.number
                length += line.text_bytes
                if length > max_bytes and not fault:
                    fault = too_long(start, 0, max_bytes)
                parts.append(content)
                if fault:
                    parts.clear()
            elif whole_file:
                if parts and parts[-1] != "\n":
                    parts.append("\n")
            else:
                if fault or parts:
                    yield _ended(parts, start, size, fault)
                parts, start, size, length, fault = [], 0, 0, 0, None
        if fault or parts:
            yield _ended(parts, start, size, fault)

    def _lines(self) -> Iterator[Line]:
        """The lines; one with carriage returns inside is several."""
        for line in lines_of(self.path, self.piece, self.reading.max_bytes):
            if "\r" not in line.content or "\r" not in line.content.rstrip("\r\n"):
                yield line
                continue
            size = line.source_bytes
            for part in line.content.rstrip("\r\n").split("\r"):
                yield Line(line.number, part, size, len(part.encode()))
                size = 0


def _visible(line: str) -> str:
    """The line without the blanks around it, a stray byte order mark included."""
    content = line.strip()
    while not content.isascii() and (content[0] in _INVISIBLE or content[-1] in _INVISIBLE):
        content = content.strip(_INVISIBLE).strip()
    return content


def _ended(parts: list[str], start: int, source_bytes: int, fault: Fault | None) -> Item:
    if fault is not None:
        return replace(fault, source_bytes=source_bytes)
    text = " ".join(parts).removesuffix(" \n").replace(" \n ", "\n")
    return Document(text, start, source_bytes)


class JsonLines(LineReader):
    """A piece of a file that has an object a line."""

    @classmethod
    def cut(cls, path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        cls(path, whole(path, file), reading).check_keys()
        return _cut_lines(path, file, piece_bytes, reading, JSON_ENDS, after_blank=False)

    def read(self) -> Iterator[Item]:
        for row, number, size in self.rows():
            is_fault = isinstance(row, Fault)
            yield row if is_fault else item_of_row(row, number, size, self.reading)

    def rows(self) -> Iterator[tuple[Any, int, int]]:
        """Each value, or what is wrong with it, with its number and the bytes that it took."""
        for line in lines_of(self.path, self.piece, self.reading.max_bytes, JSON_ENDS):
            value: Any = line.fault
            if value is None:
                if not line.content or line.content.isspace():
                    continue
                try:
                    value = json.loads(line.content)
                except (ValueError, RecursionError) as error:
                    value = Fault(
                        "not JSON", f"is not JSON: {error}", line.number, line.source_bytes
                    )
            yield value, line.number, line.source_bytes

    def check_keys(self) -> None:
        """Raises DataError if none of the first rows has the reading's key, and some have others;
        warns of it where such rows are to be left out."""
        keys: dict[str, None] = {}
        for row, *_ in islice(self.rows(), _ROWS_LOOKED_AT):
            if isinstance(row, dict):
                if self.reading.text_key in row:
                    return
                keys |= dict.fromkeys(row)
        if not keys:
            return
        sentence = (
            f"{self.path} has in its first {_ROWS_LOOKED_AT} rows no text under the key "
            f"{self.reading.text_key!r}, only the keys "
            f"{shortened(str(sorted(keys)[:_KEYS_NAMED]), 400)}"
        )
        if not self.reading.leaves_out:
            raise DataError(f"{sentence}; name the one that holds the text by --text-key")
        logging.getLogger("stacking_ds").warning(
            "warning: %s; such rows are left out: if one of these holds the text, name it by "
            "--text-key",
            sentence,
        )


def whole(path: Path, file: int) -> SourcePiece:
    """All of a file, which is not to be cut."""
    size = path.stat().st_size
    text_bytes = 3 * size if is_packed(path) else size
    return SourcePiece(file=file, start=0, stop=size, source_bytes=size, text_bytes=text_bytes)


def _cut_lines(
    path: Path, file: int, piece_bytes: int, reading: Reading, ends: Ends, after_blank: bool
) -> list[SourcePiece]:
    """Cuts where a line starts, one `after_blank` line if so; not at all what is compressed or has
    no newlines."""
    size = path.stat().st_size
    count = round(size / piece_bytes)
    if is_packed(path) or count <= 1 or not has_newlines(path, reading.max_bytes, ends):
        return [whole(path, file)]
    cuts = [0]
    with path.open("rb") as raw:
        for index in range(1, count):
            if (target := size * index // count) > cuts[-1]:
                cuts.append(_next_start(raw, target, after_blank))
    starts = sorted({0, *(cut for cut in cuts if cut < size)})
    return [
        SourcePiece(file=file, start=one, stop=two, source_bytes=two - one, text_bytes=two - one)
        for one, two in pairwise((*starts, size))
    ]


def _next_start(raw: BinaryIO, target: int, after_blank: bool) -> int:
    """The first byte at or behind `target` where a line starts, or one after a blank line; the end
    of the file if there is none."""
    raw.seek(target - 1)
    skip_line(raw, b"")
    while after_blank:
        line = raw.readline(_SKIP_BYTES)
        if not line or (line.endswith(b"\n") and not line.strip()):
            break
        skip_line(raw, line)
    return raw.tell()


def _count_lines(path: Path, stop: int) -> int:
    """The newlines in the first `stop` bytes."""
    count = 0
    with path.open("rb") as raw:
        while stop > 0 and (block := raw.read(min(stop, _SKIP_BYTES))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


# ---- .json


class JsonFile(JsonLines):
    """A .json file; numbers are those of lines where each holds an object, else of the objects."""

    @classmethod
    def cut(cls, path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        piece = whole(path, file)
        reader = cls(path, piece, reading)
        if reader._has_lines:
            return super().cut(path, file, piece_bytes, reading)
        reader.check_keys()
        return [piece]

    @cached_property
    def _has_lines(self) -> bool:
        """Whether the first line is an object, so that the others may be too."""
        start = start_of(self.path, _LOOK_BYTES, JSON_ENDS)
        line, newline, _ = start.text.lstrip().partition("\n")
        try:
            return bool(newline) and isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False

    @property
    def noun(self) -> str:  # type: ignore[override]
        return "line" if self._has_lines else "object"

    def rows(self) -> Iterator[tuple[Any, int, int]]:
        if self._has_lines:
            yield from super().rows()
            return
        before = 0
        values = _values(self.path, self.reading.max_bytes)
        for number, (value, characters) in enumerate(values, start=1):
            found = replace(value, number=number) if isinstance(value, Fault) else value
            yield found, number, characters - before
            before = characters


def _values(path: Path, limit: int) -> Iterator[tuple[Any, int]]:
    """The objects of the file's array, or those that follow one another, and the characters read up
    to their ends; a fault where it cannot go on."""
    decoder = json.JSONDecoder()
    text = _Buffer(text_blocks(path))
    in_array, needs_comma = text.next_visible() == "[", False
    if in_array:
        text.position += 1
    while True:
        character = text.next_visible()
        if text.fault is not None:
            yield text.fault, text.read
            return
        if needs_comma and character == ",":
            text.position += 1
            character, needs_comma = text.next_visible(), False
        if not character or (in_array and character == "]"):
            if in_array and not character:
                yield _not_json("its array does not end"), text.read
            return
        if needs_comma:
            yield _not_json("a comma is missing"), text.read
            return
        try:
            value, end = decoder.raw_decode(text.content, text.position)
        except (ValueError, RecursionError) as error:
            # it may go on in the next block; each try has twice as much
            if isinstance(error, RecursionError) or not text.grow(limit):
                long = len(text.content) - text.position > limit
                yield too_long(0, 0, limit) if long else _not_json(error), text.read
                return
            continue
        text.position, needs_comma = end, in_array
        yield value, text.read


def _not_json(reason: object) -> Fault:
    return Fault("not JSON", f"is not JSON: {reason}; the rest is not read", 0, 0, True)


class _Buffer:
    """The text that was read and not yet used. `read` is how many characters were used."""

    def __init__(self, blocks: Iterator[str | Fault]) -> None:
        self._blocks = blocks
        self.content, self.position, self._gone = "", 0, 0
        self.fault: Fault | None = None

    @property
    def read(self) -> int:
        return self._gone + self.position

    def next_visible(self) -> str:
        """Goes to the next character that is no blank, and tells it; nothing at the end."""
        while True:
            blanks = _JSON_BLANKS.match(self.content, self.position)
            assert blanks is not None  # it may be of no length
            self.position = blanks.end()
            if self.position < len(self.content):
                return self.content[self.position]
            if not self._more():
                return ""

    def grow(self, limit: int) -> bool:
        """Reads as much again as is there; whether there was more, and it is within the limit."""
        held = len(self.content) - self.position
        if held > limit:
            return False
        grown = False
        while len(self.content) - self.position < 2 * held and self._more():
            grown = True
        return grown

    def _more(self) -> bool:
        block = next(self._blocks, None)
        if block is None or isinstance(block, Fault):
            self.fault = self.fault or block
            return False
        self._gone += self.position
        self.content, self.position = self.content[self.position :] + block, 0
        return True

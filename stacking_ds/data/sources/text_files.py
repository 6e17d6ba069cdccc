"""Reads .txt, JSON lines and .json, plain or compressed, in bounded memory, and in pieces.

.txt: a document is what stands between blank lines, a line, or the file, as `Reading.documents`
says; wrapped lines are joined. JSON lines: one object a line; blank lines do not count. .json: an
object a line, objects one after another, or in one array.
"""

import json
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from stacking_ds.console import shortened
from stacking_ds.data.sources.documents import (
    Document,
    Fault,
    Item,
    Reading,
    SourcePiece,
    check_text,
    text_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import (
    JSON_ENDS,
    TEXT_ENDS,
    Line,
    content_suffix,
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


class TextFile:
    """A piece of a text file; numbers are those of lines."""

    def __init__(self, path: Path, piece: SourcePiece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading

    def items(self) -> Iterator[Item]:
        if content_suffix(self._path) != ".txt":
            return self.json_lines()
        return self._each_line() if self._reading.documents == "line" else self._paragraphs()

    def place(self, number: int) -> tuple[str, str]:
        number += self._lines_before
        return f"{self._path.name}:{number}", f"{self._path}, line {number}"

    @cached_property
    def _lines_before(self) -> int:
        return 0 if is_packed(self._path) else _count_lines(self._path, self._piece.start)

    def json_lines(self) -> Iterator[Item]:
        """The documents of a file that has an object a line."""
        for line in lines_of(self._path, self._piece, self._reading.max_bytes, JSON_ENDS):
            if line.fault is not None:
                yield line.fault
            elif not line.content.isspace() and line.content:
                yield self._parsed(line)

    def _parsed(self, line: Line) -> Item:
        try:
            row = json.loads(line.content)
        except (ValueError, RecursionError) as error:
            return Fault("not JSON", f"is not JSON: {error}", line.number, line.source_bytes)
        text = text_of_row(row, self._reading.text_key)
        if not isinstance(text, str):
            return Fault(*text, line.number, line.source_bytes)
        return check_text(text, line.number, line.source_bytes, self._reading.max_bytes)

    def _each_line(self) -> Iterator[Item]:
        for line in self._lines():
            content = _visible(line.content)
            if line.fault is not None:
                yield line.fault
            elif content:
                yield Document(content, line.number, line.source_bytes)

    def _paragraphs(self) -> Iterator[Item]:
        """Documents that end at a blank line, or with the file, whose blank lines then end its
        paragraphs; a fault in any of its lines is the whole document's."""
        whole_file = self._reading.documents == "file"
        paragraphs: list[str] = []
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
            if not content.isascii():
                content = _visible(content)
            if content:
                start = start or line.number
                length += line.text_bytes
                if length > self._reading.max_bytes and not fault:
                    fault = too_long(start, 0, self._reading.max_bytes)
                if fault:
                    parts.clear()
                    paragraphs.clear()
                else:
                    parts.append(content)
                continue
            if whole_file:
                if parts:
                    paragraphs.append(" ".join(parts))
                    parts = []
                continue
            if fault or parts:
                yield _ended(" ".join(parts), start, size, fault)
            parts, start, size, length, fault = [], 0, 0, 0, None
        if parts:
            paragraphs.append(" ".join(parts))
        if fault or paragraphs:
            yield _ended("\n".join(paragraphs), start, size, fault)

    def _lines(self) -> Iterator[Line]:
        """The lines; one with carriage returns inside is several."""
        for line in lines_of(self._path, self._piece, self._reading.max_bytes):
            if "\r" not in line.content or "\r" not in line.content.rstrip("\r\n"):
                yield line
                continue
            size = line.source_bytes
            for part in line.content.rstrip("\r\n").split("\r"):
                yield Line(line.number, part, size, len(part.encode()))
                size = 0


def check_keys(path: Path, rows: Iterator[Any], reading: Reading) -> None:
    """Raises DataError if none of the first `rows` has the reading's key, and some have others;
    warns of it where such rows are to be left out."""
    keys: dict[str, None] = {}
    for row in islice(rows, _ROWS_LOOKED_AT):
        if isinstance(row, dict):
            if reading.text_key in row:
                return
            keys |= dict.fromkeys(row)
    if not keys:
        return
    sentence = (
        f"{path} has in its first {_ROWS_LOOKED_AT} rows no text under the key "
        f"{reading.text_key!r}, only the keys {shortened(str(sorted(keys)[:_KEYS_NAMED]), 400)}"
    )
    if not reading.leaves_out:
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


def cut_text_file(path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
    """The pieces of a text file: cut where a document starts; one that is compressed, one document
    or without newlines not at all. Raises DataError for JSON lines without the reading's key."""
    size = path.stat().st_size
    count = max(1, round(size / piece_bytes))
    is_text = content_suffix(path) == ".txt"
    if not is_text:
        check_keys(path, _rows(path, reading), reading)
    if (
        is_packed(path)
        or count == 1
        or (is_text and reading.documents == "file")
        or not has_newlines(path, reading.max_bytes, TEXT_ENDS if is_text else JSON_ENDS)
    ):
        return [whole(path, file)]
    cuts = [0]
    with path.open("rb") as raw:
        for index in range(1, count):
            target = size * index // count
            if target > cuts[-1]:
                after_blank = is_text and reading.documents == "blank-line"
                cuts.append(_next_start(raw, target, after_blank))
    starts = sorted({cut for cut in cuts if cut < size} or {0})
    return [
        SourcePiece(
            file=file, start=start, stop=stop, source_bytes=stop - start, text_bytes=stop - start
        )
        for start, stop in zip(starts, [*starts[1:], size], strict=True)
    ]


def _rows(path: Path, reading: Reading) -> Iterator[Any]:
    for line in lines_of(path, whole(path, 0), reading.max_bytes, JSON_ENDS):
        if line.content and not line.content.isspace():
            try:
                yield json.loads(line.content)
            except (ValueError, RecursionError):
                yield None


def _visible(line: str) -> str:
    """The line without the blanks around it, a stray byte order mark included."""
    content = line.strip()
    while not content.isascii() and (content[0] in _INVISIBLE or content[-1] in _INVISIBLE):
        content = content.strip(_INVISIBLE).strip()
    return content


def _ended(text: str, start: int, source_bytes: int, fault: Fault | None) -> Item:
    if fault is None:
        return Document(text, start, source_bytes)
    return Fault(fault.reason, fault.sentence, fault.number, source_bytes, fault.rest_is_lost)


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
        while stop > 0:
            block = raw.read(min(stop, _SKIP_BYTES))
            if not block:
                break
            count += block.count(b"\n")
            stop -= len(block)
    return count


# ---- .json


class JsonFile:
    """A .json file; numbers are those of lines where each holds an object, else of the objects."""

    def __init__(self, path: Path, piece: SourcePiece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading

    def items(self) -> Iterator[Item]:
        if self._has_lines:
            yield from TextFile(self._path, self._piece, self._reading).json_lines()
            return
        limit, number, before = self._reading.max_bytes, 0, 0
        each = 0
        for number, (value, characters) in enumerate(_values(self._path, limit), start=1):
            if isinstance(value, Fault):
                yield Fault(value.reason, value.sentence, number, 0, value.rest_is_lost)
                continue
            each, before = characters - before, characters
            text = text_of_row(value, self._reading.text_key)
            if isinstance(text, str):
                yield check_text(text, number, each, limit)
            else:
                yield Fault(*text, number, each)

    @cached_property
    def _has_lines(self) -> bool:
        return _is_lines(self._path)

    def place(self, number: int) -> tuple[str, str]:
        kind = "line" if self._has_lines else "object"
        return f"{self._path.name}:{number}", f"{self._path}, {kind} {number}"


def cut_json_file(path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
    """The one piece that the file is, cut like JSON lines if it is these. Raises DataError if its
    objects have not the reading's key."""
    if _is_lines(path):
        return cut_text_file(path, file, piece_bytes, reading)
    values = (value for value, _ in _values(path, reading.max_bytes))
    check_keys(path, values, reading)
    return [whole(path, file)]


def _is_lines(path: Path) -> bool:
    """Whether the first line is an object, so that the others may be too."""
    line, newline, _ = start_of(path, _LOOK_BYTES, JSON_ENDS).text.lstrip().partition("\n")
    try:
        return bool(newline) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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

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
    SourcePiece,
    item_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import (
    JSON_ENDS,
    TEXT_ENDS,
    Ends,
    Line,
    RestIsLostError,
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
_DECODER = json.JSONDecoder()
_ROWS_LOOKED_AT = _KEYS_NAMED = 20
# what a line may begin and end with that nobody sees
_INVISIBLE = "\ufeff\u200b"


class LineReader(FileReader):
    """A piece of a file of lines, which are numbered."""

    ends: Ends = TEXT_ENDS

    @cached_property
    def before(self) -> int:  # type: ignore[override]
        return 0 if is_packed(self.path) else _count_lines(self.path, self.piece.start)

    def cut_lines(self, piece_bytes: int, *, after_blank: bool = False) -> list[SourcePiece]:
        """Cuts where a line starts, one `after_blank` line if so; not at all what is compressed or
        has no newlines."""
        path, whole, size = self.path, self.piece, self.piece.stop
        count = round(size / piece_bytes)
        if is_packed(path) or count <= 1:
            return [whole]
        if not has_newlines(path, self.reading.max_bytes, self.ends):
            return [whole]
        cuts = [0]
        with path.open("rb") as raw:
            for index in range(1, count):
                if (target := size * index // count) > cuts[-1]:
                    cuts.append(_next_start(raw, target, after_blank))
        return [
            SourcePiece(file=whole.file, start=a, stop=b, source_bytes=b - a, text_bytes=b - a)
            for a, b in pairwise(sorted({0, *cuts, size}))
        ]


class TextFile(LineReader):
    """A piece of a .txt file."""

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        rule = self.reading.documents
        if rule == "file":
            return [self.piece]
        return self.cut_lines(piece_bytes, after_blank=rule == "blank-line")

    def read(self) -> Iterator[Item]:
        if self.reading.documents != "line":
            yield from self._paragraphs()
            return
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
            parts, size = line.content.rstrip("\r\n").split("\r"), line.source_bytes
            if len(parts) == 1:
                yield line
                continue
            for part in parts:
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

    ends = JSON_ENDS

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        self.check_keys()
        return self.cut_lines(piece_bytes)

    def read(self) -> Iterator[Item]:
        for row, number, size in self.rows():
            is_fault = isinstance(row, Fault)
            yield row if is_fault else item_of_row(row, number, size, self.reading)

    def rows(self) -> Iterator[tuple[Any, int, int]]:
        """Each value, or what is wrong with it, with its number and the bytes that it took."""
        for line in lines_of(self.path, self.piece, self.reading.max_bytes, self.ends):
            number, size = line.number, line.source_bytes
            if line.fault is None and not line.content.strip():
                continue
            try:
                value = line.fault or json.loads(line.content)
            except (ValueError, RecursionError) as error:
                value = Fault("not JSON", f"is not JSON: {error}", number, size)
            yield value, number, size

    def check_keys(self) -> None:
        """Raises DataError if none of the first rows has the reading's key, and some have others;
        warns of it where such rows are to be left out."""
        first = islice(self.rows(), _ROWS_LOOKED_AT)
        keys = sorted({key for row, *_ in first if isinstance(row, dict) for key in row})
        if not keys or self.reading.text_key in keys:
            return
        sentence = (
            f"{self.path} has in its first {_ROWS_LOOKED_AT} rows no text under the key "
            f"{self.reading.text_key!r}, only the keys "
            f"{shortened(str(keys[:_KEYS_NAMED]), 400)}"
        )
        if not self.reading.leaves_out:
            raise DataError(f"{sentence}; name the one that holds the text by --text-key")
        logging.getLogger("stacking_ds").warning(
            "warning: %s; such rows are left out: if one of these holds the text, name it by "
            "--text-key",
            sentence,
        )


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
    with path.open("rb") as raw:
        blocks = iter(lambda: raw.read(min(stop - raw.tell(), _SKIP_BYTES)), b"")
        return sum(block.count(b"\n") for block in blocks)


# ---- .json


class JsonFile(JsonLines):
    """A .json file; numbers are those of lines where each holds an object, else of the objects."""

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        if self._has_lines:
            return super().cut(piece_bytes)
        self.check_keys()
        return [self.piece]

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
        number = before = 0
        try:
            for value, used in _JsonText(self.path, self.reading.max_bytes).values():
                number += 1
                yield value, number, used - before
                before = used
        except RestIsLostError as lost:
            yield replace(lost.fault, number=number + 1), number + 1, 0


class _JsonText:
    """The text of a file, read as far as it is needed."""

    def __init__(self, path: Path, most_characters: int) -> None:
        self._blocks, self._most_characters = text_blocks(path), most_characters
        self._held, self._position, self._gone = "", 0, 0
        self._lost: RestIsLostError | None = None

    def values(self) -> Iterator[tuple[Any, int]]:
        """Those of the file's array, or that follow one another, and how many characters were used
        up to their ends. Raises RestIsLostError where it cannot go on."""
        in_array = self._skips("[")
        while self._next() and not (in_array and self._next() == "]"):
            value = self._value()
            yield value, self._gone + self._position
            if in_array and not self._skips(",") and self._next() not in ("", "]"):
                raise _not_json("a comma is missing")
        if in_array and not self._next():
            raise _not_json("its array does not end")

    def _value(self) -> Any:
        while True:
            try:
                value, self._position = _DECODER.raw_decode(self._held, self._position)
            except (ValueError, RecursionError) as error:
                left = len(self._held) - self._position
                if left > self._most_characters:
                    raise RestIsLostError(too_long(0, 0, self._most_characters)) from error
                # it may go on in the next block; each try has twice as much
                if isinstance(error, RecursionError) or not self._read(left):
                    raise _not_json(error) from error
            else:
                return value

    def _skips(self, character: str) -> bool:
        """Goes on behind the next character that is no blank, if it is this one."""
        is_next = self._next() == character
        self._position += is_next
        return is_next

    def _next(self) -> str:
        """The next character that is no blank; nothing at the end."""
        while True:
            blanks = _JSON_BLANKS.match(self._held, self._position)
            assert blanks is not None  # it may be of no length
            self._position = blanks.end()
            if self._position < len(self._held):
                return self._held[self._position]
            if not self._read(1):
                if self._lost is not None:
                    raise self._lost
                return ""

    def _read(self, characters: int) -> bool:
        """Reads blocks until there are so many characters more; False if there were none."""
        self._gone += self._position
        self._held, self._position = self._held[self._position :], 0
        enough = len(self._held) + characters
        try:
            for block in self._blocks:
                self._held += block
                if len(self._held) >= enough:
                    break
        except RestIsLostError as lost:  # what was read before may be whole
            self._lost = lost
        return len(self._held) > enough - characters


def _not_json(reason: object) -> RestIsLostError:
    sentence = f"is not JSON: {reason}; the rest is not read"
    return RestIsLostError(Fault("not JSON", sentence, 0, 0, True))

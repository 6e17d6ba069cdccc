"""Reads .json files: an object a line, objects one after another, or in one array; in bounded
memory."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from stacking_ds.data.sources.documents import (
    Fault,
    Item,
    Piece,
    Reading,
    check_text,
    text_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import JSON_ENDS, start_of, text_blocks
from stacking_ds.data.sources.text_files import TextFile, check_keys, cut_text_file, whole

_LOOK_BYTES = 2**20
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonFile:
    """A .json file; numbers are those of lines where each holds an object, else of the objects."""

    def __init__(self, path: Path, piece: Piece, reading: Reading) -> None:
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


def cut_json_file(path: Path, file: int, piece_bytes: int, reading: Reading) -> list[Piece]:
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
            blanks = _BLANKS.match(self.content, self.position)
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

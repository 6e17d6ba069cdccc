"""Reads .csv and .tsv files, plain or compressed, whose first row names the columns."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stacking_ds.data.sources.documents import Fault, Item, Piece, Reading, check_text, too_long
from stacking_ds.data.sources.lines import JSON_ENDS, content_suffix, lines_of
from stacking_ds.data.sources.text_files import whole
from stacking_ds.errors import DataError

__all__ = ["DelimitedFile", "cut_delimited_file"]

# a .tsv has no quoting: a quote in it is a character like others, and often one without a second
_DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "strict": True},
}
_MOST_NAMED = 20


class DelimitedFile:
    """A .csv or .tsv file; numbers are those of the lines that rows start in. In a .csv a field in
    double quotes may hold delimiters and newlines."""

    def __init__(self, path: Path, piece: Piece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading

    def items(self) -> Iterator[Item]:
        limit = self._reading.max_bytes
        rows = _Rows(self._path, self._piece, limit)
        header = rows.next()
        names = header if isinstance(header, list) else []
        index = _index_of(names, self._reading.text_key, self._path)
        while (row := rows.next()) is not None:
            if isinstance(row, Fault):
                yield row
            elif row and len(row) != len(names):
                sentence = f"starts a row of {len(row)} columns, where the first has {len(names)}"
                yield Fault("not a row", sentence, rows.number, rows.source_bytes)
            elif row:
                yield check_text(row[index], rows.number, rows.source_bytes, limit)

    def place(self, number: int) -> tuple[str, str]:
        return f"{self._path.name}:{number}", f"{self._path}, line {number}"


def cut_delimited_file(path: Path, file: int, reading: Reading) -> list[Piece]:
    """The one piece that the file is. Raises DataError if its first row has no such column."""
    piece = whole(path, file)
    header = _Rows(path, piece, reading.max_bytes).next()
    if isinstance(header, Fault):
        raise DataError(f"{path} cannot be read: its first line {header.sentence}")
    _index_of(header or [], reading.text_key, path)
    return [piece]


class _Rows:
    """The rows of a file. `number` is the line that the last one started in, `source_bytes` what it
    took."""

    def __init__(self, path: Path, piece: Piece, limit: int) -> None:
        # a quote that never ends would take the rest of the file into memory
        csv.field_size_limit(limit)
        self._lines = lines_of(path, piece, limit, JSON_ENDS)
        self._limit = limit
        self._reader = csv.reader(self._fed(), **_DIALECTS[content_suffix(path)])
        self._fault: Fault | None = None
        self._lost = False
        self.number = self.source_bytes = 0

    def next(self) -> list[str] | Fault | None:
        """The next row, or what is wrong with it; None at the end."""
        self.number, self.source_bytes, self._fault = 0, 0, None
        try:
            row = None if self._lost else next(self._reader, None)
        except csv.Error as error:
            # a quote that does not end may have taken many rows; others spoil their own
            if "field larger" in str(error):
                self._lost = True
                return too_long(self.number, self.source_bytes, self._limit)
            self._lost = self._lost or "unexpected end" in str(error)
            sentence = f"starts what cannot be read as a row: {error}"
            return Fault("not a row", sentence, self.number, self.source_bytes, self._lost)
        return self._fault or row

    def _fed(self) -> Iterator[str]:
        for line in self._lines:
            self.number = self.number or line.number
            self.source_bytes += line.source_bytes
            if line.fault is not None:
                self._fault = self._fault or line.fault
                self._lost = line.fault.rest_is_lost
            yield line.content or "\n"


def _index_of(names: list[str], key: str, path: Path) -> int:
    if names.count(key) > 1:
        raise DataError(f"{path} has {names.count(key)} columns {key!r}; rename all but one")
    if key not in names and content_suffix(path) == ".tsv" and f'"{key}"' in names:
        raise DataError(
            f"{path} puts its fields in double quotes, which a .tsv has not: they would become "
            "part of the text; write it without quotes, or as a .csv"
        )
    if key not in names:
        raise DataError(
            f"{path} has no column {key!r} in its first line, only {names[:_MOST_NAMED]}; name the "
            "one that holds the text by --text-key"
        )
    return names.index(key)

"""Reads the text column of Parquet and Arrow files, whole or between two row groups or batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stacking_ds.data.sources.documents import Fault, Item, Piece, Reading, check_text
from stacking_ds.errors import DataError

__all__ = ["TABLE_SUFFIXES", "TableFile", "cut_table_file", "items_of_column"]

TABLE_SUFFIXES = (".parquet", ".arrow")
_ROWS_PER_READ = 256
_READ_AHEAD_BYTES = 2**20
# Parquet is compressed; its text is about three times as large.
_PARQUET_FACTOR = 3


class TableFile:
    """A piece of a Parquet or Arrow file; numbers are those of rows."""

    def __init__(self, path: Path, piece: Piece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading
        self._rows_before = 0

    def items(self) -> Iterator[Item]:
        read = self._parquet if self._path.suffix == ".parquet" else self._arrow
        number = 1
        for column, source_bytes in read():
            yield from items_of_column(column, number, source_bytes, self._reading)
            number += len(column)

    def place(self, number: int) -> tuple[str, str]:
        number += self._rows_before
        return f"{self._path.name}:{number}", f"{self._path}, row {number}"

    def _parquet(self) -> Iterator[tuple[pa.Array, int]]:
        key, piece = self._reading.text_key, self._piece
        with pq.ParquetFile(self._path, buffer_size=_READ_AHEAD_BYTES) as file:
            _check_column(file.schema_arrow, key, self._path)
            groups = range(piece.start, min(piece.stop, file.num_row_groups))
            counts = [file.metadata.row_group(i).num_rows for i in range(groups.stop)]
            self._rows_before = sum(counts[: piece.start])
            per_row = (piece.source_bytes or 0) / max(1, sum(counts[piece.start :]))
            for batch in file.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=[key]):
                yield batch.column(0), round(per_row * len(batch))

    def _arrow(self) -> Iterator[tuple[pa.Array, int]]:
        key, piece = self._reading.text_key, self._piece
        with pa.memory_map(str(self._path)) as file:
            reader = _open_arrow(file)
            _check_column(reader.schema, key, self._path)
            if isinstance(reader, pa.RecordBatchFileReader):
                self._rows_before = sum(len(reader.get_batch(i)) for i in range(piece.start))
                stop = min(piece.stop, reader.num_record_batches)
                batches = (reader.get_batch(i) for i in range(piece.start, stop))
            else:
                batches = iter(reader)
            for batch in batches:
                column = batch.column(key)
                per_row = batch.nbytes / max(1, len(batch))
                for start in range(0, len(column), _ROWS_PER_READ):
                    rows = column.slice(start, _ROWS_PER_READ)
                    yield rows, round(per_row * len(rows))


def cut_table_file(path: Path, file: int, piece_bytes: int, text_key: str) -> list[Piece]:
    """The pieces of a table: consecutive row groups or record batches of about `piece_bytes`.
    Raises DataError if it is none, or has no text under `text_key`."""
    size = path.stat().st_size
    is_parquet = path.suffix == ".parquet"
    text_bytes = size * (_PARQUET_FACTOR if is_parquet else 1)
    parts = _count_parts(path, text_key)
    count = max(1, min(parts, round(text_bytes / piece_bytes)))
    cuts = [parts * i // count for i in range(count + 1)]
    return [
        Piece(
            file=file,
            start=cuts[i],
            stop=cuts[i + 1],
            source_bytes=size // count,
            text_bytes=text_bytes // count,
        )
        for i in range(count)
    ]


def items_of_column(
    column: pa.Array, first: int, source_bytes: int, reading: Reading
) -> Iterator[Item]:
    """The documents of consecutive rows, the first of which has the number `first`."""
    each = source_bytes // max(1, len(column))
    for index, text in enumerate(_strings(column)):
        number = first + index
        if isinstance(text, str):
            yield check_text(text, number, each, reading.max_bytes)
        else:
            yield Fault("not UTF-8", f"is not UTF-8: {text.reason}", number, each)


def _strings(column: pa.Array) -> Iterator[str | UnicodeDecodeError]:
    try:
        yield from [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py() or ""
            except UnicodeDecodeError as error:
                yield error


def _count_parts(path: Path, key: str) -> int:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                _check_column(table.schema_arrow, key, path)
                return max(1, int(table.num_row_groups))
        with pa.memory_map(str(path)) as file:
            reader = _open_arrow(file)
            _check_column(reader.schema, key, path)
            parts: int = getattr(reader, "num_record_batches", 1)
            return max(1, parts)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open_arrow(file: Any) -> Any:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(file)


def _check_column(schema: pa.Schema, key: str, path: Path) -> None:
    if key not in schema.names:
        raise DataError(f"{path} has no column {key!r}, only {schema.names}; name it by --text-key")
    kind = schema.field(key).type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise DataError(f"{path}: the column {key!r} holds {kind}, not strings")

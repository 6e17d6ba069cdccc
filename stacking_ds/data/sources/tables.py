"""Reads the text column of tables: Parquet and Arrow files, whole or between two row groups or
batches; .csv and .tsv files; and Hugging Face datasets.
"""

import csv
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stacking_ds.data.sources.documents import (
    Fault,
    Item,
    Reader,
    Reading,
    SourcePiece,
    check_text,
    text_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import JSON_ENDS, content_suffix, lines_of
from stacking_ds.data.sources.text_files import whole
from stacking_ds.errors import DataError

TABLE_SUFFIXES = (".parquet", ".arrow")
_ROWS_PER_READ = 256
_READ_AHEAD_BYTES = 2**20
# Parquet is compressed; its text is about three times as large.
_PARQUET_FACTOR = 3
_TEXT_TYPES = (
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view()),
)
_MOST_NAMED, _MOST_TYPE_CHARACTERS = 20, 100


class TableFile:
    """A piece of a Parquet or Arrow file; numbers are those of rows."""

    def __init__(self, path: Path, piece: SourcePiece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading
        self._rows_before = 0

    def items(self) -> Iterator[Item]:
        read = self._parquet if _is_parquet(self._path) else self._arrow
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
            check_column(file.schema_arrow, key, self._path)
            groups = range(piece.start, min(piece.stop, file.num_row_groups))
            counts = [file.metadata.row_group(i).num_rows for i in range(groups.stop)]
            self._rows_before = sum(counts[: piece.start])
            per_row = (piece.source_bytes or 0) / max(1, sum(counts[piece.start :]))
            for batch in file.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=[key]):
                # a column "text.html" is asked for by "text" too
                yield batch.column(key), round(per_row * len(batch))

    def _arrow(self) -> Iterator[tuple[pa.Array, int]]:
        key, piece = self._reading.text_key, self._piece
        with pa.memory_map(str(self._path)) as file:
            reader = _open_arrow(file)
            check_column(reader.schema, key, self._path)
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


def cut_table_file(path: Path, file: int, piece_bytes: int, text_key: str) -> list[SourcePiece]:
    """The pieces of a table: consecutive row groups or record batches of about `piece_bytes`.
    Raises DataError if it is none, or has no text under `text_key`."""
    size = path.stat().st_size
    text_bytes = size * (_PARQUET_FACTOR if _is_parquet(path) else 1)
    parts = _count_parts(path, text_key)
    count = max(1, min(parts, round(text_bytes / piece_bytes)))
    cuts = [parts * i // count for i in range(count + 1)]
    return [
        SourcePiece(
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


def check_column(schema: pa.Schema, key: str, where: object) -> None:
    """Raises DataError unless the table has one column `key`, of text: strings of any kind, bytes
    that should be UTF-8, or nothing but nulls."""
    names = schema.names
    if key not in names:
        raise DataError(
            f"{where} has no column {key!r}, only {names[:_MOST_NAMED]}; name it by --text-key"
        )
    if names.count(key) > 1:
        raise DataError(f"{where} has {names.count(key)} columns {key!r}; rename all but one")
    kind = schema.field(names.index(key)).type
    if not _is_text(kind):
        others = [field.name for field in schema if _is_text(field.type)][:_MOST_NAMED]
        remedy = f"its columns {others} do, of which --text-key can name one" if others else ""
        raise DataError(
            f"{where}: the column {key!r} holds {str(kind)[:_MOST_TYPE_CHARACTERS]}, not strings; "
            f"{remedy or 'make one of strings'}"
        )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in _TEXT_TYPES or pa.types.is_null(kind)


def _strings(column: pa.Array) -> Iterator[str | UnicodeDecodeError]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        yield from [_text(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        for value in column:
            try:
                yield _text(value.as_py())
            except UnicodeDecodeError as error:
                yield error


def _text(value: str | bytes | None) -> str:
    return (value.decode() if isinstance(value, bytes) else value) or ""


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def _count_parts(path: Path, key: str) -> int:
    try:
        if _is_parquet(path):
            with pq.ParquetFile(path) as table:
                check_column(table.schema_arrow, key, path)
                return max(1, int(table.num_row_groups))
        with pa.memory_map(str(path)) as file:
            reader = _open_arrow(file)
            check_column(reader.schema, key, path)
            parts: int = getattr(reader, "num_record_batches", 1)
            return max(1, parts)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open_arrow(file: Any) -> Any:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(file)


# ---- .csv and .tsv, plain or compressed, whose first row names the columns

# a .tsv has no quoting: a quote in it is a character like others, and often one without a second
_DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "strict": True},
}


class DelimitedFile:
    """A .csv or .tsv file; numbers are those of the lines that rows start in. In a .csv a field in
    double quotes may hold delimiters and newlines."""

    def __init__(self, path: Path, piece: SourcePiece, reading: Reading) -> None:
        self._path, self._piece, self._reading = path, piece, reading

    def items(self) -> Iterator[Item]:
        limit = self._reading.max_bytes
        rows = _DelimitedRows(self._path, self._piece, limit)
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


def cut_delimited_file(path: Path, file: int, reading: Reading) -> list[SourcePiece]:
    """The one piece that the file is. Raises DataError if its first row has no such column."""
    piece = whole(path, file)
    header = _DelimitedRows(path, piece, reading.max_bytes).next()
    if isinstance(header, Fault):
        raise DataError(f"{path} cannot be read: its first line {header.sentence}")
    _index_of(header or [], reading.text_key, path)
    return [piece]


class _DelimitedRows:
    """The rows of a file. `number` is the line that the last one started in, `source_bytes` what it
    took."""

    def __init__(self, path: Path, piece: SourcePiece, limit: int) -> None:
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


# ---- Hugging Face datasets: streamed, one piece a shard of the dataset, or downloaded first


class HuggingFace:
    """`hf:NAME`, `hf:NAME:CONFIG`, either with `@SPLIT`. With `download` the dataset is put into
    the local cache first, and pieces are ranges of its rows."""

    holds_out = False
    paths: Sequence[Path] = ()
    unread: Sequence[str] = ()
    repeated: Sequence[str] = ()

    def __init__(self, name: str, download: bool) -> None:
        self.name, self._download = name, download
        path, _, split = name.removeprefix("hf:").partition("@")
        self._path, _, config = path.partition(":")
        if not self._path:
            raise DataError(f"{name!r} names no dataset; write hf:NAME[:CONFIG][@SPLIT]")
        self._config, self._split = config or None, split or "train"

    def identity(self) -> list[str]:
        return [self.name]

    def contents(self) -> list[tuple[str, str | None]]:
        info = getattr(self.dataset, "info", None)
        return [(self.name, str(getattr(info, "license", None) or "") or None)]

    def estimate(self) -> int:
        return int(self.dataset.data.nbytes) if self._download else 0

    def pieces(self, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        # a streamed dataset may know its columns only when it is read
        features = self.dataset.features
        if features is not None:
            check_column(features.arrow_schema, reading.text_key, self.name)
        if not self._download:
            shards = int(self.dataset.num_shards)
            return [
                SourcePiece(file=0, start=i, stop=shards, source_bytes=None, text_bytes=None)
                for i in range(shards)
            ]
        rows, size = len(self.dataset), self.estimate()
        count = max(1, min(rows, round(size / piece_bytes)))
        cuts = [rows * i // count for i in range(count + 1)]
        share = size // count
        return [
            SourcePiece(file=0, start=start, stop=stop, source_bytes=share, text_bytes=share)
            for start, stop in pairwise(cuts)
        ]

    def open(self, piece: SourcePiece, reading: Reading) -> Reader:
        return _DatasetRows(self, piece, reading)

    @property
    def downloaded(self) -> bool:
        return self._download

    @cached_property
    def dataset(self) -> Any:
        """The dataset as the library gives it; DataError where it cannot."""
        import datasets  # a slow import that only this source needs

        try:
            return datasets.load_dataset(
                self._path, self._config, split=self._split, streaming=not self._download
            )
        except _failures() as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:200]
        return DataError(
            f"{self.name}: the dataset cannot be read (is the name right, and is the network "
            f"or the local cache of `datasets` there?): {type(error).__name__}: {reason}"
        )


class _DatasetRows:
    """A piece of a dataset; numbers are those of rows, within the shard if it is streamed."""

    def __init__(self, source: HuggingFace, piece: SourcePiece, reading: Reading) -> None:
        self._source, self._piece, self._reading = source, piece, reading

    def items(self) -> Iterator[Item]:
        return self._downloaded() if self._source.downloaded else self._streamed()

    def place(self, number: int) -> tuple[str, str]:
        name, start = self._source.name, self._piece.start
        if self._source.downloaded:
            return f"{name}:{start + number}", f"{name}, row {start + number}"
        return f"{name}:{start}:{number}", f"{name}, shard {start}, row {number}"

    def _downloaded(self) -> Iterator[Item]:
        dataset, key, piece = self._source.dataset, self._reading.text_key, self._piece
        per_row = (piece.source_bytes or 0) / max(1, piece.stop - piece.start)
        arrow = dataset.with_format("arrow")
        for start in range(piece.start, piece.stop, _ROWS_PER_READ):
            stop = min(piece.stop, start + _ROWS_PER_READ)
            column = arrow[start:stop].column(key).combine_chunks()
            size = round(per_row * (stop - start))
            yield from items_of_column(column, start - piece.start + 1, size, self._reading)

    def _streamed(self) -> Iterator[Item]:
        failures = _failures()
        key, limit = self._reading.text_key, self._reading.max_bytes
        number = 0
        try:
            rows = iter(
                self._source.dataset.shard(num_shards=self._piece.stop, index=self._piece.start)
            )
        except failures as error:
            raise self._source.failed(error) from error
        while True:
            try:
                row: dict[str, Any] | None = next(rows, None)
            except failures as error:
                raise self._source.failed(error) from error
            if row is None:
                return
            number += 1
            text = text_of_row(row, key)
            if isinstance(text, str):
                yield check_text(text, number, len(text), limit)
            else:
                yield Fault(*text, number, 0)


def _failures() -> tuple[type[Exception], ...]:
    import datasets

    # what damaged files and odd tables make of `datasets` and pandas besides
    others = (LookupError, TypeError, AttributeError, NotImplementedError, pa.ArrowException)
    return (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *others)

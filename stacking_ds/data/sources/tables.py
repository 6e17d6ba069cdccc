"""Reads the text column of tables: Parquet and Arrow files, whole or between two row groups or
batches; .csv and .tsv files; and Hugging Face datasets.
"""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stacking_ds.data.sources.documents import (
    Fault,
    FileReader,
    Item,
    Reader,
    Reading,
    Source,
    SourcePiece,
    check_text,
    even_pieces,
    item_of_row,
    too_long,
)
from stacking_ds.data.sources.lines import JSON_ENDS, content_suffix, lines_of
from stacking_ds.data.sources.text_files import whole
from stacking_ds.errors import DataError

_ROWS_PER_READ = 256
_READ_AHEAD_BYTES = 2**20
# Parquet is compressed; its text is about three times as large.
PARQUET_FACTOR = 3
_TEXT_TYPES = (
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view()),
)
_MOST_NAMED, _MOST_TYPE_CHARACTERS = 20, 100


class ArrowFile(FileReader):
    """A piece of an Arrow file, or of a stream in a file; numbers are those of rows."""

    noun = "row"

    @classmethod
    def cut(cls, path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        with _opened(path, reading.text_key) as (_, parts):
            size = path.stat().st_size
            factor = PARQUET_FACTOR if _is_parquet(path) else 1
            return even_pieces(file, parts, piece_bytes, size, factor * size)

    def read(self) -> Iterator[Item]:
        with _opened(self.path, self.reading.text_key) as (table, _):
            number = 1
            for column, row_bytes in self.columns(table):
                yield from items_of_column(column, number, row_bytes, self.reading)
                number += len(column)

    def columns(self, table: Any) -> Iterator[tuple[pa.Array, float]]:
        """The text of successive rows, and the bytes of the source that each takes."""
        batches: Iterable[pa.RecordBatch] = table  # a stream
        if isinstance(table, pa.RecordBatchFileReader):
            start, stop = self.piece.start, min(self.piece.stop, table.num_record_batches)
            self.before = sum(len(table.get_batch(i)) for i in range(start))
            batches = map(table.get_batch, range(start, stop))
        for batch in batches:
            column = batch.column(self.reading.text_key)
            for first in range(0, len(column), _ROWS_PER_READ):
                yield column.slice(first, _ROWS_PER_READ), batch.nbytes / len(batch)


class ParquetFile(ArrowFile):
    """A piece of a Parquet file."""

    def columns(self, table: Any) -> Iterator[tuple[pa.Array, float]]:
        piece, key = self.piece, self.reading.text_key
        groups = range(piece.start, min(piece.stop, table.num_row_groups))
        counts = [table.metadata.row_group(i).num_rows for i in range(groups.stop)]
        self.before = sum(counts[: piece.start])
        row_bytes = (piece.source_bytes or 0) / max(1, sum(counts[piece.start :]))
        for batch in table.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=[key]):
            # a column "text.html" is asked for by "text" too
            yield batch.column(key), row_bytes


def items_of_column(
    column: pa.Array, first: int, row_bytes: float, reading: Reading
) -> Iterator[Item]:
    """The documents of consecutive rows, the first of which has the number `first`."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    each = round(row_bytes * len(column)) // max(1, len(column))
    for number, value in enumerate(column, first):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            text = value.as_buffer().to_pybytes()
        yield check_text(text, number, each, reading.max_bytes)


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


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[Any, int]]:
    """The table, which has a column `key` of text, and how many parts it can be cut into."""
    if _is_parquet(path):
        with pq.ParquetFile(path, buffer_size=_READ_AHEAD_BYTES) as table:
            check_column(table.schema_arrow, key, path)
            yield table, table.num_row_groups
        return
    with pa.memory_map(str(path)) as file:
        try:
            table = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(file)
        check_column(table.schema, key, path)
        yield table, getattr(table, "num_record_batches", 1)


# ---- .csv and .tsv, plain or compressed, whose first row names the columns

# a .tsv has no quoting: a quote in it is a character like others, and often one without a second
_DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "strict": True},
}


class DelimitedFile(FileReader):
    """A .csv or .tsv file; numbers are those of the lines that rows start in. In a .csv a field in
    double quotes may hold delimiters and newlines."""

    @classmethod
    def cut(cls, path: Path, file: int, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        piece = whole(path, file)
        header, *_ = next(cls(path, piece, reading)._rows(), ([],))
        if isinstance(header, Fault):
            raise DataError(f"{path} cannot be read: its first line {header.sentence}")
        _index_of(header, reading.text_key, path)
        return [piece]

    def read(self) -> Iterator[Item]:
        rows = self._rows()
        header, *_ = next(rows, ([],))
        names = header if isinstance(header, list) else []
        index = _index_of(names, self.reading.text_key, self.path)
        for row, number, size in rows:
            if isinstance(row, Fault):
                yield row
            elif row and len(row) != len(names):
                sentence = f"starts a row of {len(row)} columns, where the first has {len(names)}"
                yield Fault("not a row", sentence, number, size)
            elif row:
                yield check_text(row[index], number, size, self.reading.max_bytes)

    def _rows(self) -> Iterator[tuple[list[str] | Fault, int, int]]:
        """Each row, or what is wrong with it, the line that it starts in, and what it took."""
        limit = self.reading.max_bytes
        # a quote that never ends would take the rest of the file into memory
        csv.field_size_limit(limit)
        number, size, fault = 0, 0, None

        def contents() -> Iterator[str]:
            nonlocal number, size, fault
            for line in lines_of(self.path, self.piece, limit, JSON_ENDS):
                number, size = number or line.number, size + line.source_bytes
                fault = fault or line.fault
                yield line.content or "\n"

        reader, lost = csv.reader(contents(), **_DIALECTS[content_suffix(self.path)]), False
        while not lost:
            number, size, fault = 0, 0, None
            found: list[str] | Fault | None
            try:
                row = next(reader, None)
                found = fault or row
            except csv.Error as error:
                # a quote that does not end may have taken many rows; others spoil their own
                lost = any(words in str(error) for words in ("field larger", "unexpected end"))
                sentence = f"starts what cannot be read as a row: {error}"
                found = Fault("not a row", sentence, number, size, lost)
                if "field larger" in str(error):
                    found = too_long(number, size, limit)
            if found is None:
                return
            yield found, number, size


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


class HuggingFace(Source):
    """`hf:NAME`, `hf:NAME:CONFIG`, either with `@SPLIT`. With `download` the dataset is put into
    the local cache first, and pieces are ranges of its rows."""

    def __init__(self, name: str, download: bool) -> None:
        self.name, self.download = name, download
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
        return int(self.dataset.data.nbytes) if self.download else 0

    def pieces(self, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        # a streamed dataset may know its columns only when it is read
        features = self.dataset.features
        if features is not None:
            check_column(features.arrow_schema, reading.text_key, self.name)
        if self.download:
            size = self.estimate()
            return even_pieces(0, len(self.dataset), piece_bytes, size, size)
        shards = int(self.dataset.num_shards)
        return [
            SourcePiece(file=0, start=i, stop=shards, source_bytes=None, text_bytes=None)
            for i in range(shards)
        ]

    def open(self, piece: SourcePiece, reading: Reading) -> Reader:
        return _DatasetRows(self, piece, reading)

    @cached_property
    def dataset(self) -> Any:
        """The dataset as the library gives it; DataError where it cannot."""
        import datasets  # a slow import that only this source needs

        with self.named_failures():
            return datasets.load_dataset(
                self._path, self._config, split=self._split, streaming=not self.download
            )

    @contextmanager
    def named_failures(self) -> Iterator[None]:
        """Raises DataError for what the library raises."""
        import datasets

        # what damaged files and odd tables make of `datasets` and pandas besides
        others = (LookupError, TypeError, AttributeError, NotImplementedError, pa.ArrowException)
        known = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        try:
            yield
        except (*known, *others) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.name}: the dataset cannot be read (is the name right, and is the network "
                f"or the local cache of `datasets` there?): {type(error).__name__}: {reason}"
            ) from error


class _DatasetRows(Reader):
    """A piece of a dataset; numbers are those of rows, within the shard if it is streamed."""

    def __init__(self, source: HuggingFace, piece: SourcePiece, reading: Reading) -> None:
        self._source, self._piece, self._reading = source, piece, reading

    def items(self) -> Iterator[Item]:
        return self._downloaded() if self._source.download else self._streamed()

    def place(self, number: int) -> tuple[str, str]:
        name, start = self._source.name, self._piece.start
        if self._source.download:
            return f"{name}:{start + number}", f"{name}, row {start + number}"
        return f"{name}:{start}:{number}", f"{name}, shard {start}, row {number}"

    def _downloaded(self) -> Iterator[Item]:
        key, piece = self._reading.text_key, self._piece
        row_bytes = (piece.source_bytes or 0) / max(1, piece.stop - piece.start)
        arrow = self._source.dataset.with_format("arrow")
        for start in range(piece.start, piece.stop, _ROWS_PER_READ):
            rows = arrow[start : min(piece.stop, start + _ROWS_PER_READ)]
            column = rows.column(key).combine_chunks()
            yield from items_of_column(column, start - piece.start + 1, row_bytes, self._reading)

    def _streamed(self) -> Iterator[Item]:
        dataset, key = self._source.dataset, self._reading.text_key
        with self._source.named_failures():
            rows = dataset.shard(num_shards=self._piece.stop, index=self._piece.start)
            for number, row in enumerate(rows, start=1):
                text = row.get(key)
                size = len(text) if isinstance(text, str | bytes) else 0
                yield item_of_row(row, number, size, self._reading)

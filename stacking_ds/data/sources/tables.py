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
from stacking_ds.errors import DataError

_ROWS_PER_READ = 256
_READ_AHEAD_BYTES = 2**20
_TEXT_TYPES = (
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view()),
)
_MOST_NAMED, _MOST_TYPE_CHARACTERS = 20, 100


class ArrowFile(FileReader):
    """A piece of an Arrow file, or of a stream in a file; numbers are those of rows."""

    noun = "row"

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        with _opened(self.path, self.reading.text_key) as (_, parts):
            return even_pieces(self.piece, parts, piece_bytes)

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
    _require_one(schema.names, key, where)
    kind = schema.field(key).type
    if not _is_text(kind):
        others = [field.name for field in schema if _is_text(field.type)][:_MOST_NAMED]
        remedy = f"its columns {others} do, of which --text-key can name one" if others else ""
        raise DataError(
            f"{where}: the column {key!r} holds {str(kind)[:_MOST_TYPE_CHARACTERS]}, not strings; "
            f"{remedy or 'make one of strings'}"
        )


def _require_one(names: list[str], key: str, where: object, place: str = "") -> None:
    if key not in names:
        raise DataError(
            f"{where} has no column {key!r}{place}, only {names[:_MOST_NAMED]}; name the one that "
            "holds the text by --text-key"
        )
    if names.count(key) > 1:
        raise DataError(f"{where} has {names.count(key)} columns {key!r}; rename all but one")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in _TEXT_TYPES or pa.types.is_null(kind)


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[Any, int]]:
    """The table, which has a column `key` of text, and how many parts it can be cut into."""
    if content_suffix(path) == ".parquet":
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

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        self._names(self._rows())
        return [self.piece]

    def read(self) -> Iterator[Item]:
        rows = self._rows()
        names = self._names(rows)
        index = names.index(self.reading.text_key)
        for row, number, size in rows:
            if isinstance(row, Fault):
                yield row
            elif row and len(row) != len(names):
                sentence = f"starts a row of {len(row)} columns, where the first has {len(names)}"
                yield Fault("not a row", sentence, number, size)
            elif row:
                yield check_text(row[index], number, size, self.reading.max_bytes)

    def _names(self, rows: Iterator[tuple[list[str] | Fault, int, int]]) -> list[str]:
        """What the first of the rows calls the columns, of which one is the text's."""
        path, key = self.path, self.reading.text_key
        names, *_ = next(rows, ([],))
        if isinstance(names, Fault):
            raise DataError(f"{path} cannot be read: its first line {names.sentence}")
        if key not in names and content_suffix(path) == ".tsv" and f'"{key}"' in names:
            raise DataError(
                f"{path} puts its fields in double quotes, which a .tsv has not: they would become "
                "part of the text; write it without quotes, or as a .csv"
            )
        _require_one(names, key, path, " in its first line")
        return names

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
            rows, size = len(self.dataset), self.estimate()
            all_rows = SourcePiece(file=0, start=0, stop=rows, source_bytes=size, text_bytes=size)
            return even_pieces(all_rows, rows, piece_bytes)
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

        known = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        # what damaged files and odd tables make of `datasets` and pandas besides
        others = (LookupError, TypeError, AttributeError, NotImplementedError, pa.ArrowException)
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
        piece, reading, dataset = self._piece, self._reading, self._source.dataset
        if self._source.download:
            row_bytes = (piece.source_bytes or 0) / max(1, piece.stop - piece.start)
            arrow = dataset.with_format("arrow")
            for start in range(piece.start, piece.stop, _ROWS_PER_READ):
                rows = arrow[start : min(piece.stop, start + _ROWS_PER_READ)]
                column = rows.column(reading.text_key).combine_chunks()
                yield from items_of_column(column, start - piece.start + 1, row_bytes, reading)
            return
        with self._source.named_failures():
            shard = dataset.shard(num_shards=piece.stop, index=piece.start)
            for number, row in enumerate(shard, start=1):
                text = row.get(reading.text_key)
                size = len(text) if isinstance(text, str | bytes) else 0
                yield item_of_row(row, number, size, reading)

    def place(self, number: int) -> tuple[str, str]:
        name, start = self._source.name, self._piece.start
        if self._source.download:
            return f"{name}:{start + number}", f"{name}, row {start + number}"
        return f"{name}:{start}:{number}", f"{name}, shard {start}, row {number}"

"""Hugging Face datasets: streamed, one piece a shard of the dataset, or downloaded first."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from stacking_ds.data.sources.documents import (
    Fault,
    Item,
    Reader,
    Reading,
    SourcePiece,
    check_text,
    text_of_row,
)
from stacking_ds.data.sources.tables import check_column, items_of_column
from stacking_ds.errors import DataError

_ROWS_PER_READ = 256


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

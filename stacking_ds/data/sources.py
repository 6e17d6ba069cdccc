"""Documents from where they lie: text, JSON Lines, Parquet and Arrow files, Hugging Face
`datasets`, and the embedded corpus.

A source is named by a string:

    embedded                            the prose of the installed packages, see `embedded`
    hf:NAME, hf:NAME:CONFIG, ...@SPLIT  a Hugging Face dataset, streamed; the column `text`;
                                        known by its name alone, see `Source.identity`
    a file, a folder or a glob          .txt       a blank line ends a document; the lines between
                                                   are joined, so that wrapped lines do no harm
                                        .jsonl[.gz] one object a line; the key `text`
                                        .parquet, .arrow  the column `text`

Within the text of the last three a newline ends a paragraph.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from stacking_ds.data import embedded
from stacking_ds.data.manifest import SplitName, file_sha256
from stacking_ds.errors import DataError

__all__ = ["Document", "Source", "open_source"]

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")
_ROWS_PER_READ = 1024


@dataclass(frozen=True)
class Document:
    """One document: paragraphs separated by newlines, and the split its source puts it in."""

    text: str
    split: SplitName | None = None


class Source(Protocol):
    """Something documents can be read from, more than once, in the same order."""

    holds_out: bool
    """Whether the source itself puts some of its documents into the held-out split."""

    def identity(self) -> list[str]:
        """What the documents are known by later: names, with hashes or versions where they lie on
        this machine.

        These change when the documents do. Not so for a Hugging Face dataset, which has its name
        alone, so that it needs no network to be recognised: a change of it is not noticed.
        """

    def documents(self) -> Iterator[Document]: ...


def open_source(name: str) -> Source:
    """The source called `name`; DataError when its files do not exist or cannot be told apart."""
    if name == "embedded":
        return _Embedded()
    if name.startswith("hf:"):
        return _HuggingFace(name)
    return _Files(name)


class _Embedded:
    holds_out = True

    def identity(self) -> list[str]:
        return embedded.identity()

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)

    @cached_property
    def _documents(self) -> list[Document]:
        """A few megabytes, kept since reading them takes much longer than tokenizing them."""
        return [Document(text, split) for split, text in embedded.documents()]


class _HuggingFace:
    holds_out = False

    def __init__(self, name: str) -> None:
        self._name = name
        path, _, split = name.removeprefix("hf:").partition("@")
        self._path, _, config = path.partition(":")
        if not self._path:
            raise DataError(f"{name!r} names no dataset; write hf:NAME[:CONFIG][@SPLIT]")
        self._config, self._split = config or None, split or "train"

    def identity(self) -> list[str]:
        return [self._name]

    def documents(self) -> Iterator[Document]:
        import datasets  # a slow import that only this source needs

        failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        try:
            rows = iter(
                datasets.load_dataset(self._path, self._config, split=self._split, streaming=True)
            )
        except failures as error:
            raise self._failed(error) from error
        number = 0
        while True:
            try:
                row: dict[str, Any] | None = next(rows, None)
            except failures as error:
                raise self._failed(error) from error
            if row is None:
                return
            number += 1
            yield Document(_text_of(row, f"{self._name}, row {number}"))

    def _failed(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:200]
        return DataError(
            f"{self._name}: the dataset cannot be read (is the name right, and is the network "
            f"or the local cache of `datasets` there?): {type(error).__name__}: {reason}"
        )


class _Files:
    holds_out = False

    def __init__(self, name: str) -> None:
        self._paths = _expand(name)

    def identity(self) -> list[str]:
        return [f"{path.name} sha256:{_sha256(path)}" for path in self._paths]

    def documents(self) -> Iterator[Document]:
        for path in self._paths:
            read = next(reader for suffix, reader in _READERS.items() if path.name.endswith(suffix))
            try:
                for text in read(path):
                    yield Document(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8: {error.reason}") from error
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path} is a broken gzip file: {error}") from error
            except pa.ArrowException as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _expand(name: str) -> list[Path]:
    """The files behind a path, a folder (its readable files) or a glob, sorted by name."""
    path = Path(name)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    else:
        paths = sorted(Path(match) for match in glob.glob(name, recursive=True))
    if not paths:
        kind = "holds no" if path.is_dir() else "does not exist, or matches no"
        raise DataError(f"data source {name!r} {kind} {', '.join(_SUFFIXES)} file")
    for file in paths:
        if not file.name.endswith(_SUFFIXES):
            raise DataError(f"{file} is none of the known kinds: {', '.join(_SUFFIXES)}")
    return paths


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a plain or gzipped text file, without their ends."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not UTF-8 (byte {error.start} of the line)"
                ) from error


def _read_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            lines.append(line.strip())
        elif lines:
            yield " ".join(lines)
            lines = []
    if lines:
        yield " ".join(lines)


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        yield _text_of(row, where)


def _read_parquet(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{path} has no column 'text', only {file.schema_arrow.names}")
        for batch in file.iter_batches(_ROWS_PER_READ, columns=["text"]):
            yield from _texts_of_column(batch.column("text"), path)


def _read_arrow(path: Path) -> Iterator[str]:
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            reader = batches = pa.ipc.open_stream(file)
        if "text" not in reader.schema.names:
            raise DataError(f"{path} has no column 'text', only {reader.schema.names}")
        for batch in batches:
            yield from _texts_of_column(batch.column("text"), path)


def _texts_of_column(column: pa.Array, path: Path) -> Iterator[str]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{path}: the column 'text' holds {column.type}, not strings")
    for text in column.to_pylist():
        yield text or ""


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"the keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no string under the key 'text' (it has {found})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character (a lone surrogate at position {error.start} of its "
            f"text); mend or drop that document"
        ) from None
    return text


_READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}

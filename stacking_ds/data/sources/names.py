"""A source is named by a string:

    embedded                            the prose of the installed packages, see `data.embedded`
    hf:NAME, hf:NAME:CONFIG, ...@SPLIT  a Hugging Face dataset, see `hugging_face`
    a file, a folder or a glob          .txt[.gz], .jsonl[.gz], see `text_files`;
                                        .parquet, .arrow, see `tables`

Within a text a newline ends a paragraph. The text's key or column is `text` unless said otherwise.
"""

import glob
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa

from stacking_ds.data import embedded
from stacking_ds.data.manifest import SplitName
from stacking_ds.data.sources.documents import Document, Item, Piece, Reader, Reading, Source
from stacking_ds.data.sources.hugging_face import HuggingFace
from stacking_ds.data.sources.tables import TABLE_SUFFIXES, TableFile, cut_table_file
from stacking_ds.data.sources.text_files import TEXT_SUFFIXES, TextFile, cut_text_file
from stacking_ds.errors import DataError

__all__ = ["open_source"]

_SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
_COMPRESSED = (".gz", ".parquet")


def open_source(name: str, *, download: bool = False) -> Source:
    """The source called `name`; DataError when its files do not exist or cannot be told apart.

    `download` is for Hugging Face datasets: fetch them whole instead of streaming.
    """
    if name == "embedded":
        return _Embedded()
    if name.startswith("hf:"):
        return HuggingFace(name, download)
    return _Files(name)


class _Files:
    holds_out = False

    def __init__(self, name: str) -> None:
        self.name, self.paths = name, _expand(name)

    @property
    def unread(self) -> list[str]:
        """What lies in the folder, if it is one, and is not read."""
        folder = Path(self.name)
        inside = folder.iterdir() if folder.is_dir() else ()
        return sorted({path.name for path in inside} - {path.name for path in self.paths})

    def identity(self) -> list[str]:
        return [f"{path.name}, {_size(path):,} bytes" for path in self.paths]

    def contents(self) -> list[tuple[str, str | None]]:
        return []

    def estimate(self) -> int:
        return sum(_size(path) * (3 if path.suffix in _COMPRESSED else 1) for path in self.paths)

    def pieces(self, piece_bytes: int, text_key: str) -> list[Piece]:
        found: list[Piece] = []
        for index, path in enumerate(self.paths):
            try:
                if path.name.endswith(TABLE_SUFFIXES):
                    found += cut_table_file(path, index, piece_bytes, text_key)
                else:
                    found += cut_text_file(path, index, piece_bytes)
            except OSError as error:
                raise _unreadable(path, error) from error
        return found

    def open(self, piece: Piece, reading: Reading) -> Reader:
        return _OpenFile(self.paths[piece.file], piece, reading)


class _OpenFile:
    """Any file's reader, with its errors named."""

    def __init__(self, path: Path, piece: Piece, reading: Reading) -> None:
        self._path = path
        is_table = path.name.endswith(TABLE_SUFFIXES)
        self._reader: Reader = (TableFile if is_table else TextFile)(path, piece, reading)
        self.place = self._reader.place

    def items(self) -> Iterator[Item]:
        try:
            yield from self._reader.items()
        except pa.ArrowException as error:
            raise DataError(f"{self._path} cannot be read: {error}") from error
        except OSError as error:
            raise _unreadable(self._path, error) from error


class _Embedded:
    name = "embedded"
    holds_out = True
    paths: Sequence[Path] = ()
    unread: Sequence[str] = ()

    def identity(self) -> list[str]:
        return embedded.identity()

    def contents(self) -> list[tuple[str, str | None]]:
        return embedded.licences()

    def estimate(self) -> int:
        return embedded.TEXT_BYTES

    def pieces(self, piece_bytes: int, text_key: str) -> list[Piece]:
        size = embedded.TEXT_BYTES
        return [Piece(file=0, start=0, stop=1, source_bytes=size, text_bytes=size)]

    def open(self, piece: Piece, reading: Reading) -> Reader:
        return _EmbeddedDocuments()


class _EmbeddedDocuments:
    def items(self) -> Iterator[Item]:
        for number, (split, text) in enumerate(_embedded_texts(), start=1):
            yield Document(text, number, len(text), split)

    def place(self, number: int) -> tuple[str, str]:
        return f"embedded:{number}", f"the embedded corpus, document {number}"


@cache
def _embedded_texts() -> list[tuple[SplitName, str]]:
    """A few megabytes, kept since reading them takes much longer than tokenizing them."""
    return list(embedded.documents())


def _expand(name: str) -> list[Path]:
    """The files behind a path, a folder (its readable files) or a glob, sorted by name."""
    path = Path(name)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(file for file in path.iterdir() if _is_known(file) and file.is_file())
    else:
        matches = (Path(match) for match in glob.glob(name, recursive=True))
        paths = sorted(match for match in matches if not match.is_dir())
    if not paths:
        kind = "holds no" if path.is_dir() else "does not exist, or matches no"
        raise DataError(f"data source {name!r} {kind} {', '.join(_SUFFIXES)} file")
    for file in paths:
        if not _is_known(file):
            raise DataError(f"{file} is none of the known kinds: {', '.join(_SUFFIXES)}")
    return paths


def _is_known(file: Path) -> bool:
    return file.name.endswith(_SUFFIXES)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}")

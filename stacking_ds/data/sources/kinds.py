"""Sources by name: files, folders and globs of known kinds, and what is no file.

    embedded                            the prose of the installed packages, see `embedded`
    hf:NAME, hf:NAME:CONFIG, ...@SPLIT  a Hugging Face dataset, see `tables`
    a file, a folder or a glob          .txt, .jsonl, .ndjson, .json, see `text_files`; .csv, .tsv,
                                        see `tables`; each of these also .gz, .bz2, .xz, .zst;
                                        .parquet, .arrow, see `tables`

Suffixes may be in capitals. Within a text a newline ends a paragraph. The text's key or column is
`text` unless said otherwise.
"""

import errno
import glob
import os
import stat
from pathlib import Path

from stacking_ds.console import is_utf8, readable_name
from stacking_ds.data.sources.documents import FileReader, Reading, Source, SourcePiece, reading_of
from stacking_ds.data.sources.embedded import Embedded
from stacking_ds.data.sources.lines import PACKED_SUFFIXES, content_suffix, is_packed, whole
from stacking_ds.data.sources.tables import ArrowFile, DelimitedFile, HuggingFace, ParquetFile
from stacking_ds.data.sources.text_files import JsonFile, JsonLines, TextFile
from stacking_ds.errors import DataError

_LINE_FILES = {".txt": TextFile, ".jsonl": JsonLines, ".ndjson": JsonLines}
# in a folder these may as well be notes about the data
_ONLY_IF_NAMED = {".json": JsonFile, ".csv": DelimitedFile, ".tsv": DelimitedFile}
_TABLES = {".parquet": ParquetFile, ".arrow": ArrowFile}
_READERS: dict[str, type[FileReader]] = {**_LINE_FILES, **_ONLY_IF_NAMED, **_TABLES}
_KINDS = (
    f"{', '.join({**_LINE_FILES, **_ONLY_IF_NAMED})} (each also {', '.join(PACKED_SUFFIXES)}), "
    f"{' or '.join(_TABLES)}"
)

SeenFiles = dict[tuple[int, int] | Path, Path]
"""The files that are read, by device and inode, under the name that came first."""


def open_source(name: str, *, download: bool = False, seen: SeenFiles | None = None) -> Source:
    """The source called `name`; DataError when its files do not exist or cannot be told apart.
    Those that are `seen` already are left out, the others are added. `download` fetches a Hugging
    Face dataset whole instead of streaming it."""
    if name == "embedded":
        return Embedded()
    if name.startswith("hf:"):
        return HuggingFace(name, download)
    return _Files(name, {} if seen is None else seen)


class _Files(Source):
    def __init__(self, name: str, seen: SeenFiles) -> None:
        name = os.path.expanduser(name) if name.startswith("~/") else name
        self.name = name
        self.paths: list[Path] = []
        self.repeated: list[str] = []
        folder = Path(name)
        with reading_of(folder):
            found = _expand(name)
            inside = folder.iterdir() if folder.is_dir() else ()
            unread = {path.name for path in inside} - {path.name for path in found}
        self.unread = sorted(map(readable_name, unread))
        for path in found:
            status = _stat(path)
            # some file systems have no numbers for their files
            inode = (status.st_dev, status.st_ino) if status.st_ino else path.absolute()
            first = seen.setdefault(inode, path)
            if first is path:
                self.paths.append(path)
            else:
                self.repeated.append(f"{path} is {first}")

    def identity(self) -> list[str]:
        return [f"{path.name}, {_stat(path).st_size:,} bytes" for path in self.paths]

    def estimate(self) -> int:
        found = 0
        for path in self.paths:
            with reading_of(path):
                found += whole(path, 0).text_bytes or 0
        return found

    def pieces(self, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        found: list[SourcePiece] = []
        for index, path in enumerate(self.paths):
            with reading_of(path):
                found += self.open(whole(path, index), reading).cut(piece_bytes)
        return found

    def open(self, piece: SourcePiece, reading: Reading) -> FileReader:
        path = self.paths[piece.file]
        return _READERS[content_suffix(path)](path, piece, reading)


def _expand(name: str) -> list[Path]:
    """The files behind a path, a folder (its readable files) or a glob, sorted by name."""
    path, named = Path(name), []
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        named = sorted(file for file in path.iterdir() if _is_known(file) and file.is_file())
        paths = [file for file in named if content_suffix(file) not in _ONLY_IF_NAMED]
    else:
        matches = [Path(match) for match in glob.glob(name, recursive=True)]
        # where folders are links in a circle, there is a match at every turn, and at last too many
        many = glob.has_magic(name)
        paths = sorted(
            match for match in matches if not match.is_dir() and not (many and _in_circle(match))
        )
    if not paths and path.is_dir():
        remedy = f"; name the files, as {str(named[0])!r}, to have them read" if named else ""
        raise DataError(f"data source {name!r} holds no {_KINDS} file{remedy}")
    if not paths:
        raise DataError(f"data source {name!r} does not exist, or matches no {_KINDS} file")
    for file in paths:
        if not is_utf8(file):
            raise DataError(f"the name of {readable_name(file)} is not UTF-8; rename it")
        if not stat.S_ISREG(_stat(file).st_mode):
            raise DataError(
                f"{file} is not a regular file but a pipe or a device; `prepare` reads its sources "
                "more than once: write what comes from there into a file first"
            )
        if not _is_known(file):
            raise DataError(f"{file} is none of the known kinds: {_KINDS}")
    return paths


def _in_circle(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _is_known(file: Path) -> bool:
    kind = content_suffix(file)
    return kind in _READERS and not (kind in _TABLES and is_packed(file))


def _stat(path: Path) -> os.stat_result:
    with reading_of(path):
        return path.stat()

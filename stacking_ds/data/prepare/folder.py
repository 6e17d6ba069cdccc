"""Options of a prepare, and the folder in which it is done; nothing is lost by a kill.

    OUT/.unfinished/started.json     what was asked for, and the plan
    OUT/.unfinished/vocab.txt        the vocabulary, as soon as there is one
    OUT/.unfinished/unit-00000.json  what a unit has written so far
    OUT/train-00000-000.arrow, ...   shards that these records name

Every file is written whole under another name and renamed. Processes that do the same work at the
same time write the same bytes, so whoever comes last changes nothing.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from stacking_ds.console import is_utf8, readable_name, shortened
from stacking_ds.data.prepare.work_plan import Corpus, WorkPlan, open_corpus
from stacking_ds.data.shard_files import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    DocumentRule,
    PrepareRequest,
    Rejected,
    ShardFile,
    SplitName,
    file_sha256,
    write_file,
)
from stacking_ds.data.sources.documents import (
    MAX_DOCUMENT_BYTES,
    NO_TEXT,
    Document,
    Fault,
    Reader,
    Reading,
)
from stacking_ds.data.tokenizer import load_vocabulary
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_bytes
from stacking_ds.records import Record

SPLITS: tuple[SplitName, SplitName] = ("heldout", "train")
EMPTY = "empty"

_R = TypeVar("_R", bound=Record)
_STARTED, _VOCABULARY, _UNIT = "started.json", "vocab.txt", "unit-{:05d}.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# several times the largest that anybody trains; the library aborts when it makes room for more
_LARGEST_VOCABULARY = 2**20


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that `prepare` is asked for. Raises DataError for a number that is out of range.

    The vocabulary is read from `vocabulary`, or trained to `vocab_size` on about 128 Mi characters
    of the training documents. Text is lowercased and stripped of its accents, unless it is `cased`,
    which keeps both, or told to `keep_accents`; a given tokenizer.json says so itself.

    Held out are: all documents of `heldout_sources`, those a source itself holds out, and, when
    there are no `heldout_sources`, the `heldout_fraction` of the documents of other sources whose
    hash falls lowest, so that a document stays on its side whatever is added to the corpus.

    `text_key` is the key or column of the text; `documents` what a document of a .txt file is.
    `bad_documents`: "refuse" raises for the first one that cannot be read, "count" leaves such ones
    out and lists them in the manifest. `part` (i, n) does every n-th unit, from the i-th, and
    leaves the others to n - 1 other calls, of which the last one finishes. `unit_bytes` and
    `shard_characters` set the size of the pieces of work and of the shards; the latter is what each
    of the `workers` holds in memory before it writes, and at most loses when it is killed.
    """

    sources: Sequence[str]
    out_dir: Path
    vocabulary: Path | None = None
    vocab_size: int = 8192
    cased: bool = False
    keep_accents: bool = False
    heldout_sources: Sequence[str] = ()
    heldout_fraction: float = 0.02
    licence: str | None = None
    text_key: str = "text"
    documents: DocumentRule = "blank-line"
    bad_documents: Literal["refuse", "count"] = "refuse"
    download: bool = False
    workers: int = 1
    part: tuple[int, int] = (1, 1)
    shard_characters: int = 128 * 2**20
    unit_bytes: int | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self) -> None:
        for name in ("sources", "heldout_sources"):  # lists are taken too, and one by itself
            given = getattr(self, name)
            sources = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, name, sources)
        (index, count), problem = self.part, ""
        # how small it may be, the alphabet of the text says
        if self.vocab_size > _LARGEST_VOCABULARY:
            problem = (
                f"vocab_size is {self.vocab_size:,}; it can be {_LARGEST_VOCABULARY:,} at most"
            )
        elif not 0 <= self.heldout_fraction <= 0.5:
            problem = f"heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 0.5"
        elif self.workers < 1:
            problem = f"workers is {self.workers}; it must be at least 1"
        elif not 1 <= index <= count:
            problem = f"part {index} of {count} does not exist; write 1/4 to 4/4, say"
        if problem:
            raise DataError(problem)

    @property
    def reading(self) -> Reading:
        """The options by which the sources are read."""
        leaves_out = self.bad_documents == "count"
        return Reading(self.text_key, self.max_document_bytes, self.documents, leaves_out)

    def split_of(self, document: Document, document_hash: int, heldout: bool) -> SplitName:
        """The side a document is on: all of a held-out unit is held out, else the source may say
        so, else, without held-out sources, the hash does, whatever is added to the corpus."""
        if heldout:
            return "heldout"
        limit = 0 if self.heldout_sources else int(self.heldout_fraction * 2**64)
        return document.split or ("heldout" if document_hash < limit else "train")

    def refuse(self, fault: Fault, reader: Reader) -> None:
        """Raises DataError for a fault unless these are counted."""
        if self.bad_documents == "refuse":
            key = "name another key by --text-key, " if fault.reason == NO_TEXT else ""
            raise DataError(
                f"{reader.place(fault.number)[1]} {fault.sentence}; {key}leave such documents out "
                "and count them by --bad-documents count, or mend it and prepare into another "
                "folder"
            )

    def open_corpus(self) -> Corpus:
        """Opens the sources. Raises DataError for one that cannot be found."""
        return open_corpus(self.sources, self.heldout_sources, download=self.download)

    def with_real_folder(self) -> "PrepareOptions":
        """The same, links followed. Raises DataError for a name that no folder can have."""
        if not is_utf8(place := self.out_dir.absolute()):
            raise DataError(f"the name of {readable_name(place)} is not UTF-8; choose another")
        try:
            self.out_dir.exists()
        except OSError as error:
            raise DataError(
                f"{shortened(str(self.out_dir), 160)} cannot be written: "
                f"{error.strerror or error}; choose another folder"
            ) from error
        return replace(self, out_dir=Path(os.path.realpath(self.out_dir)))


# ---- what is kept in the folder


class Settings(Record):
    """Settings that, besides the request, decide which bytes are written."""

    unit_bytes: int | None
    shard_characters: int
    max_document_bytes: int
    download: bool
    software: tuple[str, ...]
    lines: int = 1
    """How .txt files are taken apart into lines: 1 before lone carriage returns, separators and
    byte order marks were looked at, 2 since; 1 also where there are none."""


class Started(Record):
    """The beginning of a prepare. `made_folder`: the folder was not there before."""

    request: PrepareRequest
    settings: Settings
    plan: WorkPlan
    made_folder: bool


class FileHash(Record):
    """The content of a file, by the index of its source and its own within it."""

    source: int
    file: int
    sha256: str


class Chunk(Record):
    """A part of a unit that is written at a time, at most one file a split; `items` is how many
    documents, bad ones included, were read for it."""

    items: int
    heldout: ShardFile | None
    train: ShardFile | None
    rejected: tuple[Rejected, ...]
    source_bytes: int
    text_bytes: int


class UnitRecord(Record):
    """The record of what a unit has written, with the vocabulary of that hash."""

    vocabulary_sha256: str
    chunks: tuple[Chunk, ...] = ()
    hashes: tuple[FileHash, ...] = ()
    complete: bool = False

    @property
    def items(self) -> int:
        return sum(chunk.items for chunk in self.chunks)

    @property
    def source_bytes(self) -> int:
        return sum(chunk.source_bytes for chunk in self.chunks)


def hashes_of(records: Iterable[UnitRecord]) -> dict[tuple[int, int], str]:
    """The hashes of files that the units took, by the indices of source and file."""
    return {(one.source, one.file): one.sha256 for record in records for one in record.hashes}


class UnfinishedFolder:
    """`path` while it has no manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / UNFINISHED_NAME

    def check(self) -> None:
        """Raises DataError if the folder holds something that no prepare has left."""
        if not self.path.exists() or (self.temporary / _STARTED).exists():
            return
        if not self.path.is_dir() or any(path != self.temporary for path in self.path.iterdir()):
            raise DataError(f"{self.path} exists and is not prepared data; choose another folder")

    def started(self) -> Started | None:
        """The prepare that was begun here, None if none was."""
        return _read(self.temporary / _STARTED, Started)

    def start(self, request: PrepareRequest, settings: Settings, plan: WorkPlan) -> None:
        """Notes what is begun. Raises DataError if another process is done with it already."""
        made = not self.path.exists()
        self.temporary.mkdir(parents=True, exist_ok=True)
        if self.is_finished:
            raise self.overtaken()
        self.keep(Started(request=request, settings=settings, plan=plan, made_folder=made))

    def vocabulary(self) -> list[str] | None:
        """The vocabulary, None if there is none yet."""
        path = self.temporary / _VOCABULARY
        return load_vocabulary(path, as_written=True) if path.exists() else None

    def keep_vocabulary(self, vocabulary: Sequence[str]) -> None:
        content = "".join(f"{token}\n" for token in vocabulary).encode()
        write_file(self.temporary / _VOCABULARY, content, self.temporary)

    def record(self, unit: int) -> UnitRecord | None:
        """The record of what the unit has written, as far as is known; None if nothing."""
        return _read(self.temporary / _UNIT.format(unit), UnitRecord)

    def keep(self, record: Started | UnitRecord, unit: int | None = None) -> None:
        """Keeps what is begun, or what the unit has written."""
        name = _STARTED if unit is None else _UNIT.format(unit)
        write_file(self.temporary / name, record.model_dump_json(indent=1).encode(), self.temporary)

    def records(self, plan: WorkPlan) -> dict[int, UnitRecord]:
        """The records of the units that have one."""
        found = {unit: self.record(unit) for unit in range(len(plan.units))}
        return {unit: record for unit, record in found.items() if record is not None}

    def is_whole(self, shard: ShardFile) -> bool:
        """True if the file is the one that was recorded, to the byte."""
        path = self.path / shard.name
        try:
            return path.stat().st_size == shard.size_bytes and file_sha256(path) == shard.sha256
        except (OSError, DamagedFileError):
            return False

    def remove_notes(self) -> None:
        """Removes all but what a finished folder holds."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def discard(self) -> None:
        """Removes everything that was made here; nothing else was there when it began."""
        started = self.started()
        for split in SPLITS:
            for path in self.path.glob(f"{split}-*.arrow"):
                path.unlink(missing_ok=True)
        self.remove_notes()
        if started is not None and started.made_folder:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    @property
    def is_finished(self) -> bool:
        return (self.path / MANIFEST_NAME).exists()

    def overtaken(self) -> DataError:
        return DataError(f"{self.path} was finished by another process")

    def unwritable(self, error: OSError) -> DataError:
        """The error for a folder that could not be written."""
        reason = f"{self.path} cannot be written: {error.strerror or error}"
        if error.errno not in _NO_ROOM:
            return DataError(reason)
        kept = ""
        if (started := self.started()) is not None:
            complete = sum(record.complete for record in self.records(started.plan).values())
            kept = f"what is finished is kept ({complete} of {len(started.plan.units)} units): "
        return DataError(f"{reason}; {kept}make room and run the same command again")


def _read(path: Path, kind: type[_R]) -> _R | None:
    """The record in a file; None if it is not there or, after a machine's crash, not whole."""
    try:
        return kind.model_validate_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, DamagedFileError, ValidationError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error

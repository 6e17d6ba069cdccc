"""A folder that is being prepared: what is done in it, and nothing that can be lost by a kill.

    OUT/.unfinished/started.json     what was asked for, and the plan
    OUT/.unfinished/vocab.txt        the vocabulary, as soon as there is one
    OUT/.unfinished/unit-00000.json  what a unit has written so far
    OUT/train-00000-000.arrow, ...   shards that these records name

Every file is written whole under another name and renamed. Processes that do the same work at the
same time write the same bytes, so whoever comes last changes nothing.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from stacking_ds.data.prepare.unit import SPLITS, Chunk
from stacking_ds.data.prepare.work_plan import InputFile, Plan
from stacking_ds.data.shard_manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    PrepareRequest,
    ShardFile,
    file_sha256,
)
from stacking_ds.data.shard_writer import write_file
from stacking_ds.data.tokenizer import load_vocabulary
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_bytes
from stacking_ds.records import Record

_R = TypeVar("_R", bound=Record)
_STARTED = "started.json"
_VOCABULARY = "vocab.txt"


class Settings(Record):
    """What besides the request decides which bytes are written."""

    unit_bytes: int | None
    shard_characters: int
    max_document_bytes: int
    download: bool
    software: tuple[str, ...]
    lines: int = 1
    """How .txt files are taken apart into lines: 1 before lone carriage returns, separators and
    byte order marks were looked at, 2 since; 1 also where there are none."""

    @classmethod
    def here(
        cls,
        unit_bytes: int | None,
        shard_characters: int,
        max_document_bytes: int,
        download: bool,
        has_text_files: bool,
    ) -> "Settings":
        """These, with the libraries that are installed and the lines as they are read now."""
        return cls(
            unit_bytes=unit_bytes,
            shard_characters=shard_characters,
            max_document_bytes=max_document_bytes,
            download=download,
            software=software(),
            lines=2 if has_text_files else 1,
        )


class Started(Record):
    """What a prepare began with. `made_folder`: the folder was not there before."""

    request: PrepareRequest
    settings: Settings
    plan: Plan
    made_folder: bool


class FileHash(Record):
    """The content of a file, by the index of its source and its own within it."""

    source: int
    file: int
    sha256: str


class UnitRecord(Record):
    """What a unit has written, with the vocabulary of that hash."""

    vocabulary_sha256: str
    chunks: tuple[Chunk, ...]
    hashes: tuple[FileHash, ...]
    complete: bool

    @property
    def source_bytes(self) -> int:
        return sum(chunk.source_bytes for chunk in self.chunks)


def software() -> tuple[str, ...]:
    """The libraries that decide which bytes are written, with their versions."""
    return tuple(f"{name} {metadata.version(name)}" for name in ("sentencex", "tokenizers"))


class UnfinishedFolder:
    """`path` while it has no manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / UNFINISHED_NAME

    def check(self) -> None:
        """Raises DataError if the folder holds something that no prepare has left."""
        if not self.path.exists() or (self.temporary / _STARTED).exists():
            return
        if not self.path.is_dir() or {path.name for path in self.path.iterdir()} - {
            UNFINISHED_NAME
        }:
            raise DataError(f"{self.path} exists and is not prepared data; choose another folder")

    def started(self) -> Started | None:
        """What was begun here, None if nothing was."""
        return _read(self.temporary / _STARTED, Started)

    def start(self, request: PrepareRequest, settings: Settings, plan: Plan) -> Started:
        """Notes what is begun. Raises DataError if another process is done with it already."""
        made = not self.path.exists()
        self.temporary.mkdir(parents=True, exist_ok=True)
        if self.is_finished:
            raise DataError(f"{self.path} was finished by another process")
        started = Started(request=request, settings=settings, plan=plan, made_folder=made)
        self._write(_STARTED, started)
        return started

    def note_files(self, started: Started, files: tuple[tuple[InputFile, ...], ...]) -> Started:
        """Notes that the files, though touched, are what they were."""
        plan = started.plan.model_copy(update={"files": files})
        started = started.model_copy(update={"plan": plan})
        self._write(_STARTED, started)
        return started

    def vocabulary(self) -> list[str] | None:
        """The vocabulary, None if there is none yet."""
        path = self.temporary / _VOCABULARY
        return load_vocabulary(path, as_written=True) if path.exists() else None

    def keep_vocabulary(self, vocabulary: Sequence[str]) -> None:
        content = "".join(f"{token}\n" for token in vocabulary).encode()
        write_file(self.temporary / _VOCABULARY, content, self.temporary)

    def record(self, unit: int) -> UnitRecord | None:
        """What the unit has written as far as is known; None if nothing."""
        return _read(self.temporary / _record_name(unit), UnitRecord)

    def keep_record(self, unit: int, record: UnitRecord) -> None:
        self._write(_record_name(unit), record)

    def records(self, units: int) -> dict[int, UnitRecord]:
        """The records of the units that have one."""
        found = {unit: self.record(unit) for unit in range(units)}
        return {unit: record for unit, record in found.items() if record is not None}

    def is_whole(self, shard: ShardFile) -> bool:
        """Whether the file is the one that was recorded, to the byte."""
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

    def _write(self, name: str, record: Record) -> None:
        content = record.model_dump_json(indent=1).encode()
        write_file(self.temporary / name, content, self.temporary)


def _record_name(unit: int) -> str:
    return f"unit-{unit:05d}.json"


def _read(path: Path, kind: type[_R]) -> _R | None:
    """The record in a file; None if it is not there or, after a machine's crash, not whole."""
    try:
        return kind.model_validate_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, DamagedFileError, ValidationError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error

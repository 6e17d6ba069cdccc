"""Does units: in the process that was called, or in each of several workers."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stacking_ds.data.prepare.folder import FileHash, Settings, UnfinishedFolder, UnitRecord
from stacking_ds.data.prepare.unit import (
    EMPTY,
    SPLITS,
    BadDocuments,
    Chunk,
    SentenceTokenizer,
    UnitWriter,
)
from stacking_ds.data.prepare.work_plan import Corpus, InputFile, open_corpus
from stacking_ds.data.shard_manifest import PrepareRequest, file_sha256
from stacking_ds.data.sources.documents import Reading, unreadable
from stacking_ds.data.tokenizer import special_ids, vocabulary_sha256
from stacking_ds.errors import DataError
from stacking_ds.records import Record

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job(Record):
    """What a worker is told; the rest it reads from the folder."""

    out_dir: str
    sources: tuple[str, ...]
    heldout_sources: tuple[str, ...]
    download: bool
    bad_documents: BadDocuments

    @classmethod
    def of(
        cls,
        out_dir: Path,
        sources: Sequence[str],
        heldout_sources: Sequence[str],
        download: bool,
        bad_documents: BadDocuments,
    ) -> "Job":
        """The job of making `out_dir`."""
        return cls(
            out_dir=os.path.realpath(out_dir),
            sources=tuple(sources),
            heldout_sources=tuple(heldout_sources),
            download=download,
            bad_documents=bad_documents,
        )


class Session:
    """A folder in which a prepare has begun and which has its vocabulary."""

    def __init__(self, job: Job, corpus: Corpus | None = None) -> None:
        self._folder = UnfinishedFolder(Path(job.out_dir))
        started, vocabulary = self._folder.started(), self._folder.vocabulary()
        if started is None or vocabulary is None:
            raise DataError(f"{job.out_dir}: the notes of this prepare are gone; run it again")
        corpus = corpus or open_corpus(job.sources, job.heldout_sources, download=job.download)
        if corpus.identity() != (started.request.heldout_sources, started.request.sources):
            raise DataError(f"{job.out_dir}: the files of its sources changed meanwhile")
        self._corpus = corpus
        self._started, self._bad_documents = started, job.bad_documents
        self._reading = reading_of(started.request, started.settings)
        self._vocab_size, self._unknown_id = len(vocabulary), special_ids(vocabulary).unk
        self._vocabulary_sha256 = vocabulary_sha256(vocabulary)
        self._tokenizer = SentenceTokenizer(vocabulary, started.request.normalization)

    def do(self, number: int, report: Callable[[int, int], None]) -> UnitRecord:
        """Does what is left of a unit. `report` is called with the documents and the bytes of the
        source that it has read. Raises DataError for bad input and for a folder that cannot be
        written; what is done by then is kept."""
        try:
            return self._do(number, report)
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def _do(self, number: int, report: Callable[[int, int], None]) -> UnitRecord:
        unit = self._started.plan.units[number]
        done, hashes, complete = self._kept(number)
        if complete:
            report(sum(chunk.items for chunk in done), sum(chunk.source_bytes for chunk in done))
            return self._record(done, hashes, True)
        hashes = hashes or self._hashes(number)
        writer = UnitWriter(
            number,
            unit.heldout,
            self._tokenizer,
            self._vocab_size,
            self._unknown_id,
            hash_limit=hash_limit(self._started.request.heldout_fraction, self._corpus),
            bad_documents=self._bad_documents,
            shard_characters=self._started.settings.shard_characters,
        )
        items = self._corpus.read(unit, self._reading)
        for chunk in writer.chunks(items, done, self._folder.path, self._folder.temporary, report):
            done = (*done, chunk)
            self._folder.keep_record(number, self._record(done, hashes, False))
        self._check_unchanged(number)
        record = self._record(done, hashes, True)
        self._folder.keep_record(number, record)
        return record

    def _kept(self, number: int) -> tuple[tuple[Chunk, ...], tuple[FileHash, ...], bool]:
        """The chunks of an earlier run up to the first that is damaged, the hashes it took, and
        whether the unit is done with them."""
        record = self._folder.record(number)
        if record is None or record.vocabulary_sha256 != self._vocabulary_sha256:
            return (), (), False
        for index, chunk in enumerate(record.chunks):
            # what had been counted is refused now: read it again, to name the place
            bad = any(rejected.reason != EMPTY for rejected in chunk.rejected)
            shards = filter(None, map(chunk.shard, SPLITS))
            refused = bad and self._bad_documents == "refuse"
            if refused or not all(map(self._folder.is_whole, shards)):
                return record.chunks[:index], record.hashes, False
        return record.chunks, record.hashes, record.complete

    def _record(
        self, chunks: tuple[Chunk, ...], hashes: tuple[FileHash, ...], complete: bool
    ) -> UnitRecord:
        return UnitRecord(
            vocabulary_sha256=self._vocabulary_sha256,
            chunks=chunks,
            hashes=hashes,
            complete=complete,
        )

    def _hashes(self, number: int) -> tuple[FileHash, ...]:
        found = []
        for source, file in self._started.plan.hashed_by(number):
            path = self._corpus.sources[source].paths[file]
            try:
                sha256 = file_sha256(path)
            except OSError as error:
                raise unreadable(path, error) from error
            found.append(FileHash(source=source, file=file, sha256=sha256))
        return tuple(found)

    def _check_unchanged(self, number: int) -> None:
        for segment in self._started.plan.units[number].segments:
            paths = self._corpus.sources[segment.source].paths
            if not paths:
                continue
            path = paths[segment.piece.file]
            if InputFile.of(path) != self._started.plan.files[segment.source][segment.piece.file]:
                raise DataError(
                    f"{path} changed while it was read; delete {self._folder.path} and prepare it "
                    "again from files that stay as they are"
                )


def reading_of(request: PrepareRequest, settings: Settings) -> Reading:
    """How the sources are read."""
    return Reading(request.text_key, settings.max_document_bytes, request.documents)


def hash_limit(heldout_fraction: float, corpus: Corpus) -> int:
    """Documents whose hash is below are held out; none where held-out sources are named."""
    return 0 if corpus.num_heldout else int(heldout_fraction * 2**64)


def unwritable(folder: UnfinishedFolder, error: OSError) -> DataError:
    """What to tell the user when `folder` could not be written."""
    reason = f"{folder.path} cannot be written: {error.strerror or error}"
    if error.errno not in _NO_ROOM:
        return DataError(reason)
    started = folder.started()
    if started is None:
        return DataError(f"{reason}; make room and run the same command again")
    units = len(started.plan.units)
    complete = sum(record.complete for record in folder.records(units).values())
    return DataError(
        f"{reason}; what is finished is kept ({complete} of {units} units): make room and run the "
        "same command again"
    )

"""`prepare`: from sources to a folder of token shards.

    plan -> vocabulary -> units, by any number of processes -> duplicates and manifest

A run that is killed, at any moment, loses at most the chunk each process was at: the same command
again goes on, and the folder is then the same, to the byte, as if nothing had happened.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stacking_ds.data.given_vocabulary import read_vocabulary
from stacking_ds.data.prepare.checks import check_corpus, check_folder_name, check_numbers
from stacking_ds.data.prepare.finish import empty_split, finish_splits
from stacking_ds.data.prepare.first_look import say_what_documents_are, text_paths
from stacking_ds.data.prepare.folder import Settings, Started, UnfinishedFolder, UnitRecord
from stacking_ds.data.prepare.learned_vocabulary import train_vocabulary, write_vocabulary
from stacking_ds.data.prepare.pool import do_in_workers
from stacking_ds.data.prepare.reuse import adopt, check_request, reusable
from stacking_ds.data.prepare.session import Job, Session, reading_of, unwritable
from stacking_ds.data.prepare.unit import SPLITS, BadDocuments, Rejections
from stacking_ds.data.prepare.work_plan import Corpus, make_plan, open_corpus
from stacking_ds.data.shard_manifest import (
    MANIFEST_NAME,
    DataManifest,
    DocumentRule,
    PrepareRequest,
)
from stacking_ds.data.shard_writer import write_file
from stacking_ds.data.sources.documents import MAX_DOCUMENT_BYTES, Reading
from stacking_ds.data.tokenizer import vocabulary_sha256
from stacking_ds.errors import DataError
from stacking_ds.files import sync

logger = logging.getLogger("stacking_ds")

# What a process holds in memory before it writes, and at most loses when it is killed.
SHARD_CHARACTERS = 128 * 2**20


@dataclass(frozen=True)
class Progress:
    """How far a running `prepare` is. `task` is "vocabulary", which reads twice from the start, or
    "shards"; `source_bytes` counts the bytes of the sources as they lie there, of `total_bytes` (of
    a vocabulary about as many), None if that is unknown; `kept_bytes` of them an earlier run had
    done."""

    task: str
    documents: int
    source_bytes: int
    total_bytes: int | None
    kept_bytes: int = 0


@dataclass(frozen=True)
class Prepared:
    """The folder's manifest, whether it was there already, and whether an earlier run had begun.
    While other parts have `missing_units` to do there is no manifest."""

    manifest: DataManifest | None
    reused: bool
    resumed: bool = False
    missing_units: int = 0


@dataclass(frozen=True)
class _How:
    """What decides nothing but who does the work, and what is said about it."""

    vocab_size: int
    workers: int
    part: tuple[int, int]
    licence: str | None
    progress: Callable[[Progress], None]
    say: Callable[[str], None]


def prepare(
    sources: str | Sequence[str],
    out_dir: Path,
    *,
    vocabulary: Path | None = None,
    vocab_size: int = 8192,
    cased: bool = False,
    keep_accents: bool = False,
    heldout_sources: Sequence[str] = (),
    heldout_fraction: float = 0.02,
    licence: str | None = None,
    text_key: str = "text",
    documents: DocumentRule = "blank-line",
    bad_documents: BadDocuments = "refuse",
    download: bool = False,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    shard_characters: int = SHARD_CHARACTERS,
    unit_bytes: int | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Prepared:
    """Makes token shards in `out_dir`, goes on making them, or finds that it already holds them.

    The vocabulary is read from `vocabulary`, or trained to `vocab_size` on about 128 Mi characters
    of the training documents. Text is lowercased and stripped of its accents, unless it is `cased`,
    which keeps both, or told to `keep_accents`; a given tokenizer.json says so itself.

    Held out are: all documents of `heldout_sources`, those a source itself holds out, and, when
    there are no `heldout_sources`, the `heldout_fraction` of the documents of other sources whose
    hash falls lowest, so that a document stays on its side whatever is added to the corpus. Exact
    duplicates do not count, over both splits.

    `text_key` is the key or column of the text; `documents` what a document of a .txt file is, and
    `say` is told how many that makes, by a first look. `bad_documents`: "refuse" raises for the
    first one that cannot be read, "count" leaves such ones out and lists them in the manifest. With
    `workers` above 1 that many processes work; `part` (i, n) does every n-th unit, from the i-th,
    and leaves the others to n - 1 other calls, of which the last one finishes. `unit_bytes` and
    `shard_characters` set the size of the pieces of work and of the shards.

    `out_dir` is new, empty, or the same prepare's. Raises DataError for unusable sources or
    vocabularies, for bad documents, for a split that stays empty, and for an `out_dir` that holds
    something else or cannot be written. What is finished by then is kept.
    """
    check_numbers(heldout_fraction, workers, part, vocab_size)
    names = (sources,) if isinstance(sources, str) else tuple(sources)
    corpus = open_corpus(names, heldout_sources, download=download)
    check_corpus(corpus, heldout_fraction, documents)
    check_folder_name(out_dir)
    given, normalization = read_vocabulary(vocabulary, cased=cased, keep_accents=keep_accents)
    heldout_lines, lines = corpus.identity()
    request = PrepareRequest(
        sources=lines,
        heldout_sources=heldout_lines,
        heldout_fraction=heldout_fraction,
        vocabulary=f"trained:{vocab_size}" if given is None else vocabulary_sha256(given),
        text_key=text_key,
        documents=documents,
        normalization=normalization,
    )
    has_text_files = bool(text_paths(corpus))
    settings = Settings.here(
        unit_bytes, shard_characters, max_document_bytes, download, has_text_files
    )
    job = Job.of(out_dir, names, heldout_sources, download, bad_documents)
    how = _How(vocab_size, workers, part, licence, progress or (lambda _: None), say)
    return _Run(corpus, request, settings, job, how)(given)


@dataclass(frozen=True)
class _Run:
    """One call of `prepare`, its request known."""

    corpus: Corpus
    request: PrepareRequest
    settings: Settings
    job: Job
    how: _How

    @property
    def folder(self) -> UnfinishedFolder:
        return UnfinishedFolder(Path(self.job.out_dir))

    def __call__(self, given: Sequence[str] | None) -> Prepared:
        done = self._reusable()
        if done is not None:
            if self.how.licence not in (None, done.licence):
                raise DataError(
                    f"{self.folder.path} is prepared, with the licence {done.licence!r} and not "
                    f"{self.how.licence!r}; delete it to prepare it again"
                )
            return Prepared(done, reused=True)
        try:
            return self._prepare(given)
        except (DataError, OSError) as error:
            # Another process may have finished the same work meanwhile, and removed the notes.
            if self.folder.is_finished and (done := self._reusable()):
                return Prepared(done, reused=True)
            if isinstance(error, OSError):
                raise unwritable(self.folder, error) from error
            raise

    def _reusable(self) -> DataManifest | None:
        return reusable(self.folder, self.corpus, self.request, self.job.bad_documents)

    def _tidy(self) -> None:
        """Leaves nothing behind where there is nothing to go on with. Other parts may be working
        though, so this is for a process that is alone."""
        started = self.folder.started()
        if self.how.part[1] == 1 and started is not None:
            records = self.folder.records(len(started.plan.units))
            trained = self.request.vocabulary.startswith("trained:") and self.folder.vocabulary()
            if not trained and not any(record.chunks for record in records.values()):
                self.folder.discard()

    def _prepare(self, given: Sequence[str] | None) -> Prepared:
        self.folder.check()
        started = self.folder.started()
        resumed = started is not None
        if started is None:
            plan = make_plan(self.corpus, self._reading, self.settings.unit_bytes)
            started = self.folder.start(self.request, self.settings, plan)
        else:
            check_request(self.folder.path, started.request, self.request)
            started = adopt(self.folder, started, self.settings, self.corpus)
        try:
            say_what_documents_are(self.corpus, self._reading, self.how.say)
            self._ensure_vocabulary(started, given)
            index, count = self.how.part
            self._do_units(started, range(index - 1, len(started.plan.units), count))
        except (DataError, OSError):
            self._tidy()
            raise
        records = self.folder.records(len(started.plan.units))
        missing = len(started.plan.units) - sum(one.complete for one in records.values())
        if missing:
            if self.folder.is_finished:
                raise self._overtaken()
            return Prepared(None, reused=False, missing_units=missing)
        return Prepared(self._finish(started, records), reused=False, resumed=resumed)

    @property
    def _reading(self) -> Reading:
        leaves_out = self.job.bad_documents == "count"
        return replace(reading_of(self.request, self.settings), leaves_out=leaves_out)

    def _overtaken(self) -> DataError:
        return DataError(f"{self.folder.path} was finished by another process")

    def _ensure_vocabulary(self, started: Started, given: Sequence[str] | None) -> None:
        if self.folder.vocabulary() is not None:
            return
        if given is None:
            given = train_vocabulary(
                self.corpus,
                started,
                self.how.vocab_size,
                self.job.bad_documents,
                lambda *now: self.how.progress(Progress("vocabulary", *now)),
            )
        self.folder.keep_vocabulary(given)

    def _do_units(self, started: Started, units: range) -> None:
        read = dict.fromkeys(units, (0, 0))
        records = self.folder.records(len(started.plan.units))
        kept = sum(one.source_bytes for unit, one in records.items() if unit in units)
        total = started.plan.source_bytes
        if total is not None:
            total = sum(started.plan.units[unit].source_bytes for unit in units)

        def report(unit: int, documents: int, source_bytes: int) -> None:
            read[unit] = (documents, source_bytes)
            done = [sum(column) for column in zip(*read.values(), strict=True)]
            self.how.progress(Progress("shards", done[0], done[1], total, kept))

        if self.how.workers > 1 and len(units) > 1:
            do_in_workers(units, self.job, self.how.workers, report)
        elif units:
            session = Session(self.job, self.corpus)
            for unit in units:
                session.do(unit, lambda *now, unit=unit: report(unit, *now))

    def _finish(self, started: Started, records: dict[int, UnitRecord]) -> DataManifest:
        folder = self.folder
        chunks = [chunk for unit in sorted(records) for chunk in records[unit].chunks]
        shards = {
            split: [shard for chunk in chunks if (shard := chunk.shard(split)) is not None]
            for split in SPLITS
        }
        splits = finish_splits(folder.path, shards, folder.temporary)
        train, heldout = splits["train"], splits["heldout"]
        rejections = Rejections()
        for chunk in chunks:
            rejections.extend(chunk.rejected)
        rejected = rejections.taken()
        if not train.documents or not heldout.documents:
            error = empty_split(
                folder.path, splits, rejected, self.request, bool(text_paths(self.corpus))
            )
            folder.discard()
            raise error
        hashes = {
            (one.source, one.file): one.sha256
            for record in records.values()
            for one in record.hashes
        }
        if (vocabulary := folder.vocabulary()) is None:
            raise self._overtaken()
        manifest = DataManifest(
            request=self.request,
            licence=self.how.licence,
            sources=self.corpus.contents(started.plan, hashes),
            vocab_size=len(vocabulary),
            vocabulary_sha256=vocabulary_sha256(vocabulary),
            vocabulary_files=write_vocabulary(folder, vocabulary, self.request.normalization),
            rejected=rejected,
            text_bytes=sum(chunk.text_bytes for chunk in chunks),
            train=train,
            heldout=heldout,
        )
        sync(folder.path)
        write_file(folder.path / MANIFEST_NAME, manifest.to_json().encode(), folder.temporary)
        folder.remove_notes()
        return manifest

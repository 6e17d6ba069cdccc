"""`prepare`: from sources to a folder of token shards.

    plan -> vocabulary -> units, by any number of processes -> duplicates and manifest

A run that is killed, at any moment, loses at most the chunk each process was at: the same command
again goes on, and the folder is then the same, to the byte, as if nothing had happened.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stacking_ds.data.pool import Report, Work, WorkerDiedError, do_in_workers
from stacking_ds.data.prepare.finish import empty_split, finish_splits
from stacking_ds.data.prepare.folder import (
    SPLITS,
    PrepareOptions,
    UnfinishedFolder,
    UnitRecord,
    finished_work,
    hashes_of,
    require_same_work,
)
from stacking_ds.data.prepare.unit import Rejections, UnitMaker
from stacking_ds.data.prepare.vocabulary import (
    read_vocabulary,
    train_vocabulary,
    write_vocabulary,
)
from stacking_ds.data.prepare.work_plan import (
    Corpus,
    WorkPlan,
    make_plan,
    say_what_documents_are,
    say_what_is_left_out,
)
from stacking_ds.data.shard_files import (
    MANIFEST_NAME,
    DataManifest,
    PrepareRequest,
    remove_unfinished,
    write_file,
)
from stacking_ds.data.tokenizer import vocabulary_sha256
from stacking_ds.errors import DataError
from stacking_ds.files import sync

logger = logging.getLogger("stacking_ds")


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a running `prepare`. `task` is "vocabulary", which reads twice from the start, or
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


def prepare(
    options: PrepareOptions,
    *,
    progress: Callable[[PrepareProgress], None] = lambda _: None,
    say: Callable[[str], None] = logger.info,
) -> Prepared:
    """Makes token shards in the folder, goes on making them, or finds that it already holds them.

    Exact duplicates do not count, over both splits. `say` is told how many documents the .txt files
    make, by a first look. The folder is new, empty, or the same prepare's. Raises DataError for
    unusable sources or vocabularies, for bad documents, for a split that stays empty, and for a
    folder that holds something else or cannot be written. What is finished by then is kept.
    """
    corpus = options.open_corpus()
    _check_corpus(corpus, options)
    options = options.with_real_folder()
    given, normalization = read_vocabulary(
        options.vocabulary, cased=options.cased, keep_accents=options.keep_accents
    )
    request = options.request(corpus, given, normalization)
    return _Preparation(options, corpus, request, given, progress, say).run()


def _check_corpus(corpus: Corpus, options: PrepareOptions) -> None:
    """Says what of the sources is not read. Raises DataError where nothing could be held out, or
    `documents` is about nothing."""
    say_what_is_left_out(corpus)
    holds_out = options.heldout_fraction or any(source.holds_out for source in corpus.train)
    if not (corpus.num_heldout or holds_out):
        raise DataError(
            "heldout_fraction is 0 and no held-out source is named, but training needs held-out "
            "documents: raise --heldout-fraction, or name what to hold out by --heldout SOURCE"
        )
    if options.documents != "blank-line" and not corpus.text_files:
        raise DataError(
            f"--documents {options.documents} says what a document of a .txt file is, and no "
            "source is one; in other files a row, or a JSON object, is a document"
        )


@dataclass(frozen=True)
class _Preparation:
    """One call of `prepare`; `given` is the vocabulary that is not to be trained."""

    options: PrepareOptions
    corpus: Corpus
    request: PrepareRequest
    given: list[str] | None
    progress: Callable[[PrepareProgress], None]
    say: Callable[[str], None]

    @property
    def folder(self) -> UnfinishedFolder:
        return UnfinishedFolder(self.options.out_dir)

    def run(self) -> Prepared:
        done, licence = self._finished_work(), self.options.licence
        if done is not None:
            if licence not in (None, done.licence):
                raise DataError(
                    f"{self.folder.path} is prepared, with the licence {done.licence!r} and not "
                    f"{licence!r}; delete it to prepare it again"
                )
            return Prepared(done, reused=True)
        try:
            return self._prepare()
        except (DataError, OSError) as error:
            # Another process may have finished the same work meanwhile, and removed the notes.
            if self.folder.is_finished and (done := self._finished_work()):
                return Prepared(done, reused=True)
            if isinstance(error, OSError):
                raise self.folder.unwritable(error) from error
            raise

    def _finished_work(self) -> DataManifest | None:
        return finished_work(self.folder, self.corpus, self.request, self.options.bad_documents)

    def _prepare(self) -> Prepared:
        folder, settings = self.folder, self.options.settings(self.corpus)
        folder.check()
        started = folder.started()
        resumed = started is not None
        if started is None:
            plan = make_plan(self.corpus, self.options.reading, self.options.unit_bytes)
            folder.start(self.request, settings, plan)
        else:
            plan = started.plan
            require_same_work(folder, started, self.request, settings, self.corpus)
        try:
            say_what_documents_are(self.corpus, self.options.reading, self.say)
            self._ensure_vocabulary(plan)
            self._do_units(plan)
        except (DataError, OSError):
            self._tidy()
            raise
        records = folder.records(plan)
        missing = len(plan.units) - sum(one.complete for one in records.values())
        if missing:
            if folder.is_finished:
                raise folder.overtaken()
            return Prepared(None, reused=False, missing_units=missing)
        return Prepared(self._finish(plan, records), reused=False, resumed=resumed)

    def _tidy(self) -> None:
        """Leaves nothing behind where there is nothing to go on with. Other parts may be working
        though, so this is for a process that is alone."""
        started = self.folder.started()
        if self.options.part[1] == 1 and started is not None:
            records = self.folder.records(started.plan)
            trained = self.given is None and self.folder.vocabulary()
            if not trained and not any(record.chunks for record in records.values()):
                self.folder.discard()

    def _ensure_vocabulary(self, plan: WorkPlan) -> None:
        if self.folder.vocabulary() is None:
            self.folder.keep_vocabulary(
                self.given
                or train_vocabulary(
                    self.corpus,
                    plan,
                    self.options,
                    self.request.normalization,
                    lambda *now: self.progress(PrepareProgress("vocabulary", *now)),
                )
            )

    def _do_units(self, plan: WorkPlan) -> None:
        index, count = self.options.part
        units = range(index - 1, len(plan.units), count)
        read = dict.fromkeys(units, (0, 0))
        records = self.folder.records(plan)
        kept = sum(one.source_bytes for unit, one in records.items() if unit in units)
        total = plan.source_bytes
        if total is not None:
            total = sum(plan.units[unit].source_bytes for unit in units)

        def report(unit: int, documents: int, source_bytes: int) -> None:
            read[unit] = (documents, source_bytes)
            done = [sum(column) for column in zip(*read.values(), strict=True)]
            self.progress(PrepareProgress("shards", done[0], done[1], total, kept))

        if self.options.workers > 1 and len(units) > 1:
            self._do_in_workers(units, report)
        elif units:
            maker = UnitMaker(self.options, self.corpus)
            for unit in units:
                maker.do(unit, partial(report, unit))

    def _do_in_workers(self, units: range, report: Report) -> None:
        work, temporary = partial(_unit_work, self.options), self.folder.temporary
        tidy = partial(remove_unfinished, temporary)
        try:
            do_in_workers(work, units, self.options.workers, report, tidy)
        except WorkerDiedError as died:
            remedy = ", with fewer --workers if it was memory" if died.out_of_memory else ""
            raise DataError(
                f"{died}, while it did unit {died.item}; what is finished is kept: run the same "
                f"command again{remedy}"
            ) from died

    def _finish(self, plan: WorkPlan, records: dict[int, UnitRecord]) -> DataManifest:
        folder = self.folder
        chunks = [chunk for unit in sorted(records) for chunk in records[unit].chunks]
        shards = {
            split: [shard for chunk in chunks if (shard := chunk.shard(split)) is not None]
            for split in SPLITS
        }
        splits = finish_splits(folder.path, shards, folder.temporary)
        rejections = Rejections()
        for chunk in chunks:
            rejections.extend(chunk.rejected)
        rejected = rejections.taken()
        if not all(split.documents for split in splits.values()):
            error = empty_split(splits, rejected, self.options, bool(self.corpus.text_files))
            folder.discard()
            raise error
        if (vocabulary := folder.vocabulary()) is None:
            raise folder.overtaken()
        manifest = DataManifest(
            request=self.request,
            licence=self.options.licence,
            sources=self.corpus.contents(plan, hashes_of(records.values())),
            vocab_size=len(vocabulary),
            vocabulary_sha256=vocabulary_sha256(vocabulary),
            vocabulary_files=write_vocabulary(folder, vocabulary, self.request.normalization),
            rejected=rejected,
            text_bytes=sum(chunk.text_bytes for chunk in chunks),
            train=splits["train"],
            heldout=splits["heldout"],
        )
        sync(folder.path)
        write_file(folder.path / MANIFEST_NAME, manifest.to_json().encode(), folder.temporary)
        folder.remove_notes()
        return manifest


def _unit_work(options: PrepareOptions) -> Work:
    """What a worker does with the number of a unit."""
    maker = UnitMaker(options)
    return maker.do

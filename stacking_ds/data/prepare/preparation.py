"""`prepare`: from sources to a folder of token shards.

    plan -> vocabulary -> units, by any number of processes -> duplicates and manifest

A run that is killed, at any moment, loses at most the chunk each process was at: the same command
again goes on, and the folder is then the same, to the byte, as if nothing had happened.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import zip_longest
from typing import Any

from stacking_ds.console import first_of, shortened
from stacking_ds.data.pool import WorkerDiedError, do_in_workers
from stacking_ds.data.prepare.finish import empty_split, finish_splits
from stacking_ds.data.prepare.folder import (
    EMPTY,
    SPLITS,
    PrepareOptions,
    Settings,
    Started,
    UnfinishedFolder,
    UnitRecord,
    hashes_of,
)
from stacking_ds.data.prepare.unit import Rejections, UnitMaker
from stacking_ds.data.prepare.vocabulary import VocabularySample, read_vocabulary
from stacking_ds.data.prepare.work_plan import Corpus, WorkPlan, look_at, make_plan
from stacking_ds.data.shard_files import (
    MANIFEST_NAME,
    DataManifest,
    PrepareRequest,
    VocabularyFile,
    file_sha256,
    read_manifest,
    remove_unfinished,
    write_file,
)
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.tokenizer import Normalization, build_tokenizer, vocabulary_sha256
from stacking_ds.errors import DataError
from stacking_ds.files import sync
from stacking_ds.records import Record

logger = logging.getLogger("stacking_ds")

_NAMED = 10
_SOFTWARE = ("sentencex", "tokenizers")
"""The libraries that decide which bytes are written."""


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a running `prepare`. `task` is "vocabulary", which reads twice from the start, or
    "shards"; `source_bytes` of the sources as they lie there are read, of `total_bytes` (about, for
    a vocabulary), None if that is unknown; an earlier run had done `kept_bytes` of them."""

    task: str
    documents: int
    source_bytes: int
    total_bytes: int | None
    kept_bytes: int = 0


@dataclass(frozen=True)
class Prepared:
    """The folder's manifest, None while other parts have `missing_units` to do; whether it was
    there already; and whether an earlier run had begun."""

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
    for source in corpus.sources:
        for sentence, names in (
            ("only its files of known kinds are read; left alone", source.unread),
            ("read once, under one name", source.repeated),
        ):
            if names:
                logger.warning("%s: %s: %s", source.name, sentence, first_of(names, _NAMED))
    holds_out = corpus.num_heldout or any(source.holds_out for source in corpus.sources)
    if not (holds_out or options.heldout_fraction):
        raise DataError(
            "heldout_fraction is 0 and no held-out source is named, but training needs held-out "
            "documents: raise --heldout-fraction, or name what to hold out by --heldout SOURCE"
        )
    if options.documents != "blank-line" and not corpus.text_files:
        raise DataError(
            f"--documents {options.documents} says what a document of a .txt file is, and no "
            "source is one; in other files a row, or a JSON object, is a document"
        )
    options = options.with_real_folder()
    given, normalization = read_vocabulary(
        options.vocabulary, cased=options.cased, keep_accents=options.keep_accents
    )
    heldout_sources, sources = corpus.identity()
    request = PrepareRequest(
        sources=sources,
        heldout_sources=heldout_sources,
        heldout_fraction=options.heldout_fraction,
        vocabulary=f"trained:{options.vocab_size}" if given is None else vocabulary_sha256(given),
        text_key=options.text_key,
        documents=options.documents,
        normalization=normalization,
    )
    folder = UnfinishedFolder(options.out_dir)
    return _Preparation(options, folder, corpus, request, given, progress, say).run()


@dataclass(frozen=True)
class _Preparation:
    """One call of `prepare`; `given` is the vocabulary that is not to be trained."""

    options: PrepareOptions
    folder: UnfinishedFolder
    corpus: Corpus
    request: PrepareRequest
    given: list[str] | None
    progress: Callable[[PrepareProgress], None]
    say: Callable[[str], None]

    def run(self) -> Prepared:
        if self.folder.is_finished:
            return self._reused()
        try:
            return self._prepare()
        except (DataError, OSError) as error:
            # Another process may have finished the same work meanwhile, and removed the notes.
            if self.folder.is_finished:
                return self._reused()
            if isinstance(error, OSError):
                raise self.folder.unwritable(error) from error
            raise

    def _reused(self) -> Prepared:
        """The finished folder. Raises DataError if it holds something else, or is damaged. As with
        `make`, a source file of the same name and size that is older than the manifest is taken to
        be the one that was read; a newer one is read and compared."""
        out_dir, licence = self.folder.path, self.options.licence
        manifest = read_manifest(out_dir)
        self._require_same(manifest.request, self.request)
        for rejected in manifest.rejected:
            if rejected.reason != EMPTY and self.options.bad_documents == "refuse":
                raise DataError(
                    f"{out_dir} was prepared with --bad-documents count and lacks "
                    f"{rejected.documents} documents ({rejected.reason}: {rejected.first[0]}); say "
                    "so again, or choose another folder"
                )
        finished_ns = (out_dir / MANIFEST_NAME).stat().st_mtime_ns
        paths = [path for source in self.corpus.sources for path in source.paths]
        files = [file for file in manifest.sources if file.sha256 is not None]
        for path, file in zip(paths, files, strict=True):
            if path.stat().st_mtime_ns > finished_ns and file_sha256(path) != file.sha256:
                raise self._other(f"{path} has changed since")
        TokenShards.open(out_dir)
        self.folder.remove_notes()
        if licence not in (None, manifest.licence):
            raise DataError(
                f"{out_dir} is prepared, with the licence {manifest.licence!r} and not "
                f"{licence!r}; delete it to prepare it again"
            )
        return Prepared(manifest, reused=True)

    def _prepare(self) -> Prepared:
        folder, options = self.folder, self.options
        settings = Settings(
            unit_bytes=options.unit_bytes,
            shard_characters=options.shard_characters,
            max_document_bytes=options.max_document_bytes,
            download=options.download,
            software=tuple(f"{name} {metadata.version(name)}" for name in _SOFTWARE),
            lines=2 if self.corpus.text_files else 1,
        )
        folder.check()
        started = folder.started()
        if started is None:
            plan = make_plan(self.corpus, options.reading, options.unit_bytes)
            folder.start(self.request, settings, plan)
        else:
            plan = started.plan
            self._require_same_work(started, settings)
        try:
            look = look_at(self.corpus, options.reading)
            if look.statement:
                self.say(look.statement)
            for warning in look.warnings:
                logger.warning("warning: %s", warning)
            if folder.vocabulary() is None:
                folder.keep_vocabulary(self.given or self._trained_vocabulary(plan))
            self._do_units(plan)
        except (DataError, OSError):
            # nothing is left where there is nothing to go on with, unless other parts are at work
            if options.part[1] == 1 and folder.started() is not None:
                trained = self.given is None and folder.vocabulary()
                if not (trained or any(one.chunks for one in folder.records(plan).values())):
                    folder.discard()
            raise
        records = folder.records(plan)
        missing = len(plan.units) - sum(one.complete for one in records.values())
        if missing:
            if folder.is_finished:
                raise folder.overtaken()
            return Prepared(None, reused=False, missing_units=missing)
        return Prepared(self._finish(plan, records), reused=False, resumed=started is not None)

    def _require_same_work(self, started: Started, settings: Settings) -> None:
        """Raises DataError where to go on would give other bytes: for another request, other
        settings, or sources that changed, of which what was touched is read and compared."""
        self._require_same(started.request, self.request)
        self._require_same(started.settings, settings)
        plan, files = started.plan, self.corpus.files()
        if files == plan.files:
            return
        known = hashes_of(self.folder.records(plan).values())
        for index, source in enumerate(self.corpus.sources):
            for number, path in enumerate(source.paths):
                touched = files[index][number] != plan.files[index][number]
                if touched and known.get((index, number)) != file_sha256(path):
                    raise self._other(f"{path} has changed, or was touched, before it was read")
        plan = plan.model_copy(update={"files": files})
        self.folder.keep(started.model_copy(update={"plan": plan}))

    def _require_same(self, there: Record, here: Record) -> None:
        different = [
            _difference(field, one, other)
            for (field, one), (_, other) in zip(there, here, strict=True)
            if one != other
        ]
        if different:
            raise self._other("; ".join(different))

    def _other(self, difference: str) -> DataError:
        return DataError(
            f"{self.folder.path} holds data prepared otherwise ({difference}); choose another "
            "folder, or delete this one"
        )

    def _trained_vocabulary(self, plan: WorkPlan) -> list[str]:
        def report(*now: Any) -> None:
            self.progress(PrepareProgress("vocabulary", *now))

        sample = VocabularySample(self.corpus, plan, self.options, report)
        return sample.train(self.request.normalization)

    def _do_units(self, plan: WorkPlan) -> None:
        index, count = self.options.part
        units = range(index - 1, len(plan.units), count)
        read = dict.fromkeys(units, (0, 0))
        records = self.folder.records(plan)
        kept = sum(one.source_bytes for unit, one in records.items() if unit in units)
        sizes = [plan.units[unit].source_bytes for unit in units]
        total = None if plan.source_bytes is None else sum(sizes)

        def report(unit: int, documents: int, source_bytes: int) -> None:
            read[unit] = (documents, source_bytes)
            done = [sum(column) for column in zip(*read.values(), strict=True)]
            self.progress(PrepareProgress("shards", done[0], done[1], total, kept))

        if self.options.workers == 1 or len(units) < 2:
            make = UnitMaker(self.options, self.corpus)
            for unit in units:
                make(unit, partial(report, unit))
            return
        make_work = partial(UnitMaker, self.options)
        tidy = partial(remove_unfinished, self.folder.temporary)
        try:
            do_in_workers(make_work, units, self.options.workers, report, tidy)
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
            split: [shard for chunk in chunks if (shard := getattr(chunk, split)) is not None]
            for split in SPLITS
        }
        splits = finish_splits(folder.path, shards, folder.temporary)
        rejections = Rejections()
        rejections.extend(one for chunk in chunks for one in chunk.rejected)
        rejected = rejections.found()
        if not all(split.documents for split in splits.values()):
            error = empty_split(splits, rejected, self.options, bool(self.corpus.text_files))
            folder.discard()
            raise error
        if (vocabulary := folder.vocabulary()) is None:
            raise folder.overtaken()
        tokenizer = build_tokenizer(vocabulary, self.request.normalization)
        texts = {
            "tokenizer.json": tokenizer.to_str(pretty=True),
            "vocab.txt": "".join(f"{token}\n" for token in vocabulary),
        }
        files = []
        for name, text in texts.items():
            path = folder.path / name
            write_file(path, text.encode(), folder.temporary)
            size = path.stat().st_size
            files.append(VocabularyFile(name=name, size_bytes=size, sha256=file_sha256(path)))
        manifest = DataManifest(
            request=self.request,
            licence=self.options.licence,
            sources=self.corpus.contents(plan, hashes_of(records.values())),
            vocab_size=len(vocabulary),
            vocabulary_sha256=vocabulary_sha256(vocabulary),
            vocabulary_files=tuple(files),
            rejected=rejected,
            text_bytes=sum(chunk.text_bytes for chunk in chunks),
            train=splits["train"],
            heldout=splits["heldout"],
        )
        sync(folder.path)
        write_file(folder.path / MANIFEST_NAME, manifest.to_json().encode(), folder.temporary)
        folder.remove_notes()
        return manifest


def _difference(field: str, there: Any, here: Any) -> str:
    if isinstance(there, tuple) and len(there) == len(here) == 1:
        (there,), (here,) = there, here
    if not isinstance(there, tuple):
        return f"{field} is {_shown(there)} there and {_shown(here)} here"
    pair = next(pair for pair in zip_longest(there, here) if pair[0] != pair[1])
    first = " and ".join(
        f"{_shown(value)} {where}"
        for value, where in zip(pair, ("there", "here"), strict=True)
        if value is not None
    )
    return (
        f"{field} are {len(there):,} there and {len(here):,} here, the first that differs {first}"
    )


def _shown(value: Any) -> str:
    return shortened(str(value) if isinstance(value, Normalization) else repr(value), 160)

"""Work plan: the sources cut into units, the same on every machine and in every run.

A unit is tokenized by one process, and what it writes depends on nothing else, so any number of
processes may share the units, in any order.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking_ds.console import first_of
from stacking_ds.data.shard_files import SourceFile
from stacking_ds.data.sources.documents import (
    Item,
    Reader,
    Reading,
    Source,
    SourcePiece,
    unreadable,
)
from stacking_ds.data.sources.kinds import SeenFiles, open_source
from stacking_ds.data.sources.lines import content_suffix
from stacking_ds.records import Record

_UNITS = 64
_NAMED = 10
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 4 * 2**20, 256 * 2**20


class InputFile(Record):
    """A file as it was when the plan was made, or last found to be the same."""

    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "InputFile":
        """The file as it is now; DataError if it cannot be read."""
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        return cls(size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns)


class Segment(Record):
    """A piece of the source with that index, held-out sources counted first."""

    source: int
    piece: SourcePiece


class WorkUnit(Record):
    """Segments that one process reads one after another; all of them held out, or none."""

    heldout: bool
    segments: tuple[Segment, ...]

    @property
    def source_bytes(self) -> int:
        """Its part of the sources, as far as that is known."""
        return sum(segment.piece.source_bytes or 0 for segment in self.segments)


class WorkPlan(Record):
    """The units in order, and the files of each source as they were."""

    units: tuple[WorkUnit, ...]
    files: tuple[tuple[InputFile, ...], ...]

    @property
    def source_bytes(self) -> int | None:
        """The size of all sources; None if a part of it is unknown."""
        pieces = [segment.piece for unit in self.units for segment in unit.segments]
        if any(piece.source_bytes is None for piece in pieces):
            return None
        return sum(unit.source_bytes for unit in self.units)

    def hashed_by(self, number: int) -> list[tuple[int, int]]:
        """The source and file indices whose content unit `number` hashes: those that start in it.

        A file is thus hashed once, whatever it is cut into.
        """
        return [
            (segment.source, segment.piece.file)
            for segment in self.units[number].segments
            if segment.piece.start == 0 and self.files[segment.source]
        ]


@dataclass(frozen=True)
class Corpus:
    """The opened sources, held-out ones first."""

    sources: tuple[Source, ...]
    num_heldout: int

    @property
    def heldout(self) -> Sequence[Source]:
        return self.sources[: self.num_heldout]

    @property
    def train(self) -> Sequence[Source]:
        return self.sources[self.num_heldout :]

    @property
    def text_files(self) -> list[Path]:
        """The .txt files of all sources."""
        paths = (path for source in self.sources for path in source.paths)
        return [path for path in paths if content_suffix(path) == ".txt"]

    def identity(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The identity by which held-out and training sources are recognised."""
        heldout, train = (
            tuple(line for source in sources for line in source.identity())
            for sources in (self.heldout, self.train)
        )
        return heldout, train

    def files(self) -> tuple[tuple[InputFile, ...], ...]:
        """The files of each source as they are now."""
        return tuple(tuple(map(InputFile.of, source.paths)) for source in self.sources)

    def open(self, segment: Segment, reading: Reading) -> Reader:
        return self.sources[segment.source].open(segment.piece, reading)

    def read(self, unit: WorkUnit, reading: Reading) -> Iterator[tuple[Item, Reader]]:
        """The items of a unit, each with the reader that knows its place."""
        for segment in unit.segments:
            reader = self.open(segment, reading)
            for item in reader.items():
                yield item, reader

    def contents(
        self, plan: WorkPlan, hashes: dict[tuple[int, int], str]
    ) -> tuple[SourceFile, ...]:
        """The manifest's entries about the sources. `hashes`: by source and file index."""
        found = []
        for index, source in enumerate(self.sources):
            heldout = index < self.num_heldout
            for number, path in enumerate(source.paths):
                found.append(
                    SourceFile(
                        name=path.name,
                        heldout=heldout,
                        size_bytes=plan.files[index][number].size_bytes,
                        sha256=hashes[index, number],
                        licence=None,
                    )
                )
            found += [
                SourceFile(name=name, heldout=heldout, size_bytes=None, sha256=None, licence=known)
                for name, known in source.contents()
            ]
        return tuple(found)


def open_corpus(
    sources: Sequence[str], heldout_sources: Sequence[str], *, download: bool = False
) -> Corpus:
    """Opens the sources by name; a file that several names lead to is read once on each side.
    Raises DataError for one that cannot be found."""
    opened: list[Source] = []
    for names in (heldout_sources, sources):
        seen: SeenFiles = {}
        opened += [open_source(name, download=download, seen=seen) for name in names]
    return Corpus(tuple(opened), len(heldout_sources))


def make_plan(corpus: Corpus, reading: Reading, unit_bytes: int | None = None) -> WorkPlan:
    """Cuts the corpus into units of about `unit_bytes` of text; by default a 64th of it, within 4
    and 256 MiB. Small neighbouring files share a unit, a shard of a dataset is a unit.
    Raises DataError for files that cannot be opened or have no text under the reading's key."""
    if unit_bytes is None:
        total = sum(source.estimate() for source in corpus.sources)
        unit_bytes = min(max(total // _UNITS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    units: list[WorkUnit] = []
    for heldout in (True, False):
        segments: list[Segment] = []
        size = 0
        for index, source in enumerate(corpus.sources):
            if (index < corpus.num_heldout) != heldout:
                continue
            for piece in source.pieces(unit_bytes, reading):
                alone = piece.text_bytes is None
                if segments and (alone or size + (piece.text_bytes or 0) > 1.5 * unit_bytes):
                    units.append(WorkUnit(heldout=heldout, segments=tuple(segments)))
                    segments, size = [], 0
                segments.append(Segment(source=index, piece=piece))
                size += unit_bytes if alone else piece.text_bytes or 0
                if size >= unit_bytes:
                    units.append(WorkUnit(heldout=heldout, segments=tuple(segments)))
                    segments, size = [], 0
        if segments:
            units.append(WorkUnit(heldout=heldout, segments=tuple(segments)))
    return WorkPlan(units=tuple(units), files=corpus.files())


def say_what_is_left_out(corpus: Corpus) -> None:
    """Warns of what lies in the folders that are sources and is not read, and of files that have
    several names."""
    logger = logging.getLogger("stacking_ds")
    for source in corpus.sources:
        if unread := source.unread:
            logger.warning(
                "%s: only its files of known kinds are read; left alone: %s",
                source.name,
                first_of(unread, _NAMED),
            )
        if repeated := source.repeated:
            logger.warning(
                "%s: read once, under one name: %s", source.name, first_of(repeated, _NAMED)
            )

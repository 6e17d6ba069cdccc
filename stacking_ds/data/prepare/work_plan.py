"""Work plan: the corpus, what its .txt files are taken for at a first look, and its cut into units.

The plan is the same on every machine and in every run. A unit is tokenized by one process, and what
it writes depends on nothing else, so any number of processes may share the units, in any order.

Where a .txt file's documents end is a convention that the file does not name. Taken wrongly, the
lines of a list become one document, or an article as many as it has paragraphs, and all goes on as
if nothing were wrong: so the first look says what is odd.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

from stacking_ds.console import first_of
from stacking_ds.data.shard_files import DataManifest, DocumentRule, SourceFile
from stacking_ds.data.sources.documents import (
    Item,
    Reader,
    Reading,
    Source,
    SourcePiece,
    reading_of,
)
from stacking_ds.data.sources.kinds import SeenFiles, open_source
from stacking_ds.data.sources.lines import content_suffix, is_packed, start_of
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
        with reading_of(path):
            stat = path.stat()
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


# ---- a first look at .txt files, before hours are spent on them

_MOST_FILES = 500
_ALL_BYTES, _LEAST_BYTES, _MOST_BYTES = 8 * 2**20, 2**14, 2**22
_MEANING: dict[DocumentRule, str] = {
    "blank-line": "what stands between blank lines",
    "line": "a line",
    "file": "a file",
}
_ENDS_A_SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")
# below are: the lines that look at all like something; documents so short that they are titles or
# paragraphs; documents so many that it is no toy; so few that splits and order mean little
_ENOUGH_LINES = 20
_TITLE_WORDS, _ONE_LINER_WORDS, _PARAGRAPH_WORDS = 6, 12, 80
_MANY, _FEW = 1000, 10
_LARGE_TOKENS = 100_000


@dataclass(frozen=True)
class FirstLook:
    """Sentences of a first look: how .txt files are read, nothing without any; and what is odd."""

    statement: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """The beginning of a file, or all of it: the words of each line, block by block; how much more
    of it there is; and whether its lines could be documents, or parts of wrapped sentences."""

    path: Path
    blocks: list[list[int]]
    factor: float
    sentence_share: float
    line_characters: float

    def count(self, rule: DocumentRule) -> float:
        """About how many documents it holds."""
        if rule == "file":
            return float(bool(self.blocks))
        lines = sum(map(len, self.blocks))
        seen = len(self.blocks) if rule == "blank-line" else lines
        # what ends where the look does was not seen to end
        return 1 + (seen - 1) * self.factor if seen else 0

    def words(self, rule: DocumentRule) -> list[float]:
        """The words of the documents seen."""
        if rule == "line":
            return [words for block in self.blocks for words in block]
        sizes = [float(sum(block)) for block in self.blocks]
        if rule == "blank-line" and len(sizes) > 1:
            return sizes if self.factor == 1 else sizes[:-1]
        return [sum(sizes) * self.factor] if sizes else []

    @property
    def could_be_a_list(self) -> bool:
        """True if it has no blank line, though lines that are no parts of sentences."""
        lines = sum(map(len, self.blocks))
        return (
            len(self.blocks) == 1
            and lines >= _ENOUGH_LINES
            and (self.sentence_share >= 0.6 or self.line_characters >= 200)
        )

    @property
    def is_wrapped(self) -> bool:
        lines = sum(map(len, self.blocks))
        narrow = 30 <= self.line_characters <= 120
        return lines >= _ENOUGH_LINES and narrow and self.sentence_share <= 0.4


def look_at(corpus: Corpus, reading: Reading) -> FirstLook:
    """Look at the beginnings of the .txt files, of 500 at most. Raises DataError for one that
    cannot be read."""
    paths = corpus.text_files
    if not paths:
        return FirstLook()
    step = -(-len(paths) // _MOST_FILES)
    chosen = paths[::step]
    most = min(max(_ALL_BYTES // len(chosen), _LEAST_BYTES), _MOST_BYTES)
    seen = [_look(path, most) for path in chosen]
    if not any(file.blocks for file in seen):
        return FirstLook()
    rule, others = reading.documents, len(paths) / len(chosen)
    exact = others == 1 and all(one.factor == 1 for one in seen)
    counts = {one: others * sum(file.count(one) for file in seen) for one in _MEANING}
    said = {one: ("" if exact else "about ") + _rounded(n, exact) for one, n in counts.items()}
    sizes = [words for file in seen for words in file.words(rule)]
    middle = median(sizes) if sizes else 0
    alternatives = ", ".join(
        f"{said[one]} with --documents {one}" for one in _MEANING if one != rule
    )
    statement = (
        f"{len(paths):,} .txt file{'s' * (len(paths) > 1)}: a document is {_MEANING[rule]} "
        f"(--documents {rule}), which makes {said[rule]} of {middle:,.0f} words in the median; it "
        f"would be {alternatives}"
    )
    only_text = len(paths) == sum(len(source.paths) for source in corpus.sources)
    alone = only_text and not any(source.holds_out for source in corpus.sources)
    odd = [
        *_thrown_together(rule, seen),
        *_torn_apart(rule, seen, counts[rule], sizes, len(paths)),
    ]
    if alone and not odd and counts[rule] < _FEW:
        odd.append(
            f"that is few ({said[rule]} in all): if there should be more documents, say where they "
            f"end by --documents ({alternatives})"
        )
    return FirstLook(statement, tuple(odd))


def say_what_documents_are(corpus: Corpus, reading: Reading, say: Callable[[str], None]) -> None:
    """Says what .txt files are taken for, and warns of what is odd, before hours are spent on it.
    Raises DataError for a file that cannot be read."""
    found = look_at(corpus, reading)
    if found.statement:
        say(found.statement)
    for warning in found.warnings:
        logging.getLogger("stacking_ds").warning("warning: %s", warning)


def odd_documents(manifest: DataManifest) -> str | None:
    """Oddities of the documents that were prepared, of whatever kind of source."""
    documents, sentences = manifest.train.documents, manifest.train.sentences
    if documents >= _MANY and sentences < 1.5 * documents:
        return (
            f"the documents have {sentences / documents:.1f} sentences in the mean: are they "
            "sentences of longer texts? Next-sentence pairs need two, and context needs more; join "
            "what belongs together (--documents for .txt files)"
        )
    if documents < _FEW and manifest.train.tokens > _LARGE_TOKENS:
        return (
            f"there are only {documents} training documents, of "
            f"{manifest.train.tokens // documents:,} tokens in the mean: are they many thrown "
            "together? Then say where they end (--documents for .txt files)"
        )
    return None


def _thrown_together(rule: DocumentRule, seen: Sequence[_Seen]) -> list[str]:
    lists = [file for file in seen if file.could_be_a_list]
    if rule != "blank-line" or not lists:
        return []
    first = lists[0]
    kind = f"{first.path.name} has" if len(lists) == 1 else f"{len(lists):,} of them have"
    each = "it is" if len(lists) == 1 else "each is"
    lines = sum(file.count("line") for file in lists)
    about = _rounded(lines, all(file.factor == 1 for file in lists))
    example = "" if len(lists) == 1 else f", {first.path.name} for one"
    return [
        f"{kind} no blank line{example}, so {each} taken for one document, though the {about} "
        "lines look like documents or sentences: if a line is a document, say --documents line, "
        "if a file is, --documents file"
    ]


def _torn_apart(
    rule: DocumentRule, seen: Sequence[_Seen], count: float, sizes: Sequence[float], files: int
) -> list[str]:
    if rule == "file" or not sizes:
        return []
    if rule == "line" and sum(file.is_wrapped for file in seen) > len(seen) / 2:
        return [
            "most lines end within a sentence, as wrapped lines do, and each is taken for a "
            "document: say --documents blank-line, or --documents file"
        ]
    middle = median(sizes)
    if count >= _MANY and middle <= _ONE_LINER_WORDS:
        return [
            f"the documents have {middle:,.0f} words in the median, as sentences and titles do, "
            "and next-sentence pairs need two sentences: if they belong to longer texts, say so by "
            "--documents file, or by blank lines between these texts alone"
        ]
    titles = sum(words <= _TITLE_WORDS for words in sizes) / len(sizes)
    many = count >= _MANY or (files > 1 and count >= 5 * files and count >= _MANY / 10)
    if rule == "blank-line" and many and (middle < _PARAGRAPH_WORDS or titles > 0.15):
        return [
            f"the documents have {middle:,.0f} words in the median and there are "
            f"{count / files:,.0f} to a file, as paragraphs are: if a file is a document, say "
            "--documents file; if one holds several, leave blank lines between these alone"
        ]
    return []


def _look(path: Path, most_bytes: int) -> _Seen:
    with reading_of(path):
        start = start_of(path, most_bytes)
        size = path.stat().st_size * (3 if is_packed(path) else 1)
    factor = 1.0 if start.is_all else max(1.0, size / start.content_bytes)
    lines = [line.strip() for line in start.text.split("\n")]
    if not start.is_all and len(lines) > 1:
        lines.pop()
    filled = [line for line in lines if line]
    return _Seen(
        path=path,
        blocks=[
            [len(line.split()) for line in block]
            for has_words, block in groupby(lines, key=bool)
            if has_words
        ],
        factor=factor,
        sentence_share=sum(bool(_ENDS_A_SENTENCE.search(line)) for line in filled)
        / max(1, len(filled)),
        line_characters=median(map(len, filled)) if filled else 0,
    )


def _rounded(count: float, exact: bool) -> str:
    """A number of documents; an estimate with two digits."""
    if exact or count < 100:
        return f"{round(count):,}"
    digits = len(str(int(count))) - 2
    return f"{round(count / 10**digits) * 10**digits:,}"

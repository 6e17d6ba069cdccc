"""Work plan: the corpus, what its .txt files are taken for at a first look, and its cut into units.

The plan is the same on every machine and in every run. A unit is tokenized by one process, and what
it writes depends on nothing else, so any number of processes may share the units, in any order.

Where a .txt file's documents end it does not say. Taken wrongly, the lines of a list become one
document, or an article as many as it has paragraphs: so the first look says what is odd.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from stacking_ds.console import plural
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
        segments = [segment for unit in self.units for segment in unit.segments]
        if any(segment.piece.source_bytes is None for segment in segments):
            return None
        return sum(unit.source_bytes for unit in self.units)


@dataclass(frozen=True)
class Corpus:
    """The opened sources, held-out ones first."""

    sources: tuple[Source, ...]
    num_heldout: int

    @property
    def text_files(self) -> list[Path]:
        """The .txt files of all sources."""
        paths = (path for source in self.sources for path in source.paths)
        return [path for path in paths if content_suffix(path) == ".txt"]

    def identity(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The identity by which held-out and training sources are recognised."""
        lines = [source.identity() for source in self.sources]
        heldout, train = lines[: self.num_heldout], lines[self.num_heldout :]
        return tuple(chain.from_iterable(heldout)), tuple(chain.from_iterable(train))

    def files(self) -> tuple[tuple[InputFile, ...], ...]:
        """The files of each source as they are now."""
        return tuple(tuple(map(InputFile.of, source.paths)) for source in self.sources)

    def read(self, unit: WorkUnit, reading: Reading) -> Iterator[tuple[Item, Reader]]:
        """The items of a unit, each with the reader that knows its place."""
        for segment in unit.segments:
            reader = self.sources[segment.source].open(segment.piece, reading)
            for item in reader.items():
                yield item, reader

    def contents(
        self, plan: WorkPlan, hashes: dict[tuple[int, int], str]
    ) -> tuple[SourceFile, ...]:
        """The manifest's entries about the sources. `hashes`: by source and file index."""
        found = []
        for index, source in enumerate(self.sources):
            entry = partial(SourceFile, heldout=index < self.num_heldout)
            for number, path in enumerate(source.paths):
                size, sha256 = plan.files[index][number].size_bytes, hashes[index, number]
                found.append(entry(name=path.name, size_bytes=size, sha256=sha256, licence=None))
            for name, licence in source.contents():
                found.append(entry(name=name, size_bytes=None, sha256=None, licence=licence))
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
    and 256 MiB. Small neighbouring files share a unit. Raises DataError as `Source.pieces` does."""
    if unit_bytes is None:
        total = sum(source.estimate() for source in corpus.sources)
        unit_bytes = min(max(total // _UNITS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    groups: list[list[Segment]] = []
    size = math.inf  # of the last group; infinite where the next piece begins another
    for index, source in enumerate(corpus.sources):
        if index == corpus.num_heldout:
            size = math.inf
        for piece in source.pieces(unit_bytes, reading):
            # what nobody knows the size of is a unit
            text_bytes = math.inf if piece.text_bytes is None else piece.text_bytes
            if size + text_bytes > 1.5 * unit_bytes:
                groups.append([])
                size = 0
            groups[-1].append(Segment(source=index, piece=piece))
            size += text_bytes
            if size >= unit_bytes:
                size = math.inf
    units = tuple(
        WorkUnit(heldout=group[0].source < corpus.num_heldout, segments=tuple(group))
        for group in groups
    )
    return WorkPlan(units=units, files=corpus.files())


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


class FirstLook(NamedTuple):
    """Sentences of a first look: how .txt files are read, nothing without any; and what is odd."""

    statement: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """The beginning of a file, or all of it: the words of each line, block by block; and how much
    more of it there is. It could be a list if it has no blank line, though lines that are no parts
    of sentences; it is wrapped if lines end within sentences."""

    path: Path
    blocks: list[list[int]]
    factor: float
    could_be_a_list: bool
    is_wrapped: bool

    @property
    def lines(self) -> int:
        return sum(map(len, self.blocks))

    def count(self, rule: DocumentRule) -> float:
        """About how many documents it holds."""
        seen = {"file": 1, "blank-line": len(self.blocks), "line": self.lines}[rule]
        # what ends where the look does was not seen to end
        return 1 + (seen - 1) * self.factor if self.blocks else 0

    def words(self, rule: DocumentRule) -> list[float]:
        """The words of the documents seen."""
        if rule == "line":
            return [words for block in self.blocks for words in block]
        sizes = [float(sum(block)) for block in self.blocks]
        if rule == "blank-line" and len(sizes) > 1:
            return sizes if self.factor == 1 else sizes[:-1]
        return [sum(sizes) * self.factor] if sizes else []


def look_at(corpus: Corpus, reading: Reading) -> FirstLook:
    """Looks at the beginnings of 500 .txt files at most. Raises DataError for unreadable ones."""
    paths = corpus.text_files
    chosen = paths[:: max(1, -(-len(paths) // _MOST_FILES))]
    most = min(max(_ALL_BYTES // max(1, len(chosen)), _LEAST_BYTES), _MOST_BYTES)
    seen = [_look(path, most) for path in chosen]
    if not any(file.blocks for file in seen):
        return FirstLook()
    rule, others = reading.documents, len(paths) / len(chosen)
    exact = others == 1 and all(one.factor == 1 for one in seen)
    counts = {one: others * sum(file.count(one) for file in seen) for one in _MEANING}
    said = {one: ("" if exact else "about ") + _rounded(n, exact) for one, n in counts.items()}
    sizes = [words for file in seen for words in file.words(rule)]
    alternatives = ", ".join(f"{said[one]} with --documents {one}" for one in said if one != rule)
    statement = (
        f"{plural(len(paths), '.txt file')}: a document is {_MEANING[rule]} (--documents {rule}), "
        f"which makes {said[rule]} of {median(sizes or [0]):,.0f} words in the median; it would be "
        f"{alternatives}"
    )
    odd = list(_oddities(rule, seen, counts[rule], sizes, len(paths)))
    only_text = len(paths) == sum(len(source.paths) for source in corpus.sources)
    alone = only_text and not any(source.holds_out for source in corpus.sources)
    if alone and not odd and counts[rule] < _FEW:
        odd.append(
            f"that is few ({said[rule]} in all): if there should be more documents, say where they "
            f"end by --documents ({alternatives})"
        )
    return FirstLook(statement, tuple(odd))


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


def _oddities(
    rule: DocumentRule, seen: Sequence[_Seen], count: float, sizes: Sequence[float], files: int
) -> Iterator[str]:
    """What looks thrown together, or torn apart."""
    lists = [file for file in seen if file.could_be_a_list]
    if rule == "blank-line" and lists:
        name, each = lists[0].path.name, "it is"
        subject = f"{name} has no blank line"
        if len(lists) > 1:
            subject = f"{len(lists):,} of them have no blank line, {name} for one"
            each = "each is"
        exact = all(file.factor == 1 for file in lists)
        lines = _rounded(sum(file.count("line") for file in lists), exact)
        yield (
            f"{subject}, so {each} taken for one document, though the {lines} lines look like "
            "documents or sentences: if a line is a document, say --documents line, if a file is, "
            "--documents file"
        )
    if rule == "file" or not sizes:
        return
    middle, mean = median(sizes), count / files
    titles = sum(words <= _TITLE_WORDS for words in sizes) / len(sizes)
    many = count >= _MANY or (files > 1 and mean >= 5 and count >= _MANY / 10)
    if rule == "line" and sum(file.is_wrapped for file in seen) > len(seen) / 2:
        yield (
            "most lines end within a sentence, as wrapped lines do, and each is taken for a "
            "document: say --documents blank-line, or --documents file"
        )
    elif count >= _MANY and middle <= _ONE_LINER_WORDS:
        yield (
            f"the documents have {middle:,.0f} words in the median, as sentences and titles do, "
            "and next-sentence pairs need two sentences: if they belong to longer texts, say so by "
            "--documents file, or by blank lines between these texts alone"
        )
    elif rule == "blank-line" and many and (middle < _PARAGRAPH_WORDS or titles > 0.15):
        yield (
            f"the documents have {middle:,.0f} words in the median and there are {mean:,.0f} to a "
            "file, as paragraphs are: if a file is a document, say --documents file; if one holds "
            "several, leave blank lines between these alone"
        )


def _look(path: Path, most_bytes: int) -> _Seen:
    with reading_of(path):
        start = start_of(path, most_bytes)
        size = path.stat().st_size * (3 if is_packed(path) else 1)
    factor = 1.0 if start.is_all else max(1.0, size / start.content_bytes)
    lines = [line.strip() for line in start.text.split("\n")]
    if not start.is_all and len(lines) > 1:
        lines.pop()
    filled = [line for line in lines if line]
    ends = sum(bool(_ENDS_A_SENTENCE.search(line)) for line in filled) / max(1, len(filled))
    characters = median(map(len, filled or [""]))
    blocks = [
        [len(line.split()) for line in block]
        for has_words, block in groupby(lines, key=bool)
        if has_words
    ]
    enough = len(filled) >= _ENOUGH_LINES
    is_list = enough and len(blocks) == 1 and (ends >= 0.6 or characters >= 200)
    is_wrapped = enough and ends <= 0.4 and 30 <= characters <= 120
    return _Seen(path, blocks, factor, is_list, is_wrapped)


def _rounded(count: float, exact: bool) -> str:
    """A number of documents; an estimate with two digits."""
    return f"{count if exact or count < 100 else float(f'{count:.2g}'):,.0f}"

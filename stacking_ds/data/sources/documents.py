"""Documents, and what a source is: cut into pieces, each of which is read alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import sentencex

from stacking_ds.console import shortened
from stacking_ds.data.shard_files import DocumentRule, SplitName
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError
from stacking_ds.records import Record

# ---- Cuts English text into sentences, without losing a character between them.


def split_sentences(text: str) -> list[str]:
    """The sentences of a text whose paragraphs are separated by newlines, none of them empty.

    The library also cuts inside words such as `pathlib.Path`; a cut without a space is undone.
    """
    sentences: list[str] = []
    for paragraph in text.split("\n"):
        pending = ""
        for piece in sentencex.segment("en", paragraph):
            pending += piece
            if piece[-1:].isspace():
                sentences.append(pending.strip())
                pending = ""
        sentences.append(pending.strip())
    return [sentence for sentence in sentences if sentence]


# A line, or a document of a .txt file, beyond this is a mistake (a base64 dump, a file without
# newlines), and would make memory grow with it.
MAX_DOCUMENT_BYTES = 64 * 2**20
NO_TEXT = "no text"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: paragraphs separated by newlines, the number of the line or row it starts at
    within its piece, the bytes of the source it took, and the split its source puts it in."""

    text: str
    number: int
    source_bytes: int
    split: SplitName | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A document, or with `rest_is_lost` all that follows in the piece, that cannot be used: the
    `reason` that such faults are counted under, and a `sentence` that goes on after the place."""

    reason: str
    sentence: str
    number: int
    source_bytes: int
    rest_is_lost: bool = False


Item = Document | Fault


class SourcePiece(Record):
    """A part of a source that is read from `start` to `stop`: bytes of a text file, row groups of a
    Parquet file, record batches of an Arrow file, rows or shards of a dataset.

    `source_bytes` is its part of the source as it lies there, `text_bytes` an estimate of the text
    in it; None where nobody knows before reading.
    """

    file: int
    start: int
    stop: int
    source_bytes: int | None
    text_bytes: int | None


def even_pieces(whole: SourcePiece, parts: int, piece_bytes: int) -> list[SourcePiece]:
    """Cuts `parts` rows, row groups or batches, as if of one size, into pieces of about
    `piece_bytes` of text."""
    count = max(1, min(parts, round((whole.text_bytes or 0) / piece_bytes)))
    cuts = [parts * i // count for i in range(count + 1)]
    sizes = {name: (getattr(whole, name) or 0) // count for name in ("source_bytes", "text_bytes")}
    return [whole.model_copy(update={"start": a, "stop": b, **sizes}) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Reading:
    """The options of reading. `text_key` is the key, or the column, that holds the text;
    `max_bytes` the size of the largest document; `documents` what a document of a .txt file is;
    `leaves_out` whether faults are left out, and not refused."""

    text_key: str = "text"
    max_bytes: int = MAX_DOCUMENT_BYTES
    documents: DocumentRule = "blank-line"
    leaves_out: bool = False


class Reader(ABC):
    """One piece, opened."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The documents in order, the same every time. Raises DataError where the piece as a whole
        cannot be read."""

    @abstractmethod
    def place(self, number: int) -> tuple[str, str]:
        """The place of line or row `number` of the piece: the file's name and its number counted
        from the file's start, as `a.jsonl:17`; and in words, as `/data/a.jsonl, line 17`."""


class FileReader(Reader):
    """One piece of a file of one kind."""

    noun: str = "line"
    """What is numbered."""
    before: int = 0
    """How many of these stand before the piece."""

    def __init__(self, path: Path, piece: SourcePiece, reading: Reading) -> None:
        self.path, self.piece, self.reading = path, piece, reading

    def cut(self, piece_bytes: int) -> list[SourcePiece]:
        """Cuts the piece, which is the whole file, as `Source.pieces` does."""
        return [self.piece]

    @abstractmethod
    def read(self) -> Iterator[Item]:
        """`items`, errors as they come."""

    def items(self) -> Iterator[Item]:
        with reading_of(self.path):
            yield from self.read()

    def place(self, number: int) -> tuple[str, str]:
        number += self.before
        return f"{self.path.name}:{number}", f"{self.path}, {self.noun} {number}"


class Source(ABC):
    """Something documents can be read from, more than once, in the same order."""

    name: str
    holds_out: bool = False
    """Whether the source itself puts some of its documents into the held-out split."""
    paths: Sequence[Path] = ()
    """The files it consists of; none where it does not lie in files of the user."""
    unread: Sequence[str] = ()
    """The files beside them that were left alone, where a folder was named."""
    repeated: Sequence[str] = ()
    """Other names of files that are read already, here or in an earlier source."""

    @abstractmethod
    def identity(self) -> list[str]:
        """Names, with sizes or versions, that tell the source from others without reading it, or
        the network."""

    def contents(self) -> list[tuple[str, str | None]]:
        """The names and licences of what it consists of, where that is not files."""
        return []

    @abstractmethod
    def estimate(self) -> int:
        """About how many bytes of text it has; 0 where nobody knows."""

    @abstractmethod
    def pieces(self, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        """Cuts it into pieces of about `piece_bytes` of text, in order; the same for the same
        content. Raises DataError for a table, or JSON, without text under the reading's key."""

    @abstractmethod
    def open(self, piece: SourcePiece, reading: Reading) -> Reader: ...


def item_of_row(row: Any, number: int, source_bytes: int, reading: Reading) -> Item:
    """The document under the reading's key of a JSON value, or the fault that there is none."""
    key = reading.text_key
    text = row.get(key, 0) if isinstance(row, dict) else 0
    if isinstance(text, str | bytes | None):
        return check_text(text, number, source_bytes, reading.max_bytes)
    found = f"the keys {sorted(row)[:20]}" if isinstance(row, dict) else type(row).__name__
    sentence = f"has no string under the key {key!r} (it has {found})"
    return Fault(NO_TEXT, sentence, number, source_bytes)


def check_text(text: str | bytes | None, number: int, source_bytes: int, max_bytes: int) -> Item:
    """A document of `text`, without words if None; or why it is too long or no text."""
    try:
        text = text.decode() if isinstance(text, bytes) else text or ""
        if len(text.encode("utf-8")) > max_bytes:
            return too_long(number, source_bytes, max_bytes)
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"is not UTF-8: {error.reason}", number, source_bytes)
    except UnicodeEncodeError as error:
        sentence = (
            f"holds half a character (a lone surrogate at position {error.start} of its text)"
        )
        return Fault("half a character", sentence, number, source_bytes)
    return Document(text, number, source_bytes)


def too_long(number: int, source_bytes: int, max_bytes: int) -> Fault:
    """The fault of a line or document above the limit."""
    sentence = (
        f"starts a line or document of more than {max_bytes:,} bytes, the limit; is it text, and "
        "are its newlines there?"
    )
    return Fault("too long", sentence, number, source_bytes)


@contextmanager
def reading_of(path: Path) -> Iterator[None]:
    """Raises DataError, which names the file, for whatever keeps it from being read."""
    try:
        yield
    except DamagedFileError as error:
        raise DataError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shortened(str(path), 160)} cannot be read: {reason}") from error

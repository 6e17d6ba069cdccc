"""One unit: read, split by hash, cut into sentences, tokenize, write; in chunks that a killed run
need not do again."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.prepare.tokenizing import SentenceTokenizer
from stacking_ds.data.sentences import split_sentences
from stacking_ds.data.shard_manifest import Record, Rejected, ShardFile, SplitName
from stacking_ds.data.shard_writer import ShardWriter
from stacking_ds.data.sources.documents import NO_TEXT, Document, Fault, Item, Reader
from stacking_ds.errors import DataError

__all__ = [
    "EMPTY",
    "SPLITS",
    "BadDocuments",
    "Chunk",
    "Rejections",
    "UnitWriter",
    "document_hash",
    "split_of",
    "usable",
    "words_of",
]

BadDocuments = Literal["refuse", "count"]
SPLITS: tuple[SplitName, SplitName] = ("heldout", "train")
EMPTY = "empty"
_FIRST_PLACES = 20
_GROUP_CHARACTERS, _GROUP_DOCUMENTS = 2**22, 2**15


class Chunk(Record):
    """What a unit wrote at a time, at most one file a split; `items` is how many documents, bad
    ones included, were read for it."""

    items: int
    heldout: ShardFile | None
    train: ShardFile | None
    rejected: tuple[Rejected, ...]
    source_bytes: int
    text_bytes: int

    def shard(self, split: SplitName) -> ShardFile | None:
        return self.heldout if split == "heldout" else self.train


class Rejections:
    """Counts what is left out, by reason, and keeps the first places."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, reason: str, place: Callable[[], str]) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        first = self._first.setdefault(reason, [])
        if len(first) < _FIRST_PLACES:
            first.append(place())

    def extend(self, rejected: Iterable[Rejected]) -> None:
        for one in rejected:
            self._counts[one.reason] = self._counts.get(one.reason, 0) + one.documents
            first = self._first.setdefault(one.reason, [])
            first.extend(one.first[: _FIRST_PLACES - len(first)])

    def taken(self) -> tuple[Rejected, ...]:
        """All of them, by reason in alphabetical order; then starts anew."""
        found = tuple(
            Rejected(reason=reason, documents=count, first=tuple(self._first[reason]))
            for reason, count in sorted(self._counts.items())
        )
        self._counts, self._first = {}, {}
        return found


def words_of(text: str) -> bytes:
    """The words of a text joined by single spaces: `" ".join(text.split())` in UTF-8."""
    joined = text.replace("\n", " ")
    # what is printable holds no white space but spaces: this spares most texts the cutting
    if joined.isprintable() and "  " not in joined:
        return joined.strip(" ").encode()
    return " ".join(text.split()).encode()


def document_hash(words: bytes) -> int:
    """64 bits that are the same for documents of the same `words_of`."""
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest())


def split_of(document: Document, number: int, heldout: bool, hash_limit: int) -> SplitName:
    """The side a document is on: all of a held-out unit is held out, else the source may say so,
    else the hash does, so that a document stays on its side whatever is added to the corpus."""
    if heldout:
        return "heldout"
    return document.split or ("heldout" if number < hash_limit else "train")


def usable(item: Item, reader: Reader, bad_documents: BadDocuments) -> bool:
    """Whether the item is a document. Raises DataError for a fault unless these are counted."""
    if isinstance(item, Document):
        return True
    if bad_documents == "refuse":
        key = "name another key by --text-key, " if item.reason == NO_TEXT else ""
        raise DataError(
            f"{reader.place(item.number)[1]} {item.sentence}; {key}leave such documents out and "
            "count them by --bad-documents count, or mend it and prepare into another folder"
        )
    return False


@dataclass
class _Group:
    """Documents that are tokenized together."""

    sentences: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    places: list[Callable[[], str]] = field(default_factory=list)
    characters: int = 0


class UnitWriter:
    """Turns the items of a unit into chunks, one after another."""

    def __init__(
        self,
        number: int,
        heldout: bool,
        tokenizer: SentenceTokenizer,
        vocab_size: int,
        unknown_id: int,
        *,
        hash_limit: int,
        bad_documents: BadDocuments,
        shard_characters: int,
    ) -> None:
        self._number, self._heldout, self._tokenizer = number, heldout, tokenizer
        self._hash_limit, self._bad_documents = hash_limit, bad_documents
        self._shard_characters = shard_characters
        self._writers = {split: ShardWriter(vocab_size, unknown_id) for split in SPLITS}
        self._rejections = Rejections()

    def chunks(
        self,
        items: Iterator[tuple[Item, Reader]],
        done: Sequence[Chunk],
        folder: Path,
        temporary: Path,
        report: Callable[[int, int], None],
    ) -> Iterator[Chunk]:
        """Writes and yields the chunks that follow `done`; what these hold is read and skipped.

        A unit without documents has one chunk that holds nothing. `report` is called now and then
        with the documents and the bytes of the source read so far in this unit.
        """
        documents = sum(chunk.items for chunk in done)
        source_bytes = sum(chunk.source_bytes for chunk in done)
        for _ in islice(items, documents):
            pass
        for index in range(len(done), 2**31):
            chunk_items = chunk_bytes = text_bytes = characters = 0
            group = _Group()
            ended = True
            for item, reader in items:
                chunk_items += 1
                chunk_bytes += item.source_bytes
                text_bytes += self._take(item, reader, group)
                if self._is_full(group):
                    characters += group.characters
                    self._tokenize(group)
                    group = _Group()
                    report(documents + chunk_items, source_bytes + chunk_bytes)
                    if characters >= self._shard_characters:
                        ended = False
                        break
            if ended and not chunk_items and index:
                return
            self._tokenize(group)
            documents, source_bytes = documents + chunk_items, source_bytes + chunk_bytes
            yield self._write(index, folder, temporary, chunk_items, chunk_bytes, text_bytes)
            report(documents, source_bytes)
            if ended:
                return

    def _is_full(self, group: _Group) -> bool:
        enough = min(_GROUP_CHARACTERS, self._shard_characters)
        return group.characters >= enough or len(group.counts) >= _GROUP_DOCUMENTS

    def _take(self, item: Item, reader: Reader, group: _Group) -> int:
        """Adds an item to the group; the bytes of its words."""

        def place(number: int = item.number, reader: Reader = reader) -> str:
            return reader.place(number)[0]

        if isinstance(item, Fault):
            usable(item, reader, self._bad_documents)
            self._rejections.add(item.reason, place)
            return 0
        words = words_of(item.text)
        if not words:
            self._rejections.add(EMPTY, place)
            return 0
        number = document_hash(words)
        split = split_of(item, number, self._heldout, self._hash_limit)
        sentences = split_sentences(item.text)
        group.sentences += sentences
        group.counts.append(len(sentences))
        group.hashes.append(number)
        group.heldout.append(split == "heldout")
        group.places.append(place)
        group.characters += len(item.text)
        return len(words)

    def _tokenize(self, group: _Group) -> None:
        """Gives the group's documents to the writers, sentences without tokens left out."""
        if not group.counts:
            return
        tokens, lengths = self._tokenizer(group.sentences)
        owner = np.repeat(np.arange(len(group.counts)), group.counts)
        counts = np.bincount(owner[lengths > 0], minlength=len(group.counts)).astype(np.int32)
        for index in np.flatnonzero(counts == 0):
            self._rejections.add(EMPTY, group.places[index])
        hashes = np.array(group.hashes, dtype=np.uint64)
        heldout = np.array(group.heldout)
        for split in SPLITS:
            chosen: NDArray[np.bool_] = heldout if split == "heldout" else ~heldout
            sentences = chosen[owner]
            self._writers[split].add(
                tokens[np.repeat(sentences, lengths)],
                lengths[sentences & (lengths > 0)],
                counts[chosen & (counts > 0)],
                hashes[chosen & (counts > 0)],
            )

    def _write(
        self,
        index: int,
        folder: Path,
        temporary: Path,
        items: int,
        source_bytes: int,
        text_bytes: int,
    ) -> Chunk:
        written = {
            split: self._writers[split].write(
                folder, f"{split}-{self._number:05d}-{index:03d}.arrow", temporary
            )
            for split in SPLITS
        }
        return Chunk(
            items=items,
            heldout=written["heldout"],
            train=written["train"],
            rejected=self._rejections.taken(),
            source_bytes=source_bytes,
            text_bytes=text_bytes,
        )

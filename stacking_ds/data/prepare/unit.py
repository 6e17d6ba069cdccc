"""One unit: read, split by hash, cut into sentences, tokenize, write; in chunks that a killed run
need not do again."""

import hashlib
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.shard_manifest import Rejected, ShardFile, SplitName
from stacking_ds.data.shard_writer import ShardWriter, token_dtype
from stacking_ds.data.shards import numbers
from stacking_ds.data.sources.documents import (
    NO_TEXT,
    Document,
    Fault,
    Item,
    Reader,
    split_sentences,
)
from stacking_ds.data.tokenizer import UNCASED, Normalization, build_tokenizer
from stacking_ds.errors import DataError
from stacking_ds.records import Record

# ---- WordPiece for millions of sentences: each word is looked up once, and all else is
# arrays.


_MAX_PIECES = 2**18
_MAX_PIECE_BYTES = 2**25

_WORD, _MARK, _SPACE = 0, 1, 2
_CLASS = np.full(256, _WORD, dtype=np.uint8)
_CLASS[list(string.punctuation.encode())] = _MARK
_CLASS[ord(" ")] = _SPACE
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[list(string.ascii_uppercase.encode())] += 32


class SentenceTokenizer:
    """Gives the ids that `build_tokenizer` gives each sentence without special tokens, where text
    that spells "[MASK]" is text. Its memory is bounded."""

    def __init__(self, vocabulary: Sequence[str], normalization: Normalization = UNCASED) -> None:
        tokenizer = build_tokenizer(vocabulary, normalization)
        self._lowercase = normalization.lowercase
        self._normalize = tokenizer.normalizer.normalize_str
        self._pre_tokenize = tokenizer.pre_tokenizer.pre_tokenize_str
        self._tokenize = tokenizer.model.tokenize
        self._dtype = token_dtype(len(vocabulary))
        self._forget()

    def __call__(
        self, sentences: Sequence[str]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int32]]:
        """The ids of all sentences one after another, and how many each has. Shapes [T], [S]."""
        texts = pa.array(sentences, pa.large_string())
        starts = np.frombuffer(texts.buffers()[1], np.int64, len(sentences) + 1)
        content = texts.buffers()[2]
        if content is None or not starts[-1]:
            return np.empty(0, self._dtype), np.zeros(len(sentences), np.int32)
        bytes_B = np.frombuffer(content, np.uint8, starts[-1])
        if self._lowercase:
            bytes_B = _LOWER[bytes_B]
        bounds = _piece_bounds(bytes_B, starts)
        pieces = pa.LargeStringArray.from_buffers(
            len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(bytes_B)
        ).dictionary_encode()
        slots_U = self._slots(pieces.dictionary.to_pylist())
        slots_P = slots_U[numbers(pieces.indices)]
        table = pa.ListArray.from_arrays(
            pa.array(np.array(self._ends, dtype=np.int32)),
            pa.array(np.array(self._ids, dtype=self._dtype)),
        )
        found = table.take(pa.array(slots_P))
        first_piece_of_sentence = np.searchsorted(bounds, starts)
        token_starts = numbers(found.offsets)[first_piece_of_sentence]
        return numbers(found.values), np.diff(token_starts)

    def _slots(self, pieces: Sequence[str]) -> NDArray[np.int64]:
        """Where the ids of each piece stand; pieces that are new get their place. Shape [U]."""
        if len(self._slot) > _MAX_PIECES or self._piece_bytes > _MAX_PIECE_BYTES:
            self._forget()
        slot = self._slot
        for piece in pieces:
            if piece not in slot:
                slot[piece] = len(slot)
                self._piece_bytes += len(piece)
                self._ids.extend(self._ids_of(piece))
                self._ends.append(len(self._ids))
        return np.fromiter(map(slot.__getitem__, pieces), np.int64, len(pieces))

    def _ids_of(self, piece: str) -> list[int]:
        word = piece.removeprefix(" ")
        if word.isascii() and word.isprintable():
            words = [word] if word else []
        else:
            words = [part for part, _ in self._pre_tokenize(self._normalize(word))]
        return [token.id for word in words for token in self._tokenize(word)]

    def _forget(self) -> None:
        self._slot: dict[str, int] = {}
        self._piece_bytes = 0
        self._ids, self._ends = array("I"), array("I", [0])


def _piece_bounds(bytes_B: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces start, and the end; every start of a sentence is among them. Shape [P + 1]."""
    kinds = _CLASS[bytes_B]
    before = np.empty_like(kinds)
    before[0] = _WORD
    before[1:] = kinds[:-1]
    is_start = kinds == _SPACE
    is_start |= (kinds == _MARK) & (before != _SPACE)
    is_start |= (kinds == _WORD) & (before == _MARK)
    is_start[starts[:-1][starts[:-1] < len(bytes_B)]] = True
    return np.append(np.flatnonzero(is_start), len(bytes_B))


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

"""Makes a unit: read, split by hash, cut into sentences, tokenize, write; in chunks that a killed
run need not do again.

Shapes: T tokens, S sentences, B bytes, P pieces of text, U different ones.
"""

import hashlib
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.prepare.folder import (
    EMPTY,
    SPLITS,
    BadDocuments,
    Chunk,
    FileHash,
    PrepareOptions,
    UnfinishedFolder,
    UnitRecord,
)
from stacking_ds.data.prepare.work_plan import Corpus, InputFile
from stacking_ds.data.shard_files import (
    Rejected,
    ShardWriter,
    SplitName,
    file_sha256,
    token_dtype,
)
from stacking_ds.data.shards import numbers
from stacking_ds.data.sources.documents import (
    NO_TEXT,
    Document,
    Fault,
    Item,
    Reader,
    reading_of,
    split_sentences,
)
from stacking_ds.data.tokenizer import (
    UNCASED,
    Normalization,
    build_tokenizer,
    special_ids,
    vocabulary_sha256,
)
from stacking_ds.errors import DataError

_FIRST_PLACES = 20
_GROUP_CHARACTERS, _GROUP_DOCUMENTS = 2**22, 2**15

# ---- WordPiece for millions of sentences: each word is looked up once, and all else is arrays

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


# ---- documents


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
    """True if the item is a document. Raises DataError for a fault unless these are counted."""
    if isinstance(item, Document):
        return True
    if bad_documents == "refuse":
        key = "name another key by --text-key, " if item.reason == NO_TEXT else ""
        raise DataError(
            f"{reader.place(item.number)[1]} {item.sentence}; {key}leave such documents out and "
            "count them by --bad-documents count, or mend it and prepare into another folder"
        )
    return False


# ---- units


@dataclass
class _Group:
    """Documents that are tokenized together."""

    sentences: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    places: list[Callable[[], str]] = field(default_factory=list)
    characters: int = 0


class UnitMaker:
    """Makes units in a folder in which a prepare has begun and which has its vocabulary."""

    def __init__(self, options: PrepareOptions, corpus: Corpus | None = None) -> None:
        self._options = options
        self.folder = UnfinishedFolder(options.out_dir)
        started, vocabulary = self.folder.require_started(), self.folder.require_vocabulary()
        self._plan, self._corpus = started.plan, corpus or options.open_corpus()
        if self._corpus.identity() != (started.request.heldout_sources, started.request.sources):
            raise DataError(f"{options.out_dir}: the files of its sources changed meanwhile")
        self._vocab_size, self._unknown_id = len(vocabulary), special_ids(vocabulary).unk
        self._vocabulary_sha256 = vocabulary_sha256(vocabulary)
        self._tokenizer = SentenceTokenizer(vocabulary, started.request.normalization)

    def do(self, number: int, report: Callable[[int, int], None]) -> None:
        """Do what is left of a unit. `report` is called with the documents and the bytes of the
        source that it has read. Raises DataError for bad input and for a folder that cannot be
        written; what is done by then is kept."""
        try:
            record = self._kept(number)
            if record.complete:
                report(sum(chunk.items for chunk in record.chunks), record.source_bytes)
            else:
                self._make(number, record, report)
        except OSError as error:
            raise self.folder.unwritable(error) from error

    def _make(self, number: int, record: UnitRecord, report: Callable[[int, int], None]) -> None:
        record = record.model_copy(update={"hashes": record.hashes or self._hashes(number)})
        unit, folder = self._plan.units[number], self.folder
        writers = {split: ShardWriter(self._vocab_size, self._unknown_id) for split in SPLITS}
        writer = _UnitWriter(unit.heldout, self._options, self._tokenizer, writers)
        items = self._corpus.read(unit, self._options.reading)
        for counts in writer.chunks(items, record.chunks, report):
            index = len(record.chunks)
            files = {
                split: one.write(
                    folder.path, f"{split}-{number:05d}-{index:03d}.arrow", folder.temporary
                )
                for split, one in writers.items()
            }
            rejected = writer.rejections.taken()
            chunk = Chunk.model_validate({**counts, **files, "rejected": rejected})
            record = record.model_copy(update={"chunks": (*record.chunks, chunk)})
            folder.keep_record(number, record)
        self._check_unchanged(number)
        folder.keep_record(number, record.model_copy(update={"complete": True}))

    def _kept(self, number: int) -> UnitRecord:
        """What an earlier run has done, up to the first chunk that is damaged."""
        record = self.folder.record(number)
        if record is None or record.vocabulary_sha256 != self._vocabulary_sha256:
            return UnitRecord(vocabulary_sha256=self._vocabulary_sha256)
        for index, chunk in enumerate(record.chunks):
            # what had been counted is refused now: read it again, to name the place
            bad = any(rejected.reason != EMPTY for rejected in chunk.rejected)
            refused = bad and self._options.bad_documents == "refuse"
            shards = filter(None, map(chunk.shard, SPLITS))
            if refused or not all(map(self.folder.is_whole, shards)):
                return record.model_copy(
                    update={"chunks": record.chunks[:index], "complete": False}
                )
        return record

    def _hashes(self, number: int) -> tuple[FileHash, ...]:
        found = []
        for source, file in self._plan.hashed_by(number):
            path = self._corpus.sources[source].paths[file]
            with reading_of(path):
                sha256 = file_sha256(path)
            found.append(FileHash(source=source, file=file, sha256=sha256))
        return tuple(found)

    def _check_unchanged(self, number: int) -> None:
        for segment in self._plan.units[number].segments:
            file, paths = segment.piece.file, self._corpus.sources[segment.source].paths
            if paths and InputFile.of(paths[file]) != self._plan.files[segment.source][file]:
                raise DataError(
                    f"{paths[file]} changed while it was read; delete {self.folder.path} and "
                    "prepare it again from files that stay as they are"
                )


class _UnitWriter:
    """Gives the documents of a unit to the writers of its splits, one chunk after another."""

    def __init__(
        self,
        heldout: bool,
        options: PrepareOptions,
        tokenizer: SentenceTokenizer,
        writers: dict[SplitName, ShardWriter],
    ) -> None:
        self._heldout, self._options = heldout, options
        self._tokenizer, self._writers = tokenizer, writers
        self.rejections = Rejections()

    def chunks(
        self,
        items: Iterator[tuple[Item, Reader]],
        done: Sequence[Chunk],
        report: Callable[[int, int], None],
    ) -> Iterator[dict[str, int]]:
        """Yields, whenever the writers hold a chunk, what was read for it, as `Chunk` calls it;
        what the chunks `done` hold is read and skipped.

        A unit without documents has one chunk that holds nothing. `report` is called now and then
        with the documents and the bytes of the source read so far in this unit.
        """
        documents = sum(chunk.items for chunk in done)
        source_bytes = sum(chunk.source_bytes for chunk in done)
        for _ in islice(items, documents):
            pass
        first, ended = not done, False
        while not ended:
            counts = dict.fromkeys(("items", "source_bytes", "text_bytes"), 0)
            characters, group = 0, _Group()
            ended = True
            for item, reader in items:
                counts["items"] += 1
                counts["source_bytes"] += item.source_bytes
                counts["text_bytes"] += self._take(item, reader, group)
                if self._is_full(group):
                    characters += group.characters
                    self._tokenize(group)
                    group = _Group()
                    report(documents + counts["items"], source_bytes + counts["source_bytes"])
                    if characters >= self._options.shard_characters:
                        ended = False
                        break
            if ended and not counts["items"] and not first:
                return
            self._tokenize(group)
            documents += counts["items"]
            source_bytes += counts["source_bytes"]
            yield counts
            report(documents, source_bytes)
            first = False

    def _is_full(self, group: _Group) -> bool:
        enough = min(_GROUP_CHARACTERS, self._options.shard_characters)
        return group.characters >= enough or len(group.counts) >= _GROUP_DOCUMENTS

    def _take(self, item: Item, reader: Reader, group: _Group) -> int:
        """Adds an item to the group; the bytes of its words."""

        def place(number: int = item.number, reader: Reader = reader) -> str:
            return reader.place(number)[0]

        if isinstance(item, Fault):
            usable(item, reader, self._options.bad_documents)
            self.rejections.add(item.reason, place)
            return 0
        words = words_of(item.text)
        if not words:
            self.rejections.add(EMPTY, place)
            return 0
        number = document_hash(words)
        split = split_of(item, number, self._heldout, self._options.hash_limit)
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
            self.rejections.add(EMPTY, group.places[index])
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

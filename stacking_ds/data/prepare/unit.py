"""Makes a unit: read, split by hash, cut into sentences, tokenize, write; in chunks that a killed
run need not do again.

Shapes: T tokens, S sentences, B bytes, P pieces of text, U different ones.
"""

import hashlib
import string
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.pool import Report
from stacking_ds.data.prepare.folder import (
    EMPTY,
    SPLITS,
    Chunk,
    FileHash,
    PrepareOptions,
    UnfinishedFolder,
    UnitRecord,
)
from stacking_ds.data.prepare.work_plan import Corpus, InputFile
from stacking_ds.data.shard_files import Rejected, ShardWriter, file_sha256, token_dtype
from stacking_ds.data.shards import numbers
from stacking_ds.data.sources.documents import (
    Fault,
    Item,
    Reader,
    SourcePiece,
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

_MAX_PIECES, _MAX_PIECE_BYTES = 2**18, 2**25
_WORD, _MARK, _SPACE = 0, 1, 2
_CLASS = np.full(256, _WORD, dtype=np.uint8)
_CLASS[list(string.punctuation.encode())] = _MARK
_CLASS[ord(" ")] = _SPACE
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[list(string.ascii_uppercase.encode())] += 32


class SentenceTokenizer:
    """Gives the ids that `build_tokenizer` gives each sentence, in bounded memory; text that spells
    "[MASK]" is text."""

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
    before = np.append(np.uint8(_WORD), kinds[:-1])
    is_start = kinds == _SPACE
    is_start |= (kinds == _MARK) & (before != _SPACE)
    is_start |= (kinds == _WORD) & (before == _MARK)
    is_start[starts[:-1][starts[:-1] < len(bytes_B)]] = True
    return np.append(np.flatnonzero(is_start), len(bytes_B))


# ---- documents


class Rejections:
    """Counts what is left out, by reason, and keeps the first places."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, place: Callable[[], str]) -> None:
        self._counts[reason] += 1
        if len(self._first[reason]) < _FIRST_PLACES:
            self._first[reason].append(place())

    def extend(self, rejected: Iterable[Rejected]) -> None:
        for one in rejected:
            self._counts[one.reason] += one.documents
            self._first[one.reason] += one.first[: _FIRST_PLACES - len(self._first[one.reason])]

    def found(self) -> tuple[Rejected, ...]:
        """All of them, by reason in alphabetical order."""
        return tuple(
            Rejected(reason=reason, documents=count, first=tuple(self._first[reason]))
            for reason, count in sorted(self._counts.items())
        )


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


# ---- units


class UnitMaker:
    """Makes units in a folder in which a prepare has begun and which has its vocabulary."""

    def __init__(self, options: PrepareOptions, corpus: Corpus | None = None) -> None:
        self.options = options
        self.folder = UnfinishedFolder(options.out_dir)
        started, vocabulary = self.folder.started(), self.folder.vocabulary()
        if started is None or vocabulary is None:
            raise DataError(
                f"what a prepare notes first is missing in {self.folder.temporary}; run "
                "`stacking-ds prepare` again with the same options"
            )
        self._plan, self._corpus = started.plan, corpus or options.open_corpus()
        if self._corpus.identity() != (started.request.heldout_sources, started.request.sources):
            raise DataError(f"{options.out_dir}: the files of its sources changed meanwhile")
        self.vocab_size, self.unknown_id = len(vocabulary), special_ids(vocabulary).unk
        self._vocabulary_sha256 = vocabulary_sha256(vocabulary)
        self.tokenizer = SentenceTokenizer(vocabulary, started.request.normalization)

    def __call__(self, number: int, report: Report) -> None:
        """Does what is left of a unit, and reports the documents and the bytes of the source read.
        Raises DataError for bad input and a folder that cannot be written; what is done is kept."""
        try:
            record = self._kept(number)
            if record.complete:
                report(record.items, record.source_bytes)
            else:
                self._make(number, record, report)
        except OSError as error:
            raise self.folder.unwritable(error) from error

    def _make(self, number: int, record: UnitRecord, report: Report) -> None:
        """Makes the chunks that are missing; a unit without documents has one, which is empty."""
        record = record.model_copy(update={"hashes": record.hashes or self._hashes(number)})
        unit = self._plan.units[number]
        items = self._corpus.read(unit, self.options.reading)
        for _ in islice(items, record.items):
            pass
        is_more = True
        while is_more:
            writer = _ChunkWriter(self, unit.heldout)
            is_more = writer.fill(items, record, report)
            if writer.items or not record.chunks:
                chunk = writer.write(self.folder, f"{number:05d}-{len(record.chunks):03d}.arrow")
                record = record.model_copy(update={"chunks": (*record.chunks, chunk)})
                self.folder.keep(record, number)
                report(record.items, record.source_bytes)
        self._check_unchanged(number)
        self.folder.keep(record.model_copy(update={"complete": True}), number)

    def _kept(self, number: int) -> UnitRecord:
        """What an earlier run has done, up to the first chunk that is damaged."""
        record = self.folder.record(number)
        if record is None or record.vocabulary_sha256 != self._vocabulary_sha256:
            return UnitRecord(vocabulary_sha256=self._vocabulary_sha256)
        for index, chunk in enumerate(record.chunks):
            # what had been counted is refused now: read it again, to name the place
            bad = any(rejected.reason != EMPTY for rejected in chunk.rejected)
            refused = bad and self.options.bad_documents == "refuse"
            shards = [shard for shard in (chunk.heldout, chunk.train) if shard is not None]
            if refused or not all(map(self.folder.is_whole, shards)):
                return record.model_copy(
                    update={"chunks": record.chunks[:index], "complete": False}
                )
        return record

    def _hashes(self, number: int) -> tuple[FileHash, ...]:
        """Of the files that start in the unit, so that each is hashed once."""
        found = []
        for source, piece, path in self._files(number):
            if piece.start == 0:
                with reading_of(path):
                    sha256 = file_sha256(path)
                found.append(FileHash(source=source, file=piece.file, sha256=sha256))
        return tuple(found)

    def _files(self, number: int) -> Iterator[tuple[int, SourcePiece, Path]]:
        """The pieces of files in a unit, with the indices of their sources."""
        for segment in self._plan.units[number].segments:
            if paths := self._corpus.sources[segment.source].paths:
                yield segment.source, segment.piece, paths[segment.piece.file]

    def _check_unchanged(self, number: int) -> None:
        for source, piece, path in self._files(number):
            if InputFile.of(path) != self._plan.files[source][piece.file]:
                raise DataError(
                    f"{path} changed while it was read; delete {self.folder.path} and "
                    "prepare it again from files that stay as they are"
                )


class _ChunkWriter:
    """Gives documents of a unit to the writers of its splits, until these hold a chunk; documents
    are tokenized in groups."""

    def __init__(self, maker: UnitMaker, heldout: bool) -> None:
        self._options, self._tokenizer, self._heldout = maker.options, maker.tokenizer, heldout
        self._writers = {split: ShardWriter(maker.vocab_size, maker.unknown_id) for split in SPLITS}
        self._rejections = Rejections()
        self._sentences: list[str] = []
        # of each document its sentences, its hash, whether it is held out, and its place
        self._group: list[tuple[int, int, bool, Callable[[], str]]] = []
        self._characters = self._group_characters = 0
        self.items = self._source_bytes = self._text_bytes = 0

    def fill(self, items: Iterator[tuple[Item, Reader]], done: UnitRecord, report: Report) -> bool:
        """Takes items until the chunk is full; False if they ended. Reports now and then what of
        the unit is read, with what is `done`."""
        enough = min(_GROUP_CHARACTERS, self._options.shard_characters)
        for item, reader in items:
            self.items += 1
            self._source_bytes += item.source_bytes
            self._take(item, reader)
            if self._group_characters >= enough or len(self._group) >= _GROUP_DOCUMENTS:
                self._tokenize()
                report(done.items + self.items, done.source_bytes + self._source_bytes)
                if self._characters >= self._options.shard_characters:
                    return True
        self._tokenize()
        return False

    def write(self, folder: UnfinishedFolder, name: str) -> Chunk:
        """Writes the chunk: of each split that has documents a file."""
        files = {
            split: writer.write(folder.path, f"{split}-{name}", folder.temporary)
            for split, writer in self._writers.items()
        }
        return Chunk(
            items=self.items,
            heldout=files["heldout"],
            train=files["train"],
            rejected=self._rejections.found(),
            source_bytes=self._source_bytes,
            text_bytes=self._text_bytes,
        )

    def _take(self, item: Item, reader: Reader) -> None:
        """Adds an item to the group, or to what is left out."""
        at = item.number  # not the item, whose text would stay in memory

        def place() -> str:
            return reader.place(at)[0]

        if isinstance(item, Fault):
            self._options.refuse(item, reader)
            self._rejections.add(item.reason, place)
            return
        words = words_of(item.text)
        if not words:
            self._rejections.add(EMPTY, place)
            return
        number, sentences = document_hash(words), split_sentences(item.text)
        is_heldout = self._options.split_of(item, number, self._heldout) == "heldout"
        self._sentences += sentences
        self._group.append((len(sentences), number, is_heldout, place))
        self._group_characters += len(item.text)
        self._text_bytes += len(words)

    def _tokenize(self) -> None:
        """Gives the group's documents to the writers, sentences without tokens left out."""
        if not self._group:
            return
        tokens, lengths = self._tokenizer(self._sentences)
        all_counts, all_hashes, are_heldout, places = zip(*self._group, strict=True)
        owner = np.repeat(np.arange(len(places)), all_counts)
        counts = np.bincount(owner[lengths > 0], minlength=len(places)).astype(np.int32)
        for index in np.flatnonzero(counts == 0):
            self._rejections.add(EMPTY, places[index])
        hashes, heldout = np.array(all_hashes, dtype=np.uint64), np.array(are_heldout)
        for split in SPLITS:
            chosen: NDArray[np.bool_] = heldout if split == "heldout" else ~heldout
            sentences = chosen[owner]
            self._writers[split].add(
                tokens[np.repeat(sentences, lengths)],
                lengths[sentences & (lengths > 0)],
                counts[chosen & (counts > 0)],
                hashes[chosen & (counts > 0)],
            )
        self._characters += self._group_characters
        self._sentences, self._group, self._group_characters = [], [], 0

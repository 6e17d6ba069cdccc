"""Reads a folder of token shards, memory-mapped: nothing is loaded until it is looked at."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.shard_files import (
    DataManifest,
    RecordedFile,
    ShardFile,
    SplitName,
    VocabularyFile,
    file_sha256,
    read_manifest,
)
from stacking_ds.data.tokenizer import SpecialIds, load_vocabulary, special_ids, vocabulary_sha256
from stacking_ds.errors import DataError, UnreadableDataError, unreadable
from stacking_ds.files import DamagedFileError, open_regular

# ---- the files that are written here

_AGAIN = "delete the folder and prepare it again"


@contextmanager
def reading(path: Path, remedy: str = _AGAIN) -> Iterator[None]:
    """Names the file in whatever goes wrong with it.

    Raises:
        UnreadableDataError: it cannot be read, and may be whole.
        DataError: it is missing or damaged; what to do is the `remedy`.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; bring it back, or {remedy}") from error
    except DamagedFileError as damage:
        raise DataError(f"{damage}; {remedy}") from damage
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # what Arrow finds has none
            raise unreadable(UnreadableDataError, path, error) from error
        raise DataError(f"{path} is damaged: {error}; {remedy}") from error


def require_whole(
    folder: Path, file: RecordedFile, *, every_byte: bool, remedy: str = _AGAIN
) -> None:
    """Raises DataError, as `reading` does, unless it is the file that was written."""
    with reading(path := folder / file.name, remedy):
        with open_regular(path) as opened:
            size_bytes = os.fstat(opened.fileno()).st_size
        if size_bytes != file.size_bytes:
            raise ValueError(f"it has {size_bytes} bytes, its manifest says {file.size_bytes}")
        if every_byte and file_sha256(path) != file.sha256:
            raise ValueError("it is not the file its manifest describes (its sha256 differs)")


def numbers(array: pa.Array) -> NDArray[Any]:
    """A view, which cannot be written, of an array of numbers without nulls; shape [len(array)].
    Raises ValueError where it has nulls, or claims more than it holds.

    pyarrow's `to_numpy` gives the same, and imports pandas for it where that is installed: 0.4 s,
    in which a KeyboardInterrupt is lost.
    """
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} numbers are missing")
    dtype = np.dtype(array.type.to_pandas_dtype())
    _, values = array.buffers()
    if values is None:  # Arrow keeps nothing of an empty array
        return np.empty(0, dtype)
    view: NDArray[Any] = np.frombuffer(values, dtype, len(array), array.offset * dtype.itemsize)
    view.flags.writeable = False
    return view


_TOKENS_AT_ONCE = 2**24


def only_batch(path: Path, columns: Mapping[str, tuple[pa.DataType, ...]]) -> pa.RecordBatch:
    """The one record batch of a file, memory-mapped: it has these columns, each of one of its
    types, without nulls, and Arrow finds no fault with it. To be called in `reading`."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"it has {reader.num_record_batches} record batches instead of 1")
    types = {name: reader.schema.field(name).type for name in columns}
    for name, allowed in columns.items():
        if types[name] not in allowed:
            raise ValueError(f"its {name} are of type {str(types[name])[:100]}")
    batch = reader.get_batch(0)
    batch.validate()
    parts = [batch.column(name) for name in columns]
    parts += [part.values for part in parts if pa.types.is_list(part.type)]
    if any(part.null_count for part in parts):  # `numbers` finds those in a struct
        raise ValueError("it holds nulls")
    return batch


_COLUMNS = {
    "tokens": (pa.list_(pa.uint16()), pa.list_(pa.uint32())),
    "sentence_lengths": (pa.list_(pa.int32()),),
    "document_hash": (pa.uint64(),),
}

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class ShardArrays:
    """The arrays of one file. Offsets have one entry more than there are documents."""

    path: Path
    tokens: Tokens
    token_offsets: NDArray[np.int32]
    sentence_lengths: NDArray[np.int32]
    sentence_offsets: NDArray[np.int32]
    document_hashes: NDArray[np.uint64]

    @classmethod
    def of(cls, path: Path, record: ShardFile) -> "ShardArrays":
        """Maps a file. Raises DataError, as `reading` does, where it is not what was written."""
        with reading(path):
            batch = only_batch(path, _COLUMNS)
            tokens, lengths = batch.column("tokens"), batch.column("sentence_lengths")
            for column in (tokens, lengths):
                offsets, stop = numbers(column.offsets), len(column.values)
                whole = len(offsets) and offsets[0] == 0 and offsets[-1] == stop
                if not (whole and (offsets[1:] >= offsets[:-1]).all()):
                    raise ValueError("its lists overlap")
            found = (len(batch), len(lengths.values), len(tokens.values))
            if found != (record.documents, record.sentences, record.tokens):
                raise ValueError(
                    f"it holds {found} documents, sentences and tokens, not what its manifest says"
                )
            lists = (tokens.values, tokens.offsets, lengths.values, lengths.offsets)
            return cls(path, *map(numbers, (*lists, batch.column("document_hash"))))

    def require_ids(self, vocab_size: int) -> None:
        """Raises DataError where an id is none of the vocabulary's."""
        with reading(self.path):
            for first in range(0, len(self.tokens), _TOKENS_AT_ONCE):
                largest = int(self.tokens[first : first + _TOKENS_AT_ONCE].max())
                if largest >= vocab_size:
                    raise ValueError(
                        f"it holds the id {largest}, and the vocabulary {vocab_size} tokens"
                    )

    def require_sentences(self) -> None:
        """Raises DataError unless each sentence has a token, and those of a document its tokens."""
        with reading(self.path):
            if self.sentence_lengths.min(initial=1) < 1:
                raise ValueError("it has a sentence without a token")
            ends = np.concatenate([[0], np.cumsum(self.sentence_lengths, dtype=np.int64)])
            if not np.array_equal(ends[self.sentence_offsets], self.token_offsets):
                raise ValueError("its sentences have other tokens than its documents")


class TokenShards:
    """A prepared folder. Opening compares the sizes of the files with the manifest."""

    def __init__(self, folder: Path, manifest: DataManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verified = False

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "TokenShards":
        """Opens `folder`; with `verify`, every byte is compared with the manifest's sha256, and
        what the bytes say of documents and tokens with what is true of a shard, since whoever
        prepared them wrote the manifest too. Raises DataError naming the file that is wrong."""
        shards = cls(folder, read_manifest(folder))
        for file in shards.files:
            # an exchanged vocabulary gives every token another meaning, and is cheap to notice
            require_whole(folder, file, every_byte=isinstance(file, VocabularyFile))
        if verify:
            shards.verify_once()
        return shards

    def verify_once(self) -> None:
        """As `open` with `verify`, unless this object has been found to be whole before."""
        if not self._verified:
            for _ in self.verifying():
                pass

    def verifying(self) -> Iterator[None]:
        """As `open` with `verify`, a file at a time."""
        for file in self.files:
            require_whole(self.folder, file, every_byte=True)
            yield
        for name in get_args(SplitName):
            self.split(name).check()
            yield
        self._verified = True

    @property
    def files(self) -> list[RecordedFile]:
        """The records of all files that the manifest names."""
        return [
            *self.manifest.train.shards,
            *self.manifest.heldout.shards,
            self.manifest.train.duplicates,
            self.manifest.heldout.duplicates,
            *self.manifest.vocabulary_files,
        ]

    def split(self, name: SplitName) -> "TokenSplit":
        return TokenSplit(self, name)

    def split_sha256(self, name: SplitName) -> str:
        """The identity of the documents of a split that count: a hash over its files' hashes."""
        record = self.manifest.split(name)
        hashes = [shard.sha256 for shard in record.shards] + [record.duplicates.sha256]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> list[str]:
        """The token of id i at index i. DataError where it is not that of the manifest."""
        path = self.folder / "vocab.txt"
        tokens = load_vocabulary(path, as_written=True)
        found = (len(tokens), vocabulary_sha256(tokens))
        if found != (self.manifest.vocab_size, self.manifest.vocabulary_sha256):
            raise DataError(
                f"{path} is not the vocabulary of {self.manifest.vocab_size} tokens that its "
                "manifest describes; delete the folder and prepare it again"
            )
        return tokens

    @cached_property
    def special_ids(self) -> SpecialIds:
        return special_ids(self.vocabulary)

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files anew."""
        return (TokenShards, (self.folder, self.manifest))


class TokenSplit:
    """The documents of one split, those that do not count included: `duplicates` names them. Its
    tokens count as one long array, file after file."""

    def __init__(self, shards: TokenShards, name: SplitName) -> None:
        self.shards = shards
        self.name: SplitName = name
        record = shards.manifest.split(name)
        self.arrays = [ShardArrays.of(shards.folder / shard.name, shard) for shard in record.shards]
        self.token_bases = np.cumsum([0, *(shard.tokens for shard in record.shards)])
        self.document_bases = np.cumsum([0, *(shard.documents for shard in record.shards)])
        self.num_tokens = int(self.token_bases[-1])
        self.num_documents = int(self.document_bases[-1])
        with reading(path := shards.folder / record.duplicates.name):
            batch = only_batch(path, {"document": (pa.int64(),)})
            documents: NDArray[np.int64] = numbers(batch.column("document"))
            bounded = np.concatenate([[-1], documents, [self.num_documents]])
            if not (bounded[1:] > bounded[:-1]).all():
                raise ValueError(f"it names documents that the {name} split does not have")
            if len(documents) != record.duplicates.documents:
                raise ValueError(f"it lists {len(documents)} documents, not what its manifest says")
        self.duplicates = documents

    def tokens_of(self, document: int) -> Tokens:
        """The token ids of a document, a view of the mapped file. Shape [tokens]."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        shard = int(np.searchsorted(self.document_bases, document, side="right")) - 1
        arrays, row = self.arrays[shard], document - int(self.document_bases[shard])
        return arrays.tokens[arrays.token_offsets[row] : arrays.token_offsets[row + 1]]

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of stretches of the split's tokens, one after the other; each lies in one
        file. Shape [sum of lengths]. Raises DataError for stretches that no file has, and for ids
        of no vocabulary entry."""
        shards = np.searchsorted(self.token_bases, starts, side="right") - 1
        shards = shards.clip(0, len(self.arrays) - 1)
        inside = (starts >= 0) & (starts <= self.num_tokens) & (lengths >= 0)
        inside &= lengths <= self.token_bases[shards + 1] - starts
        if not inside.all():
            raise DataError(
                f"rows of {self.shards.folder} lie outside its {self.name} files, so how they were "
                "laid out is damaged: delete the folder `layouts` in it, which is made again"
            )
        offsets = starts - self.token_bases[shards]
        tokens = np.empty(int(lengths.sum()), dtype=np.int64)
        place = 0
        # few and long: slices are faster than an index for every token
        for shard, offset, length in np.stack([shards, offsets, lengths], axis=1).tolist():
            tokens[place : place + length] = self.arrays[shard].tokens[offset : offset + length]
            place += length
        vocab_size = self.shards.manifest.vocab_size
        if tokens.max(initial=0) >= vocab_size:
            # on a GPU it would be a device-side assert, steps later
            found = int(np.searchsorted(np.cumsum(lengths), tokens.argmax(), side="right"))
            self.arrays[shards[found]].require_ids(vocab_size)
        return tokens

    def counted(self, shard: int) -> NDArray[np.bool_]:
        """A mask of the documents of file number `shard` that count, as no duplicates. Shape
        [documents]."""
        first, last = self.document_bases[shard : shard + 2]
        counts = np.ones(last - first, dtype=np.bool_)
        low, high = np.searchsorted(self.duplicates, (first, last))
        counts[self.duplicates[low:high] - first] = False
        return counts

    def unigram_counts(self) -> NDArray[np.int64]:
        """The occurrences of each token in the documents that count. Shape [vocab_size]."""
        counts = np.zeros(self.shards.manifest.vocab_size, dtype=np.int64)
        for arrays in self.arrays:
            arrays.require_ids(len(counts))
            counts += np.bincount(arrays.tokens, minlength=len(counts))
        for document in self.duplicates:
            counts -= np.bincount(self.tokens_of(int(document)), minlength=len(counts))
        return counts

    def check(self) -> None:
        """Reads every file: ids are of the vocabulary, sentences add up to documents, and what does
        not count is what the manifest says. Raises DataError naming the file of which it is not
        true."""
        for arrays in self.arrays:
            arrays.require_ids(self.shards.manifest.vocab_size)
            arrays.require_sentences()
        self.require_duplicates()

    def require_duplicates(self) -> None:
        """Raises DataError where what does not count is not what the manifest says."""
        record = self.shards.manifest.split(self.name).duplicates
        found = np.zeros(2, dtype=np.int64)
        for shard, arrays in enumerate(self.arrays):
            offsets = np.stack([arrays.sentence_offsets, arrays.token_offsets])
            found += np.diff(offsets)[:, ~self.counted(shard)].sum(axis=1, dtype=np.int64)
        sums = tuple(found.tolist())
        with reading(self.shards.folder / record.name):
            if sums != (record.sentences, record.tokens):
                raise ValueError(
                    f"it lists {sums} sentences and tokens, not what its manifest says"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenSplit, (self.shards, self.name))

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
    DuplicatesFile,
    ShardFile,
    SplitName,
    VocabularyFile,
    file_sha256,
    not_opened,
    read_manifest,
)
from stacking_ds.data.tokenizer import SpecialIds, load_vocabulary, special_ids, vocabulary_sha256
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, open_regular

# ---- the Arrow files that are written here


def numbers(array: pa.Array) -> NDArray[Any]:
    """A view, which cannot be written, of an array of numbers without nulls; shape [len(array)].

    pyarrow's `to_numpy` gives the same, and imports pandas for it where that is installed: 0.4 s,
    in which a KeyboardInterrupt is lost.

    Raises:
        ValueError: it has nulls, or claims more than it holds.
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
    types, without nulls, and Arrow finds no fault with it.

    Raises:
        ValueError: it has not (pa.ArrowInvalid is one too).
        OSError: it cannot be read.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"it has {reader.num_record_batches} record batches instead of 1")
    types = {name: reader.schema.field(name).type for name in columns}
    for name, allowed in columns.items():
        if types[name] not in allowed:
            raise ValueError(f"its {name} are of type {str(types[name])[:100]}")
    batch = reader.get_batch(0)
    batch.validate()
    if any(_has_nulls(batch.column(name)) for name in columns):
        raise ValueError("it holds nulls")
    return batch


def _has_nulls(column: pa.Array) -> bool:
    if pa.types.is_list(column.type):
        return bool(column.null_count) or _has_nulls(column.values)
    if pa.types.is_struct(column.type):
        return bool(column.null_count) or any(map(_has_nulls, column.flatten()))
    return bool(column.null_count)


def is_rising(offsets: NDArray[np.int32], stop: int) -> bool:
    """True if these offsets go from 0 to `stop`, and never back."""
    return bool(
        len(offsets)
        and offsets[0] == 0
        and offsets[-1] == stop
        and (offsets[1:] >= offsets[:-1]).all()
    )


def require_ids(tokens_T: NDArray[Any], vocab_size: int) -> None:
    """Raises ValueError where an id is none of the vocabulary's."""
    for first in range(0, len(tokens_T), _TOKENS_AT_ONCE):
        largest = int(tokens_T[first : first + _TOKENS_AT_ONCE].max())
        if largest >= vocab_size:
            raise ValueError(f"it holds the id {largest}, and the vocabulary {vocab_size} tokens")


def require_sentences(
    lengths_S: NDArray[np.int32],
    sentence_offsets: NDArray[np.int32],
    token_offsets: NDArray[np.int32],
) -> None:
    """Raises ValueError unless every sentence has a token, and those of each document its tokens.
    Offsets are [D + 1], and rising."""
    if len(lengths_S) and lengths_S.min() < 1:
        raise ValueError("it has a sentence without a token")
    ends = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
    if not np.array_equal(ends[sentence_offsets], token_offsets):
        raise ValueError("its sentences have other tokens than its documents")


_COLUMNS = {
    "tokens": (pa.list_(pa.uint16()), pa.list_(pa.uint32())),
    "sentence_lengths": (pa.list_(pa.int32()),),
    "document_hash": (pa.uint64(),),
}

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
_RecordedFile = ShardFile | DuplicatesFile | VocabularyFile


@dataclass(frozen=True)
class ShardArrays:
    """The arrays of one file. Offsets have one entry more than there are documents."""

    tokens: Tokens
    token_offsets: NDArray[np.int32]
    sentence_lengths: NDArray[np.int32]
    sentence_offsets: NDArray[np.int32]
    document_hashes: NDArray[np.uint64]


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
        prepared them wrote the manifest too.

        Raises DataError naming the file that is missing, of another size, altered or wrong.
        """
        shards = cls(folder, read_manifest(folder))
        for file in shards.files:
            _check(folder / file.name, file, verify=False)
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
            _check(self.folder / file.name, file, verify=True)
            yield
        for name in get_args(SplitName):
            self.split(name).check()
            yield
        self._verified = True

    @property
    def files(self) -> list[_RecordedFile]:
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
        self.arrays = [_map(shards.folder / shard.name, shard) for shard in record.shards]
        self.token_bases = np.cumsum([0, *(shard.tokens for shard in record.shards)])
        self.document_bases = np.cumsum([0, *(shard.documents for shard in record.shards)])
        self.num_tokens = int(self.token_bases[-1])
        self.num_documents = int(self.document_bases[-1])
        self.duplicates = _read_duplicates(shards.folder / record.duplicates.name, self)

    def tokens_of(self, document: int) -> Tokens:
        """The token ids of a document, a view of the mapped file. Shape [tokens]."""
        arrays, row = self._locate(document)
        return arrays.tokens[arrays.token_offsets[row] : arrays.token_offsets[row + 1]]

    def sentence_lengths_of(self, document: int) -> NDArray[np.int32]:
        """The lengths of a document's sentences, in tokens. Shape [sentences]."""
        arrays, row = self._locate(document)
        offsets = arrays.sentence_offsets
        return arrays.sentence_lengths[offsets[row] : offsets[row + 1]]

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of stretches of the split's tokens, one stretch after the other; each lies
        in one file. Shape [sum of lengths].

        Raises DataError for stretches that no file has, and for ids of no vocabulary entry.
        """
        shards = self._files_of(starts, lengths)
        offsets = starts - self.token_bases[shards]
        tokens = np.empty(int(lengths.sum()), dtype=np.int64)
        place = 0
        # few and long: slices are faster than an index for every token
        for shard, offset, length in zip(
            shards.tolist(), offsets.tolist(), lengths.tolist(), strict=True
        ):
            stretch = self.arrays[shard].tokens[offset : offset + length]
            tokens[place : place + length] = stretch
            place += length
        manifest = self.shards.manifest
        if tokens.max(initial=0) >= manifest.vocab_size:
            # on a GPU it would be a device-side assert, steps later
            found = int(np.searchsorted(np.cumsum(lengths), tokens.argmax(), side="right"))
            name = manifest.split(self.name).shards[shards[found]].name
            with _wrong_is_damage(self.shards.folder / name):
                require_ids(tokens, manifest.vocab_size)
        return tokens

    def _files_of(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        last = len(self.arrays) - 1
        shards = np.searchsorted(self.token_bases, starts, side="right") - 1
        shards = shards.clip(0, last)
        inside = (starts >= 0) & (starts <= self.num_tokens) & (lengths >= 0)
        inside &= lengths <= self.token_bases[shards + 1] - starts
        if not inside.all():
            raise DataError(
                f"rows of {self.shards.folder} lie outside its {self.name} files, so how they were "
                "laid out is damaged: delete the folder `layouts` in it, which is made again"
            )
        return shards

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
        for path, arrays in self._files():
            with _wrong_is_damage(path):
                require_ids(arrays.tokens, len(counts))
            counts += np.bincount(arrays.tokens, minlength=len(counts))
        for document in self.duplicates:
            counts -= np.bincount(self.tokens_of(int(document)), minlength=len(counts))
        return counts

    def check(self) -> None:
        """Reads every file: ids are of the vocabulary, sentences add up to documents, and what does
        not count is what the manifest says. Raises DataError naming the file of which it is not
        true."""
        manifest = self.shards.manifest
        for path, arrays in self._files():
            with _wrong_is_damage(path):
                require_ids(arrays.tokens, manifest.vocab_size)
                require_sentences(
                    arrays.sentence_lengths, arrays.sentence_offsets, arrays.token_offsets
                )
        self.require_duplicates()

    def require_duplicates(self) -> None:
        """Raises DataError where what does not count is not what the manifest says."""
        record = self.shards.manifest.split(self.name).duplicates
        found = np.zeros(2, dtype=np.int64)
        for shard, arrays in enumerate(self.arrays):
            offsets = np.stack([arrays.sentence_offsets, arrays.token_offsets])
            found += np.diff(offsets)[:, ~self.counted(shard)].sum(axis=1, dtype=np.int64)
        if found.tolist() != [record.sentences, record.tokens]:
            raise DataError(
                f"{self.shards.folder / record.name} lists {tuple(found.tolist())} sentences and "
                "tokens, not what its manifest says; delete the folder and prepare it again"
            )

    def _files(self) -> Iterator[tuple[Path, ShardArrays]]:
        record = self.shards.manifest.split(self.name)
        for shard, arrays in zip(record.shards, self.arrays, strict=True):
            yield self.shards.folder / shard.name, arrays

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenSplit, (self.shards, self.name))

    def _locate(self, document: int) -> tuple[ShardArrays, int]:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        index = int(np.searchsorted(self.document_bases, document, side="right")) - 1
        return self.arrays[index], document - int(self.document_bases[index])


def _check(path: Path, record: _RecordedFile, verify: bool) -> None:
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != record.size_bytes:
            raise DataError(
                f"{path} has {size_bytes} bytes, its manifest says {record.size_bytes}: it is "
                "damaged; delete the folder and prepare it again"
            )
        # an exchanged vocabulary gives every token another meaning, and is cheap to notice
        verify = verify or isinstance(record, VocabularyFile)
        if verify and file_sha256(path) != record.sha256:
            raise DataError(
                f"{path} is not the file its manifest describes (its sha256 differs); delete the "
                "folder and prepare it again"
            )
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; bring it back, or delete the folder and prepare it again"
        ) from error
    except DamagedFileError as damage:
        raise DataError(f"{damage}; delete the folder and prepare it again") from damage
    except OSError as error:
        raise not_opened(path, error) from error


def _map(path: Path, record: ShardFile) -> ShardArrays:
    with _unreadable(path, "token shard"):
        batch = only_batch(path, _COLUMNS)
        tokens, lengths = batch.column("tokens"), batch.column("sentence_lengths")
        arrays = ShardArrays(
            numbers(tokens.values),
            numbers(tokens.offsets),
            numbers(lengths.values),
            numbers(lengths.offsets),
            numbers(batch.column("document_hash")),
        )
    whole = is_rising(arrays.token_offsets, len(arrays.tokens))
    if not (whole and is_rising(arrays.sentence_offsets, len(arrays.sentence_lengths))):
        raise DataError(f"{path} is damaged (its lists overlap); prepare the folder again")
    found = (len(batch), len(arrays.sentence_lengths), len(arrays.tokens))
    if found != (record.documents, record.sentences, record.tokens):
        raise DataError(
            f"{path} holds {found} documents, sentences and tokens, not what its manifest says"
        )
    return arrays


@contextmanager
def _unreadable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # what Arrow finds has none
            raise not_opened(path, error) from error
        raise DataError(f"{path} is not a readable {what}: {error}") from error


@contextmanager
def _wrong_is_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error}; delete the folder and prepare it again"
        ) from error


def _read_duplicates(path: Path, split: TokenSplit) -> NDArray[np.int64]:
    with _unreadable(path, "list of duplicates"):
        batch = only_batch(path, {"document": (pa.int64(),)})
        documents: NDArray[np.int64] = numbers(batch.column("document"))
    rising = bool((documents[1:] > documents[:-1]).all())
    if len(documents) and not (rising and 0 <= documents[0] <= documents[-1] < split.num_documents):
        raise DataError(f"{path} names documents that the {split.name} split does not have")
    if len(documents) != split.shards.manifest.split(split.name).duplicates.documents:
        raise DataError(f"{path} lists {len(documents)} documents, not what its manifest says")
    return documents

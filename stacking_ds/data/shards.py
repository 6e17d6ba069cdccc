"""Reads a folder of token shards, memory-mapped: nothing is loaded until it is looked at."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.manifest import (
    DataManifest,
    DuplicatesFile,
    ShardFile,
    SplitName,
    VocabularyFile,
    file_sha256,
    read_manifest,
)
from stacking_ds.data.tokenizer import SpecialIds, load_vocabulary, special_ids
from stacking_ds.errors import DataError

__all__ = ["ShardArrays", "TokenShards", "TokenSplit"]

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
        """Opens `folder`; with `verify`, every byte is compared with the manifest's sha256.

        Raises DataError naming the file that is missing, of another size, or altered.
        """
        manifest = read_manifest(folder)
        files: list[_RecordedFile] = [
            *manifest.train.shards,
            *manifest.heldout.shards,
            manifest.train.duplicates,
            manifest.heldout.duplicates,
            *manifest.vocabulary_files,
        ]
        for file in files:
            _check(folder / file.name, file, verify)
        return cls(folder, manifest)

    def verify_once(self) -> None:
        """As `open` with `verify`, unless this object has been found to be whole before."""
        if not self._verified:
            TokenShards.open(self.folder, verify=True)
            self._verified = True

    def split(self, name: SplitName) -> "TokenSplit":
        return TokenSplit(self, name)

    def split_sha256(self, name: SplitName) -> str:
        """What identifies the documents of a split that count: a hash over its files' hashes."""
        record = self.manifest.split(name)
        hashes = [shard.sha256 for shard in record.shards] + [record.duplicates.sha256]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> list[str]:
        """The token of id i at index i."""
        return load_vocabulary(self.folder / "vocab.txt", as_written=True)

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
        in one file. Shape [sum of lengths]."""
        shards = np.searchsorted(self.token_bases, starts, side="right") - 1
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
        return tokens

    def counted(self, shard: int) -> NDArray[np.bool_]:
        """Which documents of file number `shard` count, as no duplicates. Shape [documents]."""
        first, last = self.document_bases[shard : shard + 2]
        counts = np.ones(last - first, dtype=np.bool_)
        low, high = np.searchsorted(self.duplicates, (first, last))
        counts[self.duplicates[low:high] - first] = False
        return counts

    def unigram_counts(self) -> NDArray[np.int64]:
        """How often each token occurs in the documents that count. Shape [vocab_size]."""
        counts = np.zeros(self.shards.manifest.vocab_size, dtype=np.int64)
        for arrays in self.arrays:
            counts += np.bincount(arrays.tokens, minlength=len(counts))
        for document in self.duplicates:
            counts -= np.bincount(self.tokens_of(int(document)), minlength=len(counts))
        return counts

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenSplit, (self.shards, self.name))

    def _locate(self, document: int) -> tuple[ShardArrays, int]:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        index = int(np.searchsorted(self.document_bases, document, side="right")) - 1
        return self.arrays[index], document - int(self.document_bases[index])


def _check(path: Path, record: _RecordedFile, verify: bool) -> None:
    try:
        size_bytes = path.stat().st_size
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
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _map(path: Path, record: ShardFile) -> ShardArrays:
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        tokens, lengths = batch.column("tokens"), batch.column("sentence_lengths")
        arrays = ShardArrays(
            tokens.values.to_numpy(),
            tokens.offsets.to_numpy(),
            lengths.values.to_numpy(),
            lengths.offsets.to_numpy(),
            batch.column("document_hash").to_numpy(),
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable token shard: {error}") from error
    whole = _is_rising(arrays.token_offsets, len(arrays.tokens))
    if not (whole and _is_rising(arrays.sentence_offsets, len(arrays.sentence_lengths))):
        raise DataError(f"{path} is damaged (its lists overlap); prepare the folder again")
    found = (len(batch), len(arrays.sentence_lengths), len(arrays.tokens))
    if found != (record.documents, record.sentences, record.tokens):
        raise DataError(
            f"{path} holds {found} documents, sentences and tokens, not what its manifest says"
        )
    return arrays


def _is_rising(offsets: NDArray[np.int32], stop: int) -> bool:
    return offsets[0] == 0 and offsets[-1] == stop and bool((np.diff(offsets) >= 0).all())


def _read_duplicates(path: Path, split: TokenSplit) -> NDArray[np.int64]:
    try:
        column = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("document")
        documents: NDArray[np.int64] = column.to_numpy()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable list of duplicates: {error}") from error
    if len(documents) and not 0 <= documents[0] <= documents[-1] < split.num_documents:
        raise DataError(f"{path} names documents that the {split.name} split does not have")
    return documents

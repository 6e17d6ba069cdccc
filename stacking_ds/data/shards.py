"""Reads a folder of token shards, memory-mapped: nothing is loaded until it is looked at."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.manifest import (
    DataManifest,
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


@dataclass(frozen=True)
class ShardArrays:
    """The arrays of one file. Offsets have one entry more than there are documents."""

    tokens: Tokens
    token_offsets: NDArray[np.int32]
    sentence_lengths: NDArray[np.int32]
    sentence_offsets: NDArray[np.int32]


class TokenShards:
    """A prepared folder. Opening compares the sizes of the files with the manifest."""

    def __init__(self, folder: Path, manifest: DataManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "TokenShards":
        """Opens `folder`; with `verify`, every byte is compared with the manifest's sha256.

        Raises DataError naming the file that is missing, of another size, or altered.
        """
        manifest = read_manifest(folder)
        files: list[ShardFile | VocabularyFile] = [
            *manifest.train.shards,
            *manifest.heldout.shards,
            *manifest.vocabulary_files,
        ]
        for file in files:
            _check(folder / file.name, file, verify)
        return cls(folder, manifest)

    def split(self, name: SplitName) -> "TokenSplit":
        return TokenSplit(self, name)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The token of id i at index i."""
        return load_vocabulary(self.folder / "vocab.txt")

    @cached_property
    def special_ids(self) -> SpecialIds:
        return special_ids(self.vocabulary)

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files anew."""
        return (TokenShards, (self.folder, self.manifest))


class TokenSplit:
    """The documents of one split. Its tokens count as one long array, file after file."""

    def __init__(self, shards: TokenShards, name: SplitName) -> None:
        self.shards = shards
        self.name: SplitName = name
        record = shards.manifest.split(name)
        self.num_documents = record.documents
        self.num_tokens = record.tokens
        self.arrays = [_map(shards.folder / shard.name, shard) for shard in record.shards]
        self._token_bases = np.cumsum([0, *(shard.tokens for shard in record.shards)])
        self._document_bases = np.cumsum([0, *(shard.documents for shard in record.shards)])

    def tokens_of(self, document: int) -> Tokens:
        """The token ids of a document, a view of the mapped file. Shape [tokens]."""
        arrays, row = self._locate(document)
        return arrays.tokens[arrays.token_offsets[row] : arrays.token_offsets[row + 1]]

    def sentence_lengths_of(self, document: int) -> NDArray[np.int32]:
        """The lengths of a document's sentences, in tokens. Shape [sentences]."""
        arrays, row = self._locate(document)
        offsets = arrays.sentence_offsets
        return arrays.sentence_lengths[offsets[row] : offsets[row + 1]]

    def tokens_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `positions` of the split, each in [0, num_tokens); any shape."""
        if len(self.arrays) == 1:
            return self.arrays[0].tokens[positions].astype(np.int64)
        tokens = np.empty(positions.shape, dtype=np.int64)
        shard_indices = np.searchsorted(self._token_bases, positions, side="right") - 1
        for index in np.unique(shard_indices):
            here = shard_indices == index
            tokens[here] = self.arrays[index].tokens[positions[here] - self._token_bases[index]]
        return tokens

    def unigram_counts(self) -> NDArray[np.int64]:
        """How often each token occurs in the split. Shape [vocab_size]."""
        counts = np.zeros(self.shards.manifest.vocab_size, dtype=np.int64)
        for arrays in self.arrays:
            counts += np.bincount(arrays.tokens, minlength=len(counts))
        return counts

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenSplit, (self.shards, self.name))

    def _locate(self, document: int) -> tuple[ShardArrays, int]:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        index = int(np.searchsorted(self._document_bases, document, side="right")) - 1
        return self.arrays[index], document - int(self._document_bases[index])


def _check(path: Path, record: ShardFile | VocabularyFile, verify: bool) -> None:
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
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable token shard: {error}") from error
    found = (len(batch), len(arrays.sentence_lengths), len(arrays.tokens))
    if found != (record.documents, record.sentences, record.tokens):
        raise DataError(
            f"{path} holds {found} documents, sentences and tokens, not what its manifest says"
        )
    return arrays

"""Writes one split as Arrow files: one row a document, one record batch a file.

Columns: `tokens`, list<uint16> (uint32 for vocabularies of more than 65,536 tokens), the ids of
the whole document without special tokens; `sentence_lengths`, list<int32>, which add up to the
number of tokens. One record batch means that a file's tokens lie in one contiguous buffer.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stacking_ds.data.manifest import ShardFile, SplitManifest, SplitName, file_sha256

__all__ = ["SplitWriter"]


class SplitWriter:
    """Collects documents and writes a file whenever `shard_tokens` are reached."""

    def __init__(
        self, folder: Path, split: SplitName, *, vocab_size: int, shard_tokens: int
    ) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._typecode = "H" if vocab_size <= 2**16 else "I"
        self._shards: list[ShardFile] = []
        self._start_shard()

    def add(self, sentences: Sequence[Sequence[int]]) -> None:
        """Appends a document: the token ids of its sentences, none of them empty."""
        for ids in sentences:
            self._tokens.extend(ids)
            self._sentence_lengths.append(len(ids))
        self._token_offsets.append(len(self._tokens))
        self._sentence_offsets.append(len(self._sentence_lengths))
        if len(self._tokens) >= self._shard_tokens:
            self._write_shard()

    def finish(self) -> SplitManifest:
        """Writes what is left and returns the split's record."""
        if len(self._token_offsets) > 1:
            self._write_shard()
        return SplitManifest(
            documents=sum(shard.documents for shard in self._shards),
            sentences=sum(shard.sentences for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            shards=tuple(self._shards),
        )

    def _start_shard(self) -> None:
        self._tokens = array(self._typecode)
        self._sentence_lengths = array("i")
        self._token_offsets = array("i", [0])
        self._sentence_offsets = array("i", [0])

    def _write_shard(self) -> None:
        batch = pa.record_batch(
            {
                "tokens": _list_column(self._token_offsets, self._tokens),
                "sentence_lengths": _list_column(self._sentence_offsets, self._sentence_lengths),
            }
        )
        path = self._folder / f"{self._split}-{len(self._shards):05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        self._shards.append(
            ShardFile(
                name=path.name,
                size_bytes=path.stat().st_size,
                sha256=file_sha256(path),
                documents=len(self._token_offsets) - 1,
                sentences=len(self._sentence_lengths),
                tokens=len(self._tokens),
            )
        )
        self._start_shard()


def _list_column(offsets: "array[int]", values: "array[int]") -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.asarray(offsets)), pa.array(np.asarray(values)))

"""Writes one Arrow file of a split: one row a document, one record batch a file.

Columns: `tokens`, list<uint16> (uint32 for vocabularies of more than 65,536 tokens), the ids of
the whole document without special tokens; `sentence_lengths`, list<int32>, which add up to the
number of tokens; `document_hash`, uint64, the same for documents of the same words. One record
batch means that a file's tokens lie in one contiguous buffer.

Shapes: D documents, S sentences, T tokens.
"""

import glob
import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from stacking_ds.data.shard_manifest import ShardFile
from stacking_ds.files import write_whole


def token_dtype(vocab_size: int) -> DTypeLike:
    """The narrowest unsigned integers that hold every id of the vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """Collects documents in memory until they are written to a file. The tokens `unknown_id` are
    counted, where one is given."""

    def __init__(self, vocab_size: int, unknown_id: int | None = None) -> None:
        self._dtype, self._unknown_id = token_dtype(vocab_size), unknown_id
        self._clear()

    def add(
        self,
        tokens_T: NDArray[np.unsignedinteger],
        sentence_lengths_S: NDArray[np.int32],
        sentence_counts_D: NDArray[np.int32],
        document_hashes_D: NDArray[np.uint64],
    ) -> None:
        """Appends documents: their tokens one after another, the lengths of their sentences in
        tokens, and how many sentences each document has; none of these is zero."""
        if not len(sentence_counts_D):
            return
        self._tokens.append(tokens_T.astype(self._dtype, copy=False))
        self._sentence_lengths.append(sentence_lengths_S.astype(np.int32, copy=False))
        self._sentence_counts.append(sentence_counts_D)
        self._hashes.append(document_hashes_D)

    def write(self, folder: Path, name: str, temporary: Path) -> ShardFile | None:
        """Writes what was collected as `folder`/`name`, by way of a file in `temporary`, and starts
        anew. Returns its record; None, and no file, if nothing was collected."""
        if not self._hashes:
            return None
        tokens, lengths = np.concatenate(self._tokens), np.concatenate(self._sentence_lengths)
        counts, hashes = np.concatenate(self._sentence_counts), np.concatenate(self._hashes)
        self._clear()
        unknown = self._unknown_id
        sentence_offsets = _offsets(counts)
        batch = pa.record_batch(
            {
                "tokens": pa.ListArray.from_arrays(
                    pa.array(_offsets(lengths)[sentence_offsets]), pa.array(tokens)
                ),
                "sentence_lengths": pa.ListArray.from_arrays(
                    pa.array(sentence_offsets), pa.array(lengths)
                ),
                "document_hash": pa.array(hashes),
            }
        )
        size_bytes, sha256 = write_arrow(batch, folder / name, temporary)
        return ShardFile(
            name=name,
            size_bytes=size_bytes,
            sha256=sha256,
            documents=len(hashes),
            sentences=len(lengths),
            tokens=len(tokens),
            unknown_tokens=None if unknown is None else int(np.count_nonzero(tokens == unknown)),
        )

    def _clear(self) -> None:
        self._tokens: list[NDArray[np.unsignedinteger]] = []
        self._sentence_lengths: list[NDArray[np.int32]] = []
        self._sentence_counts: list[NDArray[np.int32]] = []
        self._hashes: list[NDArray[np.uint64]] = []


def write_arrow(batch: pa.RecordBatch, path: Path, temporary: Path) -> tuple[int, str]:
    """Writes `batch` as the only one of an Arrow file; its size in bytes and its sha256."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    write_file(path, content, temporary)
    return len(content), hashlib.sha256(content).hexdigest()


def write_file(path: Path, content: bytes | memoryview, temporary: Path) -> None:
    """Puts `content` at `path` whole or not at all, whatever happens to process or machine, by way
    of a file in the folder `temporary`, which must lie on the same file system."""
    write_whole(path, content, temporary / f"{path.name}{_mark(os.getpid())}{uuid.uuid4().hex}")


def remove_unfinished(temporary: Path, process: int) -> None:
    """Removes what `write_file` was writing in a process of this machine that is gone."""
    for path in temporary.glob(f"*{glob.escape(_mark(process))}*"):
        path.unlink(missing_ok=True)


def _mark(process: int) -> str:
    return f".{os.uname().nodename}-{process}-"


def _offsets(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets

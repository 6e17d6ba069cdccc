"""What is true of the Arrow files that are written here, asked of those that are read.

A hash says that a file is the one its manifest describes; who made both may have been a stranger.
Of what these let pass, no index, length or id leads outside what is there.

Shapes: D documents, S sentences, T tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["is_rising", "only_batch", "require_ids", "require_sentences"]

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
    """Do these offsets go from 0 to `stop`, and never back?"""
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

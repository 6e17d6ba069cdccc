"""Prepared folders of made-up documents, in which no token occurs twice."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.shard_files import (
    MANIFEST_NAME,
    DataManifest,
    DuplicatesFile,
    PrepareRequest,
    ShardWriter,
    SplitManifest,
    VocabularyFile,
    file_sha256,
    write_arrow,
)
from stacking_ds.data.shards import TokenShards, TokenSplit
from stacking_ds.data.tokenizer import SPECIAL_TOKENS, vocabulary_sha256

__all__ = ["FIRST_TOKEN", "make_shards"]

FIRST_TOKEN = len(SPECIAL_TOKENS)
Documents = Sequence[Sequence[int]]


def make_shards(
    folder: Path,
    train: Documents,
    heldout: Documents = ((3, 4), (5, 2)),
    *,
    documents_per_shard: int = 10**9,
    duplicates: Sequence[int] = (),
) -> TokenShards:
    """Documents of the given sentence lengths in tokens; the tokens of the split count up from
    FIRST_TOKEN. `duplicates` are the training documents that do not count."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = max(sum(map(sum, documents)) for documents in (train, heldout))
    vocabulary = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(tokens))]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    splits = {
        name: _write_split(folder, name, documents, documents_per_shard, dropped, len(vocabulary))
        for name, documents, dropped in (("train", train, duplicates), ("heldout", heldout, ()))
    }
    manifest = DataManifest(
        request=PrepareRequest(
            sources=(),
            heldout_sources=(),
            heldout_fraction=0.0,
            vocabulary="trained",
            text_key="text",
        ),
        licence=None,
        sources=(),
        vocab_size=len(vocabulary),
        vocabulary_sha256=vocabulary_sha256(vocabulary),
        vocabulary_files=(
            VocabularyFile(
                name="vocab.txt",
                size_bytes=(folder / "vocab.txt").stat().st_size,
                sha256=file_sha256(folder / "vocab.txt"),
            ),
        ),
        rejected=(),
        text_bytes=0,
        **splits,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return TokenShards.open(folder)


def sentence_lengths_of(split: TokenSplit, document: int) -> NDArray[np.int32]:
    """The lengths of a document's sentences, in tokens. Shape [sentences]."""
    shard = int(np.searchsorted(split.document_bases, document, side="right")) - 1
    arrays, row = split.arrays[shard], document - split.document_bases[shard]
    first, stop = arrays.sentence_offsets[row : row + 2]
    return arrays.sentence_lengths[first:stop]


def _write_split(
    folder: Path,
    name: str,
    documents: Documents,
    documents_per_shard: int,
    duplicates: Sequence[int],
    vocab_size: int,
) -> SplitManifest:
    writer, shards = ShardWriter(vocab_size), []
    token = FIRST_TOKEN
    for number, lengths in enumerate(documents):
        stop = token + sum(lengths)
        digest = hashlib.blake2b(f"{name} {number}".encode(), digest_size=8).digest()
        writer.add(
            np.arange(token, stop),
            np.array(lengths, dtype=np.int32),
            np.array([len(lengths)], dtype=np.int32),
            np.array([int.from_bytes(digest)], dtype=np.uint64),
        )
        token = stop
        if (number + 1) % documents_per_shard == 0 or number + 1 == len(documents):
            shards.append(writer.write(folder, f"{name}-{len(shards):05d}-000.arrow", folder))
    dropped = [documents[number] for number in duplicates]
    column = pa.array(np.array(sorted(duplicates), dtype=np.int64))
    path = folder / f"{name}-duplicates.arrow"
    size_bytes, sha256 = write_arrow(pa.record_batch({"document": column}), path, folder)
    counts = {
        "documents": (len(documents), len(dropped)),
        "sentences": (sum(map(len, documents)), sum(map(len, dropped))),
        "tokens": (sum(map(sum, documents)), sum(map(sum, dropped))),
    }
    return SplitManifest(
        shards=tuple(shards),
        duplicates=DuplicatesFile(
            name=path.name,
            size_bytes=size_bytes,
            sha256=sha256,
            **{count: gone for count, (_, gone) in counts.items()},
        ),
        **{count: there - gone for count, (there, gone) in counts.items()},
    )

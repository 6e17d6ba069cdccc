"""Files of a folder of token shards: the records of `manifest.json`, and writing the Arrow files.

An Arrow file holds one row a document, in one record batch, so that its tokens lie in one
contiguous buffer. Columns: `tokens`, list<uint16> (uint32 for vocabularies of more than 65,536
tokens), the ids of the whole document without special tokens; `sentence_lengths`, list<int32>,
which add up to the number of tokens; `document_hash`, uint64, the same for documents of the same
words.

Shapes: D documents, S sentences, T tokens.
"""

import glob
import hashlib
import os
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray
from pydantic import Field, ValidationError, model_validator

from stacking_ds.config.sections import VocabularySize
from stacking_ds.data.tokenizer import UNCASED, Normalization
from stacking_ds.errors import DataError, UnreadableDataError, unreadable
from stacking_ds.files import DamagedFileError, open_regular, read_text, write_whole
from stacking_ds.records import Record, first_problem

MANIFEST_NAME = "manifest.json"
# the folder inside a prepared one that is there until all is done
UNFINISHED_NAME = ".unfinished"
MANY_UNKNOWN = 0.01
"""The share of [UNK] above which people are warned; English has a thousandth of that."""
SplitName = Literal["train", "heldout"]
# what a document of a .txt file is: what stands between blank lines, a line, or the file
DocumentRule = Literal["blank-line", "line", "file"]

_MOST = 2**53
Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$")]
"""Of a file in the folder itself, whatever a manifest says."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PrepareRequest(Record):
    """A request to `prepare`: enough to recognise it without reading the sources, whose
    contents are in `DataManifest.sources`."""

    sources: tuple[str, ...]
    heldout_sources: tuple[str, ...]
    heldout_fraction: float
    vocabulary: str
    text_key: str
    documents: DocumentRule = "blank-line"
    normalization: Normalization = UNCASED
    """Folders of earlier versions, which do not say, are uncased."""


class SourceFile(Record):
    """Something that was read: a file, a Hugging Face dataset, or a package of the embedded corpus.
    `size_bytes` and `sha256` are None for what is no file, `licence` is None where unknown."""

    name: str
    heldout: bool
    size_bytes: int | None
    sha256: str | None
    licence: str | None


class Rejected(Record):
    """Documents that were left out for one reason, and the places of the first 20, such as
    `wiki.jsonl:17` (line 17, or row 17 of a table)."""

    reason: str
    documents: int
    first: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return (
            f"left out, {self.reason}: {self.documents:,} documents, the first at "
            f"{', '.join(self.first[:3])}"
        )


class RecordedFile(Record):
    """One file, as it was written."""

    name: FileName
    size_bytes: Positive
    sha256: Sha256


class ShardFile(RecordedFile):
    """One Arrow file of a split, duplicates included. `unknown_tokens` are those that are [UNK];
    None where nobody counted, as in earlier versions and in lists of duplicates."""

    documents: Count
    sentences: Count
    tokens: Count
    unknown_tokens: Count | None = None


class DuplicatesFile(ShardFile):
    """The Arrow file that lists the documents of a split which do not count, and what they hold."""


class SplitManifest(Record):
    """Counts of a split, that is without its duplicates, and the files that hold it, in
    order."""

    documents: Count
    sentences: Count
    tokens: Count
    shards: tuple[ShardFile, ...]
    duplicates: DuplicatesFile

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitManifest":
        for count in ("documents", "sentences", "tokens"):
            there = sum(getattr(shard, count) for shard in self.shards)
            if getattr(self, count) + getattr(self.duplicates, count) != there:
                raise ValueError(f"its {count} are not those of its files without the duplicates")
        return self

    @property
    def unknown_share(self) -> float | None:
        """The share of [UNK] in the tokens of all files; None where earlier versions wrote one."""
        unknown = 0
        for shard in self.shards:
            if shard.unknown_tokens is None:
                return None
            unknown += shard.unknown_tokens
        return unknown / max(sum(shard.tokens for shard in self.shards), 1)


class VocabularyFile(RecordedFile):
    """`vocab.txt` or `tokenizer.json`."""


class DataManifest(Record):
    """Everything needed to trust and to read the folder. `licence` is what the user said the text's
    licence is, None where nothing was said; `text_bytes` is the size of the documents in all
    shards, their words joined by single spaces."""

    format_version: Literal[2] = 2
    request: PrepareRequest
    licence: str | None
    sources: tuple[SourceFile, ...]
    vocab_size: VocabularySize
    vocabulary_sha256: Sha256
    vocabulary_files: tuple[VocabularyFile, ...]
    rejected: tuple[Rejected, ...]
    text_bytes: Count
    train: SplitManifest
    heldout: SplitManifest

    @model_validator(mode="after")
    def _has_vocabulary(self) -> "DataManifest":
        if "vocab.txt" not in {file.name for file in self.vocabulary_files}:
            raise ValueError("vocab.txt is not among its vocabulary_files")
        return self

    def split(self, name: SplitName) -> SplitManifest:
        return self.train if name == "train" else self.heldout

    @property
    def duplicate_documents(self) -> int:
        """Over both splits."""
        return self.train.duplicates.documents + self.heldout.duplicates.documents

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(folder: Path) -> DataManifest:
    """The manifest in `folder`; DataError when it is missing, damaged or of another version,
    OSError for a name that no folder can have."""
    path = folder / MANIFEST_NAME
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        state = f"holds no prepared data ({MANIFEST_NAME} is missing); make it with"
        again = ""
        if (folder / UNFINISHED_NAME).is_dir():
            state, again = "is unfinished: run the same", " again, which goes on where it stopped"
        raise DataError(f"{folder} {state} `stacking-ds prepare`{again}") from error
    except DamagedFileError as error:
        folder.stat()  # where its name is too long, nothing is damaged
        raise DataError(f"{error}; delete the folder and prepare it again") from error
    except OSError as error:
        raise unreadable(UnreadableDataError, path, error) from error
    try:
        return DataManifest.model_validate_json(text)
    except ValidationError as error:
        if any(problem["loc"] == ("format_version",) for problem in error.errors()):
            raise DataError(
                f"{folder} was prepared in another version of the format; delete it and run "
                "`stacking-ds prepare` again"
            ) from error
        problem = first_problem(error)
        raise DataError(f"{path} is damaged or of another version: {problem}") from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises what `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(vocab_size: int) -> DTypeLike:
    """The narrowest unsigned integers that hold every id of the vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """Collects documents in memory until they are written to a file. The tokens `unknown_id` are
    counted, where one is given."""

    def __init__(self, vocab_size: int, unknown_id: int | None = None) -> None:
        self._dtype, self._unknown_id = token_dtype(vocab_size), unknown_id
        self._added: list[tuple[NDArray[Any], ...]] = []

    def add(
        self,
        tokens_T: NDArray[np.unsignedinteger],
        sentence_lengths_S: NDArray[np.int32],
        sentence_counts_D: NDArray[np.int32],
        document_hashes_D: NDArray[np.uint64],
    ) -> None:
        """Appends documents: their tokens one after another, the lengths of their sentences in
        tokens, and how many sentences each document has; none of these is zero."""
        if len(sentence_counts_D):
            tokens_T = tokens_T.astype(self._dtype, copy=False)
            lengths_S = sentence_lengths_S.astype(np.int32, copy=False)
            self._added.append((tokens_T, lengths_S, sentence_counts_D, document_hashes_D))

    def write(self, folder: Path, name: str, temporary: Path) -> ShardFile | None:
        """Writes what was collected as `folder`/`name`, by way of a file in `temporary`, and starts
        anew. Returns its record; None, and no file, if nothing was collected."""
        if not self._added:
            return None
        tokens, lengths, counts, hashes = map(np.concatenate, zip(*self._added, strict=True))
        self._added = []
        unknown = self._unknown_id
        offsets = _offsets(counts)
        columns = {
            "tokens": pa.ListArray.from_arrays(_offsets(lengths)[offsets], tokens),
            "sentence_lengths": pa.ListArray.from_arrays(offsets, lengths),
            "document_hash": hashes,
        }
        size_bytes, sha256 = write_arrow(pa.record_batch(columns), folder / name, temporary)
        return ShardFile(
            name=name,
            size_bytes=size_bytes,
            sha256=sha256,
            documents=len(hashes),
            sentences=len(lengths),
            tokens=len(tokens),
            unknown_tokens=None if unknown is None else int(np.count_nonzero(tokens == unknown)),
        )


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

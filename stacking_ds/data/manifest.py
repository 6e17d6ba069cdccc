"""What a folder of token shards says about itself: `manifest.json`."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stacking_ds.errors import DataError

__all__ = [
    "MANIFEST_NAME",
    "DataManifest",
    "PrepareRequest",
    "ShardFile",
    "SplitManifest",
    "SplitName",
    "VocabularyFile",
    "file_sha256",
    "read_manifest",
]

MANIFEST_NAME = "manifest.json"
SplitName = Literal["train", "heldout"]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class PrepareRequest(_Record):
    """What `prepare` was asked for. Equal requests on equal input give equal folders."""

    sources: tuple[str, ...]
    heldout_sources: tuple[str, ...]
    heldout_fraction: float
    vocabulary: str


class ShardFile(_Record):
    """One Arrow file of a split."""

    name: str
    size_bytes: int
    sha256: str
    documents: int
    sentences: int
    tokens: int


class SplitManifest(_Record):
    """The counts of a split and the files that hold it, in order."""

    documents: int
    sentences: int
    tokens: int
    shards: tuple[ShardFile, ...]


class VocabularyFile(_Record):
    """`vocab.txt` or `tokenizer.json`."""

    name: str
    size_bytes: int
    sha256: str


class DataManifest(_Record):
    """Everything needed to trust and to read the folder. `licence` is None where unknown."""

    format_version: Literal[1] = 1
    request: PrepareRequest
    licence: str | None
    vocab_size: int
    vocabulary_sha256: str
    vocabulary_files: tuple[VocabularyFile, ...]
    duplicate_documents: int
    empty_documents: int
    train: SplitManifest
    heldout: SplitManifest

    def split(self, name: SplitName) -> SplitManifest:
        return self.train if name == "train" else self.heldout

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(folder: Path) -> DataManifest:
    """The manifest in `folder`; DataError when it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no prepared data ({MANIFEST_NAME} is missing); "
            "make it with `stacking-ds prepare`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return DataManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path} is damaged or of another version: {place}: {first['msg']}"
        ) from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

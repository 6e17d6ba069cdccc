"""What a checkpoint says of itself: its `manifest.json`, as strict records."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stacking_ds.errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "USE_ANOTHER",
    "Interval",
    "Manifest",
    "RankFile",
    "package_versions",
    "read_manifest",
]

FORMAT_VERSION: Literal[1] = 1
USE_ANOTHER = "write the name of an earlier checkpoint into checkpoints/latest and resume from that"

Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Interval(_Record):
    """The elements [start, stop) of one parameter, under each of `keys`."""

    name: str
    start: Count
    stop: Count
    keys: tuple[str, ...]


class RankFile(_Record):
    name: str
    size_bytes: Count
    sha256: str
    intervals: tuple[Interval, ...]


class Manifest(_Record):
    """What a checkpoint is of; everything but the numbers themselves."""

    format_version: Literal[1]
    package_versions: dict[str, str]
    step: Count
    optimizer_step: Count
    """The optimizer's own count, which its bias correction needs; 0 means no moments yet."""
    loss_scale: float
    """What fp16 multiplied the loss by; 1.0 at other precisions."""
    num_hidden_layers: Count
    vocabulary_sha256: str
    data_sha256: str
    train_state: dict[str, Any]
    config: dict[str, Any]
    parameters: dict[str, tuple[int, ...]]
    """Name and shape, in the optimizer's order."""
    files: tuple[RankFile, ...]


def package_versions() -> dict[str, str]:
    """Of the libraries on which the numbers or their layout depend."""
    names = ("torch", "deepspeed", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    CheckpointError: the manifest is missing, unreadable or of another format.
    """
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {USE_ANOTHER}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(
            f"{path} is damaged or of another version: {where}: {first['msg']}; {USE_ANOTHER}"
        ) from None

"""Manifest of a checkpoint: its `manifest.json`, as strict records."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, ValidationError, model_validator

from stacking_ds.checkpoint.folders import fall_back, step_of
from stacking_ds.errors import CheckpointError, UnreadableError, unreadable
from stacking_ds.files import DamagedFileError, read_json
from stacking_ds.records import Record, first_problem
from stacking_ds.sharding.fragments import MASTER, MOMENTS, Cut

FORMAT_VERSION: Literal[2] = 2
CHUNK_BYTES = 1 << 20
"""Reading an interval verifies whole chunks: small ones cost little to read beyond it, large ones
make a short manifest."""

_MOST = 2**53
ELEMENT_BYTES = 4

Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Number = Annotated[float, Field(ge=0.0, le=float(_MOST))]
# a chunk is read into memory as a whole
ChunkBytes = Annotated[int, Field(ge=1, le=1 << 30)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
Words = Annotated[str, Field(pattern=r"^[ -~]{0,200}$")]
"""Printable characters."""


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def checksum(data: bytes | memoryview) -> str:
    """Tells damage, as fast as memory is read; it is no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


class Contents(Record):
    """Everything that is saved besides masters and moments, and what it belongs to.

    Nothing else is needed to go on. The position in the data, masks and dropout are functions of
    `config["seed"]` and `step`; the learning rate is one of `config` and `step`. The stage is
    `train_state["stage_index"]`.
    """

    step: Count
    optimizer_step: Count
    """The optimizer's own count, which its bias correction needs; 0 means no moments yet."""
    loss_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """The factor of the loss in fp16; 1.0 at other precisions."""
    num_hidden_layers: Positive
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    """Of the engine that saved; any other can load."""
    vocabulary_sha256: Words
    data_sha256: Words
    train_state: dict[str, Count | Number]
    config: dict[str, Any]


class Parameter(Record):
    """A parameter's shape, and how its elements are cut among the ranks' files: `fragments.Cut`."""

    shape: tuple[Positive, ...]
    size: Positive
    offset: Count

    @property
    def cut(self) -> Cut:
        return Cut(math.prod(self.shape), self.size, self.offset)


class RankFile(Record):
    """One rank's safetensors file, which holds "KEY/NAME" for each part the rank owns."""

    name: str
    size_bytes: Positive
    checksums: tuple[Checksum, ...]
    """One per chunk of the file."""


class Manifest(Contents):
    """A whole checkpoint, its numbers excepted. It grows with parameters, ranks and bytes, never
    with their products."""

    format_version: Literal[2] = FORMAT_VERSION
    package_versions: dict[Words, Words]
    world_size: Positive
    chunk_bytes: ChunkBytes
    keys: tuple[str, ...]
    """State saved of each parameter: the master, and the moments once there are any."""
    parameters: Annotated[dict[Name, Parameter], Field(min_length=1)]
    """In the optimizer's order."""
    files: tuple[RankFile, ...]
    """In the order of the ranks."""

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        if self.keys not in ((MASTER,), (MASTER, *MOMENTS)):
            raise ValueError("keys are neither the masters alone nor these with both moments")
        if self.optimizer_step and self.keys == (MASTER,):
            raise ValueError(f"there are no moments after {self.optimizer_step} updates")
        if len(self.files) != self.world_size:
            raise ValueError(f"{len(self.files)} files of {self.world_size} ranks")
        for rank, file in enumerate(self.files):
            if file.name != rank_file_name(rank):
                raise ValueError(f"the file of rank {rank} is not {rank_file_name(rank)}")
            expected = -(-file.size_bytes // self.chunk_bytes)
            if len(file.checksums) != expected:
                raise ValueError(f"{len(file.checksums)} of {expected} checksums of {file.name}")
        for name, parameter in self.parameters.items():
            if self.world_size * parameter.size - parameter.offset < parameter.cut.numel:
                raise ValueError(f"not all elements of {name} are in a file")
        numel = sum(parameter.cut.numel for parameter in self.parameters.values())
        # so that nobody makes room for what cannot be there
        if numel * len(self.keys) * ELEMENT_BYTES > sum(file.size_bytes for file in self.files):
            raise ValueError(f"{numel} parameters do not fit into the files")
        if self.train_state.get("step", self.step) != self.step:
            raise ValueError(f"train_state is not that of step {self.step}")
        return self

    @property
    def fp16_loss_scale(self) -> float | None:
        """The loss scale that fp16 has settled on; None at other precisions, and in the recipe of
        a version that has none."""
        engine = self.config.get("engine")
        is_fp16 = isinstance(engine, dict) and engine.get("precision") == "fp16"
        return self.loss_scale if is_fp16 else None

    def tensors_of(self, rank: int) -> dict[str, int]:
        """The tensors in the file of `rank`, and how many elements each has."""
        intervals = {name: each.cut.interval(rank) for name, each in self.parameters.items()}
        return {
            f"{key}/{name}": high - low
            for name, (low, high) in intervals.items()
            if low < high
            for key in self.keys
        }

    def to_json(self) -> str:
        """The text of `manifest.json`: this record and its checksum."""
        record = self.model_dump(mode="json")
        return json.dumps({"checksum": _checksum_of(record), **record}, indent=1) + "\n"


def _checksum_of(record: dict[str, Any]) -> str:
    return checksum(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    UnreadableError: the manifest is there and cannot be read.
    CheckpointError: it is missing, damaged or of another format.
    """
    path = folder / "manifest.json"
    try:
        return _checked(path, read_json(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        problem = f"{path} cannot be read ({error.strerror})"
    except OSError as error:
        raise unreadable(UnreadableError, path, error) from None
    except DamagedFileError as damage:
        problem = str(damage)
    except ValidationError as error:
        problem = f"{path} is damaged: {first_problem(error)}"
    raise CheckpointError(f"{problem}; {fall_back(folder)}")


def _checked(path: Path, record: Any) -> Manifest:
    if not isinstance(record, dict):
        raise DamagedFileError(path, "it is not a JSON object")
    stated, version = record.pop("checksum", None), record.get("format_version")
    whole = stated == _checksum_of(record)
    if version != FORMAT_VERSION and (whole or stated is None):  # version 1 had no checksum
        raise CheckpointError(
            f"{path} is of format version {version}, and this stacking_ds reads version "
            f"{FORMAT_VERSION}; go on with the one that wrote it, or start the run again with "
            f"another --run-dir"
        )
    if not whole:
        raise DamagedFileError(path, "its checksum is not that of its contents")
    manifest = Manifest.model_validate_json(json.dumps(record))
    if step_of(path.parent) not in (None, manifest.step):
        raise DamagedFileError(path, f"it is that of step {manifest.step}")
    return manifest

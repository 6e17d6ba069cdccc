"""Checkpoints and shards that a stranger has made: every sum is right, and what they say is not."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from stacking_ds.checkpoint.manifest import checksum
from stacking_ds.data.rows import RECORD_NAME
from stacking_ds.data.shard_files import MANIFEST_NAME

__all__ = ["ODD_VALUES", "Change", "forge_arrow", "forge_header", "forge_manifest", "places", "put"]

Change = Callable[[dict[str, Any]], object]

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e300, 0.5, "", "x", "../../../x", "a\0b", "\n"),
    *([], {}, [[]], {"": 0}, [-1], ["x"], [2**62, 2**62]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value, itself excepted."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, each in inner:
        found.append((*path, key))
        if isinstance(each, dict | list):
            found += places(each, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Exchange what stands at `path`."""
    *parents, last = path
    for parent in parents:
        value = value[parent]
    value[last] = new


def forge_manifest(folder: Path, change: Change) -> None:
    """Change the manifest of a checkpoint, and sum it up again."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    change(record)
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"checksum": checksum(text.encode()), **record}))


def forge_header(folder: Path, change: Change, length: int | None = None) -> None:
    """Change the header of rank 0's file, and sum that and the manifest up again. `length` is what
    the file says that the header has, if not what it has."""
    path = folder / "rank_00000.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    stated = len(text) if length is None else length
    content = stated.to_bytes(8, "little") + text + content[end:]
    path.write_bytes(content)

    def resum(record: dict[str, Any]) -> None:
        size = record["chunk_bytes"]
        chunks = [content[place : place + size] for place in range(0, len(content), size)]
        record["files"][0] |= {"size_bytes": len(content), "checksums": list(map(checksum, chunks))}

    forge_manifest(folder, resum)


def forge_arrow(folder: Path, name: str, columns: dict[str, pa.Array], batches: int = 1) -> None:
    """Write other columns into a file of a prepared folder, or of a layout, and sum it up again."""
    sink = pa.BufferOutputStream()
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(sink, batch.schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    (folder / name).write_bytes(content)
    listed = RECORD_NAME if (folder / RECORD_NAME).exists() else MANIFEST_NAME
    record = json.loads((folder / listed).read_text())
    for entry in _entries(record):
        if entry["name"] == name:
            sha256 = hashlib.sha256(content).hexdigest()
            entry |= {"size_bytes": len(content), "sha256": sha256}
    (folder / listed).write_text(json.dumps(record))


def _entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    if "parts" in record:
        return list(record["parts"])
    splits = (record["train"], record["heldout"])
    return [entry for split in splits for entry in (*split["shards"], split["duplicates"])]

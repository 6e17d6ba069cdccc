"""Write safetensors files: https://huggingface.co/docs/safetensors has the format.

Plain writes, whose files follow the umask. The library's own `save_file` makes them readable by
their owner alone, by way of a temporary file, and a group could not go on with each other's runs.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["little_endian_bytes", "safetensors_header", "save_file"]

_ELEMENT_BYTES = 4


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write fp32 tensors of the CPU as the safetensors file `path`, one after the other."""
    header, _ = safetensors_header({name: tuple(each.shape) for name, each in tensors.items()})
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(little_endian_bytes(tensor))


def safetensors_header(
    shapes: Mapping[str, tuple[int, ...]], **metadata: str
) -> tuple[bytes, dict[str, int]]:
    """A file's bytes before its numbers, and the place in the file of each fp32 tensor."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name], end = end, end + _ELEMENT_BYTES * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [places[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + place for name, place in places.items()}


def little_endian_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a fp32 tensor of the CPU as a safetensors file has them."""
    assert tensor.dtype == torch.float32
    assert tensor.device.type == "cpu"
    return tensor.detach().contiguous().numpy().astype("<f4", copy=False).data

"""What the header of a rank's file says of its tensors, believed only where all of it fits.

| length, 8 bytes | header, JSON | tensor | tensor | … |     https://huggingface.co/docs/safetensors
"""

import re
from typing import Any

from stacking_ds.files import is_count, parse_json

__all__ = ["LENGTH_BYTES", "header_end", "read_header"]

LENGTH_BYTES = 8
"""Of the number that says how many bytes of header follow it."""

_ELEMENT_BYTES = 4
# safetensors' own bound
_MOST_HEADER_BYTES = 100_000_000


def header_end(length: bytes | bytearray, size_bytes: int) -> int:
    """The place in a file of `size_bytes` where the header ends, by its first bytes.

    Raises:
        ValueError: it would not end in the file.
    """
    end = LENGTH_BYTES + int.from_bytes(length, "little")
    if end > min(size_bytes, LENGTH_BYTES + _MOST_HEADER_BYTES):
        raise ValueError(f"its header would end at byte {end}")
    return end


def read_header(
    header: bytes | bytearray, start: int, size_bytes: int
) -> dict[str, tuple[int, int]]:
    """Name to first byte and number of elements, of 1-D fp32 tensors that fill the bytes from
    `start` to `size_bytes` and share none.

    Raises:
        ValueError: it says anything else.
    """
    entries = parse_json(header)
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    found = {name: _tensor(name, entry) for name, entry in entries.items()}
    place = start
    for name, (offset, numel) in sorted(found.items(), key=lambda entry: entry[1]):
        if start + offset != place:
            raise ValueError(f"its header puts {_shown(name)} where another tensor or none is")
        place += _ELEMENT_BYTES * numel
    if place != size_bytes:
        raise ValueError(f"its tensors end at byte {place} instead of {size_bytes}")
    return {name: (start + offset, numel) for name, (offset, numel) in found.items()}


def _tensor(name: str, entry: Any) -> tuple[int, int]:
    """The offset and the number of elements."""
    match entry:
        case {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}:
            counts = all(map(is_count, (numel, begin, end)))
            if counts and numel > 0 and end - begin == _ELEMENT_BYTES * numel:
                return begin, numel
    raise ValueError(f"its header says of {_shown(name)} what is true of no 1-D fp32 tensor")


def _shown(name: str) -> str:
    return re.sub(r"[^\w./-]", "?", name)[:100]

"""Intervals of saved parameters, read from whichever ranks' files hold them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stacking_ds.data.manifest import file_sha256
from stacking_ds.errors import CheckpointError
from stacking_ds.manifest import USE_ANOTHER, Interval, Manifest, RankFile

__all__ = ["FragmentReader"]


class FragmentReader:
    """Opens, and verifies, a rank's file when it first needs it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._shapes = manifest.parameters
        self._open: dict[str, Any] = {}
        self._places: dict[str, list[tuple[RankFile, Interval]]] = {}
        for file in manifest.files:
            for interval in file.intervals:
                self._places.setdefault(interval.name, []).append((file, interval))

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        saved = self._shapes.get(name)
        if saved != shape:
            found = f"has {name} with shape {saved}" if saved else f"has no {name}"
            raise CheckpointError(
                f"{self._folder} is of another model: it {found}, this model needs shape {shape}; "
                f"resume with the recipe the run was started with"
            )

    def fill(self, view: torch.Tensor, key: str, name: str, start: int, stop: int) -> None:
        """Copy the elements [start, stop) of `name` into `view`, from whichever files have them."""
        filled = 0
        for file, interval in self._places.get(name, []):
            low, high = max(start, interval.start), min(stop, interval.stop)
            if low < high and key in interval.keys:
                part = self._read(
                    file, f"{key}/{name}", low - interval.start, high - interval.start
                )
                view[low - start : high - start].copy_(part)
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"{self._folder} has {filled} of the {stop - start} elements [{start}, {stop}) of "
                f"{name}'s {key}: its manifest is not whole; {USE_ANOTHER}"
            )

    def _read(self, file: RankFile, tensor: str, low: int, high: int) -> torch.Tensor:
        path = self._folder / file.name
        try:
            if file.name not in self._open:
                if (size := path.stat().st_size) != file.size_bytes:
                    raise CheckpointError(
                        f"{path} has {size} bytes instead of {file.size_bytes}: it is damaged; "
                        f"{USE_ANOTHER}"
                    )
                if file_sha256(path) != file.sha256:
                    raise CheckpointError(
                        f"{path} is damaged: its bytes are not those that were written; "
                        f"{USE_ANOTHER}"
                    )
                self._open[file.name] = safe_open(path, framework="pt")
            part: torch.Tensor = self._open[file.name].get_slice(tensor)[low:high]
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}); {USE_ANOTHER}"
            ) from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); {USE_ANOTHER}") from None
        return part

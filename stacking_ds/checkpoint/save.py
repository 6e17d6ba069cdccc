"""Write a checkpoint while training goes on.

    main thread    start ── poll ── poll ── poll ──────────── poll ── …
                     │                       │ gather records   │ done
    each rank        └ write, fsync, hash ───┘                  │
    first rank                                └ publish, prune ─┘

Only the main thread talks to other ranks. A checkpoint is published when all ranks' files are on
disk; whatever fails or is killed before leaves the previous one as it was.
"""

import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import torch

from stacking_ds.checkpoint.folders import begin, folder_name, named_by_latest, partial_of, publish
from stacking_ds.checkpoint.manifest import (
    CHUNK_BYTES,
    ELEMENT_BYTES,
    Contents,
    Manifest,
    Parameter,
    RankFile,
    checksum,
    rank_file_name,
)
from stacking_ds.console import first_of
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError
from stacking_ds.files import DamagedFileError, sync
from stacking_ds.sharding.fragments import Fragment


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
        places[name], end = end, end + ELEMENT_BYTES * math.prod(shape)
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


# on which the numbers or their layout depend
_PACKAGES = ("torch", "deepspeed", "safetensors")
_PATIENCE_SECONDS = 10.0
_MEET_SECONDS = 1.0


class BackgroundSave:
    """One checkpoint on its way to the disk. Every method but `abandon` is a collective."""

    def __init__(
        self,
        run_dir: Path,
        fragments: Sequence[Fragment],
        world: World,
        contents: Contents,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        """Start to write `fragments`: host tensors that nobody writes to while the save lasts
        (`Fragment.on_host`). `afterwards` is called on the first rank, in its thread, when the
        checkpoint is published."""
        self.folder = run_dir / "checkpoints" / folder_name(contents.step)
        self.over = False
        """Whether it has been published or has failed."""
        self.seconds = 0.0
        """Time that its threads have taken so far; on the first rank, once it is published, with
        what the slowest rank took to write. When they were waited for does not count."""
        self._world = world
        self._afterwards = afterwards
        self._manifest = partial(
            Manifest,
            **contents.model_dump(),
            package_versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            world_size=world.size,
            chunk_bytes=CHUNK_BYTES,
            keys=tuple(fragments[0].views),
            parameters={
                each.name: Parameter(shape=each.shape, size=each.cut.size, offset=each.cut.offset)
                for each in fragments
            },
        )
        self._written: RankFile | None = None
        self._publishing = False
        self._failure: str | None = None
        self._thread: Thread | None = None
        owned = [fragment.owned_by(world.rank) for fragment in fragments]
        if world.on_first(self._begin):
            self._go(self._write, owned)

    def poll(self) -> bool:
        """Ask the ranks, in one small all-reduce, whether the checkpoint is published; waits for no
        thread. Raises `CheckpointError`: on every rank, if one could not write; the save is over,
        nothing of it is left, and `latest` still names the previous checkpoint, untouched."""
        if self._world.any(self._thread is not None and self._thread.is_alive()):
            return False
        self._raise_failures()
        if self._publishing:
            self.over = True
            return True
        written = self._world.gather_on_first((self._written, self.seconds))
        self._publishing = True
        if self._world.is_first:
            self.seconds = max(seconds for _, seconds in written)
            self._go(self._publish, [file for file, _ in written])
        return False

    def finish(self) -> None:
        """Wait until the checkpoint is published. Raises `CheckpointError`: as `poll`."""
        with self._world.waiting_for(self._thread):
            while not self.poll():
                self._world.pulse.work = self._thread
                if self._thread is not None:
                    # not to its end: who is done earlier waits in a collective, which times out
                    self._thread.join(_MEET_SECONDS)

    def abandon(self) -> None:
        """Give up without asking the other ranks, of which one may be gone; what is written stays
        under its hidden name."""
        self.over = True
        if self._thread is not None:
            # Not for ever, since a file system may hang; but a thread that comes back from native
            # code into an interpreter that has ended can abort the process.
            self._thread.join(_PATIENCE_SECONDS)

    # ------------------------------------------------------------- in the threads

    def _go(self, action: Callable[..., None], *arguments: Any) -> None:
        def act(*arguments: Any) -> None:
            started = time.monotonic()
            try:
                action(*arguments)
            except BaseException as error:  # noqa: BLE001 - the main thread raises it on all ranks
                self._failure = str(error) or type(error).__name__
            self.seconds += time.monotonic() - started

        # the thread lets go of its arguments, the captured state, when it ends
        self._thread = Thread(target=act, args=arguments, name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads: the other ranks must learn of it
            self._thread, self._failure = None, str(error)

    def _write(self, owned: Sequence[Fragment]) -> None:
        path = partial_of(self.folder) / rank_file_name(self._world.rank)
        tensors = {
            f"{key}/{fragment.name}": view
            for fragment in owned
            if fragment.numel
            for key, view in fragment.views.items()
        }
        save_file(tensors, path)
        sync(path)
        with path.open("rb") as file:
            checksums = tuple(map(checksum, iter(lambda: file.read(CHUNK_BYTES), b"")))
        self._written = RankFile(
            name=path.name, size_bytes=path.stat().st_size, checksums=checksums
        )

    def _publish(self, files: Sequence[RankFile]) -> None:
        publish(self.folder, self._manifest(files=tuple(files)).to_json())
        self._afterwards()

    # ------------------------------------------------------------- when it fails

    def _begin(self) -> bool:
        try:
            begin(self.folder)
        except OSError as error:
            self._failure = str(error)
        return self._failure is None

    def _raise_failures(self) -> None:
        if not self._world.any(self._failure is not None):
            return
        self.over = True
        reasons = enumerate(self._world.gather(self._failure))
        told = [f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None]
        self._world.on_first(lambda: self._clean_up(told))

    def _clean_up(self, reasons: Sequence[str]) -> NoReturn:
        shutil.rmtree(partial_of(self.folder), ignore_errors=True)
        why = first_of(reasons, 3, "; ")
        try:
            newest = named_by_latest(self.folder.parent)
            before = f"{newest} is untouched" if newest else "there is no earlier checkpoint"
        except (OSError, DamagedFileError) as error:  # the file system that has just failed
            reason = error.strerror if isinstance(error, OSError) else error.reason
            newest, before = None, f"which one is the latest cannot be read ({reason})"
        if newest == self.folder.name:
            raise CheckpointError(
                f"{self.folder} was saved, but may not outlast a power failure ({why})"
            )
        raise CheckpointError(
            f"{self.folder} was not saved ({why}); {before}: make room or mend the file system"
        )

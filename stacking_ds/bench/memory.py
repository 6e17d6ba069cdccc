"""How far a process's host memory rises while something runs, and what tensors it holds."""

import contextlib
import ctypes
import gc
import resource
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import torch

_SELF = Path("/proc/self")
_SAMPLE_SECONDS = 0.001
_WATCH_SECONDS = 0.02
_PAGE = resource.getpagesize()
# one 64-bit entry a page: man 5 proc_pid_pagemap
_ENTRY_BYTES = 8
_IN_MEMORY_BIT = np.uint64(63)


def settle() -> None:
    """Collect garbage and give freed pages back, so that what is resident is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int((_SELF / "statm").read_text().split()[1])
    return pages * _PAGE


class HostPeak:
    """The highest resident memory of this process while it is entered, in `bytes`.

    The kernel keeps the mark where it lets a process reset its own; elsewhere a thread samples
    every millisecond, which may miss the very top.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> "HostPeak":
        settle()
        try:
            (_SELF / "clear_refs").write_text("5")
        except OSError:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sampler is None:
            self.bytes = _high_water_mark()
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, resident_bytes())
            self._done.wait(_SAMPLE_SECONDS)


class TreePeak:
    """The highest resident memory that any one process of a tree had while this was entered, in
    `bytes`.

    The operating system's account of a finished child will not do: it begins with what the parent
    had when it forked.
    """

    def __init__(self, root: int) -> None:
        self.bytes = 0
        self._root = psutil.Process(root)
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "TreePeak":
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(_WATCH_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (self._root, *self._root.children(recursive=True)):
                    # gone meanwhile, or a zombie, which has no memory
                    with contextlib.suppress(OSError, StopIteration):
                        peak = _high_water_mark(Path(f"/proc/{process.pid}"))
                        self.bytes = max(self.bytes, peak)


def _high_water_mark(process: Path = _SELF) -> int:
    status = (process / "status").read_text().splitlines()
    kib = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(kib) * 1024


def live_tensor_bytes() -> int | None:
    """Of all host tensors that Python can reach, as `touched_bytes`."""
    # by type: isinstance would ask every object there is for its class, and some of them answer
    found = (
        candidate for candidate in gc.get_objects() if issubclass(type(candidate), torch.Tensor)
    )
    return touched_bytes(found)


def touched_bytes(tensors: Iterable[torch.Tensor]) -> int | None:
    """Host memory in use under `tensors`: memory that several share counts once, pages that were
    allocated but never written to (DeepSpeed's unused buckets) do not.

    None where the kernel does not say which pages are in use.
    """
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    try:
        with (_SELF / "pagemap").open("rb") as page_map:
            return sum(_touched(page_map, *storage) for storage in storages.items())
    except OSError:
        return None


def _touched(page_map: BinaryIO, address: int, size: int) -> int:
    if size < _PAGE:
        return size
    first, last = address // _PAGE, (address + size - 1) // _PAGE
    page_map.seek(first * _ENTRY_BYTES)
    entries = np.frombuffer(page_map.read((last - first + 1) * _ENTRY_BYTES), np.uint64)
    return round(size * float((entries >> _IN_MEMORY_BIT).mean()))

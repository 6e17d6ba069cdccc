"""One way across a boundary, taken once, under a clock, a memory gauge and a counter."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from stacking_ds.bench.bytes_sent import BytesSent, written_bytes
from stacking_ds.bench.memory import HostPeak, live_tensor_bytes, resident_bytes, settle
from stacking_ds.bench.workload import Workload
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import source_name
from stacking_ds.sharding.fragments import MASTER

_TOLERANCE = 1e-9  # of fp64 sums, which ranks may add up in another order


@dataclass
class Record:
    """What one way to cross the boundary took on this rank."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    """Host memory at its highest, above that before the boundary."""
    peak_above_free_bytes: int = 0
    """Host memory at its highest, above that of the process without any engine."""
    captured_bytes: int | None = None
    engine_bytes: int | None = None
    """Of the new engine's tensors."""
    sent: dict[str, int] = field(default_factory=dict)
    written_bytes: int | None = None
    """To sockets and files, as the kernel counts."""

    def peak_ratio(self) -> float | None:
        """The highest memory above what cannot be avoided: captured state and new engine."""
        if self.captured_bytes is None or self.engine_bytes is None:
            return None
        return self.peak_above_free_bytes / (self.captured_bytes + self.engine_bytes)


class LabelledWorld:
    """What installing may ask of the other ranks, each under its own label of the counter."""

    def __init__(self, world: World, sent: BytesSent) -> None:
        self.rank, self.size = world.rank, world.size
        self._world, self._sent = world, sent

    def sum(self, values: Sequence[float]) -> list[float]:
        with self._sent.labelled("checksums"):
            return self._world.sum(values)

    def all_to_all(
        self, outgoing: Sequence[torch.Tensor], incoming_sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        with self._sent.labelled("state moved"):
            return self._world.all_to_all(outgoing, incoming_sizes)


class Crossing:
    """One way across the boundary, taken once, with its clock, its peak and its counter."""

    def __init__(self, workload: Workload, world: World, *, counting: bool) -> None:
        self.workload, self.world = workload, world
        self.counting = counting
        self.sent = BytesSent()
        self.record = Record()
        settle()
        self._free_bytes, self._free_tensors = resident_bytes(), live_tensor_bytes()
        self.engine = workload.old_engine(world)
        self._sums = _master_sums(self.engine, world) if counting else {}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The boundary itself: peak memory, and everything sent if this is the round that counts"""
        counted: AbstractContextManager[Any] = self.sent if self.counting else nullcontext()
        with HostPeak() as peak, counted:
            start_bytes = resident_bytes()
            self.world.barrier()
            written_before = written_bytes()
            yield
            written_after = written_bytes()
        if written_before is not None and written_after is not None:
            self.record.written_bytes = written_after - written_before
        self.record.peak_bytes = peak.bytes - start_bytes
        self.record.peak_above_free_bytes = peak.bytes - self._free_bytes
        self.record.sent = dict(self.sent.by_label)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the boundary; it has ended when it has on all ranks."""
        started = time.perf_counter()
        with self.sent.labelled(name):
            yield
        self.world.barrier()
        self.record.seconds[name] = time.perf_counter() - started

    def release(self) -> None:
        engine, self.engine = self.engine, None
        release_engine(engine)

    def engine_tensor_bytes(self) -> int | None:
        """Of the engine that is there now."""
        now, free = live_tensor_bytes(), self._free_tensors
        return None if now is None or free is None else now - free

    def check(self, layers: tuple[int, ...] | None) -> None:
        """That the engine has the masters it should have by the layer map."""
        if not self.counting:
            return
        for name, found in _master_sums(self.engine, self.world).items():
            expected = self._sums[source_name(name, layers)]
            scale = max(1.0, abs(expected))
            assert abs(found - expected) <= _TOLERANCE * scale, f"{name}: {found}, not {expected}"


def _master_sums(engine: Any, world: World) -> dict[str, float]:
    owned = [fragment.owned_by(world.rank) for fragment in sharded_state.fragments(engine)]
    # of absolute values: a plain sum is 0 for much that is lost
    sums = [float(fragment.views[MASTER].abs().sum(dtype=torch.float64)) for fragment in owned]
    names = [fragment.name for fragment in owned]
    return dict(zip(names, world.sum(sums), strict=True))

"""World: this process's rank, and the collectives of host values, errors and stop requests."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.errors import UserError, agreed
from stacking_ds.process.exit import is_mendable, mended_by
from stacking_ds.process.stop_signals import StopRequest

# well below any time-out, so that who waits for a slow rank hears of it in between
_SECONDS_BETWEEN_WORDS = 5.0
_SECONDS_TO_LET_GO = 5.0


@dataclass
class Pulse:
    """Progress of this rank; `FailureDetector` compares it with the others'."""

    # what all ranks do alike: collectives entered, micro-batches begun; who has fewer is behind
    moves: int = 0
    step: int = 0
    # the thread that the main thread waits for, while it only meets the others to tell them so
    work: threading.Thread | None = None
    loading: bool = False  # whether the main thread waits for its next batch
    waiting: bool = False  # whether meetings are no moves, since they are for waiting

    def move(self) -> None:
        if not self.waiting:
            self.moves += 1


@dataclass(frozen=True)
class World:
    """This process's rank, and the collectives it may call (on all ranks, in the same order)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None
    pulse: Pulse = field(default_factory=Pulse, compare=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def speaks_for_node(self) -> bool:
        return self.local_rank == 0

    def barrier(self) -> None:
        self.pulse.move()
        dist.barrier(group=self.host_group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in fp64."""
        self.pulse.move()
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return list(total.tolist())

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one."""
        return self.sum([float(flag)])[0] > 0

    def all_to_all(
        self, outgoing: Sequence[torch.Tensor], incoming_sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send each rank its 1-D fp32 host tensor; what came from each, of the sizes expected."""
        self.pulse.move()
        sent, sizes = torch.cat(list(outgoing)), list(incoming_sizes)
        received = torch.empty(sum(sizes))
        sent_sizes = [part.numel() for part in outgoing]
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.host_group)
        return list(torch.split(received, sizes))

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        self.pulse.move()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_on_first(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on rank 0; nothing elsewhere."""
        self.pulse.move()
        values: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None, dst=0, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The picklable `value` of rank 0, on every rank."""
        self.pulse.move()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    @contextmanager
    def waiting_for(self, work: threading.Thread | None) -> Iterator[None]:
        """The main threads meet in here for as long as `work` takes, on this rank or another. Its
        progress counts for the failure detector, and their meetings do not."""
        self.pulse.work, self.pulse.waiting = work, True
        try:
            yield
        except KeyboardInterrupt:
            if work is not None:
                # else it may come back from native code into an interpreter that has ended, and
                # abort the process
                work.join(_SECONDS_TO_LET_GO)
            raise
        finally:
            self.pulse.work, self.pulse.waiting = None, False

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 while the others wait; its result or its error on every rank.

        It may take longer than a collective may: the others are told now and then to wait on.
        """
        work = _Work(action, self) if self.is_first else None
        with self.waiting_for(work.thread if work else None):
            done, result, failure = self.broadcast(work.look() if work else None)
            while not done:
                done, result, failure = self.broadcast(work.look() if work else None)
        if failure is not None:
            raise agreed(_sentence_of(failure)) from failure
        return result

    def on_all(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank, for as long as it takes each; its result on this rank.

        An error on any rank is raised on all: as it is where all have the same, otherwise with
        the rank and the node that has it.
        """
        work = _Work(action, self)
        with self.waiting_for(work.thread):
            done, result, failure = work.look()
            while self.any(not done):
                done, result, failure = work.look()
        if not self.any(failure is not None):
            return result
        own = failure and _sentence_of(failure)
        told = own and (type(own), str(own))
        ranks = self.gather((socket.gethostname(), told))
        failed = [(rank, host, error) for rank, (host, error) in enumerate(ranks) if error]
        if own is not None and len(failed) == self.size and len({each[2] for each in failed}) == 1:
            raise agreed(own) from failure
        rank, host, (kind, text) = failed[0]
        others = f" ({len(failed)} of {self.size} ranks failed)" if len(failed) > 1 else ""
        kind = kind if issubclass(kind, UserError) else RuntimeError
        raise agreed(kind(f"rank {rank} on {host}: {text}{others}")) from failure


class _Work:
    """An action under way, in a thread where other ranks wait for it."""

    def __init__(self, action: Callable[[], Any], world: World) -> None:
        self._action = action
        self._result: Any = None
        self._failure: Exception | None = None
        self._device = world.device
        self.thread: threading.Thread | None = None
        if world.size == 1:
            self._run()
        else:
            self.thread = threading.Thread(target=self._run, name="work", daemon=True)
            self.thread.start()

    def _run(self) -> None:
        try:
            if self.thread is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            self._result = self._action()
        except Exception as error:  # noqa: BLE001 - handed to every rank, raised there
            self._failure = error
        except BaseException as error:
            if self.thread is None:
                raise
            # an exit in a thread would look like success
            self._failure = RuntimeError(f"{type(error).__name__}: {error}")

    def look(self) -> tuple[bool, Any, Exception | None]:
        """Tell whether it is done, its result and its error, after a while at most."""
        if self.thread is not None:
            self.thread.join(_SECONDS_BETWEEN_WORDS)
            if self.thread.is_alive():
                return False, None, None
        return True, self._result, self._failure


def _sentence_of(error: Exception) -> Exception:
    if isinstance(error, OSError) and is_mendable(error):
        return UserError(mended_by(error))
    return error


class StopFlag:
    """Stops all ranks at the same step, whichever of them was asked to; they ask it at step,
    evaluation and growth boundaries."""

    def __init__(self, world: World, request: StopRequest) -> None:
        self._world, self._request = world, request

    def agreed(self) -> bool:
        """True on every rank once any rank was asked to stop (a collective); raises as
        `StopRequest.raise_if_interrupted`."""
        self._request.raise_if_interrupted()
        return self._world.any(self._request.made)

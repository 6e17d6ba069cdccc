"""Who is still there: the job ends soon on all ranks when one of them dies, hangs or is cut off.

    every rank    tells each second or two: alive, its moves, its work    ──┐  a store on rank 0's
    rank 0        looks at all: one is silent, or nobody moves: verdict   ──┤  node, beside the
    the others    read the verdict; rank 0 does not answer: their own     ──┘  process group

Collectives cannot do this: over NCCL a dead peer is not noticed, no error names a rank, and a rank
blocked in one cannot look. So threads look, and end the process where its main thread is stuck.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from stacking_ds.distributed.lost_ranks import Fate, Missing, Seen, sentence, who_is_missing
from stacking_ds.distributed.rendezvous import connect
from stacking_ds.distributed.world import World
from stacking_ds.errors import EXIT_LOST_RANK, LostRankError

# ---- Time without this process's own pauses: SIGSTOP, a suspended job, a VM's stop, a
# debugger's.


class AwakeClock:
    """Seconds in which this process ran, as far as whoever calls `look` regularly can tell.

    Who was away itself has heard nothing of the others, which are not silent for that.
    """

    def __init__(self, longest_gap_seconds: float) -> None:
        """`longest_gap_seconds`: what is more between two looks is a pause, and does not count."""
        self._longest = longest_gap_seconds
        # one object, so that another thread never sees half of it
        self._last = (time.monotonic(), 0.0)

    def look(self) -> float:
        """Call it every now and then, from one thread; what `now` says."""
        self._last = (time.monotonic(), self.now())
        return self._last[1]

    def now(self) -> float:
        looked, seconds = self._last
        return seconds + min(time.monotonic() - looked, self._longest)


# ---- Does a thread get on? By the processor time that it, and processes started for it,
# have taken.


class Progress:
    """Counts the looks at which the work under way had got on; 0 while there is none.

    What is stuck, in a file system that hangs say, takes no processor time at all.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._seconds = 0.0
        self._count = 0
        self._others: set[int] = set()

    def look(self, thread: threading.Thread | None) -> int:
        if thread is None or not thread.is_alive():
            self._thread = None
            return 0
        try:
            children = psutil.Process().children(recursive=True)
            if thread is not self._thread:
                self._thread, self._count, self._seconds = thread, 1, 0.0
                # a loader's processes look up now and then, whatever this thread does
                self._others = {child.pid for child in children}
            started_for_it = [child for child in children if child.pid not in self._others]
            seconds = _processor_seconds(thread, started_for_it)
        except (OSError, psutil.Error):
            return max(1, self._count)
        if seconds > self._seconds:
            self._seconds = seconds
            self._count += 1
        return self._count


def _processor_seconds(thread: threading.Thread, processes: list[psutil.Process]) -> float:
    seconds = sum(
        own.user_time + own.system_time
        for own in psutil.Process().threads()
        if own.id == thread.native_id
    )
    for process in processes:
        times = process.cpu_times()
        seconds += times.user + times.system
    return float(seconds)


_LONGEST_INTERVAL_SECONDS = 2.0
_INTERVALS_OF_SILENCE = 6  # at least so many beats may be missed
_INTERVALS_OF_PAUSE = 2  # so late is no thread that is not kept from running
_INTERVALS_TO_GATHER = 4  # what others have to say when contact is lost
_INTERVALS_TO_DECIDE = _INTERVALS_TO_GATHER + 3
_SECONDS_TO_END = 15.0  # for a main thread that can still end by itself
_SECONDS_TO_TELL = 10.0  # the file system or the pipe may be what hangs

_VERDICT, _FATES = "watch/verdict", "watch/fates"


class Watch:
    """Watches over the ranks while it is entered; entering and leaving are collectives.

    Leaving by an error makes it known to the other ranks. One that tells of lost contact becomes a
    LostRankError which says who is missing, as far as rank 0 can find out.
    """

    def __init__(
        self,
        world: World,
        *,
        timeout_seconds: float,
        silence_seconds: float,
        on_lost: Callable[[str], None] = lambda verdict: None,
    ) -> None:
        """Args:
        timeout_seconds: how long it may be that no rank moves.
        silence_seconds: how long a rank may be silent.
        on_lost: told the verdict before the process is ended from here, its main thread being
            stuck; may be set later, once it is known what to tell.
        """
        self._world = world
        self._timeout, self._silence = timeout_seconds, silence_seconds
        self._interval = min(_LONGEST_INTERVAL_SECONDS, silence_seconds / _INTERVALS_OF_SILENCE)
        self.on_lost = on_lost
        self._clock = AwakeClock(_INTERVALS_OF_PAUSE * self._interval)
        self._progress = Progress()
        self._hosts: list[str] = []
        self._seen: list[Seen] = []
        self._leaving = threading.Event()
        self._decided = threading.Event()
        self._verdict, self._verdict_of_first = "", False
        self._first_beat, self._heard_of_first = b"", 0.0
        self._alarm: float | None = None
        self._warned = False
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------- the main thread

    def __enter__(self) -> "Watch":
        if self._world.size == 1:
            return self
        try:
            self._hosts = self._world.gather(socket.gethostname())
            store = self._connect()
            if self._world.is_first:
                store.set(_FATES, "\n")
            self._tell(store, 0)
            self._world.barrier()  # from now on every key is there
        except RuntimeError as error:
            if not is_lost_contact(error):
                raise
            raise LostRankError(_lost_contact(self._world, error)) from error
        self._clock = AwakeClock(_INTERVALS_OF_PAUSE * self._interval)
        self._heard_of_first = now = self._clock.now()
        self._seen = [Seen(heard=now, moved=now) for _ in self._hosts]
        for action, arguments in ((self._beat, (store,)), (self._judge, ())):
            thread = threading.Thread(target=action, args=arguments, name="watch", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._world.size == 1:
            return
        if error is None or is_raised_by_all(error):
            gone = self._leave_together()
            if gone is None or error is not None:
                return
            error = gone
        contact = is_lost_contact(error)
        self._confess(error, contact)
        if contact:
            raise self._lost(error) from error
        if isinstance(error, Exception) and self._world.is_first:
            self._let_others_read()
        self._leaving.set()

    def _leave_together(self) -> RuntimeError | None:
        """What a rank says that does not find the others at the end."""
        try:
            self._world.barrier()  # some have more to tidy up, and are watched while they do
            self._leaving.set()
            for thread in self._threads:
                thread.join()
            self._world.barrier()  # rank 0 takes the store with it
        except RuntimeError as error:
            return error
        return None

    def _lost(self, error: BaseException) -> LostRankError:
        if self._world.is_first:
            self._let_others_read()
        else:
            self._decided.wait(_INTERVALS_TO_DECIDE * self._interval)
        self._leaving.set()
        lost = LostRankError(self._verdict or _lost_contact(self._world, error))
        lost.said_elsewhere = bool(self._verdict) and not self._speaks
        return lost

    def _let_others_read(self) -> None:
        """The store with the verdict goes when rank 0 does."""
        if self._decided.wait(_INTERVALS_TO_DECIDE * self._interval):
            time.sleep(2 * self._interval)

    def _confess(self, error: BaseException, contact: bool) -> None:
        fate = Fate(
            self._world.rank, self._world.pulse.step, f"{type(error).__name__}: {error}", contact
        )
        self._alarm = self._clock.now()
        with suppress(RuntimeError):  # rank 0 is gone with the store
            self._connect().append(_FATES, json.dumps(fate.__dict__) + "\n")

    def _connect(self) -> Any:
        # its own connection: one that waits for an answer would hold up the others
        return connect(timedelta(seconds=self._silence))

    @property
    def _speaks(self) -> bool:
        """Is the verdict this rank's to say? Rank 0's own, else one rank's of each node."""
        if self._world.is_first or self._verdict_of_first:
            return self._world.is_first
        beside_first = socket.gethostname() == self._hosts[0]
        return self._world.local_rank == (1 if beside_first else 0)

    # ------------------------------------------------------------- the thread that talks

    def _beat(self, store: Any) -> None:
        count = 0
        try:
            # once it is decided nobody asks any more, and the store may go at any moment
            while not self._leaving.wait(self._interval) and not self._decided.is_set():
                count += 1
                self._tell(store, count)
                if self._world.is_first:
                    self._look(store)
                else:
                    self._listen(store)
        except RuntimeError:
            if not self._leaving.is_set():
                # under torchrun rank 0 itself may see this: the store is its agent's
                self._decide(self._first_is_gone("ended, or its launcher did"))

    def _tell(self, store: Any, count: int) -> None:
        pulse = self._world.pulse
        work = self._progress.look(pulse.work)
        store.set(_key(self._world.rank), f"{count} {pulse.moves} {work} {int(pulse.loading)}")

    def _look(self, store: Any) -> None:
        keys = [_key(rank) for rank in range(self._world.size)]
        *beats, fates = store.multi_get([*keys, _FATES])
        now = self._clock.now()
        for seen, beat in zip(self._seen, beats, strict=True):
            count, moves, work, loading = map(int, beat.split())
            seen.update(count, moves, work, now)
            seen.loading = bool(loading)
        for line in fates.decode().splitlines():
            if line:
                fate = Fate(**json.loads(line))
                self._seen[fate.rank].fate = fate
                self._alarm = self._alarm or now

    def _listen(self, store: Any) -> None:
        if store.check([_VERDICT]):
            self._verdict_of_first = True
            self._decide(store.get(_VERDICT).decode())
            return
        # the store answers also while rank 0 itself is stopped
        beat = store.get(_key(0))
        if beat != self._first_beat:
            self._first_beat, self._heard_of_first = beat, self._clock.now()

    # ------------------------------------------------------------- the thread that judges

    def _judge(self) -> None:
        while not self._leaving.wait(self._interval):
            now = self._clock.look()
            if not self._decided.is_set():
                if self._world.is_first:
                    self._judge_all(now)
                elif now - self._heard_of_first > self._silence:
                    self._decide(self._first_is_gone("does not answer"))
            if self._decided.is_set():
                self._end()
                return

    def _judge_all(self, now: float) -> None:
        silence = self._silence
        if self._alarm is not None:
            silence = min(silence, (_INTERVALS_TO_GATHER - 1) * self._interval)
        missing = who_is_missing(self._seen, now, silence=silence, timeout=self._timeout)
        if missing is None and self._alarm is not None:
            if now - self._alarm < _INTERVALS_TO_GATHER * self._interval:
                return
            missing = who_is_missing(self._seen, now, silence=silence, timeout=0.0)
        if missing is not None:
            self._decide(self._sentence(missing, now))
        elif not self._warned:
            behind = who_is_missing(self._seen, now, silence=silence, timeout=self._timeout / 2)
            if behind is not None:
                self._warned = True
                said = self._sentence(behind, now)
                _say(f"{said}; waiting for {self._timeout / 2:.0f} s more")

    def _sentence(self, missing: Missing, now: float) -> str:
        return sentence(missing, self._seen, self._hosts, now, self._world.pulse.step)

    def _first_is_gone(self, how: str) -> str:
        step = self._world.pulse.step
        return f"rank 0 on {self._hosts[0]} {how}; the last step here was {step}"

    def _decide(self, verdict: str) -> None:
        if self._decided.is_set():
            return
        self._verdict = verdict
        if self._world.is_first:
            with suppress(RuntimeError):  # where torchrun's agent has the store, and is gone
                self._connect().set(_VERDICT, verdict)
        self._decided.set()

    def _end(self) -> None:
        """The main thread leaves if it can; where it is stuck, so that it cannot, this does."""
        if self._leaving.wait(_SECONDS_TO_END if self._alarm else 2 * self._interval):
            return
        last = threading.Timer(_SECONDS_TO_TELL, os._exit, [EXIT_LOST_RANK])
        last.daemon = True
        last.start()
        if self._speaks:
            _say(f"stacking-ds: error: {self._verdict}")
        named = f"rank {self._world.rank} on " in self._verdict
        if named or (self._world.is_first and "none is behind" in self._verdict):
            _say(_main_thread_stack(self._world.rank))
        self.on_lost(self._verdict)
        os._exit(EXIT_LOST_RANK)


def _key(rank: int) -> str:
    return f"watch/beat/{rank}"


def _say(message: str) -> None:
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # the launcher that read it is gone
        return


def _main_thread_stack(rank: int) -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)[-12:]) if frame else ""
    return f"[rank {rank}] its main thread is at:\n{stack}"


def is_raised_by_all(error: BaseException) -> bool:
    """Does every rank raise it, so that none is missing for it?"""
    return bool(getattr(error, "on_all_ranks", False))


# what gloo and NCCL say when the other end is gone or late
_SIGNS_OF_LOST_CONTACT = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out waiting",
    "connection refused",
    "no route to host",
    "remote process exited",
    "connectfullmesh",
)


def is_lost_contact(error: BaseException) -> bool:
    """Does it say no more than that another rank does not answer?"""
    if isinstance(error, LostRankError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_LOST_CONTACT)


def _lost_contact(world: World, error: BaseException) -> str:
    return (
        f"rank {world.rank} on {socket.gethostname()} lost contact with other ranks after step "
        f"{world.pulse.step} ({str(error).splitlines()[0]})"
    )

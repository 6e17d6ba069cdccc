"""Heartbeat and failure detector: the job ends on all ranks when one dies, hangs or is cut off.

    every rank    tells each second or two: alive, its moves, its work    ──┐  a store on rank 0's
    rank 0        looks at all: one is silent, or nobody moves: verdict   ──┤  node, beside the
    the others    read the verdict; rank 0 does not answer: their own     ──┘  process group

Collectives cannot do this: over NCCL a dead peer is not noticed, no error names a rank, and a rank
blocked in one cannot look. So threads look, and end the process where its main thread is stuck.
"""

import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from stacking_ds.console import say_on_stderr
from stacking_ds.distributed import lost_ranks
from stacking_ds.distributed.process_group import connect, is_lost_contact
from stacking_ds.distributed.world import World
from stacking_ds.errors import (
    EXIT_LOST_RANK,
    AgreedError,
    LostRankError,
    LostRankToldError,
    UserError,
)
from stacking_ds.process.exit import end_now

_LONGEST_INTERVAL_SECONDS = 2.0
_INTERVALS_OF_SILENCE = 6  # at least so many beats may be missed
_INTERVALS_OF_PAUSE = 2  # so late is no thread that is not kept from running
_INTERVALS_TO_GATHER = 4  # what others have to say when contact is lost
_INTERVALS_TO_DECIDE = _INTERVALS_TO_GATHER + 3
_SECONDS_TO_END = 15.0  # for a main thread that can still end by itself
_SECONDS_TO_TELL = 10.0  # the file system or the pipe may be what hangs

# names that earlier versions understand: a node with one of those is to be told of as such
_BEAT, _VERDICT, _FAILURES = "watch/beat/", "watch/verdict", "watch/fates"


class FailureDetector:
    """Detects lost ranks while it is entered; entering and leaving are collectives.

    Leaving by an error makes it known to the other ranks. One that tells of lost contact becomes a
    LostRankError which says who is missing, as far as rank 0 can find out.
    """

    def __init__(self, world: World, *, timeout_seconds: float, silence_seconds: float) -> None:
        """`timeout_seconds`: for how long it may be that no rank moves; `silence_seconds`: for how
        long a rank may be silent."""
        self.record: Callable[[str], None] = lambda verdict: None
        """Called with the verdict before this rank ends by it; it may fail by a UserError."""
        self._world = world
        self._timeout, self._silence = timeout_seconds, silence_seconds
        self._interval = min(_LONGEST_INTERVAL_SECONDS, silence_seconds / _INTERVALS_OF_SILENCE)
        self._progress = lost_ranks.Progress()
        self._hosts: list[str] = []
        self._seen: list[lost_ranks.RankView] = []
        self._leaving = threading.Event()
        self._decided = threading.Event()
        self._verdict, self._verdict_of_first = "", False
        self._first_beat, self._heard_of_first = b"", 0.0
        self._alarm: float | None = None
        self._warned = False
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------- the main thread

    def __enter__(self) -> "FailureDetector":
        if self._world.size == 1:
            return self
        try:
            self._hosts = self._world.gather(socket.gethostname())
            store = self._connect()
            if self._world.is_first:
                store.set(_FAILURES, "\n")
            self._tell(store, 0)
            self._world.barrier()  # from now on every key is there
        except RuntimeError as error:
            if not is_lost_contact(error):
                raise
            raise LostRankError(_lost_contact(self._world, error)) from error
        self._clock = lost_ranks.AwakeClock(_INTERVALS_OF_PAUSE * self._interval)
        self._heard_of_first = now = self._clock.now()
        self._seen = [lost_ranks.RankView(heard=now, moved=now) for _ in self._hosts]
        for target in (partial(self._beat, store), self._judge):
            self._threads.append(threading.Thread(target=target, name="heartbeat", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._world.size == 1:
            return
        if error is None or isinstance(error, AgreedError):
            try:
                self._world.barrier()  # some have more to tidy up, and are watched while they do
                self._leaving.set()
                for thread in self._threads:
                    thread.join()
                self._world.barrier()  # rank 0 takes the store with it
                return
            except RuntimeError as gone:
                if error is not None:
                    return
                error = gone
        contact = is_lost_contact(error)
        self._report(error, contact)
        if self._world.is_first and isinstance(error, Exception):
            # the store goes when this rank does, and the others are to read the verdict in it
            if self._decided.wait(_INTERVALS_TO_DECIDE * self._interval):
                time.sleep(2 * self._interval)
        elif contact:
            self._decided.wait(_INTERVALS_TO_DECIDE * self._interval)
        if not contact:
            self._leaving.set()
            return
        is_told = self._verdict and not self._speaks
        verdict = self._verdict or _lost_contact(self._world, error)
        self._record(verdict)
        self._leaving.set()
        raise (LostRankToldError if is_told else LostRankError)(verdict) from error

    def _record(self, verdict: str) -> None:
        with suppress(OSError, UserError):
            self.record(verdict)

    def _report(self, error: BaseException, contact: bool) -> None:
        why, step = f"{type(error).__name__}: {error}", self._world.pulse.step
        failure = lost_ranks.RankFailure(self._world.rank, step, why, contact)
        self._alarm = self._clock.now()
        with suppress(RuntimeError):  # rank 0 is gone with the store
            self._connect().append(_FAILURES, json.dumps(asdict(failure)) + "\n")

    def _connect(self) -> Any:
        # its own connection: one that waits for an answer would hold up the others
        return connect(timedelta(seconds=self._silence))

    @property
    def _speaks(self) -> bool:
        """True where this rank says the verdict: rank 0 its own, else one rank of each node."""
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
                elif store.check([_VERDICT]):
                    self._verdict_of_first = True
                    self._decide(store.get(_VERDICT).decode())
                # the store answers also while rank 0 itself is stopped
                elif (beat := store.get(f"{_BEAT}0")) != self._first_beat:
                    self._first_beat, self._heard_of_first = beat, self._clock.now()
        except RuntimeError:
            if not self._leaving.is_set():
                # under torchrun rank 0 itself may see this: the store is its agent's
                self._decide(self._first_is_gone("ended, or its launcher did"))

    def _tell(self, store: Any, count: int) -> None:
        pulse, rank = self._world.pulse, self._world.rank
        work = self._progress.look(pulse.work)
        store.set(f"{_BEAT}{rank}", f"{count} {pulse.moves} {work} {int(pulse.loading)}")

    def _look(self, store: Any) -> None:
        keys = [f"{_BEAT}{rank}" for rank in range(self._world.size)]
        *beats, failures = store.multi_get([*keys, _FAILURES])
        now = self._clock.now()
        for seen, beat in zip(self._seen, beats, strict=True):
            seen.update(now, *map(int, beat.split()))
        for line in filter(None, failures.decode().splitlines()):
            failure = lost_ranks.RankFailure(**json.loads(line))
            self._seen[failure.rank].failure = failure
            self._alarm = self._alarm or now

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

        def missing_by(timeout: float) -> str | None:
            missing = lost_ranks.find_missing(self._seen, now, silence=silence, timeout=timeout)
            step = self._world.pulse.step
            return (
                lost_ranks.sentence(missing, self._seen, self._hosts, now, step)
                if missing
                else None
            )

        verdict = missing_by(self._timeout)
        if verdict is None and self._alarm is not None:
            if now - self._alarm < _INTERVALS_TO_GATHER * self._interval:
                return
            verdict = missing_by(0.0)
        if verdict is not None:
            self._decide(verdict)
        elif not self._warned and (behind := missing_by(self._timeout / 2)) is not None:
            self._warned = True
            say_on_stderr(f"{behind}; waiting for {self._timeout / 2:.0f} s more")

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
        last = threading.Timer(_SECONDS_TO_TELL, end_now, [EXIT_LOST_RANK])
        last.daemon = True
        last.start()
        if self._speaks:
            say_on_stderr(f"stacking-ds: error: {self._verdict}")
        named = f"rank {self._world.rank} on " in self._verdict
        if named or (self._world.is_first and "none is behind" in self._verdict):
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(frame)[-12:]) if frame else ""
            say_on_stderr(f"[rank {self._world.rank}] its main thread is at:\n{stack}")
        self._record(self._verdict)
        end_now(EXIT_LOST_RANK)


def _lost_contact(world: World, error: BaseException) -> str:
    return (
        f"rank {world.rank} on {socket.gethostname()} lost contact with other ranks after step "
        f"{world.pulse.step} ({str(error).splitlines()[0]})"
    )

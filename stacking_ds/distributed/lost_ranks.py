"""Lost ranks: which are missing, by what rank 0 has seen of them, and how to say it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from stacking_ds.console import first_of

_NAMED = 3
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class RankFailure:
    """A rank's own report that it ends by an error."""

    rank: int
    step: int
    why: str
    contact: bool  # true where it only lost contact with others, which is no fault of its own


@dataclass
class RankView:
    """A rank as rank 0 sees it; times are rank 0's, without its own pauses."""

    heard: float  # when it was last heard of
    moved: float  # when it was last seen to have moved
    beats: int = 0
    moves: int = 0
    work: int = 0  # grows while it works by itself; 0 while it does not
    loading: bool = False  # whether it waits for a batch of its own loader
    failure: RankFailure | None = None

    def update(self, now: float, beats: int, moves: int, work: int, loading: int) -> None:
        if beats != self.beats:
            self.heard = now
        if (moves, work) != (self.moves, self.work):
            self.moved = now
        self.beats, self.moves, self.work, self.loading = beats, moves, work, bool(loading)


@dataclass(frozen=True)
class Missing:
    """`how`: "failed", "silent", "loading", "stuck", or "together" where nobody is behind the
    others."""

    how: str
    ranks: tuple[int, ...]


def find_missing(
    ranks: Sequence[RankView], now: float, *, silence: float, timeout: float
) -> Missing | None:
    """The ranks that keep the others from going on; None while all is well.

    Who failed by itself comes before who is silent, who is silent before who waits for a batch or
    is stuck in work that the others wait for, or behind them.
    """

    def those(are_so: Callable[[RankView], object]) -> tuple[int, ...]:
        return tuple(rank for rank, seen in enumerate(ranks) if are_so(seen))

    if failed := those(lambda seen: seen.failure and not seen.failure.contact):
        return Missing("failed", failed)
    if silent := those(lambda seen: not seen.failure and now - seen.heard > silence):
        return Missing("silent", silent)
    if now - max(seen.moved for seen in ranks) <= timeout:
        return None
    if loading := those(lambda seen: seen.loading and timeout):
        return Missing("loading", loading)
    least = min(seen.moves for seen in ranks)
    # when contact is lost, who is at work has not noticed yet
    behind = those(lambda seen: seen.work and timeout) or those(lambda seen: seen.moves == least)
    return Missing("together" if len(behind) == len(ranks) else "stuck", behind)


def sentence(
    missing: Missing, ranks: Sequence[RankView], hosts: Sequence[str], now: float, step: int
) -> str:
    """Ranks, nodes and the last step, for people. `step` is what rank 0 has completed: all ranks
    have, and what was last heard of a rank may be some steps old."""
    first = ranks[missing.ranks[0]]
    who = first_of([f"rank {rank} on {hosts[rank]}" for rank in missing.ranks], _NAMED)
    verb = "is" if len(missing.ranks) == 1 else "are"
    if missing.how == "failed":
        assert first.failure is not None
        why = " ".join(first.failure.why.split())[:_SHOWN_CHARACTERS]
        return f"{who} failed after step {first.failure.step}: {why}"
    heard, after = f"{now - first.heard:.0f} s ago", f"after step {step}"
    still = f"{now - max(seen.moved for seen in ranks):.0f} s"
    return {
        "silent": f"{who} {verb} gone or cut off: last heard of {heard}, {after}",
        "loading": f"{who} {verb} without a batch {after}: the loader has handed over none for "
        f"{still}; its processes are stopped, or hang in the file system of the token shards",
        "stuck": f"{who} {verb} stuck {after} while the others wait: no rank has moved for {still}",
        "together": f"no rank has moved for {still} {after}, and none is behind: the network "
        f"between them, or a collective of the engine, is stuck",
    }[missing.how]


# --------------------------------------------------------------- time and work


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
            own = [one for one in psutil.Process().threads() if one.id == thread.native_id]
            times = [child.cpu_times() for child in children if child.pid not in self._others]
        except (OSError, psutil.Error):
            return max(1, self._count)
        seconds = sum(one.user_time + one.system_time for one in own)
        seconds += sum(one.user + one.system for one in times)  # of those started for it
        if seconds > self._seconds:
            self._seconds = seconds
            self._count += 1
        return self._count

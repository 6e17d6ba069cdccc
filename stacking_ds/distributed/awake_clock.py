"""Time without this process's own pauses: SIGSTOP, a suspended job, a VM's stop, a debugger's."""

import time

__all__ = ["AwakeClock"]


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

"""Notices an attempt of which a part has ended, while the rest would wait for ever.

A rank that is stopped, or whose node does not answer, cannot end itself, and the launcher on its
node waits for it.
"""

import time
from collections.abc import Callable

from stacking_ds.launch.census import Census
from stacking_ds.launch.request import Patience

__all__ = ["PartEnded"]


class PartEnded:
    """To be asked again and again while the runner runs."""

    def __init__(
        self, census: Census, run_has_ended: Callable[[], bool], patience: Patience
    ) -> None:
        """`run_has_ended`: whether the run's own records say so."""
        self._census, self._run_has_ended, self._patience = census, run_has_ended, patience
        now = time.monotonic()
        self._look_at, self._count_at = now + patience.look_seconds, now + patience.count_seconds
        self._ended_at: float | None = None
        self._seen: dict[str, set[int]] = {}
        self._gone_since: dict[int, float] = {}

    def reason(self) -> str | None:
        """Why the rest is not to be waited for any longer, for people; None while it is."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._patience.look_seconds
            if self._ended_at is None and self._run_has_ended():
                self._ended_at = now
        if self._ended_at is not None and now - self._ended_at > self._patience.end_seconds:
            return "the run has ended, and a part of its processes has not"
        if now < self._count_at:
            return None
        self._count_at = now + self._patience.count_seconds
        gone = sorted(self._gone_for_long(now))
        if not gone:
            return None
        ranks = len(set().union(*self._seen.values()))
        return f"{len(gone)} of {ranks} ranks have ended, rank {gone[0]} among them"

    def _gone_for_long(self, now: float) -> list[int]:
        """The ranks that their host, when it was asked twice, said it has no longer."""
        # by host: one that does not answer says nothing about its ranks
        gone: set[int] = set()
        for host, found in self._census.take().found.items():
            seen = self._seen.setdefault(host, set())
            gone |= seen - set(found.ranks)
            seen.update(found.ranks)
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in gone}
        long = self._patience.count_seconds
        return [rank for rank, since in self._gone_since.items() if now - since >= long]

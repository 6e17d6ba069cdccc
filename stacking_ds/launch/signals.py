"""Remembers that the launcher was asked to stop, and how urgently."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from stacking_ds.process.stop_signals import STOP_SIGNALS

__all__ = ["StopSignals"]

_GLANCE_SECONDS = 0.1


class StopSignals:
    """SIGINT, SIGTERM, SIGUSR1 and, without nohup, SIGHUP ask to stop; a second SIGINT at once.

    For the main thread, which has to look: `asked_by` is None until asked, `at_once` False.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        assert threading.current_thread() is threading.main_thread()
        for number in STOP_SIGNALS:
            # nohup is meant to outlive the terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by is signal.SIGINT:
            self.at_once = True
        if self.asked_by is not signal.SIGINT:
            self.asked_by = signal.Signals(number)

    def wait(self, seconds: float) -> bool:
        """Wait that long, or until asked; True if asked."""
        before, deadline = (self.asked_by, self.at_once), time.monotonic() + seconds
        while (self.asked_by, self.at_once) == before and time.monotonic() < deadline:
            time.sleep(min(_GLANCE_SECONDS, seconds))
        return self.asked_by is not None

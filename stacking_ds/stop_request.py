"""Signals that ask a run to stop: remembered, until all ranks ask at the same step.

SIGTERM   a launcher, a scheduler or a person; SLURM at a preemption or a requeue
SIGUSR1   SLURM, some time before the time limit (`sbatch --signal=USR1@180`)
SIGINT    Ctrl-C; a second one interrupts at once
"""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """Holds signals while it is entered; `made` says whether one came."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def made(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> "StopRequest":
        # before a run can save anything, the others may end it; this one would end it by default
        self._hold([signal.SIGUSR1])
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def hold_all(self) -> None:
        """From now on a stop leaves a checkpoint behind, so every signal waits for it."""
        self._hold([signal.SIGINT, signal.SIGTERM])

    def _hold(self, signals: Sequence[signal.Signals]) -> None:
        for number in signals:
            previous = signal.signal(number, self._remember)
            self._previous.setdefault(number, previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

"""Signals that ask a run to stop: acknowledged at once, remembered, and taken up by all ranks at
the same step.

SIGTERM   a launcher, a scheduler or a person; SLURM at a preemption or a requeue
SIGUSR1   SLURM, some time before the time limit (`sbatch --signal=USR1@180`)
SIGHUP    the terminal was closed; under nohup it is ignored, and stays so
SIGINT    Ctrl-C; a second one, or one where there is nothing to save yet, ends at once
"""

import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from stacking_ds.errors import EXIT_INTERRUPTED
from stacking_ds.process.exit import end_now
from stacking_ds.process.launchers import is_first_of_node, marked

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that launchers, schedulers and terminals send to every process of a run."""

_SAME_PRESS_SECONDS = 1.0  # launchers pass a Ctrl-C on as SIGTERM, which may come first
_SECONDS_TO_END = 10.0  # for an interrupt that the main thread does not see, or takes too long over
_CLOSED = 0  # no signal has this number


class StopRequest:
    """Holds signals while it is entered, in the main thread; `made` says whether one came.

    Two see each signal. Its handler remembers it, and raises KeyboardInterrupt where the run is to
    end at once. It runs in the main thread, which may be at work for minutes without seeing it,
    and where an import or a foreign library can swallow the exception. So a thread, woken by the
    operating system, says that the signal has come, and ends the process where the main thread
    has not done so in time.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self._saves = False
        self._handled = _Asked()
        self._interrupted = False

    @property
    def made(self) -> bool:
        return self._handled.by is not None

    def __enter__(self) -> "StopRequest":
        # before a run can save anything, the others may end it; this one would end it by default
        self._hold([signal.SIGUSR1, signal.SIGINT])
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        _forget_in_children()
        self._listener = threading.Thread(target=self._listen, name="stop request", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write_end, bytes([_CLOSED]))
        self._listener.join()
        self._previous.clear()
        os.close(self._read_end)
        os.close(self._write_end)

    def hold_all(self) -> None:
        """From now on a stop leaves a checkpoint behind, so every signal waits for it; raises as
        `raise_if_interrupted`."""
        self.raise_if_interrupted()
        self._saves = True
        self._hold(STOP_SIGNALS)

    def raise_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt if the run is to end at once, and work that is done by now may
        have swallowed that."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _hold(self, signals: Sequence[signal.Signals]) -> None:
        for number in signals:
            # a shell's `&` and nohup have these two ignored, and that is a person's choice
            chosen = number in (signal.SIGINT, signal.SIGHUP)
            if not chosen or signal.getsignal(number) != signal.SIG_IGN:
                self._previous.setdefault(number, signal.signal(number, self._remember))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._handled.add(number, self._saves) == "end":
            self._interrupted = True
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """The thread."""
        heard = _Asked()
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read_end], [], [], left)[0]:
                _end()
            number = os.read(self._read_end, 1)[0]
            if number == _CLOSED:
                return
            if number not in self._previous:
                continue  # somebody else's
            what = heard.add(number, self._saves)
            if what == "stop":
                then = "finishes the step and saves" if self._saves else "stops before its first"
                more = "one more" if number == signal.SIGINT else "a"
                _say(
                    f"asked to stop ({signal.Signals(number).name}): the run {then}; {more} Ctrl-C "
                    f"ends it at once, unsaved"
                )
            elif what == "end" and deadline is None:
                deadline = time.monotonic() + _SECONDS_TO_END
            elif what == "end":
                _end()


@dataclass
class _Asked:
    """Adds up what the signals that have come ask for."""

    by: signal.Signals | None = None
    since: float = 0.0

    def add(self, number: int, saves: bool) -> Literal["stop", "end"] | None:
        """Return what this signal asks for beyond those before it: to stop soon, to end at once.
        `saves`: whether a stop leaves a checkpoint behind by now."""
        now, first = time.monotonic(), self.by is None
        again = self.by is signal.SIGINT or now - self.since > _SAME_PRESS_SECONDS
        if first:
            self.by, self.since = signal.Signals(number), now
        if number == signal.SIGINT and (not saves or (again and not first)):
            return "end"
        return "stop" if first else None


def _say(message: str) -> None:
    if is_first_of_node():
        line = marked(f"stacking-ds: {message}\n")
        with suppress(OSError, ValueError):  # closed, or the terminal is gone
            # not by way of a buffer that the main thread may hold; below its progress bars
            os.write(2, ("\n" + line if sys.stderr.isatty() else line).encode())


def _end() -> None:
    _say("interrupted")
    end_now(EXIT_INTERRUPTED)


@functools.cache
def _forget_in_children() -> None:
    """A process that is forked must not tell this one of the signals that it gets itself."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

"""Reads every byte of a run's data again while it trains, and finds damage since its start."""

import logging
import os
import threading
from contextlib import suppress
from itertools import chain

from stacking_ds.data.run_data import RunData
from stacking_ds.errors import DataError, UnreadableDataError

_SECONDS_TO_END = 10.0  # for the file that is being read
_SECONDS_BETWEEN_TRIES = 300.0  # a file system that was away may be back

logger = logging.getLogger("stacking_ds")


class Rereading:
    """A thread that compares shards and rows with their sha256, while it is entered."""

    def __init__(self, data: RunData, *, enabled: bool) -> None:
        """Without `enabled` it does nothing, and finds nothing."""
        self._data = data
        self._failure: Exception | None = None
        self._leaving = False
        self._ending = threading.Event()
        self.thread: threading.Thread | None = None
        if enabled:
            self.thread = threading.Thread(target=self._read, name="rereading", daemon=True)

    @property
    def failed(self) -> bool:
        """True if damage has been found so far."""
        return self._failure is not None

    def require_whole(self, since_step: int) -> None:
        """Raises DataError for damage found so far; the attempt has trained since that step."""
        if self._failure is not None:
            raise DataError(
                f"{self._failure}; what was trained after step {since_step}, where this attempt "
                f"began, may have seen the damage: go on from a checkpoint up to that step"
            ) from self._failure

    def goes_on(self, seconds: float) -> bool:
        """True while there is something to read, after `seconds` at most. For the end of a run:
        what cannot be read is tried only once more from now on."""
        if self.thread is None:
            return False
        self._ending.set()
        self.thread.join(seconds)
        return self.thread.is_alive()

    def __enter__(self) -> "Rereading":
        if self.thread is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        self._ending.set()
        if self.thread is not None:
            self.thread.join(_SECONDS_TO_END)

    def _read(self) -> None:
        with suppress(OSError):  # a thread of Linux has its own; training comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        told = False
        while True:
            last = self._ending.is_set()
            try:
                rows = self._data.train.values()
                for _ in chain(self._data.shards.verifying(), *(one.verifying() for one in rows)):
                    if self._leaving:
                        return
                return
            except UnreadableDataError as error:  # which is no damage, and may pass
                if last:
                    _say(f"the data were not read again to their end: {error}")
                    return
                if not told:
                    _say(f"the data cannot be read again yet, and training goes on: {error}")
                told = True
                self._ending.wait(_SECONDS_BETWEEN_TRIES)
            except Exception as error:  # noqa: BLE001 - the main thread raises it
                self._failure = error
                return


def _say(message: str) -> None:
    with suppress(Exception):  # at the interpreter's end there may be nobody to say it
        logger.warning(message)

"""Does a thread get on? By the processor time that it, and processes started for it, have taken."""

import threading
import time

import psutil

__all__ = ["Progress"]


class Progress:
    """Counts the looks at which the work under way had got on; 0 while there is none.

    What is stuck, in a file system that hangs say, takes no processor time at all.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._seconds = 0.0
        self._count = 0

    def look(self, thread: threading.Thread | None) -> int:
        if thread is None or not thread.is_alive():
            self._thread = None
            return 0
        seconds = _processor_seconds(thread)
        if thread is not self._thread:
            self._thread, self._count = thread, 1
        elif seconds > self._seconds:
            self._count += 1
        self._seconds = seconds
        return self._count


def _processor_seconds(thread: threading.Thread) -> float:
    try:
        own = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except (OSError, OverflowError):  # it has just ended
        return 0.0
    others = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        others += times.user + times.system
    return own + others

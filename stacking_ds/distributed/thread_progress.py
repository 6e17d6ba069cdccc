"""Does a thread get on? By the processor time that it, and processes started for it, have taken."""

import threading

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

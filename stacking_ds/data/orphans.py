"""Worker processes that end when the process that started them does."""

import multiprocessing
import os
import threading

__all__ = ["end_with_parent"]


def end_with_parent() -> None:
    """Call it in a process of `multiprocessing`'s. Nobody else ends a worker that hears no signals;
    it would wait for work, or for who takes it, for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()

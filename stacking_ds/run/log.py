"""A run's log on rank 0: to the console at once, and to `train.log` from the first line on, which
is said before that file may be opened."""

import logging
import sys
from typing import Any, TextIO

logger = logging.getLogger("stacking_ds")


class RunLog:
    """Takes what the package logs while it is entered, or until it is closed. Where a start is
    refused, the console has shown sentences alone."""

    def __enter__(self) -> "RunLog":
        logger.setLevel(logging.INFO)
        logger.propagate = False
        self._console = _Console(sys.stderr)
        self._console.setFormatter(logging.Formatter("%(message)s"))
        self._console.setLevel(logging.WARNING)
        self._held = _Held()
        self._handlers: list[logging.Handler] = [self._console, self._held]
        for handler in self._handlers:
            logger.addHandler(handler)
        return self

    def write_to(self, file: Any) -> None:
        """Write what was said so far, and all that follows, to `file`, which has `write`."""
        to_file = logging.StreamHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.removeHandler(self._held)
        self._handlers.append(to_file)
        logger.addHandler(to_file)
        # on a terminal the bars show progress already; there only the sentences are printed
        shows_lines = not sys.stderr.isatty()
        for record in self._held.records:
            to_file.handle(record)
            if shows_lines and record.levelno < logging.WARNING:
                self._console.handle(record)
        if shows_lines:
            self._console.setLevel(logging.INFO)
        self._held.records.clear()

    def close(self) -> None:
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Held(logging.Handler):
    """Keeps the records until there is a file for them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Console(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        # its reader is gone, or its disk full: a traceback for every line helps nobody
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

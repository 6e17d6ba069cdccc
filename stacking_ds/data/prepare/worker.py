"""One worker process: `python -m stacking_ds.data.prepare.worker`, started by `workers`.

It reads a job and then the numbers of units from its standard input, a line each, and answers in
lines of JSON. When that input ends, since the parent is done or was killed, so does the worker, at
once: everything on disk is whole at any time. It is a program of its own, and not
`multiprocessing`, so that it loads neither the caller's main module nor torch.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

import pyarrow as pa

from stacking_ds.data.prepare.session import Job, Session
from stacking_ds.errors import UserError

__all__ = ["main"]


def main() -> None:
    """Works until standard input ends."""
    # Whoever signals all processes of a job signals the parent too, which decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Other libraries print; only answers may go where the parent reads.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    pa.set_cpu_count(1)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    try:
        session = Session(Job.model_validate_json(lines.get()))
        while True:
            _do(session, int(lines.get()), answers)
    except UserError as error:
        _answer(answers, error=str(error))
    except Exception as error:  # noqa: BLE001  # the parent says what it was
        traceback.print_exc()
        _answer(answers, crash=f"{type(error).__name__}: {error}")
    signal.pause()


def _listen(lines: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _do(session: Session, number: int, answers: TextIO) -> None:
    def report(documents: int, source_bytes: int) -> None:
        _answer(answers, documents=documents, source_bytes=source_bytes)

    session.do(number, report)
    _answer(answers, done=number)


def _answer(answers: TextIO, **content: Any) -> None:
    answers.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

"""One worker process: `python -m stacking_ds.data.prepare.pool`, started by `workers`.

It reads a job and then the numbers of units from its standard input, a line each, and answers in
lines of JSON. When that input ends, since the parent is done or was killed, so does the worker, at
once: everything on disk is whole at any time. It is a program of its own, and not
`multiprocessing`, so that it loads neither the caller's main module nor torch.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from stacking_ds.data.prepare.folder import UnfinishedFolder
from stacking_ds.data.prepare.session import Job, Session
from stacking_ds.data.shard_writer import remove_unfinished
from stacking_ds.errors import DataError, UserError
from stacking_ds.process.exit import end_now

# ---- Several processes that do units, and what becomes of them.


_Event = tuple[int, dict[str, Any]]


def do_in_workers(
    units: Sequence[int], job: Job, count: int, report: Callable[[int, int, int], None]
) -> None:
    """Does `units` in `count` processes, each unit in one. `report` is called with a unit, the
    documents and the bytes of the source that were read for it.

    Raises DataError for what a worker raises, and when a worker is killed. Whatever happens, no
    worker is left.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for unit in units:
        todo.put(unit)
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    processes = [_start() for _ in range(min(count, len(units)))]
    threads = [
        threading.Thread(target=_serve, args=(process, job, todo, events), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        left = len(units)
        while left:
            unit, answer = events.get()
            if "documents" in answer:
                report(unit, answer["documents"], answer["source_bytes"])
            elif "done" in answer:
                left -= 1
            else:
                raise _failure(unit, answer)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        for process in processes:
            _close(process)
            remove_unfinished(UnfinishedFolder(Path(job.out_dir)).temporary, process.pid)


def _start() -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        # -P: what lies in the user's folder is no module of ours
        [sys.executable, "-P", "-m", "stacking_ds.data.prepare.pool"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        process_group=0,  # Ctrl-C is the parent's to answer
    )


def _close(process: "subprocess.Popen[str]") -> None:
    for stream in (process.stdin, process.stdout):
        # what was not read by a worker that is gone
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _serve(
    process: "subprocess.Popen[str]",
    job: Job,
    todo: "queue.SimpleQueue[int]",
    events: "queue.SimpleQueue[_Event]",
) -> None:
    """Gives one worker units until there are none, and passes its answers on."""
    assert process.stdin is not None
    assert process.stdout is not None
    unit = -1
    try:
        process.stdin.write(job.model_dump_json() + "\n")
        while True:
            unit = todo.get_nowait()
            process.stdin.write(f"{unit}\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                events.put((unit, answer))
                if "done" in answer:
                    break
            else:
                break
    except queue.Empty:
        return
    except (OSError, ValueError):
        pass  # it died; so its exit status says
    events.put((unit, {"exit": process.wait()}))


def _failure(unit: int, answer: dict[str, Any]) -> Exception:
    if "error" in answer:
        return DataError(answer["error"])
    if "crash" in answer:
        return RuntimeError(f"a worker failed in unit {unit}: {answer['crash']}")
    status = answer["exit"]
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited ({status})"
    reason = ", as when memory runs out" if status == -signal.SIGKILL else ""
    remedy = ", with fewer --workers if it was memory" if reason else ""
    doing = f"did unit {unit}" if unit >= 0 else "started"
    return DataError(
        f"a worker {how}{reason}, while it {doing}; what is finished is kept: run the same "
        f"command again{remedy}"
    )


# ---- One worker process: `python -m stacking_ds.data.prepare.pool`, started by
# `workers`.


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
    end_now(0)


def _do(session: Session, number: int, answers: TextIO) -> None:
    def report(documents: int, source_bytes: int) -> None:
        _answer(answers, documents=documents, source_bytes=source_bytes)

    session.do(number, report)
    _answer(answers, done=number)


def _answer(answers: TextIO, **content: Any) -> None:
    answers.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

"""Sweeps one host: finds, asks to stop or kills all processes that a launch has started.

Every process of a launch carries its marker in the environment. `python -m
stacking_ds.launch.sweep MARKER` prints how many there are, and which ranks, as JSON.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import psutil

from stacking_ds.process.launchers import HYDRA_RANK, OPEN_MPI_RANK

MARKER_VARIABLE = "STACKING_DS_LAUNCH"

Action = Literal["count", "stop-ranks", "stop", "kill"]
_RANKS = ("RANK", OPEN_MPI_RANK, HYDRA_RANK)
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Found:
    """The marked processes of a host, and the ranks among them."""

    processes: int
    ranks: tuple[int, ...]


def sweep(marker: str, action: Action = "count") -> Found:
    """Find the processes with `marker`, and do what is asked.

    "count" does nothing, "stop-ranks" sends SIGTERM to ranks (and the loaders they started),
    "stop" to all, and "kill" ends all with SIGKILL, waiting for them; what it counts was found
    first.
    """
    found = list(_marked(marker))
    if action == "kill":
        # until none is left: one may start another while this one looks
        deadline, left = time.monotonic() + _PATIENCE_SECONDS, found
        while left and time.monotonic() < deadline:
            for process, _ in left:
                _send(process, signal.SIGKILL)
            time.sleep(0.05)  # psutil's waiting would take a child's exit code from who started it
            left = list(_marked(marker))
    elif action != "count":
        for process, rank in found:
            if action == "stop" or rank is not None:
                _send(process, signal.SIGTERM)
    return Found(len(found), tuple(sorted({rank for _, rank in found if rank is not None})))


def _marked(marker: str) -> Iterator[tuple[psutil.Process, int | None]]:
    """The processes of this user that carry the marker, but not the one that asks and those that
    started it; each with its rank, if it is one."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue  # it has just ended, or is somebody else's
        if environment.get(MARKER_VARIABLE) == marker and process.pid not in spared:
            ranks = [environment[name] for name in _RANKS if name in environment]
            yield process, int(ranks[0]) if ranks and ranks[0].isdigit() else None


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error, OSError):  # it has just ended
        process.send_signal(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep this host once; 0 always, since what was found is in what is printed."""
    parser = argparse.ArgumentParser(prog="python -m stacking_ds.launch.sweep", description=__doc__)
    parser.add_argument("marker")
    parser.add_argument("--action", choices=get_args(Action), default="count")
    options = parser.parse_args(arguments)
    print(json.dumps(asdict(sweep(options.marker, options.action))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

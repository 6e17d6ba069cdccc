"""Where a figure was made: command, commit, machine, versions."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from stacking_ds.engine.zero.compatibility import deepspeed

_COPY_BYTES = 1 << 28
_COPIES = 3


def describe_machine() -> dict[str, str]:
    """What somebody needs to judge a figure, or to make it again."""
    cores = len(os.sched_getaffinity(0))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": " ".join(["stacking-ds", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{cores} cores of {_processor()}",
        "gpus": ", ".join(gpus) or "none",
        "load_average": f"{os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """Of the checkout this package runs from; "unknown" where it is installed."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one, whose CPU time does not depend on what else the cores do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def host_copy_gib_per_second() -> float:
    """How fast one core copies host memory to host memory; the best of a few tries."""
    source, target = torch.ones(_COPY_BYTES // 4), torch.ones(_COPY_BYTES // 4)
    with one_thread():
        seconds = min(_seconds_of_copy(source, target) for _ in range(_COPIES))
    return _COPY_BYTES / 2**30 / seconds


def _seconds_of_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started

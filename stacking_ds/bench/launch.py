"""Start several ranks of one command on this machine, and wait for them without hanging."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stacking_ds.errors import UserError
from stacking_ds.process.launchers import HYDRA_SIZE, OPEN_MPI_SIZE, by_srun, free_port

_POLL_SECONDS = 0.1
_LINES_OF_A_FAILURE = 15


def under_launcher() -> bool:
    """Has a launcher started this process as one of several ranks?"""
    return by_srun() or any(name in os.environ for name in ("RANK", OPEN_MPI_SIZE, HYDRA_SIZE))


def say_if_no_gpu() -> None:
    """Tell DeepSpeed, before it is imported, of a machine without GPUs; else it warns."""
    if _gpus() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def run_on_ranks(arguments: Sequence[str], ranks: int) -> None:
    """`stacking-ds ARGUMENTS` on `ranks` processes that find one another as under a launcher.

    GPUs are shown to them where there is one for each.

    Raises:
        UserError: a rank failed, with the end of what it said; the others are stopped.
    """
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if _gpus() < ranks:
        shared |= {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",  # ranks that take each other's cores are timed wrongly
        }
    with tempfile.TemporaryDirectory(prefix="stacking-ds-ranks-") as folder:
        logs = [Path(folder) / f"rank_{rank}.log" for rank in range(ranks)]
        processes = [
            _start(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
            for rank, log in enumerate(logs)
        ]
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            said = logs[failed].read_text(errors="replace").splitlines()
            raise UserError(
                f"rank {failed} of {ranks} ended with exit code {processes[failed].returncode}; "
                f"it said at the end:\n" + "\n".join(said[-_LINES_OF_A_FAILURE:])
            )


def _start(
    arguments: Sequence[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "stacking_ds", *arguments],
            env={**os.environ, **environment},
            stdout=stream,
            stderr=stream,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended well, or the first has failed: its rank. What then waits for it for
    ever is the caller's to stop."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(_POLL_SECONDS)


def _gpus() -> int:
    import torch  # takes seconds, and not every command needs it

    return torch.cuda.device_count()

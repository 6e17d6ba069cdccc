"""A run's directory: whose it is, and what is in it.

RUN_DIR/config.yaml      the resolved recipe
        metrics.jsonl    one JSON object a line
        train.log        the same for people
        tensorboard/     the same for TensorBoard
        attempts.jsonl   when it was begun, how it ended, what was judged of it
        checkpoints/     sharded training state
        export/          the finished model as a Hugging Face folder
"""

import errno
import fcntl
import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from stacking_ds.attempts import ATTEMPTS_FILE
from stacking_ds.config import RunConfig, changed_keys
from stacking_ds.errors import CheckpointError, ConfigError
from stacking_ds.recipe import load_run_config

if TYPE_CHECKING:  # it brings torch along, for seconds
    from stacking_ds.distributed import World

__all__ = ["check", "lock", "read_config", "require_shared", "write_config"]

_PATIENCE_SECONDS = 10.0
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}

logger = logging.getLogger("stacking_ds")

_CONFIG, _UNFINISHED, _LOCK = "config.yaml", "config.tmp", ".lock"


def check(run_dir: Path, config: RunConfig, *, resume: bool) -> None:
    """Make sure that `run_dir` may become, or already is, the run of `config`.

    Raises:
        CheckpointError: it holds a run and `resume` is not set, or another run than `config`.
    """
    if not any((run_dir / "checkpoints").glob("step_*")) and (run_dir / _CONFIG).exists():
        return  # it ended before its first checkpoint: nothing is lost by starting anew
    if (run_dir / _CONFIG).exists():
        if not resume:
            raise CheckpointError(
                f"{run_dir} already holds a run; continue it with --resume, or choose another "
                f"--run-dir"
            )
        changes = changed_keys(read_config(run_dir), config)
        if changes:
            raise CheckpointError(
                f"{run_dir} holds another run ({'; '.join(changes)}); use the recipe it was "
                f"started with, or choose another --run-dir"
            )
    elif run_dir.is_dir():
        found = {path.name for path in run_dir.iterdir()} - {_UNFINISHED, _LOCK, ATTEMPTS_FILE}
        if any(not name.startswith(".stacking-ds-doctor-") for name in found):
            raise CheckpointError(
                f"{run_dir} is not empty and holds no run (there is no {_CONFIG}); choose another "
                f"--run-dir"
            )
    elif run_dir.exists():
        raise CheckpointError(f"{run_dir} is a file; choose another --run-dir")


def lock(run_dir: Path, patience_seconds: float = 0.0) -> IO[str]:
    """Keep other jobs out of the run for as long as the returned file is open.

    Where the file system has no locks there is a warning instead. The file says who holds it, in
    words that no other attempt uses: `require_shared` looks for them on every node.

    Args:
        patience_seconds: how long to wait for a job that is at work in it.

    Raises:
        CheckpointError: another job is at work in it.
        ConfigError: the directory cannot be created or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / _LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise _not_writable(run_dir, error) from None
    try:
        locked = _lock_in_time(file, run_dir, patience_seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise _not_writable(run_dir, error) from None
        logger.warning(
            "the file system of %s has no locks (%s): see that no other job trains in it, or have "
            "it mounted with them (Lustre: -o flock)",
            run_dir,
            error.strerror,
        )
        locked = True
    if not locked:
        file.close()
        raise CheckpointError(
            f"another job is training in {run_dir}; wait for it or stop it, or choose another "
            f"--run-dir"
        )
    try:
        _sign(file)
    except OSError as error:
        with suppress(OSError):  # it tries to write once more
            file.close()
        raise _not_writable(run_dir, error) from None
    return file


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n")
    file.flush()
    os.fsync(file.fileno())  # network file systems show others what is on the server


def _signature(run_dir: Path) -> bytes | None:
    try:
        return (run_dir / _LOCK).read_bytes()
    except OSError:
        return None


def _lock_in_time(file: IO[str], run_dir: Path, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            if not told:
                told = True
                logger.warning(
                    "another job is still at work in %s; waiting %.0f s for it to end",
                    run_dir,
                    patience_seconds,
                )
            time.sleep(0.1)
        else:
            return True


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved recipe, which makes the directory this run's.

    Raises:
        ConfigError: it cannot be written.
    """
    unfinished = run_dir / _UNFINISHED
    try:
        unfinished.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(unfinished, run_dir / _CONFIG)
    except OSError as error:
        raise _not_writable(run_dir, error) from None


def require_shared(run_dir: Path, world: "World") -> None:
    """Make sure that every rank sees the run that rank 0 has entered: what it has just written,
    since a node may have a copy of its own of an older attempt. A collective.

    Raises:
        ConfigError: on every rank, if one does not: it would train for hours and save nothing.
    """
    written = world.broadcast(_signature(run_dir) if world.is_first else None)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (sees := _signature(run_dir) == written) and time.monotonic() < deadline:
        # network file systems show a new file a little later, and sooner to who lists its folder
        with suppress(OSError):
            os.listdir(run_dir.parent)
        time.sleep(0.1)
    blind = [
        f"rank {rank} on {host}"
        for rank, (host, sees) in enumerate(world.gather((socket.gethostname(), sees)))
        if not sees
    ]
    if blind:
        error = ConfigError(
            f"{len(blind)} of {world.size} ranks (first: {blind[0]}) do not see the run directory "
            f"{run_dir} that rank 0 has written to; give a --run-dir on a file system that all "
            f"nodes share"
        )
        error.on_all_ranks = True
        raise error


def _not_writable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the run directory {run_dir} ({error.strerror}); choose another --run-dir, "
        f"or mend its permissions or file system"
    )


def read_config(run_dir: Path) -> RunConfig:
    """The resolved recipe of the run in `run_dir`.

    Raises:
        CheckpointError: there is no run.
    """
    path = run_dir / _CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run_dir} holds no run: there is no {path.name} in it")
    return load_run_config(str(path))

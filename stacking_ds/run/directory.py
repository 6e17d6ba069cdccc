"""A run's directory: whose it is, its lock, its recipe, its tokenizer.

RUN_DIR/config.yaml      the resolved recipe
        tokenizer/       of the training data, so that the export needs no token shards, and
                         SHA256SUMS of its files, for `sha256sum -c`
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
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from stacking_ds.checkpoint.folders import newest_first, saved, use_command
from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig, changed_keys
from stacking_ds.console import first_of
from stacking_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    UnreadableDataError,
    UnreadableError,
    agreed,
    unreadable,
)
from stacking_ds.files import (
    DamagedFileError,
    published,
    read_bytes,
    read_text,
    sync,
    without_waiting,
    write_whole,
)
from stacking_ds.run.attempts import ATTEMPTS_FILE

if TYPE_CHECKING:  # they bring seconds of imports along
    from stacking_ds.data.shards import TokenShards
    from stacking_ds.distributed.world import World


_PATIENCE_SECONDS = 10.0
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}

logger = logging.getLogger("stacking_ds")

_ANOTHER = "choose another --run-dir"
_CONFIG, _UNFINISHED, _LOCK = "config.yaml", "config.tmp", ".lock"
_TOKENIZER, _SUMS, _VOCABULARY = "tokenizer", "SHA256SUMS", "vocab.txt"


def check(run_dir: Path, config: RunConfig, *, resume: bool) -> None:
    """Make sure that `run_dir` may become, or already is, the run of `config`. Raises
    `CheckpointError`: it holds a run and `resume` is not set, or another run than `config`."""
    if saved(run_dir):
        if not resume:
            raise CheckpointError(
                f"{run_dir} already holds a run; continue it with --resume, or {_ANOTHER}"
            )
        if changes := changed_keys(read_config(run_dir), config):
            raise CheckpointError(
                f"{run_dir} holds another run ({first_of(changes, between='; ')}); use the recipe "
                f"it was started with, or {_ANOTHER}"
            )
    elif (run_dir / _CONFIG).exists():
        return  # it ended before its first checkpoint: nothing is lost by starting anew
    elif run_dir.is_dir():
        found = {path.name for path in run_dir.iterdir()} - {_UNFINISHED, _LOCK, ATTEMPTS_FILE}
        if any(not name.startswith(".stacking-ds-doctor-") for name in found):
            raise CheckpointError(
                f"{run_dir} is not empty and holds no run (there is no {_CONFIG}); {_ANOTHER}"
            )
    elif run_dir.exists():
        raise CheckpointError(f"{run_dir} is a file; {_ANOTHER}")


def holds_run(run_dir: Path) -> bool:
    """True if a run has made the directory its own."""
    return (run_dir / _CONFIG).exists() or bool(saved(run_dir))


def lock(
    run_dir: Path,
    patience_seconds: float = 0.0,
    remedy: str = f"wait for it or stop it, or {_ANOTHER}",
) -> IO[str]:
    """Keep other jobs out of the run for as long as the returned file is open. One that is at work
    in it is waited for; where it does not end in time, `remedy` says what to do. Raises
    `CheckpointError`: it does not; `ConfigError`: the directory cannot be created or written.

    Where the file system has no locks there is a warning instead. The file says who holds it, in
    words that no other attempt uses: `require_shared` looks for them on every node.
    """
    deadline, file = time.monotonic() + patience_seconds, None
    try:
        while file is None or not _is_there(file, run_dir):
            if file is not None:  # who had it was refused, and has taken its own away
                file.close()
            run_dir.mkdir(parents=True, exist_ok=True)
            file = open(  # noqa: SIM115 - open for as long as the run is locked
                run_dir / _LOCK, "a", encoding="utf-8", opener=without_waiting
            )
            if not _lock_in_time(file, run_dir, deadline):
                raise CheckpointError(f"another job is training in {run_dir}; {remedy}")
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n")
        file.flush()
        os.fsync(file.fileno())  # network file systems show others what is on the server
    except (OSError, CheckpointError) as error:
        if file is not None:
            with suppress(OSError):  # it tries to write once more
                file.close()
        raise _not_writable(run_dir, error) if isinstance(error, OSError) else error from None
    return file


def _signature(run_dir: Path) -> bytes | None:
    try:
        return read_bytes(run_dir / _LOCK)
    except (OSError, DamagedFileError):
        return None


def _lock_in_time(file: IO[str], run_dir: Path, deadline: float) -> bool:
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if (left := deadline - time.monotonic()) <= 0:
                return False
            if not told:
                told = True
                waiting = "another job is still at work in %s; waiting %.0f s for it to end"
                logger.warning(waiting, run_dir, left)
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s has no locks (%s): see that no other job trains in it, or "
                "have it mounted with them (Lustre: -o flock)",
                run_dir,
                error.strerror,
            )
            return True


def _is_there(file: IO[str], run_dir: Path) -> bool:
    """True if the open file is still the one that others find under its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), (run_dir / _LOCK).stat())
    return False


def forget_if_empty(run_dir: Path, *, made_by_lock: bool) -> None:
    """Take the lock, and the folder if it was made for it, away where a run was refused before
    anything was written. For who holds the lock."""
    with suppress(OSError):
        if [path.name for path in run_dir.iterdir()] == [_LOCK]:
            (run_dir / _LOCK).unlink()
            if made_by_lock:
                run_dir.rmdir()


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved recipe, which makes the directory this run's. Raises `ConfigError`: it
    cannot be written."""
    try:
        write_whole(run_dir / _CONFIG, config.to_yaml(), run_dir / _UNFINISHED)
        sync(run_dir)
    except OSError as error:
        raise _not_writable(run_dir, error) from None


def require_shared(run_dir: Path, world: "World") -> None:
    """Make sure that every rank sees the run that rank 0 has entered: what it has just written,
    since a node may have a copy of its own of an older attempt. A collective. Raises `ConfigError`:
    on every rank, if one does not: it would train for hours and save nothing."""
    written = world.broadcast(_signature(run_dir) if world.is_first else None)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (sees := _signature(run_dir) == written) and time.monotonic() < deadline:
        # network file systems show a new file a little later, and sooner to who lists its folder
        with suppress(OSError):
            os.listdir(run_dir.parent)
        time.sleep(0.1)
    told = world.gather((socket.gethostname(), sees))
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(told) if not sees]
    if blind:
        raise agreed(
            ConfigError(
                f"{len(blind)} of {world.size} ranks (first: {blind[0]}) do not see the run "
                f"directory {run_dir} that rank 0 has written to; give a --run-dir on a file "
                f"system that all nodes share"
            )
        )


def _not_writable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the run directory {run_dir} ({error.strerror}); choose another --run-dir, "
        f"or mend its permissions or file system"
    )


def read_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved recipe of the run in `run_dir`, after `key=value` overrides. Raises
    `CheckpointError`: there is no run, or its recipe is damaged; a checkpoint that has it is
    offered; `ConfigError`: an override cannot be used."""
    path = run_dir / _CONFIG
    try:
        if not read_text(path).strip():
            raise DamagedFileError(path, "it is empty")
        config = load_run_config(str(path))
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{path} is missing"
        if not saved(run_dir):
            problem = f"{run_dir} holds no run: there is no {path.name} in it"
    except (DamagedFileError, ConfigError) as error:
        problem = str(error)
    except OSError as error:
        raise unreadable(UnreadableError, path, error) from None
    else:
        return load_run_config(str(path), overrides) if overrides else config
    offered = next((f for f in newest_first(run_dir) if _config_in(f) is not None), None)
    if offered is None:
        raise CheckpointError(f"{problem}; give a run's directory, or bring it back from a copy")
    raise CheckpointError(
        f"{problem}; `{use_command(offered)}` writes it anew, as that checkpoint has it"
    )


def require_shards(run_dir: Path, config: RunConfig, option: str) -> None:
    """Raises:
    DataError: the token shards are not where the run's recipe says; `option` says where.
    """
    from stacking_ds.data.shard_files import MANIFEST_NAME  # brings numpy along

    # what is there and cannot be read, or is no file, is for who reads it to say
    if not os.path.lexists(Path(config.data.path) / MANIFEST_NAME):
        raise DataError(
            f"the token shards of {run_dir} are not in {config.data.path}; say with {option} where "
            f"they are"
        )


def mend_config(run_dir: Path, found: Path) -> bool:
    """Write a recipe that is missing or damaged anew, from the checkpoint `found`; False if there
    is nothing to mend, or the checkpoint's is of another version. Raises `UnreadableError`: nobody
    knows whether the recipe is damaged; `ConfigError`: it cannot be written."""
    try:
        read_config(run_dir)
    except UnreadableError:
        raise
    except CheckpointError:
        if config := _config_in(found):
            write_config(run_dir, config)
            return True
    return False


def _config_in(found: Path) -> RunConfig | None:
    from stacking_ds.checkpoint import listing, manifest

    with suppress(CheckpointError):
        return listing.config_of(manifest.read_manifest(found))
    return None


# ------------------------------------------------------------------ its tokenizer


def keep_tokenizer(run_dir: Path, shards: "TokenShards") -> None:
    """Copy the tokenizer of the shards into the run, whole or not at all, unless it is there. What
    a start with another vocabulary left, which saved nothing, is replaced. Raises `DataError`: what
    is there cannot be read; `OSError`: the run's directory cannot be written."""
    folder = run_dir / _TOKENIZER
    sums = {file.name: file.sha256 for file in shards.manifest.vocabulary_files}
    if _kept_sums(folder) == sums:
        return
    with published(folder) as partial:
        for name in sums:
            shutil.copyfile(shards.folder / name, partial / name)
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())
        (partial / _SUMS).write_text(lines, encoding="utf-8")


def choose_tokenizer(
    run_dir: Path, config: RunConfig, vocabulary_sha256: str, data: Path | None
) -> Path:
    """The folder with the verified tokenizer of a model that was trained on this vocabulary: that
    of the prepared folder `data` if one is given, else the run's own. A run of a version that kept
    none has it beside its shards. Raises `DataError`: it is missing, damaged or cannot be read;
    `CheckpointError`: it is another vocabulary's."""
    from stacking_ds.data import shard_files  # brings numpy along

    if data is None and (run_dir / _TOKENIZER).is_dir():
        folder, sums = run_dir / _TOKENIZER, _kept_sums(run_dir / _TOKENIZER)
        remedy = f"delete {folder}, so that the one beside the shards is taken, or give --data"
    else:
        folder = data or Path(config.data.path)
        remedy = "give the prepared folder with --data"
        if data is None and not os.path.lexists(folder / shard_files.MANIFEST_NAME):
            raise DataError(
                f"{run_dir} keeps no tokenizer of its own, and its token shards are not in "
                f"{folder}; {remedy}"
            )
        manifest = shard_files.read_manifest(folder)
        sums = {file.name: file.sha256 for file in manifest.vocabulary_files}
    for name, sha256 in sums.items():
        path = folder / name
        try:
            found = shard_files.file_sha256(path)
        except (FileNotFoundError, DamagedFileError):
            found = "missing"
        except OSError as error:
            raise unreadable(UnreadableDataError, path, error) from None
        if found != sha256:
            raise DataError(f"{path} is missing or damaged; {remedy}")
    if sums.get(_VOCABULARY) != vocabulary_sha256:
        raise CheckpointError(
            f"{run_dir} was trained with another vocabulary than that of {folder}; {remedy}"
        )
    return folder


def _kept_sums(folder: Path) -> dict[str, str]:
    path = folder / _SUMS
    try:
        lines = [line.partition("  ") for line in read_text(path).splitlines()]
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        return {}  # as if they were those of nothing
    except OSError as error:
        raise unreadable(UnreadableDataError, path, error) from None
    return {name: sha256 for sha256, _, name in lines if name == Path(name).name}


def default_run_dir(config: RunConfig) -> Path:
    """Directory of a recipe's run, unless the command line names another."""
    return Path("runs") / config.name

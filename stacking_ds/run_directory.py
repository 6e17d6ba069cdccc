"""A run's directory: whose it is, and what is in it.

RUN_DIR/config.yaml      the resolved recipe
        metrics.jsonl    one JSON object a line
        train.log        the same for people
        tensorboard/     the same for TensorBoard
        checkpoints/     sharded training state
        export/          the finished model as a Hugging Face folder
"""

import os
from pathlib import Path

from stacking_ds.config import RunConfig, changed_keys, load_run_config
from stacking_ds.errors import CheckpointError, ConfigError

__all__ = ["claim", "read_config"]


def claim(run_dir: Path, config: RunConfig, *, resume: bool) -> None:
    """Make `run_dir` this run's own, or make sure it already is.

    Raises:
        CheckpointError: it holds a run and `resume` is not set, or another run than `config`.
        ConfigError: it cannot be created or written.
    """
    config_path = run_dir / "config.yaml"
    if config_path.exists():
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
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise CheckpointError(
            f"{run_dir} is not empty and holds no run; choose another --run-dir or empty it"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = config_path.with_suffix(".tmp")
        temporary.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(temporary, config_path)
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {run_dir}: {error}") from None


def read_config(run_dir: Path) -> RunConfig:
    """The resolved recipe of the run in `run_dir`.

    Raises:
        CheckpointError: there is no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run_dir} holds no run: there is no {path.name} in it")
    return load_run_config(str(path))

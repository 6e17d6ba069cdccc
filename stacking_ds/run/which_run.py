"""Which run a `train` is about: the words of its command line that say so.

    train --recipe NAME [--run-dir DIR]            a new run, in runs/<recipe's name> if not said
    train --recipe NAME [--run-dir DIR] --resume   the same, or going on with it if it is there
    train --resume DIR                             going on with a run by its own recipe

Without torch: `launch` asks too, and waits for days.
"""

import argparse
import os
from pathlib import Path

from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.errors import ConfigError

__all__ = ["add_run_options", "config_of", "run_dir_of"]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `train` that say which run it is."""
    parser.add_argument(
        "--recipe",
        help="a bundled recipe's name, or a .yaml file; a run that is resumed has its own",
    )
    parser.add_argument("--run-dir", type=Path, help="where the run lives (runs/<recipe's name>)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe, e.g. optimizer.learning_rate=1e-3; repeatable, the "
        "last one for a key wins",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        default=False,
        metavar="RUN_DIR",
        help="go on with the run RUN_DIR; without a value, with that in --run-dir if there is one",
    )


def run_dir_of(options: argparse.Namespace, config: RunConfig | None = None) -> Path:
    """The directory of the run whose recipe is `config`, which is read if it is not given.

    Raises:
        ConfigError: two directories are given, none can be told, or the recipe that has the run's
            name cannot be used.
    """
    named = _named(options)
    return named or Path("runs") / (config or config_of(options)).name


def config_of(options: argparse.Namespace) -> RunConfig:
    """The recipe, of the run itself if it is resumed and no other is given, after overrides.

    Raises:
        ConfigError: there is none, or a value that cannot be used.
        CheckpointError: the run is not there, or its recipe is damaged.
    """
    if options.recipe is not None:
        return load_run_config(options.recipe, options.set)
    run_dir = _named(options)
    if run_dir is None or not options.resume:
        raise ConfigError(
            "train needs --recipe, a bundled recipe's name or a .yaml file, or the directory of a "
            "run to go on with: --resume RUN_DIR"
        )
    from stacking_ds.run.directory import read_config

    return read_config(run_dir, options.set)


def _named(options: argparse.Namespace) -> Path | None:
    given = (options.run_dir, options.resume)
    named = [path for path in given if isinstance(path, Path)]
    if len({os.path.realpath(path) for path in named}) > 1:
        raise ConfigError(
            f"--run-dir {options.run_dir} and --resume {options.resume} are two runs; give one"
        )
    return named[0] if named else None

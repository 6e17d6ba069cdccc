"""`stacking-ds slurm`: the batch scripts, where a person can change them."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from stacking_ds.config.recipe import batch_scripts
from stacking_ds.errors import ConfigError


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the one action; it sets `command`, which returns the exit code."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser(
        allow_abbrev=False, name="copy", help="write the batch scripts into DIR/slurm"
    )
    action.add_argument(
        "directory", type=Path, metavar="DIR", help="where sbatch is called, seen by all nodes"
    )
    action.set_defaults(command=_copy)


def _copy(options: argparse.Namespace) -> int:
    target = options.directory / "slurm"
    scripts = batch_scripts()
    changed = [
        path.name
        for path in scripts
        if (target / path.name).exists() and (target / path.name).read_bytes() != path.read_bytes()
    ]
    if changed:
        raise ConfigError(
            f"{target} has {', '.join(changed)} with other contents, which stay as they are: move "
            f"them away, or give another folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path in scripts:
        if not (target / path.name).exists():  # in a checkout they may be these themselves
            shutil.copyfile(path, target / path.name)
    (target / "submit.sh").chmod(0o755)  # a wheel does not keep it
    command = Path(sys.executable).with_name("stacking-ds")
    place, program = (shlex.quote(str(path)) for path in (options.directory, command))
    print(
        f"batch scripts are in {target}; write what your site needs into {target / 'site.sh'}, then"
    )
    print(
        f"cd {place} && STACKING_DS={program} sbatch slurm/pretrain.sbatch RECIPE RUN_DIR "
        f"--set data.path=SHARDS"
    )
    return 0

"""What a person asked `stacking-ds launch` for, and the run it is about."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import stacking_ds
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch.environment import parse_assignments, require_plain
from stacking_ds.run.directory import add_run_options, run_dir_of

PACKAGE_FOLDER = Path(stacking_ds.__file__).parents[1]


@dataclass(frozen=True)
class Patience:
    """How long things are waited for."""

    pause_seconds: float = 5.0
    """Between a failed attempt and the next."""
    survivors_seconds: float = 10.0
    """For what is left of an attempt that ended by itself."""
    probe_seconds: float = 20.0
    """For a host to answer at all."""
    sweep_seconds: float = 30.0
    """For a host to say what runs on it."""
    look_seconds: float = 2.0
    """Between two looks at all hosts that are to be clear, or at the run's records."""
    end_seconds: float = 30.0
    """For all processes to end once the run's records say that it has ended."""
    count_seconds: float = 60.0
    """Between two counts of the ranks while all seems well."""


@dataclass(frozen=True)
class Request:
    """The options of `launch`. Either `hostfile` or `ranks` is given."""

    command: tuple[str, ...]
    hostfile: Path | None = None
    ranks: int | None = None
    restarts: int = 0
    min_nodes: int | None = None
    launcher: str = "pdsh"
    launcher_args: str = ""
    ssh_port: int | None = None
    master_address: str | None = None
    master_port: int | None = None
    env: tuple[str, ...] = ()
    stop_seconds: float | None = None
    verbose: bool = False
    runner: tuple[str, ...] = (sys.executable, "-m", "deepspeed.launcher.runner")
    patience: Patience = Patience()

    def check(self) -> None:
        """Find what can be found wrong before any host is asked.

        Raises:
            ConfigError: an option that cannot be used, or a program that is not there.
        """
        if not self.command or self.command[0].startswith("-"):
            raise ConfigError(
                "launch what? Write the command behind the options, such as `stacking-ds launch "
                "--hostfile hosts train --recipe bert_base_stacking`"
            )
        if self.command[0] == "launch":
            raise ConfigError("launch cannot launch itself; write the command of the ranks")
        if "RANK" in os.environ:
            raise ConfigError(
                f"launch starts all ranks, and is itself rank {os.environ['RANK']} of another "
                f"launcher; start it once, or unset RANK"
            )
        if (self.hostfile is None) == (self.ranks is None):
            raise ConfigError("give either --hostfile FILE or --ranks N (on this machine)")
        if self.restarts < 0:
            raise ConfigError(f"--restarts {self.restarts} must be 0 or more")
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks} must be 1 or more")
        parse_assignments(self.env)
        if self.hostfile is None:
            if self.min_nodes is not None:
                raise ConfigError("--min-nodes is for --hostfile; leave it out with --ranks")
        else:
            self._check_for_hosts()

    def _check_for_hosts(self) -> None:
        same = "use one without them on all hosts"
        require_plain(os.getcwd(), "the working directory", same)
        require_plain(sys.executable, "the interpreter", same)
        require_plain(str(PACKAGE_FOLDER), "the folder of the package", same)
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            raise ConfigError(
                f"--launcher-args {self.launcher_args!r} cannot be split into words ({error}); "
                f"close its quotes"
            ) from None
        program = {"pdsh": "pdsh", "openmpi": "mpirun"}[self.launcher]
        other = {"pdsh": "openmpi", "openmpi": "pdsh"}[self.launcher]
        if shutil.which(program) is None:
            raise ConfigError(
                f"--launcher {self.launcher} needs {program}, which is not in PATH here; install "
                f"it, or try --launcher {other}"
            )


# --------------------------------------------------------------------- the command


def tracked_run(command: Sequence[str]) -> Path | None:
    """The directory of the run that `command` trains; None for a command that trains none.

    Raises:
        UserError: its options, or the recipe that names the run, cannot be used.
    """
    if command[0] != "train":
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_run_options(parser)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    try:
        options, _ = parser.parse_known_args(command[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see `stacking-ds train --help`") from None
    if options.dry_run or options.help:
        return None
    return run_dir_of(options)


def with_resume(command: Sequence[str]) -> tuple[str, ...]:
    """`command`, which trains, going on with its run."""
    if any(word.partition("=")[0] == "--resume" for word in command):
        return tuple(command)
    return (*command, "--resume")

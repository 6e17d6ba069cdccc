"""DeepSpeed's runner for one attempt: what a person asked for, and from it the runner's command
line, environment and files."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking_ds.errors import ConfigError
from stacking_ds.launch.environment import (
    draw_environment,
    hosts_environment,
    parse_assignments,
    passable,
    require_plain,
    search_path,
)
from stacking_ds.launch.hosts import PACKAGE_FOLDER, SSH_OPTIONS, Host, draw_hostfile
from stacking_ds.launch.sweep import MARKER_VARIABLE
from stacking_ds.process.launchers import free_port

# else mpirun waits for ever for a host whose cable was pulled
_MPI_KEEPALIVE = (
    *("--mca", "oob_tcp_keepalive_time", "10"),
    *("--mca", "oob_tcp_keepalive_intvl", "5"),
    *("--mca", "oob_tcp_keepalive_probes", "3"),
)


@dataclass(frozen=True)
class Timeouts:
    """The times that things are waited for."""

    pause_seconds: float = 5.0  # between a failed attempt and the next
    survivors_seconds: float = 10.0  # for what is left of an attempt that ended by itself
    probe_seconds: float = 20.0  # for a host to answer at all
    sweep_seconds: float = 30.0  # for a host to say what runs on it
    look_seconds: float = 2.0  # between two looks at hosts to be clear, or at the run's records
    end_seconds: float = 30.0  # for all processes to end once the run's records say that it has
    count_seconds: float = 60.0  # between two counts of the ranks while all seems well


@dataclass(frozen=True)
class LaunchRequest:
    """Options of `launch`. Either `hostfile` or `ranks` is given."""

    command: tuple[str, ...]
    run_dir: Path | None = None  # that of the run which `command` trains; None if it trains none
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
    timeouts: Timeouts = Timeouts()

    def check(self) -> None:
        """Raise a ConfigError for what can be found wrong before any host is asked: an option that
        cannot be used, or a program that is not there."""
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
            return
        for word, what in (
            (os.getcwd(), "the working directory"),
            (sys.executable, "the interpreter"),
            (str(PACKAGE_FOLDER), "the folder of the package"),
        ):
            require_plain(word, what, "use one without them on all hosts")
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            raise ConfigError(
                f"--launcher-args {self.launcher_args!r} cannot be split into words ({error}); "
                f"close its quotes"
            ) from None
        on_pdsh = self.launcher == "pdsh"
        program, other = ("pdsh", "openmpi") if on_pdsh else ("mpirun", "pdsh")
        if shutil.which(program) is None:
            raise ConfigError(
                f"--launcher {self.launcher} needs {program}, which is not in PATH here; install "
                f"it, or try --launcher {other}"
            )


def prepare(
    request: LaunchRequest,
    command: Sequence[str],
    hosts: Sequence[Host],
    folder: Path,
    marker: str,
    own: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the runner that starts `command` on `hosts`; on this machine,
    where ranks inherit this process's environment, if there are none.

    Args:
        folder: for the runner's files; it has to stay until the runner has ended.
        marker: what the processes of this attempt are known by.
        own: this process's environment.

    Raises:
        ConfigError: a variable cannot reach the hosts, or fewer GPUs are visible here than ranks.
    """
    given, python = parse_assignments(request.env), sys.executable
    hostfile, variables_file = folder / "hosts", folder / "environment"
    if hosts:
        variables = hosts_environment(given, python=python, own=own, launcher=request.launcher)
        variables[MARKER_VARIABLE] = marker
        hostfile.write_text(draw_hostfile(hosts), encoding="utf-8")
        variables_file.write_text(draw_environment(variables), encoding="utf-8")
        ssh = f"{own.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
        environment = {**own, "DS_ENV_FILE": str(variables_file), "PDSH_SSH_ARGS_APPEND": ssh}
        where, level, words = _through_launcher(request), "warning", passable(command)
    else:
        environment = {**own, "PATH": search_path(python, own), **given}
        # it would warn that there is no hostfile, which is as it should be
        where, level, words = _gpus(request.ranks or 1, environment), "error", list(command)
    arguments = [
        *request.runner,
        *("--hostfile", str(hostfile)),  # in any case, or it would look for /job/hostfile
        *where,
        *("--master_port", str(request.master_port or free_port())),
        *("--log_level", "info" if request.verbose else level),
        "--no_local_rank",  # the environment says it
        *("--module", "stacking_ds", *words),
    ]
    return arguments, {**environment, MARKER_VARIABLE: marker}


def _through_launcher(request: LaunchRequest) -> list[str]:
    arguments = [
        "--force_multi",  # one host that is left need not be this machine
        "--no_ssh_check",
        *("--launcher", request.launcher),
    ]
    if request.ssh_port is not None:
        arguments += ["--ssh_port", str(request.ssh_port)]
    if request.master_address is not None:
        arguments += ["--master_addr", request.master_address]
    words = shlex.split(request.launcher_args)
    if request.launcher == "openmpi":
        port = "" if request.ssh_port is None else f" -p {request.ssh_port}"
        ssh = [] if "plm_rsh_args" in words else ["--mca", "plm_rsh_args", f"{SSH_OPTIONS}{port}"]
        as_root = ["--allow-run-as-root"] * (os.geteuid() == 0)
        words = [*_MPI_KEEPALIVE, *as_root, *ssh, *words]
    if words:
        arguments.append(f"--launcher_args={shlex.join(words)}")  # the value begins with a dash
    return arguments


def _gpus(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Options for the GPUs that ranks take. DeepSpeed ignores CUDA_VISIBLE_DEVICES where it is told
    a number, and then takes the first ones, which may be somebody else's."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or environment.get("DS_ACCELERATOR") == "cpu":
        return ["--num_gpus", str(ranks)]
    numbers = [number.strip() for number in visible.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible!r} names GPUs otherwise than DeepSpeed's launcher can "
            f"read; name them by number, such as 0,1"
        )
    if len(numbers) < ranks:
        raise ConfigError(
            f"--ranks {ranks} needs as many GPUs, and CUDA_VISIBLE_DEVICES={visible!r} names "
            f"{len(numbers)}; name more, or start fewer ranks"
        )
    return ["--include", f"localhost:{','.join(numbers[:ranks])}"]

"""DeepSpeed's runner: its command line, its environment and its files for one attempt."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stacking_ds.errors import ConfigError
from stacking_ds.launch.environment import (
    draw_environment,
    hosts_environment,
    parse_assignments,
    passable,
)
from stacking_ds.launch.hosts import Host, draw_hostfile
from stacking_ds.launch.request import Request
from stacking_ds.launch.sweep import MARKER_VARIABLE

# without them pdsh, and mpirun, wait for ever for a host whose cable was pulled
_SSH = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o BatchMode=yes"
_MPI_KEEPALIVE = (
    *("--mca", "oob_tcp_keepalive_time", "10"),
    *("--mca", "oob_tcp_keepalive_intvl", "5"),
    *("--mca", "oob_tcp_keepalive_probes", "3"),
)


def prepare_on_hosts(
    request: Request,
    command: Sequence[str],
    hosts: Sequence[Host],
    folder: Path,
    marker: str,
    own: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the runner that starts `command` on `hosts`.

    Args:
        folder: where its files are written; it has to stay until the runner has ended.
        marker: what the processes of this attempt are known by.
        own: this process's environment.

    Raises:
        ConfigError: a variable cannot reach the hosts.
    """
    variables = hosts_environment(
        parse_assignments(request.env), python=sys.executable, own=own, launcher=request.launcher
    )
    variables[MARKER_VARIABLE] = marker
    hostfile, variables_file = folder / "hosts", folder / "environment"
    hostfile.write_text(draw_hostfile(hosts), encoding="utf-8")
    variables_file.write_text(draw_environment(variables), encoding="utf-8")
    arguments = [
        *request.runner,
        *("--hostfile", str(hostfile)),
        "--force_multi",  # one host that is left need not be this machine
        "--no_ssh_check",
        *("--launcher", request.launcher),
        *_options(request, "warning"),
    ]
    if request.ssh_port is not None:
        arguments += ["--ssh_port", str(request.ssh_port)]
    if request.master_address is not None:
        arguments += ["--master_addr", request.master_address]
    if launcher_args := _launcher_args(request):
        arguments.append(f"--launcher_args={launcher_args}")  # the value begins with a dash
    environment = {
        **own,
        MARKER_VARIABLE: marker,
        "DS_ENV_FILE": str(variables_file),
        "PDSH_SSH_ARGS_APPEND": f"{own.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH}".strip(),
    }
    return [*arguments, "--module", "stacking_ds", *passable(command)], environment


def _options(request: Request, level: str) -> list[str]:
    port = request.master_port or _free_port()
    return [
        *("--master_port", str(port)),
        *("--log_level", "info" if request.verbose else level),
        "--no_local_rank",  # the environment says it
    ]


def _launcher_args(request: Request) -> str:
    given = shlex.split(request.launcher_args)
    if request.launcher != "openmpi":
        return shlex.join(given)
    own = list(_MPI_KEEPALIVE)
    if os.geteuid() == 0:
        own.append("--allow-run-as-root")
    if "plm_rsh_args" not in given:
        port = "" if request.ssh_port is None else f" -p {request.ssh_port}"
        own += ["--mca", "plm_rsh_args", f"{_SSH}{port}"]
    return shlex.join([*own, *given])


def prepare_local(
    request: Request, command: Sequence[str], folder: Path, marker: str, own: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The same for ranks on this machine, which inherit this process's environment.

    Raises:
        ConfigError: fewer GPUs are visible than there are ranks.
    """
    assert request.ranks is not None
    given = parse_assignments(request.env)
    environment = {**own, **given, MARKER_VARIABLE: marker}
    if "PATH" not in given:
        path = [os.path.dirname(sys.executable), *own.get("PATH", os.defpath).split(os.pathsep)]
        environment["PATH"] = os.pathsep.join(dict.fromkeys(path))
    # it would say that there is no hostfile, which is as it should be
    options = _options(request, "error")
    arguments = [
        *request.runner,
        *("--hostfile", str(folder / "none")),  # not the /job/hostfile it would look for
        *_places(request.ranks, environment),
        *options,
    ]
    return [*arguments, "--module", "stacking_ds", *command], environment


def _places(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Which GPUs the ranks take. DeepSpeed ignores CUDA_VISIBLE_DEVICES where it is told a number,
    and then takes the first ones, which may be somebody else's."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

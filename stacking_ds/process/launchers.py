"""Launchers' variables: this process's rank, how many there are, and where they meet.

deepspeed, torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
mpirun (Open MPI), hydra    a size; mpi4py tells the rest
srun                   SLURM_PROCID and relatives; the first node of the step is the meeting place
none of them           one process

Without torch, since who says a sentence is asked for errors too.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping

from stacking_ds.errors import ConfigError

# what Open MPI, and MPICH and its relatives, tell a process they started
OPEN_MPI_SIZE, HYDRA_SIZE = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"
OPEN_MPI_RANK, HYDRA_RANK = "OMPI_COMM_WORLD_RANK", "PMI_RANK"
# below the range from which systems take ports for outgoing connections
_FIRST_PORT, _PORTS = 15_000, 15_000


def by_srun() -> bool:
    """True in a task of a SLURM step of several. A batch script's own shell has SLURM_PROCID
    and SLURM_NTASKS too, but is no such step."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def world_size_from_environment() -> int:
    """The number of ranks as the launcher says it; 1 where there is no launcher."""
    return _first_set("WORLD_SIZE", OPEN_MPI_SIZE, "SLURM_STEP_NUM_TASKS", HYDRA_SIZE, otherwise=1)


def rank_from_environment() -> int:
    """This process's rank as the launcher says it; 0 where there is no launcher."""
    slurm = ["SLURM_PROCID"] if by_srun() else []
    return _first_set("RANK", OPEN_MPI_RANK, *slurm, HYDRA_RANK, otherwise=0)


def local_rank_from_environment() -> int:
    """This process's rank on its node as the launcher says it; 0 where there is no launcher."""
    slurm = ["SLURM_LOCALID"] if by_srun() else []
    return _first_set(
        "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", *slurm, "MPI_LOCALRANKID", otherwise=0
    )


def _first_set(*names: str, otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


def is_first_of_node() -> bool:
    """True on the rank that speaks for its node, whose own terminal or log it may be."""
    return local_rank_from_environment() == 0


def marked(message: str) -> str:
    """The message with the rank that says it; rank 0's own as it is."""
    rank = rank_from_environment()
    return message if rank == 0 else f"[rank {rank}] {message}"


_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def complete_environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: a launcher's variables are incomplete, or MPI cannot be asked.
    """
    environment = os.environ
    if "RANK" in environment:
        return _launcher_environment(environment)
    if int(environment.get(OPEN_MPI_SIZE, "1")) > 1:
        return _mpi_environment()
    if by_srun():
        return slurm_environment(environment)
    if int(environment.get(HYDRA_SIZE, "1")) > 1:
        return _mpi_environment()
    return dict(zip(_NAMES, ("0", "1", "0", "1", "127.0.0.1", str(free_port())), strict=True))


def _launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    required = [name for name in _NAMES if name != "LOCAL_WORLD_SIZE"]
    missing = [name for name in required if name not in environment]
    if missing:
        raise ConfigError(
            f"the launcher set RANK but not {', '.join(missing)}; start with "
            f"`deepspeed train.py …` or `torchrun train.py …`, or unset RANK for a single process"
        )
    found = {name: environment[name] for name in required}
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
    found["LOCAL_WORLD_SIZE"] = environment.get(
        "LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1")
    )
    return found


# --------------------------------------------------------------------------- srun


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The same from the variables of a job step. A MASTER_ADDR or MASTER_PORT that is set stays.

    Raises:
        ConfigError: a variable is missing that srun sets.
    """
    try:
        tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        job = int(environment["SLURM_JOB_ID"])
        # a job that was requeued must not wait for the port of its past
        attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
        port = _FIRST_PORT + (7 * job + int(environment["SLURM_STEP_ID"]) + 31 * attempt) % _PORTS
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": environment.get(
                "MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])
            ),
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"srun started several tasks, but the environment does not tell their places "
            f"({type(error).__name__}: {error}); start with plain `srun stacking-ds train …`, and "
            f"let containers pass SLURM_* on"
        ) from None


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or "1")
    return tasks


def first_host(nodes: str) -> str:
    """The first name in SLURM's short form of a list: `gpu[07-09,12],login` begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} names no node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


# --------------------------------------------------------------------------- MPI


def _mpi_environment() -> dict[str, str]:
    """Ranks and a meeting place under mpirun, which sets neither RANK nor MASTER_ADDR."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by MPI, but mpi4py cannot load an MPI library ({error}); install the one "
            f"that mpirun belongs to, or start with `deepspeed` or `torchrun`"
        ) from None
    everyone = MPI.COMM_WORLD
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    several_nodes = everyone.allreduce(node.size) != node.size * everyone.size
    address = os.environ.get("MASTER_ADDR") or address_of_this_node(several_nodes)
    port = os.environ.get("MASTER_PORT") or str(free_port())
    address, port = everyone.bcast((address, port))
    places = map(str, (everyone.rank, everyone.size, node.rank, node.size))
    return dict(zip(_NAMES, (*places, address, port), strict=True))


# ------------------------------------------------------------------------- network


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def address_of_this_node(several_nodes: bool) -> str:
    """The IPv4 address under which others reach this node.

    Raises:
        ConfigError: it has none, or several and its name does not tell which.
    """
    named = _resolved_name()
    if named is not None and not (several_nodes and ipaddress.ip_address(named).is_loopback):
        return named
    if not several_nodes:
        return "127.0.0.1"
    return _only_address("MASTER_ADDR to the address that the other nodes reach rank 0 under")[1]


def interface_for_gloo() -> str | None:
    """The interface for GLOO_SOCKET_IFNAME on a node of several; None where gloo finds it alone.

    It binds to what the node's name resolves to. Where /etc/hosts says 127.0.1.1 for that, as
    Debian's installer writes it, no other node could connect.

    Raises:
        ConfigError: the name resolves to nothing useful, and there are several interfaces.
    """
    named = _resolved_name()
    if named is not None and not ipaddress.ip_address(named).is_loopback:
        return None
    return _only_address("GLOO_SOCKET_IFNAME to the interface that joins the nodes")[0]


def _resolved_name() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _only_address(what_to_set: str) -> tuple[str, str]:
    import psutil  # every command would wait for it

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        (name, one.address)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for one in addresses
        if one.family == socket.AF_INET and not ipaddress.ip_address(one.address).is_loopback
    ]
    if len(found) == 1:
        return found[0]
    choices = ", ".join(f"{name} {address}" for name, address in found) or "none but loopback"
    raise ConfigError(
        f"the name of this node, {socket.gethostname()}, resolves to {_resolved_name()}, which "
        f"other nodes cannot reach, and its interfaces ({choices}) leave no single choice: set "
        f"{what_to_set}, or mend /etc/hosts"
    )

"""Launchers' variables: this process's rank, how many there are, and where they meet.

deepspeed and torchrun tell the meeting place, mpi4py finds one under mpirun (Open MPI) and hydra,
and under srun it is the first node of the step. Where there is none of them there is one process.

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
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_TOLD = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    (OPEN_MPI_RANK, OPEN_MPI_SIZE, "OMPI_COMM_WORLD_LOCAL_RANK"),
    _SLURM,
    (HYDRA_RANK, HYDRA_SIZE, "MPI_LOCALRANKID"),
)
"""Where each launcher tells the rank, the number of ranks, and the rank on its node; the first
launcher of these that does is believed."""
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# below the range from which systems take ports for outgoing connections
_FIRST_PORT, _PORTS = 15_000, 15_000


def by_srun() -> bool:
    """True in a task of a SLURM step of several. A batch script's own shell has SLURM_PROCID
    and SLURM_NTASKS too, but is no such step."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _told(column: int, otherwise: int) -> int:
    names = [launcher[column] for launcher in _TOLD if launcher is not _SLURM or by_srun()]
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


def rank_from_environment() -> int:
    """This process's rank as the launcher says it; 0 where there is no launcher."""
    return _told(0, otherwise=0)


def world_size_from_environment() -> int:
    """The number of ranks as the launcher says it; 1 where there is no launcher."""
    return _told(1, otherwise=1)


def is_first_of_node() -> bool:
    """True on the rank that speaks for its node, whose own terminal or log it may be."""
    return _told(2, otherwise=0) == 0


def marked(message: str) -> str:
    """The message with the rank that says it; rank 0's own as it is."""
    rank = rank_from_environment()
    return message if rank == 0 else f"[rank {rank}] {message}"


def complete_environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a ConfigError
    where a launcher's variables are incomplete, or MPI cannot be asked."""
    environment = os.environ
    if "RANK" in environment:
        # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
        ranks_here = environment.get("LOCAL_SIZE", "1")
        found = {"LOCAL_WORLD_SIZE": ranks_here, **environment}
        missing = [name for name in _NAMES if name not in found]
        if missing:
            raise ConfigError(
                f"the launcher set RANK but not {', '.join(missing)}; start with `deepspeed "
                f"train.py …` or `torchrun train.py …`, or unset RANK for a single process"
            )
        return {name: found[name] for name in _NAMES}
    if int(environment.get(OPEN_MPI_SIZE, "1")) > 1:
        return _mpi_environment()
    if by_srun():
        return slurm_environment(environment)
    if int(environment.get(HYDRA_SIZE, "1")) > 1:
        return _mpi_environment()
    return dict(zip(_NAMES, ("0", "1", "0", "1", "127.0.0.1", str(free_port())), strict=True))


# --------------------------------------------------------------------------- srun


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The same from the variables of a job step; a ConfigError where one is missing that srun sets.
    A MASTER_ADDR or MASTER_PORT that is set stays."""
    try:
        tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        # a job that was requeued must not wait for the port of its past
        attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
        first = first_host(environment["SLURM_STEP_NODELIST"])
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": environment.get("MASTER_ADDR", first),
            "MASTER_PORT": environment.get(
                "MASTER_PORT", str(_FIRST_PORT + (7 * job + step + 31 * attempt) % _PORTS)
            ),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"srun started several tasks, but the environment does not tell their places "
            f"({type(error).__name__}: {error}); start with plain `srun stacking-ds train …`, and "
            f"let containers pass SLURM_* on"
        ) from None


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]."""
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text) is None:
        raise ValueError(f"{text!r} is no list of tasks per node")
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or "1"))]


def first_host(nodes: str) -> str:
    """The first name in SLURM's short form of a list: `gpu[07-09,12],login` begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} names no node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


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
    """The IPv4 address under which others reach this node; a ConfigError where it has none, or
    several and its name does not tell which."""
    named, reachable = _resolved_name()
    if reachable or not several_nodes:
        return named or "127.0.0.1"
    return _only_address("MASTER_ADDR to the address that the other nodes reach rank 0 under")[1]


def interface_for_gloo() -> str | None:
    """The interface for GLOO_SOCKET_IFNAME on a node of several; None where gloo finds it alone.

    It binds to what the node's name resolves to. Where /etc/hosts says 127.0.1.1 for that, as
    Debian's installer writes it, no other node could connect; then a ConfigError where there are
    several interfaces.
    """
    if _resolved_name()[1]:
        return None
    return _only_address("GLOO_SOCKET_IFNAME to the interface that joins the nodes")[0]


def _resolved_name() -> tuple[str | None, bool]:
    """What this node's name resolves to, and whether other nodes could reach it there."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None, False
    return named, not ipaddress.ip_address(named).is_loopback


def _only_address(what_to_set: str) -> tuple[str, str]:
    import psutil  # every command would wait for it

    up = psutil.net_if_stats()
    found = [
        (name, one.address)
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if name in up and up[name].isup and one.family == socket.AF_INET
        if not ipaddress.ip_address(one.address).is_loopback
    ]
    if len(found) == 1:
        return found[0]
    choices = ", ".join(f"{name} {address}" for name, address in found) or "none but loopback"
    raise ConfigError(
        f"the name of this node, {socket.gethostname()}, resolves to {_resolved_name()[0]}, which "
        f"other nodes cannot reach, and its interfaces ({choices}) leave no single choice: set "
        f"{what_to_set}, or mend /etc/hosts"
    )

"""What launchers say of this process before it has met any other: its rank, and how many there are.

Without torch, since it is asked for errors too.
"""

import os
import socket

# what Open MPI, and MPICH and its relatives, tell a process they started
OPEN_MPI_SIZE, HYDRA_SIZE = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def by_srun() -> bool:
    """Is this a task of a step of several? A batch script's own shell has SLURM_PROCID and
    SLURM_NTASKS too, but is no such step."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def world_size_from_environment() -> int:
    """The number of ranks as the launcher says it; 1 where there is no launcher."""
    names = ("WORLD_SIZE", OPEN_MPI_SIZE, "SLURM_STEP_NUM_TASKS", HYDRA_SIZE)
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def rank_from_environment() -> int:
    """This process's rank as the launcher says it; 0 where there is no launcher."""
    names = [*RANK_VARIABLES]
    if by_srun():
        names.insert(2, "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def local_rank_from_environment() -> int:
    """This process's rank on its node as the launcher says it; 0 where there is no launcher."""
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]
    if by_srun():
        names.insert(2, "SLURM_LOCALID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def free_port() -> int:
    """A TCP port that nobody listens on at present, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

"""What ssh and SLURM read on emulated hosts."""

import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.namespaces import program

__all__ = ["write_host_settings", "write_slurm_settings"]

_SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PidFile none
MaxStartups 100:30:200
MaxSessions 100
"""
_SSH_CONFIG = """\
Host *
    IdentityFile /etc/ssh/key
    IdentitiesOnly yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 5
"""

# cred_expire is also how long a requeued job waits. config_overrides: a host says it has more
# processors than the machine has. MinJobAge: a job's record outlives the test. Jobs in `urgent`
# take nodes from those in the other partitions.
_SLURM_CONFIG = """\
ClusterName=tests
SlurmctldHost={head}
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={requeue_seconds}
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1,defer_batch
ReturnToService=2
JobRequeue=1
KillWait={kill_wait_seconds}
SlurmdTimeout={slurmd_timeout_seconds}
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
WaitTime=0
NodeName={nodes} Port=17001 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=cancelling Nodes=ALL PreemptMode=CANCEL MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE State=UP
"""
# Without it slurmd looks for a cgroup hierarchy, and ends where none is mounted.
_CGROUP_CONFIG = """\
CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""
# The hosts share /tmp, but not /dev/shm.
_MPI_CONFIG = "PMIxCliTmpDirBase=/dev/shm\n"


def _new_key(path: Path) -> str:
    """Make an ssh key pair; its public half."""
    subprocess.run(
        [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path],
        check=True,
    )
    return path.with_name(f"{path.name}.pub").read_text()


def write_host_settings(directory: Path, addresses: Mapping[str, str]) -> None:
    """Write each host's share of /etc into a folder of its name, and make root's home for all."""
    (directory / "home").mkdir()
    key, public = directory / "key", _new_key(directory / "key")
    known = {node: _new_key(directory / f"host-key-{node}") for node in addresses}
    for node in addresses:
        ssh = directory / node / "ssh"
        ssh.mkdir(parents=True)
        shutil.copy(key, ssh / "key")
        shutil.copy(directory / f"host-key-{node}", ssh / "host_key")
        (ssh / "key.pub").write_text(public)
        (ssh / "known_hosts").write_text(
            "".join(f"{name},{addresses[name]} {line}" for name, line in known.items())
        )
        (ssh / "sshd_config").write_text(_SSHD_CONFIG)
        (ssh / "ssh_config").write_text(_SSH_CONFIG)
        etc = directory / node
        names = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "resolv.conf").touch()
        (etc / "passwd").write_text(_passwd(directory / "home"))


def _passwd(home: Path) -> str:
    """The machine's users; root lives elsewhere: a login runs what the machine's ~ says."""
    users = Path("/etc/passwd").read_text().splitlines()
    others = "".join(f"{line}\n" for line in users if not line.startswith("root:"))
    return f"root:x:0:0:root:{home}:/bin/bash\n{others}"


def write_slurm_settings(directory: Path, nodes: Sequence[str], values: Mapping[str, int]) -> None:
    """Write the cluster's settings and its key, and make its folders."""
    config = _SLURM_CONFIG.format(
        directory=directory, nodes=",".join(nodes), head=nodes[0], **values
    )
    (directory / "slurm.conf").write_text(config)
    (directory / "cgroup.conf").write_text(_CGROUP_CONFIG)
    (directory / "mpi.conf").write_text(_MPI_CONFIG)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for folder in ("state", *(f"spool-{node}" for node in nodes)):
        (directory / folder).mkdir()

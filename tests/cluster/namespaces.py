"""The parts emulated hosts are made of: programs, waiting, namespaces, ssh settings."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = [
    "SYSTEM_PATH",
    "Command",
    "child",
    "enter",
    "missing",
    "missing_program",
    "program",
    "remove_abandoned",
    "unshare",
    "wait_until",
]

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

_PROGRAMS = ["ip", "unshare", "nsenter", "mount", "hostname", "sshd", "ssh", "ssh-keygen", "pdsh"]
_Value = TypeVar("_Value")


def missing() -> str | None:
    """Why there can be no emulated hosts on this machine; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "emulated hosts need root on Linux"
    if Path("/proc/self/setgroups").read_text().strip() == "deny":
        return "sshd needs a root who may set groups, not one of a user namespace"
    if reason := missing_program(_PROGRAMS):
        return reason
    spaces = unshare("net", "uts", "ipc", "mount", "pid")
    links = "ip link add br0 type bridge && ip link add p1 type veth peer name p2"
    for what, command in {"namespaces": "true", "a bridge or a veth pair": links}.items():
        probe = subprocess.run(
            [*spaces, "--mount-proc", "sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": SYSTEM_PATH},
        )
        if probe.returncode:
            return f"the kernel refuses {what}: {probe.stderr.strip()}"
    return None


def missing_program(names: Collection[str]) -> str | None:
    """Which of these programs are not installed, as a reason; None if all are."""
    absent = [name for name in names if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def program(name: str) -> str:
    """The full path of a program, also of one in a system folder that PATH leaves out."""
    path = shutil.which(name, path=SYSTEM_PATH)
    assert path is not None, f"{name} is not installed"
    return path


def unshare(*kinds: str) -> list[str]:
    """The beginning of a command that shall run in new namespaces, which end with it."""
    return [program("unshare"), *(f"--{kind}" for kind in kinds), "--fork", "--kill-child"]


def enter(pid: int, *kinds: str) -> list[str]:
    """The beginning of a command that shall run in namespaces of the process `pid`."""
    return [program("nsenter"), "--target", str(pid), *(f"--{kind}" for kind in kinds)]


def child(pid: int) -> int:
    """The first child of a process, once there is one; 0 if the process has ended."""

    def first() -> int | None:
        try:
            parent = psutil.Process(pid)
            if children := parent.children():
                return int(children[0].pid)
            return 0 if parent.status() == psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return 0

    return wait_until(first, f"process {pid} has a child")


class Command(subprocess.Popen[bytes]):
    """A command in a host. Signals go to the command itself, and `returncode` is its own."""

    @property
    def inner(self) -> psutil.Process:
        """The command's process (`pid` is that of the nsenter which waits for it)."""
        return psutil.Process(child(self.pid))

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            self.inner.send_signal(sig)


def wait_until(
    condition: Callable[[], _Value | None],
    what: str | Callable[[], str],
    *,
    timeout: float = 15,
    interval: float = 0.02,
) -> _Value:
    """Poll until `condition` gives something other than None and False, and return that.

    Raises:
        AssertionError: after `timeout` seconds; it says `what` did not come about.
    """
    deadline = time.monotonic() + timeout
    while (value := condition()) is None or value is False:
        if time.monotonic() > deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout:g} s: {text}")
        time.sleep(interval)
    return value


def remove_abandoned(prefix: str) -> None:
    """Remove the folders `prefix`-PID-* in the temporary folder whose process is no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}-*-*"):
        owner = folder.name.removeprefix(f"{prefix}-").split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder)

"""Emulated hosts on one Linux machine, as root: each with its own address, name, processes, sshd.

A host is a set of namespaces (net, uts, pid, ipc, mount) whose process 1 is an sshd. All of them
live inside one outer pid namespace, the switch, whose process 1 reads a pipe that this process
holds: when this process ends, in whatever way, the kernel ends every process of every host.
Files and /tmp are shared with the machine; its network, /etc, /run and ~ stay as they are: all
hosts share one empty home of their own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.cluster.namespaces import (
    SYSTEM_PATH,
    Command,
    child,
    enter,
    missing,
    program,
    remove_abandoned,
    unshare,
    wait_until,
)
from tests.cluster.settings import write_host_settings

__all__ = ["Command", "Hosts", "missing", "wait_until"]

_SUBNET = "10.77.0"
_SPACES = ("uts", "ipc", "mount", "pid")  # and net, which a host keeps when it crashes
# On the end of its input, process 1 of the switch ends every host and removes their files.
_SWITCH = 'cat >/dev/null; kill -9 -1; rm -rf "$1"'
# The settings are bound first: a temporary folder may itself be below what is mounted next.
_BOOT = """set -e
hostname "$1"
for name in passwd hosts nsswitch.conf resolv.conf ssh; do
    if [ -e "/etc/$name" ]; then mount --bind "$2/$name" "/etc/$name"; fi
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec "$3" -D -e
"""


class Hosts:
    """node1 ... nodeN, which reach one another, and nothing else, by ssh.

    Use it as a context manager. Hosts of several test sessions on a machine do not meet.
    """

    def __init__(self, count: int, *, prefix: str = "emulated-hosts") -> None:
        self.names = [f"node{index}" for index in range(1, count + 1)]
        self._prefix = prefix
        self._directory: Path | None = None
        self._switch: subprocess.Popen[bytes] | None = None
        self._networks: dict[str, int] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._booted: dict[str, subprocess.Popen[bytes]] = {}
        self._first: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    @property
    def directory(self) -> Path:
        """Where logs and settings are, until `down`."""
        assert self._directory is not None, "the hosts are not up"
        return self._directory

    @property
    def environment(self) -> dict[str, str]:
        """What a command gets that asks for nothing else; `deepspeed` and `python` are ours."""
        path = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
        return {"PATH": path, "HOME": str(self.directory / "home"), "LANG": "C.UTF-8"}

    def address(self, node: str) -> str:
        return f"{_SUBNET}.{self.names.index(node) + 1}"

    def up(self) -> None:
        """Start all hosts; remove the files of sessions that were killed."""
        assert self._switch is None, "the hosts are up"
        remove_abandoned(self._prefix)
        self._directory = Path(tempfile.mkdtemp(prefix=f"{self._prefix}-{os.getpid()}-"))
        try:
            write_host_settings(self._directory, {node: self.address(node) for node in self.names})
            self._start_switch()
            for node in self.names:
                self._connect(node)
            self._boot(self.names)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End all hosts and remove their files. Again is no harm."""
        if self._switch is not None:
            assert self._switch.stdin is not None
            self._switch.stdin.close()
            self._switch.wait()
        for process in self._children:
            process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._switch = self._directory = None
        for record in (self._children, self._networks, self._booted, self._first):
            record.clear()

    def start(
        self,
        node: str,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        log: Path,
    ) -> Command:
        """Start `command` in a host, in a session of its own; `env` is its whole environment."""
        assert self.is_up(node), f"{node} is down"
        with log.open("ab") as stream:
            place = enter(self._first[node], "net", *_SPACES, f"wd={cwd or self.directory}")
            started = Command(
                [*place, "--", *map(str, command)],
                env=dict(self.environment if env is None else env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(started)
        # from here on a crash of the host ends it
        child(started.pid)
        return started

    def run(
        self,
        node: str,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in a host; what it wrote, on stderr too, comes back as `stdout`.

        Raises:
            AssertionError: with what it wrote, if it runs for more than `timeout` seconds.
        """
        arguments = [str(argument) for argument in command]
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix="run-") as stream:
            log = Path(stream.name)
            process = self.start(node, arguments, cwd=cwd, env=env, log=log)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output = log.read_text(errors="replace")
        assert code is not None, f"{arguments} in {node} takes over {timeout:g} s:\n{output}"
        return subprocess.CompletedProcess(arguments, code, output, "")

    def is_up(self, node: str) -> bool:
        return node in self._booted and self._booted[node].poll() is None

    def crash(self, node: str) -> None:
        """End every process of the host at once; the kernel tells its peers (FIN or RST)."""
        os.kill(self._first.pop(node), signal.SIGKILL)
        self._booted.pop(node).wait()

    def boot(self, node: str) -> None:
        """Start a crashed host again, with the same address and host key."""
        self._boot([node])

    def unplug(self, node: str) -> None:
        """Pull the host's cable: nothing passes any more, and no peer is told."""
        self._ip(self._switch_pid, "link", "set", f"port-{node}", "down")

    def plug(self, node: str) -> None:
        self._ip(self._switch_pid, "link", "set", f"port-{node}", "up")

    def processes(self, node: str, containing: str = "") -> list[psutil.Process]:
        """The host's living processes with this text in their command line, seen from outside."""
        if not self.is_up(node):
            return []
        home = os.stat(f"/proc/{self._first[node]}/ns/pid")
        found = []
        for process in psutil.process_iter():
            # a process may end meanwhile; one that may not be looked at is not a host's
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if os.path.samestat(os.stat(f"/proc/{process.pid}/ns/pid"), home):
                    alive = process.status() != psutil.STATUS_ZOMBIE
                    if alive and containing in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def mend(self, *, spare: Collection[str] = ()) -> None:
        """Plug in and boot all hosts; end all that runs in them but sshd and programs to spare."""
        for node in self.names:
            self.plug(node)
            self._clean(node, spare)
        self._boot([node for node in self.names if not self.is_up(node)])
        self._children = [process for process in self._children if process.poll() is None]

    @staticmethod
    def hostfile(path: Path, slots: Mapping[str, int]) -> Path:
        """Write a hostfile as the `deepspeed` launcher reads it."""
        path.write_text("".join(f"{node} slots={count}\n" for node, count in slots.items()))
        return path

    @property
    def _switch_pid(self) -> int:
        assert self._switch is not None, "the hosts are not up"
        return child(self._switch.pid)

    def _start_switch(self) -> None:
        self._switch = subprocess.Popen(
            [*unshare("net", "pid"), "sh", "-c", _SWITCH, "switch", str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._ip(self._switch_pid, "link", "add", "bridge", "type", "bridge")
        self._ip(self._switch_pid, "link", "set", "bridge", "up")

    def _connect(self, node: str) -> None:
        """Give the host a network, held by an idle process, and a cable to the switch."""
        switch = self._switch_pid
        holder = subprocess.Popen(
            [*enter(switch, "pid"), "--", *unshare("net"), "sleep", "infinity"],
            start_new_session=True,
        )
        self._children.append(holder)
        pid = child(child(holder.pid))
        port, eth0 = f"port-{node}", ["peer", "name", "eth0", "netns", str(pid)]
        self._ip(switch, "link", "add", port, "type", "veth", *eth0)
        self._ip(switch, "link", "set", port, "master", "bridge", "up")
        self._ip(pid, "link", "set", "lo", "up")
        self._ip(pid, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
        self._ip(pid, "link", "set", "eth0", "up")
        self._networks[node] = pid

    def _boot(self, nodes: Sequence[str]) -> None:
        for node in nodes:
            assert not self.is_up(node), f"{node} is up"
            network = f"net=/proc/{self._networks[node]}/ns/net"
            spaces = [*unshare(*_SPACES), "--mount-proc"]
            boot = ["sh", "-c", _BOOT, "boot", node, str(self.directory / node), program("sshd")]
            with (self.directory / f"{node}.log").open("wb") as stream:
                self._booted[node] = subprocess.Popen(
                    [*enter(self._switch_pid, "pid", network), "--", *spaces, *boot],
                    env={"PATH": SYSTEM_PATH},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._children.append(self._booted[node])
        for node in nodes:
            self._await_sshd(node)
            self._first[node] = child(child(self._booted[node].pid))

    def _await_sshd(self, node: str) -> None:
        log = self.directory / f"{node}.log"
        wait_until(
            lambda: "Server listening on 0.0.0.0" in log.read_text(),
            lambda: f"{node} boots:\n{log.read_text()}",
        )

    def _ip(self, pid: int, *arguments: str) -> None:
        """Run `ip` in the network of a process."""
        subprocess.run([*enter(pid, "net"), "--", program("ip"), *arguments], check=True)

    def _clean(self, node: str, spare: Collection[str]) -> None:
        def kill() -> bool:
            """Kill what is to go; whether nothing was."""
            clean = True
            for process in self.processes(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.pid != self._first[node] and process.name() not in spare:
                        clean = False
                        process.kill()
            return clean

        wait_until(kill, lambda: f"{node} is clean: {self.processes(node)}")

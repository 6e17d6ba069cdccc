"""Hosts of a job: the hostfile, a command on all of them by ssh, and the census of an attempt's
processes, on all hosts and on this machine."""

import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import stacking_ds
from stacking_ds.errors import ConfigError
from stacking_ds.files import DamagedFileError, read_text
from stacking_ds.launch.sweep import Action, Found, sweep

PACKAGE_FOLDER = Path(stacking_ds.__file__).parents[1]
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o BatchMode=yes"
"""For whoever starts ssh: else it waits for ever for a host whose cable was pulled."""

_LINE = re.compile(r"(\S+)\s+slots=(\d{1,6})", re.ASCII)
# what an editor leaves at the start of a file and nobody sees
_UNSEEN = dict.fromkeys(map(ord, "\ufeff\u200b"))
# what begins with - would be an option of ssh; a : would name a module of pdsh
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A host, as ssh knows it, and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of the file, in its order; # begins a comment. Blanks around a line and a byte
    order mark before it do not count.

    Raises:
        ConfigError: the file cannot be read, or a line of it is not a host; with its number.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, DamagedFileError) as error:
        raise ConfigError(
            f"cannot read the hostfile {path} ({error}); give a text file with `name slots=N` lines"
        ) from None
    seen: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(lines, start=1):
        text, where = line.partition("#")[0].translate(_UNSEEN), f"{path}:{number}"
        text = " ".join(text.split())
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if not found:
            raise ConfigError(f"{where}: {text!r} is not a host; write `name slots=N`")
        name, slots = found[1], int(found[2])
        if not _NAME.fullmatch(name) and not _is_ipv6(name):
            raise ConfigError(
                f"{where}: {name!r} is not a host name; use letters, digits, . _ and -, and give "
                f"user and port in ~/.ssh/config"
            )
        if slots == 0:
            raise ConfigError(
                f"{where}: host {name} has slots=0; give it at least one, or take its line out"
            )
        if name in seen:
            raise ConfigError(
                f"{where}: host {name} stands in line {seen[name]} already; keep one line with all "
                f"its slots"
            )
        seen[name] = number
        hosts.append(Host(name, slots))
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host; write `name slots=N` lines into it")
    return hosts


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).version == 6 and "%" not in name
    except ValueError:
        return False


def draw_hostfile(hosts: Sequence[Host]) -> str:
    """The text of a hostfile with these hosts."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


# --------------------------------------------------------------------------------- ssh


def run_on_hosts(
    hosts: Sequence[str], command: str, *, port: int | None, seconds: float
) -> dict[str, tuple[str, str | None]]:
    """Run `command` on every host; what each has printed, and what the trouble was with it: None
    where the command ended with exit code 0.

    Args:
        hosts: names that a hostfile may hold; ssh would take others for options.
        command: for the hosts' shells, of words that were checked.
        port: of the ssh servers; None for what ~/.ssh/config says.
        seconds: after which a host is said not to have answered.
    """
    at_port = [] if port is None else ["-p", str(port)]
    ssh = ["ssh", *SSH_OPTIONS.split(), "-o", "ConnectTimeout=5", *at_port, "--"]

    def answer(host: str) -> tuple[str, str | None]:
        try:
            done = subprocess.run(
                [*ssh, host, command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                start_new_session=True,  # Ctrl-C is for the launcher, which still needs the hosts
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "", f"no answer in {seconds:.0f} s"
        except FileNotFoundError:
            return "", "there is no ssh on this machine"
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return done.stdout, said if done.returncode else None

    with ThreadPoolExecutor(max_workers=64) as pool:  # it starts no more than it needs
        return dict(zip(hosts, pool.map(answer, hosts), strict=True))


# ------------------------------------------------------------------------------ census


@dataclass(frozen=True)
class ProcessCount:
    """The marked processes by host (this machine is ""), and the hosts that did not say."""

    found: dict[str, Found]
    silent: dict[str, str]

    @property
    def processes(self) -> int:
        return sum(found.processes for found in self.found.values())

    @property
    def ranks(self) -> set[int]:
        return {rank for found in self.found.values() for rank in found.ranks}


@dataclass(frozen=True)
class Census:
    """Asks the same hosts about the same marker again and again."""

    hosts: Sequence[str]
    marker: str
    port: int | None
    seconds: float

    def take(self, action: Action = "count") -> ProcessCount:
        """Take `action` (see `sweep`) everywhere, at once; what was found before it."""
        found, silent = {}, {}
        command = (
            f"env PYTHONPATH={PACKAGE_FOLDER} {sys.executable} -P -m stacking_ds.launch.sweep "
            f"{self.marker} --action {action}"
        )
        answers = run_on_hosts(self.hosts, command, port=self.port, seconds=self.seconds)
        for host, (output, trouble) in answers.items():
            if trouble is not None:
                silent[host] = trouble
                continue
            try:
                # what a shell's start-up files print comes before
                raw = json.loads(output.strip().splitlines()[-1])
                found[host] = Found(int(raw["processes"]), tuple(raw["ranks"]))
            except (ValueError, LookupError, TypeError):
                silent[host] = f"it said {output[:80]!r}"
        # last, since a runner that is killed takes the way to the other hosts with it; and a rank
        # is asked to stop once, which it was already if this machine is one of the hosts
        asking = self.hosts and action in ("stop-ranks", "stop")
        found[""] = sweep(self.marker, "count" if asking else action)
        return ProcessCount(found, silent)

"""One command on many hosts at once by ssh, each with a time limit."""

import ipaddress
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stacking_ds.errors import ConfigError
from stacking_ds.files import DamagedFileError, read_text

# ---- The hosts of a job and their ranks: `name slots=N`, one a line.


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
        text = " ".join(line.partition("#")[0].translate(_UNSEEN).split())
        if not text:
            continue
        host = _host(text, f"{path}:{number}")
        if host.name in seen:
            raise ConfigError(
                f"{path}:{number}: host {host.name} stands in line {seen[host.name]} already; "
                f"keep one line with all its slots"
            )
        seen[host.name] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host; write `name slots=N` lines into it")
    return hosts


def _host(text: str, where: str) -> Host:
    found = _LINE.fullmatch(text)
    if not found:
        raise ConfigError(f"{where}: {text!r} is not a host; write `name slots=N`")
    name, slots = found[1], int(found[2])
    if not _NAME.fullmatch(name) and not _is_ipv6(name):
        raise ConfigError(
            f"{where}: {name!r} is not a host name; use letters, digits, . _ and -, and give user "
            f"and port in ~/.ssh/config"
        )
    if slots == 0:
        raise ConfigError(
            f"{where}: host {name} has slots=0; give it at least one, or take its line out"
        )
    return Host(name, slots)


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).version == 6 and "%" not in name
    except ValueError:
        return False


def draw_hostfile(hosts: Sequence[Host]) -> str:
    """The text of a hostfile with these hosts."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


# ---- One command on many hosts at once by ssh, each with a time limit.


_AT_ONCE = 64
_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=5"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
)


@dataclass(frozen=True)
class Answer:
    """What a host answered; `trouble` is None where the command ended with exit code 0."""

    host: str
    output: str
    trouble: str | None


def run_on_hosts(
    hosts: Sequence[str], command: str, *, port: int | None, seconds: float
) -> list[Answer]:
    """Run `command` on every host; the answers in the order of the hosts.

    Args:
        hosts: names that a hostfile may hold; ssh would take others for options.
        command: for the hosts' shells, of words that were checked.
        port: of the ssh servers; None for what ~/.ssh/config says.
        seconds: after which a host is said not to have answered.
    """
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(lambda host: _run(host, command, port, seconds), hosts))


def _run(host: str, command: str, port: int | None, seconds: float) -> Answer:
    at_port = [] if port is None else ["-p", str(port)]
    try:
        done = subprocess.run(
            ["ssh", *_OPTIONS, *at_port, "--", host, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,  # Ctrl-C is for the launcher, which still needs the hosts
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, "", f"no answer in {seconds:.0f} s")
    except FileNotFoundError:
        return Answer(host, "", "there is no ssh on this machine")
    if done.returncode == 0:
        return Answer(host, done.stdout, None)
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Answer(host, done.stdout, said)

"""One command on many hosts at once by ssh, each with a time limit."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

__all__ = ["Answer", "run_on_hosts"]

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

"""What is left of an attempt on all of its hosts and on this machine."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stacking_ds.console import first_of
from stacking_ds.launch.request import PACKAGE_FOLDER
from stacking_ds.launch.ssh import Answer, run_on_hosts
from stacking_ds.launch.sweep import Action, Found, sweep

__all__ = ["Census", "Count"]


@dataclass(frozen=True)
class Count:
    """The marked processes by host (this machine is ""), and the hosts that did not say."""

    found: dict[str, Found]
    silent: dict[str, str]

    @property
    def processes(self) -> int:
        return sum(found.processes for found in self.found.values())

    @property
    def ranks(self) -> set[int]:
        return {rank for found in self.found.values() for rank in found.ranks}

    def places(self) -> str:
        """Where there are processes, for people."""
        return first_of(
            [host or "this machine" for host, found in self.found.items() if found.processes]
        )


class Census:
    """Asks the same hosts about the same marker again and again."""

    def __init__(
        self, hosts: Sequence[str], marker: str, *, port: int | None, seconds: float
    ) -> None:
        self._hosts, self._marker = list(hosts), marker
        self._port, self._seconds = port, seconds

    def take(self, action: Action = "count") -> Count:
        """Do `action` (see `sweep`) everywhere, at once; what was found before it."""
        found, silent = {}, {}
        if self._hosts:
            command = (
                f"env PYTHONPATH={PACKAGE_FOLDER} {sys.executable} -P -m stacking_ds.launch.sweep "
                f"{self._marker} --action {action}"
            )
            for answer in run_on_hosts(
                self._hosts, command, port=self._port, seconds=self._seconds
            ):
                heard = _read(answer)
                if heard is None:
                    silent[answer.host] = answer.trouble or f"it said {answer.output[:80]!r}"
                else:
                    found[answer.host] = heard
        # last, since a runner that is killed takes the way to the other hosts with it; and a rank
        # is asked to stop once, which it was already if this machine is one of the hosts
        asking = self._hosts and action in ("stop-ranks", "stop")
        found[""] = sweep(self._marker, "count" if asking else action)
        return Count(found, silent)


def _read(answer: Answer) -> Found | None:
    if answer.trouble is not None:
        return None
    try:
        # what a shell's start-up files print comes before
        raw = json.loads(answer.output.strip().splitlines()[-1])
        return Found(int(raw["processes"]), tuple(raw["ranks"]))
    except (ValueError, LookupError, TypeError):
        return None

"""`stacking-ds doctor`: the options, and the table."""

import argparse
import json
import os
import textwrap
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacking_ds.commands.train import add_local_rank, add_set
from stacking_ds.console import join_names, plural, say
from stacking_ds.errors import EXIT_USER_ERROR, ConfigError
from stacking_ds.files import write_whole

if TYPE_CHECKING:
    from stacking_ds.distributed.world import World
    from stacking_ds.doctor.checks import Finding


# who asks whether a rank is missing does not want to wait as long as a run would
_MEETING_SECONDS = 45.0
_CHECK_COLUMNS, _VERDICT_COLUMNS, _LINE_COLUMNS = 17, 9, 110
_DESCRIPTION = """\
Start it as you start a run, for example `deepspeed --hostfile hosts --module stacking_ds doctor
--recipe R`, or alone. It looks for what differs between the nodes and for what would stop the run
later; exit code 2 if something would."""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options; it sets `command`, which returns the exit code."""
    parser.description = _DESCRIPTION
    parser.add_argument("--recipe", help="also the recipe, its data and its checkpoints' size")
    add_set(parser)
    parser.add_argument(
        "--run-dir", type=Path, help="where the run will live (runs/<recipe's name>)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it here too")
    add_local_rank(parser)
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    # with it comes DeepSpeed, some of whose functions have torch's default group as an argument's
    # default: imported later they would keep gloo's threads alive, which at exit can abort Python
    from stacking_ds.distributed import process_group
    from stacking_ds.doctor import examination  # noqa: F401

    world = process_group.start(timedelta(seconds=_MEETING_SECONDS))
    try:
        return report(world, options)
    finally:
        process_group.stop()


def report(world: "World", options: argparse.Namespace) -> int:
    """Examine the cluster and print the table on rank 0; the exit code, on every rank.

    Raises:
        ConfigError: on every rank, if the JSON file cannot be written.
    """
    from stacking_ds.doctor.examination import Examination

    world.on_first(lambda: _require_writable(options.json))
    found = Examination(world, options.recipe, options.set, options.run_dir)
    if world.is_first:
        counts = f"{plural(len(found.nodes), 'node')}, {plural(len(found.ranks), 'rank')}"
        say(f"{counts}: {join_names(list(found.nodes))}\n")
    for finding in found.look():
        _say_finding(finding)
    failed: bool = world.broadcast(found.failed)
    world.on_first(lambda: _write(options.json, found.to_record()))
    if world.is_first:
        verdicts = [finding.verdict for finding in found.findings]
        counts = ", ".join(
            [f"{verdicts.count('FAILED'):,} FAILED"] * failed
            + [plural(verdicts.count("warning"), "warning")] * ("warning" in verdicts)
        )
        then = "a run would stop, or be wrong, for what has FAILED" if failed else "a run can start"
        say(f"\n{counts or 'all is well'}: {then}")
    return EXIT_USER_ERROR if failed else 0


def _say_finding(finding: "Finding") -> None:
    lead = f"{finding.check:<{_CHECK_COLUMNS}}{finding.verdict:<{_VERDICT_COLUMNS}}"
    indent, width = " " * len(lead), _LINE_COLUMNS
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    say(fill(finding.text, initial_indent=lead, subsequent_indent=indent))
    if finding.remedy:
        say(fill(f"-> {finding.remedy}", initial_indent=indent, subsequent_indent=f"{indent}   "))


def _require_writable(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError(f"--json {path} is no file in a folder that can be written; name another")


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        write_whole(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write --json {path} ({error.strerror})") from None

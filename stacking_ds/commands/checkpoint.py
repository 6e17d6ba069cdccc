"""`stacking-ds checkpoint list · verify · inspect · use`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from stacking_ds.checkpoint.folders import choose, choose_all, point_to
from stacking_ds.console import say
from stacking_ds.errors import EXIT_USER_ERROR
from stacking_ds.run import directory


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the actions; each sets `command`, which returns the exit code."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], summary: str
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(allow_abbrev=False, name=name, help=summary)
        action.set_defaults(command=command)
        return action

    action = add("list", _list, "what is there")
    action.add_argument("run_dir", type=Path)
    action.add_argument("--json", action="store_true", help="for programs")

    action = add("verify", _verify, "read every byte: is it whole; exit code 2 if not")
    _which(action).add_argument("--all", action="store_true", help="every checkpoint of the run")

    action = add("inspect", _inspect, "what is in it")
    _which(action)
    action.add_argument(
        "--parameters", action="store_true", help="shape, cut and statistics of each parameter"
    )
    action = add(
        "use",
        _use,
        "go on from this one: verify it, and have `latest` name it; exit code 2 if it is not whole",
    )
    action.add_argument("run_dir", type=Path)
    action.add_argument("checkpoint", metavar="STEP", help="e.g. 1000, or step_00001000")


def _which(action: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    action.add_argument("run_dir", type=Path, help="a run's directory, or a checkpoint's")
    which = action.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", help="e.g. 1000; the newest if not given")
    return which


def _list(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.listing import listed, listing

    run_dir = options.run_dir
    say(json.dumps(listed(run_dir), indent=1) if options.json else listing(run_dir))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.listing import verify

    run_dir = options.run_dir
    folders = choose_all(run_dir) if options.all else [choose(run_dir, options.checkpoint)]
    return 0 if verify(folders, say) else EXIT_USER_ERROR


def _inspect(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.listing import contents, parameter_lines

    found = choose(options.run_dir, options.checkpoint)
    say(contents(found))
    if options.parameters:
        say("")
        for line in parameter_lines(found):
            say(line)
    return 0


def _use(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.listing import verify

    run_dir = options.run_dir
    found = choose(run_dir, options.checkpoint)
    with directory.lock(run_dir, remedy="wait for it or stop it first"):
        if not verify([found], say):
            return EXIT_USER_ERROR
        point_to(found)
        if directory.mend_config(run_dir, found):
            say(f"{run_dir / 'config.yaml'} is written anew, from the manifest of {found.name}")
    say(f"`latest` names {found.name}: --resume goes on from it")
    return 0

"""`stacking-ds checkpoint list · verify · inspect`."""

import argparse
import json
import os
import sys
from pathlib import Path

__all__ = ["add_checkpoint"]

_DAMAGED = 2


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the three actions; each sets `command`, which returns the exit code."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser(allow_abbrev=False, name="list", help="what is there")
    action.add_argument("run_dir", type=Path)
    action.add_argument("--json", action="store_true", help="for programs")
    action.set_defaults(command=_list)

    action = actions.add_parser(
        allow_abbrev=False, name="verify", help="read every byte: is it whole; exit code 2 if not"
    )
    which = _which(action)
    which.add_argument("--all", action="store_true", help="every checkpoint of the run")
    action.set_defaults(command=_verify)

    action = actions.add_parser(allow_abbrev=False, name="inspect", help="what is in it")
    _which(action)
    action.add_argument(
        "--parameters", action="store_true", help="shape, cut and statistics of each parameter"
    )
    action.set_defaults(command=_inspect)


def _which(action: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    action.add_argument("run_dir", type=Path, help="a run's directory, or a checkpoint's")
    which = action.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", help="e.g. step_00001000; the newest if not given")
    return which


def _list(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.report import listed, listing

    as_json = options.json
    _say(json.dumps(listed(options.run_dir), indent=1) if as_json else listing(options.run_dir))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.choice import choose, choose_all
    from stacking_ds.checkpoint.report import verify

    if options.all:
        folders = choose_all(options.run_dir)
    else:
        folders = [choose(options.run_dir, options.checkpoint)]
    return 0 if verify(folders, _say) else _DAMAGED


def _inspect(options: argparse.Namespace) -> int:
    from stacking_ds.checkpoint.choice import choose
    from stacking_ds.checkpoint.report import contents, parameter_lines

    found = choose(options.run_dir, options.checkpoint)
    _say(contents(found))
    if options.parameters:
        _say("")
        for line in parameter_lines(found):
            _say(line)
    return 0


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # `| head` has read enough; the exit code is still to come
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""`stacking-ds evaluate · export · report`: what has come of a run."""

import argparse
import json
from pathlib import Path

from stacking_ds.checkpoint.folders import choose
from stacking_ds.console import say, say_on_stderr
from stacking_ds.run.directory import read_config, require_shards
from stacking_ds.run.report import run_table


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `evaluate`; sets `command`, which returns the exit code."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. 1000; the newest if not given")
    parser.add_argument("--data", help="token shards to evaluate on; the run's own if not given")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    config = read_config(options.run_dir)
    if options.data is None:
        require_shards(options.run_dir, config, "--data FOLDER")
    else:
        section = config.data.model_copy(update={"path": options.data})
        config = config.model_copy(update={"data": section})
    # seconds of imports, for a run that is there; before there is a process group
    from stacking_ds.distributed import process_group
    from stacking_ds.train.from_checkpoint import run_heldout
    from stacking_ds.train.plan import open_plan

    plan = open_plan(config)
    found = choose(options.run_dir, options.checkpoint)
    world = process_group.start()
    try:
        result = run_heldout(plan, found, world)
        if world.is_first:
            say(json.dumps({"checkpoint": str(found), **result.record()}))
        result.require_finite(f"of {found}")
    finally:
        process_group.stop()
    return 0


def add_export(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `export`; sets `command`, which returns the exit code."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. 1000; the newest if not given")
    parser.add_argument(
        "--data",
        type=Path,
        help="prepared folder whose tokenizer to export; default the run's",
    )
    parser.add_argument("--out", type=Path, help="folder to write (RUN_DIR/export)")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    config = read_config(options.run_dir)
    from stacking_ds.train.from_checkpoint import export_run, warning_of  # seconds of imports

    found = choose(options.run_dir, options.checkpoint)
    place = export_run(config, options.run_dir, found, options.out, options.data)
    say(f"exported: {place}")
    if warning := warning_of(options.run_dir, found):
        say_on_stderr(f"stacking-ds: warning: {warning}")
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `report`; sets `command`, which returns the exit code."""
    parser.add_argument("run_dir", type=Path)
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    say(run_table(options.run_dir))
    return 0

"""`stacking-ds prepare · data · train · checkpoint · evaluate · export · report · bench`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_ds import __version__
from stacking_ds.bench.commands import add_bench
from stacking_ds.checkpoint_commands import add_checkpoint
from stacking_ds.data.commands import add_prepare
from stacking_ds.data.inspect_commands import add_data
from stacking_ds.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from stacking_ds.job import Job

__all__ = ["main"]

USER_ERROR, NOT_FINITE, INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code.

    0 done (or stopped when asked), 2 something the user can mend, 3 a loss that is not finite,
    130 interrupted.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except UserError as error:
        _say_once(f"stacking-ds: error: {error}", everywhere=error.on_all_ranks)
        return USER_ERROR
    except OSError as error:
        _say_once(
            f"stacking-ds: error: {error}; make room, or mend paths and permissions",
            everywhere=False,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("stacking-ds: interrupted", file=sys.stderr)
        return INTERRUPTED
    except NonFiniteError as error:
        _say_once(f"stacking-ds: error: {error}", everywhere=True)
        return NOT_FINITE


def _say_once(message: str, *, everywhere: bool) -> None:
    """Print an error: once a node if all ranks have it, else on the rank that has it."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if local_rank == "0" or not everywhere:
        prefix = "" if rank == "0" else f"[rank {rank}] "
        print(prefix + message, file=sys.stderr, flush=True)


def _say_on_first_of_node(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stacking-ds", description="Pre-train BERT-style encoders by progressive stacking."
    )
    parser.add_argument("--version", action="version", version=f"stacking-ds {__version__}")
    # `deepspeed --module` puts it before the command; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_prepare(
        commands.add_parser(allow_abbrev=False, name="prepare", help="text to token shards")
    )
    _add_train(
        commands.add_parser(
            allow_abbrev=False, name="train", help="train a recipe, growing from stage to stage"
        )
    )
    add_data(
        commands.add_parser(
            allow_abbrev=False, name="data", help="inspect prepared shards, or lay out their rows"
        )
    )
    add_checkpoint(
        commands.add_parser(
            allow_abbrev=False,
            name="checkpoint",
            help="list, verify or inspect a run's checkpoints",
        )
    )
    _add_evaluate(
        commands.add_parser(
            allow_abbrev=False, name="evaluate", help="held-out loss of a run's checkpoint"
        )
    )
    _add_export(
        commands.add_parser(
            allow_abbrev=False, name="export", help="a run's model as a Hugging Face folder"
        )
    )
    report = commands.add_parser(
        allow_abbrev=False, name="report", help="what happened in a run, as a table"
    )
    report.add_argument("run_dir", type=Path)
    report.set_defaults(command=_report)
    add_bench(
        commands.add_parser(
            allow_abbrev=False,
            name="bench",
            help="what a step, kernels, data, a boundary or LAMB cost, measured here",
        )
    )
    return parser


# --------------------------------------------------------------------------- train


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="a bundled recipe's name, or a .yaml file")
    parser.add_argument("--run-dir", type=Path, help="where the run lives (runs/<recipe's name>)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe, e.g. optimizer.learning_rate=1e-3; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --run-dir if there is one"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe and data, lay out its rows, show the schedule, and stop",
    )
    # launchers pass it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    from stacking_ds import distributed
    from stacking_ds.job import Job
    from stacking_ds.recipe import load_run_config

    try:
        config = load_run_config(options.recipe, options.set)
        job = Job.check(config)
        for phase in job.phases.phases:
            job.ds_config(distributed.world_size_from_environment(), phase)
        # before the ranks meet: who waits for others in a collective is soon taken for dead
        job.lay_out_rows(_say_on_first_of_node, len(os.sched_getaffinity(0)))
    except UserError as error:
        # no rank has met another yet, and all of them read the same files
        error.on_all_ranks = True
        raise
    run_dir = options.run_dir or Path("runs") / config.name
    if options.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.to_yaml()}\n{job.draw()}")
        return 0

    from stacking_ds.host_memory import keep_freed_memory
    from stacking_ds.trainer import train

    world = distributed.start()
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        train(job, world, run_dir, resume=options.resume)
        if world.is_first:
            print(f"see `stacking-ds report {run_dir}`")
    finally:
        distributed.stop()
    return 0


# ------------------------------------------------------------- evaluate and export


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. step_00001000; the newest if not given")
    parser.add_argument("--data", help="token shards to evaluate on; the run's own if not given")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from stacking_ds import distributed
    from stacking_ds.checkpoint.choice import choose
    from stacking_ds.from_checkpoint import run_heldout

    job = _job_of(options.run_dir, options.data)
    found = choose(options.run_dir, options.checkpoint)
    world = distributed.start()
    try:
        result = run_heldout(job, found, world)
        if world.is_first:
            print(json.dumps({"checkpoint": str(found), **dataclasses.asdict(result)}))
    finally:
        distributed.stop()
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. step_00001000; the newest if not given")
    parser.add_argument("--data", help="token shards whose tokenizer to export; default the run's")
    parser.add_argument("--out", type=Path, help="folder to write (RUN_DIR/export)")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from stacking_ds.from_checkpoint import export_run

    job = _job_of(options.run_dir, options.data)
    print(f"exported: {export_run(job, options.run_dir, options.checkpoint, options.out)}")
    return 0


def _job_of(run_dir: Path, data: str | None) -> "Job":
    from stacking_ds.job import Job
    from stacking_ds.run_directory import read_config

    config = read_config(run_dir)
    if data is not None:
        section = config.data.model_copy(update={"path": data})
        config = config.model_copy(update={"data": section})
    return Job.check(config)


def _report(options: argparse.Namespace) -> int:
    from stacking_ds.report import run_table

    print(run_table(options.run_dir))
    return 0

"""`stacking-ds prepare · data · train · launch · again · doctor · checkpoint · evaluate · export ·
report · bench`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_ds import __version__
from stacking_ds.attempts import add_again
from stacking_ds.bench.commands import add_bench
from stacking_ds.checkpoint_commands import add_checkpoint
from stacking_ds.data.commands import add_prepare
from stacking_ds.data.inspect_commands import add_data
from stacking_ds.doctor.commands import add_doctor
from stacking_ds.ending import tell
from stacking_ds.launch.commands import add_launch
from stacking_ds.launch.words import ENCODED, decode_arguments
from stacking_ds.train_command import add_train
from stacking_ds.waiting_threads import let_waiting_threads_sleep

if TYPE_CHECKING:
    from stacking_ds.job import Job

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code, which `ending.tell` lists."""
    let_waiting_threads_sleep()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [ENCODED]:
        words = decode_arguments(words[1])
    options = _parser().parse_args(words)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error)
        if code is None:
            raise
        return code


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
    add_train(
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
    add_launch(
        commands.add_parser(
            allow_abbrev=False,
            name="launch",
            help="DeepSpeed's launcher, watched over: hosts that answer, restarts, nothing left",
        )
    )
    add_doctor(
        commands.add_parser(
            allow_abbrev=False,
            name="doctor",
            help="on all ranks of a cluster: which node differs, and what is missing",
        )
    )
    add_again(
        commands.add_parser(
            allow_abbrev=False, name="again", help="should a run that has ended be started again?"
        )
    )
    add_bench(
        commands.add_parser(
            allow_abbrev=False,
            name="bench",
            help="what a step, kernels, data, a boundary or LAMB cost, measured here",
        )
    )
    return parser


# ------------------------------------------------------------- evaluate and export


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. step_00001000; the newest if not given")
    parser.add_argument("--data", help="token shards to evaluate on; the run's own if not given")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    job = _job_of(options.run_dir, options.data)
    from stacking_ds import distributed
    from stacking_ds.checkpoint.choice import choose
    from stacking_ds.from_checkpoint import run_heldout

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
    job = _job_of(options.run_dir, options.data)
    from stacking_ds.from_checkpoint import export_run

    print(f"exported: {export_run(job, options.run_dir, options.checkpoint, options.out)}")
    return 0


def _job_of(run_dir: Path, data: str | None) -> "Job":
    from stacking_ds.run_directory import read_config

    config = read_config(run_dir)
    from stacking_ds.job import Job  # seconds of imports, for a run that is there

    if data is not None:
        section = config.data.model_copy(update={"path": data})
        config = config.model_copy(update={"data": section})
    return Job.check(config)


def _report(options: argparse.Namespace) -> int:
    from stacking_ds.run_directory import read_config

    read_config(options.run_dir)
    from stacking_ds.report import run_table  # seconds of imports, for a run that is there

    print(run_table(options.run_dir))
    return 0

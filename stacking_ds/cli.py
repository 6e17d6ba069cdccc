"""`stacking-ds prepare · data · train · launch · again · doctor · checkpoint · evaluate · export ·
report · slurm · bench`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_ds import __version__
from stacking_ds.bench.commands import add_bench
from stacking_ds.commands.checkpoint import add_checkpoint
from stacking_ds.commands.data import add_data
from stacking_ds.commands.doctor import add_doctor
from stacking_ds.commands.launch import add_launch
from stacking_ds.commands.prepare import add_prepare
from stacking_ds.commands.slurm import add_slurm
from stacking_ds.commands.train import add_train
from stacking_ds.launch.environment import ENCODED, decode_arguments
from stacking_ds.launch.restart_policy import add_again
from stacking_ds.process.exit import tell
from stacking_ds.process.runtime import let_waiting_threads_sleep
from stacking_ds.process.utf8 import check_names, steady_streams

if TYPE_CHECKING:
    from stacking_ds.train.plan import TrainingPlan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code, which `ending.tell` lists."""
    let_waiting_threads_sleep()
    steady_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == [ENCODED]:
            words = decode_arguments("".join(words[1:2]))
        options = _parser().parse_args(words)
        command: Callable[[argparse.Namespace], int] = options.command
        check_names(words)
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
    for name, summary, add in (
        ("prepare", "text to token shards", add_prepare),
        ("train", "train a recipe, growing from stage to stage", add_train),
        ("data", "inspect prepared shards, or lay out their rows", add_data),
        (
            "checkpoint",
            "list, verify or inspect a run's checkpoints, or choose from which to go on",
            add_checkpoint,
        ),
        ("evaluate", "held-out loss of a run's checkpoint", _add_evaluate),
        ("export", "a run's model as a Hugging Face folder", _add_export),
        ("report", "what happened in a run, as a table", _add_report),
        (
            "launch",
            "DeepSpeed's launcher, watched over: hosts that answer, restarts, nothing left",
            add_launch,
        ),
        ("doctor", "on all ranks of a cluster: which node differs, what is missing", add_doctor),
        ("again", "should a run that has ended be started again?", add_again),
        ("slurm", "the batch scripts, copied to where you stand", add_slurm),
        ("bench", "what a step, kernels, data, a boundary or LAMB cost, measured here", add_bench),
    ):
        add(commands.add_parser(allow_abbrev=False, name=name, help=summary))
    return parser


# ------------------------------------------------------------- evaluate and export


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", help="e.g. 1000; the newest if not given")
    parser.add_argument("--data", help="token shards to evaluate on; the run's own if not given")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    plan = _plan_of(options.run_dir, options.data)
    from stacking_ds.checkpoint.folders import choose
    from stacking_ds.distributed import process_group
    from stacking_ds.train.from_checkpoint import run_heldout

    found = choose(options.run_dir, options.checkpoint)
    world = process_group.start()
    try:
        result = run_heldout(plan, found, world)
        if world.is_first:
            print(json.dumps({"checkpoint": str(found), **result.record()}))
        result.require_finite(f"of {found}")
    finally:
        process_group.stop()
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
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
    from stacking_ds.run.directory import read_config

    config = read_config(options.run_dir)
    from stacking_ds.checkpoint.folders import choose
    from stacking_ds.train.from_checkpoint import export_run, warning_of  # seconds of imports

    found = choose(options.run_dir, options.checkpoint)
    place = export_run(config, options.run_dir, found, options.out, options.data)
    print(f"exported: {place}")
    warning = warning_of(options.run_dir, found)
    if warning:
        print(f"stacking-ds: warning: {warning}", file=sys.stderr)
    return 0


def _plan_of(run_dir: Path, data: str | None) -> "TrainingPlan":
    from stacking_ds.run.directory import read_config, require_shards

    config = read_config(run_dir)
    if data is None:
        require_shards(run_dir, config, "--data FOLDER")
    from stacking_ds.train.plan import open_plan  # seconds of imports, for a run that is there

    if data is not None:
        section = config.data.model_copy(update={"path": data})
        config = config.model_copy(update={"data": section})
    return open_plan(config)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from stacking_ds.run.report import run_table

    print(run_table(options.run_dir))
    return 0

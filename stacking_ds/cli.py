"""`stacking-ds prepare · data · train · launch · again · doctor · checkpoint · evaluate · export ·
report · slurm · bench`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from stacking_ds import __version__
from stacking_ds.bench.commands import add_bench
from stacking_ds.commands.checkpoint import add_checkpoint
from stacking_ds.commands.data import add_data
from stacking_ds.commands.doctor import add_doctor
from stacking_ds.commands.launch import add_again, add_launch, add_slurm
from stacking_ds.commands.prepare import add_prepare
from stacking_ds.commands.results import add_evaluate, add_export, add_report
from stacking_ds.commands.train import add_local_rank, add_train
from stacking_ds.console import check_names, end_streams, steady_streams
from stacking_ds.launch.environment import ENCODED, decode_arguments
from stacking_ds.process.exit import report_error
from stacking_ds.process.runtime import let_waiting_threads_sleep

_COMMANDS = {
    add_prepare: "text to token shards",
    add_train: "train a recipe, growing from stage to stage",
    add_data: "inspect prepared shards, or lay out their rows",
    add_checkpoint: "list, verify or inspect a run's checkpoints, or choose from which to go on",
    add_evaluate: "held-out loss of a run's checkpoint",
    add_export: "a run's model as a Hugging Face folder",
    add_report: "what happened in a run, as a table",
    add_launch: "DeepSpeed's launcher, watched over: hosts that answer, restarts, nothing left",
    add_doctor: "on all ranks of a cluster: which node differs, what is missing",
    add_again: "should a run that has ended be started again?",
    add_slurm: "the batch scripts, copied to where you stand",
    add_bench: "what a step, kernels, data, a boundary or LAMB cost, measured here",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code, which `report_error` lists."""
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
        code = report_error(error)
        if code is None:
            raise
        return code
    finally:
        end_streams()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stacking-ds", description="Pre-train BERT-style encoders by progressive stacking."
    )
    parser.add_argument("--version", action="version", version=f"stacking-ds {__version__}")
    add_local_rank(parser)  # `deepspeed --module` puts it before the command
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add, summary in _COMMANDS.items():
        name = add.__name__.removeprefix("add_")
        add(commands.add_parser(allow_abbrev=False, name=name, help=summary))
    return parser

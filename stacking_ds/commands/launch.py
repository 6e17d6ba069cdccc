"""`stacking-ds launch`, and for SLURM `again`, which its batch scripts ask, and `slurm copy`."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from stacking_ds.commands.train import add_train, run_dir_of
from stacking_ds.config.recipe import batch_scripts
from stacking_ds.console import say, say_on_stderr
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch.restart_policy import decision_of_this_job, judge
from stacking_ds.run.attempts import passed_over

_EXIT_AGAIN, _EXIT_NOT_AGAIN, _EXIT_COMPLETE = 0, 1, 3  # 2 is a UserError's


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options; it sets `command`, which returns the exit code."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hostfile", type=Path, help="the hosts, `name slots=RANKS` one a line")
    where.add_argument("--ranks", type=int, metavar="N", help="that many ranks on this machine")
    again = "start a failed `train` again up to N times, from its newest checkpoint (0)"
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help=again)
    fewer = "go on with M hosts or more where others do not answer; all of them if not given"
    parser.add_argument("--min-nodes", type=int, metavar="M", help=fewer)
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable of the ranks, beside those of .deepspeed_env; repeatable",
    )
    parser.add_argument(
        "--stop-seconds",
        type=float,
        help="what the ranks are given to save when asked to stop (30, and 30 for each rank of a "
        "host)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what DeepSpeed says")
    through = parser.add_argument_group("through what, with a hostfile")
    through.add_argument("--launcher", choices=("pdsh", "openmpi"), default="pdsh")
    through.add_argument(
        "--launcher-args",
        default="",
        metavar="'...'",
        help="for pdsh or mpirun, written with =; where the hosts' interface is not eth0, mpirun "
        "needs --launcher-args='--mca btl_tcp_if_include NAME'",
    )
    through.add_argument("--ssh-port", type=int, metavar="P")
    first = "of the first host, as the others see it; asked if not"
    through.add_argument("--master-addr", dest="master_address", metavar="A", help=first)
    meeting = "where ranks meet; a free one if not given"
    parser.add_argument("--master-port", type=int, metavar="P", help=meeting)
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="what the ranks run, such as `train --recipe bert_base_stacking`",
    )
    parser.set_defaults(command=_launch)


def _launch(options: argparse.Namespace) -> int:
    from stacking_ds.launch.runner import LaunchRequest
    from stacking_ds.launch.supervise import supervise

    words = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    known = {field.name for field in fields(LaunchRequest)}
    named = {name: value for name, value in vars(options).items() if name in known}
    named |= {"command": tuple(words), "run_dir": tracked_run(words), "env": tuple(options.env)}
    return supervise(LaunchRequest(**named))


def tracked_run(command: Sequence[str]) -> Path | None:
    """The directory of the run that `command` trains; None for a command that trains none.

    Raises:
        UserError: its options, or the recipe that names the run, cannot be used.
    """
    if not command or command[0] != "train":
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_train(parser)
    try:
        options, rest = parser.parse_known_args(command[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see `stacking-ds train --help`") from None
    if options.dry_run or {"-h", "--help"} & {*rest}:
        return None
    return run_dir_of(options)


def add_again(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options; it sets `command`, whose exit code is the answer."""
    parser.description = (
        f"Should a run that has ended be started again? Exit code {_EXIT_AGAIN}: yes; "
        f"{_EXIT_NOT_AGAIN}: no, it has failed too often or a person has to mend something; "
        f"{_EXIT_COMPLETE}: no, it is complete."
    )
    parser.add_argument("run_dir", type=Path)
    status = "what the job ended with ($? in a batch script)"
    parser.add_argument("--exit-status", type=int, required=True, metavar="N", help=status)
    parser.set_defaults(command=_again)


def _again(options: argparse.Namespace) -> int:
    if (damage := passed_over(options.run_dir)) is not None:
        say_on_stderr(damage)
    decision = decision_of_this_job(options.run_dir) or judge(options.run_dir, options.exit_status)
    say(decision.why)
    not_again = _EXIT_COMPLETE if decision.outcome == "complete" else _EXIT_NOT_AGAIN
    return _EXIT_AGAIN if decision.again else not_again


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the one action; it sets `command`, which returns the exit code."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    does = "write the batch scripts into DIR/slurm"
    action = actions.add_parser(allow_abbrev=False, name="copy", help=does)
    where = "where sbatch is called, seen by all nodes"
    action.add_argument("directory", type=Path, metavar="DIR", help=where)
    action.set_defaults(command=_copy)


def _copy(options: argparse.Namespace) -> int:
    target = options.directory / "slurm"
    scripts = {target / path.name: path for path in batch_scripts()}
    there = {place: path for place, path in scripts.items() if place.exists()}
    changed = [p.name for p, path in there.items() if p.read_bytes() != path.read_bytes()]
    if changed:
        raise ConfigError(
            f"{target} has {', '.join(changed)} with other contents, which stay as they are: move "
            f"them away, or give another folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    for place in scripts.keys() - there.keys():  # in a checkout they may be these themselves
        shutil.copyfile(scripts[place], place)
    (target / "submit.sh").chmod(0o755)  # a wheel does not keep it
    command = Path(sys.executable).with_name("stacking-ds")
    folder, program = (shlex.quote(str(path)) for path in (options.directory, command))
    say(
        f"batch scripts are in {target}; write what your site needs into {target / 'site.sh'}, "
        f"then\ncd {folder} && STACKING_DS={program} sbatch slurm/pretrain.sbatch RECIPE RUN_DIR "
        f"--set data.path=SHARDS"
    )
    return 0

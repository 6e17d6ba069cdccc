"""`stacking-ds launch`."""

import argparse
from pathlib import Path


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options; it sets `command`, which returns the exit code."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hostfile", type=Path, help="the hosts, `name slots=RANKS` one a line")
    where.add_argument("--ranks", type=int, metavar="N", help="that many ranks on this machine")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a failed `train` again up to N times, from its newest checkpoint (0)",
    )
    parser.add_argument(
        "--min-nodes",
        type=int,
        metavar="M",
        help="go on with M hosts or more where others do not answer; all of them if not given",
    )
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
    through.add_argument(
        "--master-addr", metavar="A", help="of the first host, as the others see it; asked if not"
    )
    parser.add_argument(
        "--master-port", type=int, metavar="P", help="where ranks meet; a free one if not given"
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="what the ranks run, such as `train --recipe bert_base_stacking`",
    )
    parser.set_defaults(command=_launch)


def _launch(options: argparse.Namespace) -> int:
    from stacking_ds.launch.request import Request
    from stacking_ds.launch.supervise import supervise

    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    return supervise(
        Request(
            command=tuple(command),
            hostfile=options.hostfile,
            ranks=options.ranks,
            restarts=options.restarts,
            min_nodes=options.min_nodes,
            launcher=options.launcher,
            launcher_args=options.launcher_args,
            ssh_port=options.ssh_port,
            master_address=options.master_addr,
            master_port=options.master_port,
            env=tuple(options.env),
            stop_seconds=options.stop_seconds,
            verbose=options.verbose,
        )
    )

"""The options of `stacking-ds bench`, and what each of its commands prints."""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacking_ds.bench.data_commands import add_data_bench
from stacking_ds.bench.growth_commands import add_growth
from stacking_ds.bench.kernels_commands import add_kernels
from stacking_ds.bench.lamb_commands import add_lamb
from stacking_ds.bench.options import add_json, numbers
from stacking_ds.bench.overlap_commands import add_overlap
from stacking_ds.bench.step_commands import add_step
from stacking_ds.console import say_on_stderr
from stacking_ds.errors import ConfigError
from stacking_ds.growth.operators import OPERATORS

if TYPE_CHECKING:
    from stacking_ds.bench.workload import Workload


_SIZES: dict[str, dict[str, Any]] = {
    "default": {
        "ranks": (2, 3, 4),
        "zero_stage": (0, 1, 2, 3),
        "hidden_size": 512,
        "layers": 4,
        "new_layers": 8,
        "vocab_size": 8192,
        "sequence_length": 32,
        "rounds": 3,
    },
    "quick": {
        "ranks": (2,),
        "zero_stage": (1, 3),
        "hidden_size": 64,
        "layers": 2,
        "new_layers": 4,
        "vocab_size": 512,
        "sequence_length": 16,
        "rounds": 1,
    },
}
_GLOBAL_BATCH_SIZE, _MICRO_BATCH_SIZE = 256, 32


def add_bench(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    _add_boundary(
        benches.add_parser(
            allow_abbrev=False,
            name="boundary",
            help="bytes, memory and time of a boundary, beside what people do today",
        )
    )
    _add_planner(
        benches.add_parser(
            allow_abbrev=False,
            name="planner",
            help="what a growth would move at any number of ranks, and how long that takes",
        )
    )
    add_lamb(
        benches.add_parser(
            allow_abbrev=False,
            name="lamb",
            help="what a LAMB step sends, and its time beside a plain loop, apex and DeepSpeed",
        )
    )
    add_kernels(
        benches.add_parser(
            allow_abbrev=False,
            name="kernels",
            help="fused operations, attention and FP8 products, beside what memory allows",
        )
    )
    add_step(
        benches.add_parser(
            allow_abbrev=False,
            name="step",
            help="a training step beside transformers, torch.compile and a plain loop",
        )
    )
    add_growth(
        benches.add_parser(
            allow_abbrev=False,
            name="growth",
            help="what a training step costs at each depth of a growth",
        )
    )
    add_data_bench(
        benches.add_parser(
            allow_abbrev=False,
            name="data",
            help="preparing text beside `datasets.map`, its memory, masking and loading",
        )
    )
    add_overlap(
        benches.add_parser(
            allow_abbrev=False,
            name="overlap",
            help="a step under ZeRO's settings for sending while computing",
        )
    )


def _add_boundary(parser: argparse.ArgumentParser) -> None:
    usual = _SIZES["default"]
    parser.description = (
        "Starts the ranks itself on this machine; under deepspeed, torchrun or mpirun it measures "
        "with the ranks there are."
    )
    parser.add_argument("--ranks", type=numbers, help="how many, e.g. 2,3,4 (the default)")
    parser.add_argument("--zero-stage", type=numbers, help="which, e.g. 1,3 (0,1,2,3)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    for name in ("hidden-size", "layers", "new-layers", "vocab-size", "sequence-length"):
        parser.add_argument(f"--{name}", type=int, help=f"({usual[name.replace('-', '_')]})")
    parser.add_argument("--rounds", type=int, help=f"({usual['rounds']})")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model on 2 ranks: does it work, how it looks"
    )
    add_json(parser)
    parser.set_defaults(command=_boundary)


def _boundary(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu, under_launcher

    say_if_no_gpu()
    chosen_ranks = options.ranks
    for name, value in _SIZES["quick" if options.quick else "default"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.rounds, *options.ranks) < 1:
        raise ConfigError("--rounds and --ranks start at 1")
    # says what is wrong with the sizes before a rank is started
    workloads = [_workload(options, zero_stage) for zero_stage in options.zero_stage]
    if under_launcher():
        return _measure_here(options, workloads, chosen_ranks)
    cases = []
    for ranks in options.ranks:
        for workload in workloads:
            started = time.monotonic()
            cases += _measure_there(workload, ranks, options.rounds)
            say_on_stderr(
                f"ZeRO {workload.zero_stage}, {ranks} ranks: {time.monotonic() - started:.0f} s"
            )
    _report(cases, options)
    if options.quick:
        say_on_stderr("--quick: fixed costs decide at this size; judge memory and times without it")
    return 0


def _workload(options: argparse.Namespace, zero_stage: int) -> "Workload":
    from stacking_ds.bench.workload import Workload

    workload = Workload(
        hidden_size=options.hidden_size,
        layers=options.layers,
        new_layers=options.new_layers,
        vocab_size=options.vocab_size,
        sequence_length=options.sequence_length,
        global_batch_size=_GLOBAL_BATCH_SIZE,
        micro_batch_size=_MICRO_BATCH_SIZE,
        precision=options.precision,
        zero_stage=zero_stage,
    )
    workload.require_possible()
    return workload


def _measure_there(workload: "Workload", ranks: int, rounds: int) -> list[Any]:
    """In processes of their own, so that no measurement finds the memory of the one before."""
    from stacking_ds.bench.launch import run_on_ranks

    with tempfile.TemporaryDirectory(prefix="stacking-ds-bench-") as folder:
        path = Path(folder) / "figures.json"
        sizes = ("hidden_size", "layers", "new_layers", "vocab_size", "sequence_length",
                 "precision", "zero_stage")  # fmt: skip
        chosen = [f"--{name.replace('_', '-')}={getattr(workload, name)}" for name in sizes]
        run_on_ranks(["bench", "boundary", *chosen, f"--rounds={rounds}", f"--json={path}"], ranks)
        cases: list[Any] = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return cases


def _measure_here(
    options: argparse.Namespace, workloads: Sequence["Workload"], chosen_ranks: Sequence[int] | None
) -> int:
    from stacking_ds.bench.boundary import measure_boundary
    from stacking_ds.distributed import process_group

    world = process_group.start()
    try:
        if chosen_ranks not in (None, (world.size,)):
            raise ConfigError(
                f"--ranks={','.join(map(str, chosen_ranks))}, but the launcher started "
                f"{world.size}; leave --ranks out, or start without a launcher"
            )
        cases = [measure_boundary(workload, world, options.rounds) for workload in workloads]
        if world.is_first:
            _report(cases, options)
    finally:
        process_group.stop()
    return 0


def _report(cases: Sequence[Any], options: argparse.Namespace) -> None:
    from stacking_ds.bench.boundary_table import boundary_table, boundary_targets
    from stacking_ds.bench.machine import describe_machine

    machine = describe_machine()
    print(boundary_table(cases, machine, options.rounds))
    if options.json is not None:
        targets = [{**target._asdict(), "met": target.met} for target in boundary_targets(cases)]
        _write_json(options.json, {
            "machine": machine, "rounds": options.rounds, "cases": cases, "targets": targets,
        })  # fmt: skip


# ------------------------------------------------------------------------- planner


def _add_planner(parser: argparse.ArgumentParser) -> None:
    parser.description = "Pure arithmetic: starts no rank and needs none of the machines."
    parser.add_argument("--model", choices=("bert-base", "bert-large"), default="bert-large")
    parser.add_argument("--layers", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--new-layers", type=int, default=48, help="(%(default)s)")
    parser.add_argument("--operator", choices=tuple(OPERATORS), default="stack")
    parser.add_argument("--moments", choices=("carry", "reset"), default="carry")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--ranks", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--new-ranks", type=int, help="as many as before")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=3, help="(%(default)s)")
    parser.add_argument("--new-zero-stage", type=int, choices=range(4), help="as before")
    parser.add_argument(
        "--link-gib-per-second", type=float, default=10.0, help="of one rank (%(default)s)"
    )
    parser.add_argument(
        "--host-gib-per-second", type=float, help="of one rank's copies; measured here if not given"
    )
    add_json(parser)
    parser.set_defaults(command=_planner)


def _planner(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu

    say_if_no_gpu()
    from stacking_ds.bench.machine import describe_machine, host_copy_gib_per_second
    from stacking_ds.bench.planner import Growth, price, price_table

    growth = Growth(
        model=options.model,
        layers=options.layers,
        new_layers=options.new_layers,
        ranks=options.ranks,
        new_ranks=options.ranks if options.new_ranks is None else options.new_ranks,
        zero_stage=options.zero_stage,
        new_zero_stage=(
            options.zero_stage if options.new_zero_stage is None else options.new_zero_stage
        ),
        operator=options.operator,
        moments=options.moments,
        precision=options.precision,
    )
    host, link = options.host_gib_per_second, options.link_gib_per_second
    origin = "given"
    if host is None:
        host, origin = host_copy_gib_per_second(), "measured on this machine"
    found = price(growth, host, link)
    speeds = f"{host:.1f} GiB/s on the host ({origin}) and {link:g} GiB/s on a link"
    print(price_table(growth, found, speeds))
    if options.json is not None:
        _write_json(options.json, {
            "machine": describe_machine(), "growth": asdict(growth), "price": asdict(found),
            "host_gib_per_second": host, "link_gib_per_second": link,
        })  # fmt: skip
    return 0


def _write_json(path: Path, figures: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

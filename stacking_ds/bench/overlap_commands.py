"""The options of `stacking-ds bench overlap`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_ds.bench.options import add_json, numbers
from stacking_ds.errors import ConfigError

_GLOBAL_BATCH_SIZE, _MICRO_BATCH_SIZE = 64, 16


def add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starts the ranks itself on this machine; under deepspeed, torchrun or mpirun it measures "
        "with the ranks there are, over the links that they have."
    )
    parser.add_argument("--ranks", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--zero-stage", type=numbers, default=(1, 2, 3), help="(1,2,3)")
    parser.add_argument("--buckets", type=numbers, default=(500_000, 5_000_000, 50_000_000),
                        help="elements sent at once (5e5,5e6,5e7)")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    sizes = {"hidden-size": 256, "layers": 6, "vocab-size": 8192, "sequence-length": 64}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=_GLOBAL_BATCH_SIZE,
                        help="rows of a step (%(default)s)")  # fmt: skip
    parser.add_argument("--micro-batch-size", type=int, default=_MICRO_BATCH_SIZE,
                        help="rows a rank computes at once (%(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    add_json(parser)
    parser.set_defaults(command=_overlap)


def _overlap(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import run_on_ranks, say_if_no_gpu, under_launcher

    say_if_no_gpu()
    for name in ("rounds", "ranks", "global_batch_size", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1"
            )
    if not set(options.zero_stage) <= {1, 2, 3}:
        raise ConfigError("--zero-stage: ZeRO 0 has nothing to choose; name some of 1, 2 and 3")
    if odd := [bucket for bucket in options.buckets if bucket < 2 or bucket % 2]:
        raise ConfigError(
            f"--buckets: DeepSpeed wants even numbers of elements from 2 on, not {odd[0]}"
        )
    workloads = [_workload(options, stage) for stage in options.zero_stage]
    if under_launcher():
        return _measure_here(options, workloads)
    print("each setting is an engine; this takes minutes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="stacking-ds-bench-") as folder:
        path = Path(folder) / "figures.json"
        chosen = [f"--ranks={options.ranks}", f"--rounds={options.rounds}", f"--json={path}",
                  f"--precision={options.precision}"]  # fmt: skip
        chosen += [
            f"--{name.replace('_', '-')}={','.join(map(str, getattr(options, name)))}"
            for name in ("zero_stage", "buckets")
        ]
        chosen += [
            f"--{name.replace('_', '-')}={getattr(options, name)}"
            for name in ("hidden_size", "layers", "vocab_size", "sequence_length",
                         "global_batch_size", "micro_batch_size")
        ]  # fmt: skip
        run_on_ranks(["bench", "overlap", *chosen], options.ranks)
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    _report(cases, options)
    return 0


def _workload(options: argparse.Namespace, zero_stage: int) -> Any:
    from stacking_ds.bench.workload import Workload

    if options.layers < 2:
        raise ConfigError(f"--layers={options.layers} must be at least 2")
    workload = Workload(
        hidden_size=options.hidden_size,
        layers=1,
        new_layers=options.layers,  # what is trained
        vocab_size=options.vocab_size,
        sequence_length=options.sequence_length,
        global_batch_size=options.global_batch_size,
        micro_batch_size=options.micro_batch_size,
        precision=options.precision,
        zero_stage=zero_stage,
    )
    workload.require_possible()
    return workload


def _measure_here(options: argparse.Namespace, workloads: Sequence[Any]) -> int:
    from stacking_ds.bench.overlap import measure_overlap
    from stacking_ds.distributed import process_group

    world = process_group.start()
    try:
        cases = [
            case
            for workload in workloads
            for case in measure_overlap(workload, world, options.buckets, options.rounds)
        ]
        if world.is_first:
            _report(cases, options)
    finally:
        process_group.stop()
    return 0


def _report(cases: Sequence[Any], options: argparse.Namespace) -> None:
    from stacking_ds.bench.machine import describe_machine
    from stacking_ds.bench.overlap import overlap_table

    machine = describe_machine()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"\n{overlap_table(cases)}")
    if options.json is not None:
        figures = {"machine": machine, "rounds": options.rounds, "cases": cases}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

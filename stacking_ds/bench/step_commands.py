"""The options of `stacking-ds bench step`, and the order of its cases."""

import argparse
import itertools
import json
import time
from typing import TYPE_CHECKING, Any, get_args

from stacking_ds.bench.options import add_json
from stacking_ds.config.sections import KernelsName
from stacking_ds.console import say_on_stderr
from stacking_ds.errors import ConfigError

if TYPE_CHECKING:
    from stacking_ds.bench.step_case import Model, StepCase
    from stacking_ds.distributed.world import World


_ROUNDS = {"cpu": 10, "cuda": 10}
_QUICK_LENGTH, _QUICK_ROWS, _QUICK_STEP_TOKENS = 32, 8, 1 << 12
_LENGTH = 128


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Whole optimizer steps of one process: ours, transformers' BERT in the same DeepSpeed "
        "engine, torch.compile and a plain loop, in turn on the same rows. With a GPU it measures "
        "BERT-base of 3, 6 and 12 layers and BERT-large, on rows of 128 and 512, in bf16. Without "
        "one, a small BERT in CPU time of one thread; CUDA_VISIBLE_DEVICES= hides the GPUs."
    )
    parser.add_argument(
        "--only", metavar="CASES", help="e.g. base-3L,large: cases whose names begin with that"
    )
    parser.add_argument("--hidden-size", type=int, help="of one model instead of the usual ones")
    parser.add_argument("--layers", type=int, help="of one model instead of the usual ones")
    parser.add_argument("--sequence-length", type=int, help="instead of the usual ones")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compare with our model compiled by torch (with a GPU; on a CPU that takes minutes)",
    )
    add_how(parser, _ROUNDS)
    parser.set_defaults(command=_step)


def add_how(parser: argparse.ArgumentParser, rounds: dict[str, int]) -> None:
    """The options that `bench growth` has too."""
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1, help="(%(default)s)")
    parser.add_argument(
        "--kernels", choices=get_args(KernelsName), default="auto", help="ours (%(default)s)"
    )
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU what a step frees stays the process's; else clearing new pages is measured "
        "too, a part that varies and that is largest for transformers",
    )
    parser.add_argument("--rounds", type=int, help=f"({rounds['cpu']}; on a GPU {rounds['cuda']})")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: does it work, how it looks"
    )
    add_json(parser)


def require_no_launcher() -> None:
    """Raises:
    ConfigError: a launcher started this process.
    """
    from stacking_ds.bench.launch import under_launcher

    if under_launcher():
        raise ConfigError("this bench measures one process: start it without a launcher")


def keeps_memory(options: argparse.Namespace, device: str) -> bool:
    """Arrange for what --keep-memory says; whether it is so."""
    from stacking_ds.process.runtime import keep_freed_memory

    return options.keep_memory and device == "cpu" and keep_freed_memory()


def _step(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu

    say_if_no_gpu()
    import torch

    from stacking_ds.bench.step_case import chosen_cases

    require_no_launcher()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.rounds is None:
        options.rounds = 2 if options.quick else _ROUNDS[device]
    if options.rounds < 1:
        raise ConfigError(f"--rounds={options.rounds} must be at least 1")
    cases, with_accumulation = chosen_cases(
        _cases(options, device), options.only, with_accumulation=device == "cpu"
    )
    for case in cases:
        _ = case.config  # says what is wrong with the sizes before anything is measured
    from stacking_ds.bench.machine import describe_machine
    from stacking_ds.bench.step_table import step_table, step_targets
    from stacking_ds.distributed import process_group

    world = process_group.start()
    try:
        figures = {
            "machine": describe_machine(),
            "keeps_memory": keeps_memory(options, device),
            **_measure(options, cases, with_accumulation, world),
        }
    finally:
        process_group.stop()
    targets = [{**one._asdict(), "verdict": one.verdict} for one in step_targets(figures)]
    print(step_table(figures))
    if options.json is not None:
        found = json.dumps({**figures, "targets": targets}, indent=1)
        options.json.write_text(found + "\n", encoding="utf-8")
    if options.quick:
        say_on_stderr("--quick: fixed costs decide at this size; judge times without it")
    return 0


def _cases(options: argparse.Namespace, device: str) -> list["StepCase"]:
    from stacking_ds.bench.step_case import cpu_cases, gpu_cases

    length = options.sequence_length
    if length is None and options.quick:
        length = _QUICK_LENGTH
    if length is not None and length < 8:
        raise ConfigError(f"--sequence-length={length} must be at least 8")
    model = _model(options, device)
    if device == "cuda":
        step_tokens = {"step_tokens": _QUICK_STEP_TOKENS} if options.quick else {}
        return gpu_cases(model, length, **step_tokens)
    assert model is not None
    rows = {"rows": _QUICK_ROWS} if options.quick else {}
    return cpu_cases(model, length or _LENGTH, **rows)


def _model(options: argparse.Namespace, device: str) -> "Model | None":
    """The one that is asked for, else the CPU's; None for the GPU's usual ones."""
    from stacking_ds.bench.step_case import BASE, SMALL, TINY, chosen_model

    is_usual = not options.quick and options.hidden_size is None and options.layers is None
    if device == "cuda" and is_usual:
        return None
    usual = TINY if options.quick else BASE if device == "cuda" else SMALL
    return chosen_model(usual, options.hidden_size, options.layers)


def _measure(
    options: argparse.Namespace, cases: "list[StepCase]", with_accumulation: bool, world: "World"
) -> dict[str, Any]:
    import torch

    from stacking_ds.bench.step import How, measure_accumulation, measure_cases
    from stacking_ds.bench.step_case import ACCUMULATION

    with_compile = options.compile
    if with_compile is None:
        with_compile = world.device.type == "cuda"
    how = How(options.kernels, options.zero_stage, options.rounds, with_compile)
    measured, width = [], 0
    for _, group in itertools.groupby(cases, lambda case: case.engine):
        same_engine, started = list(group), time.monotonic()
        names = ", ".join(case.name for case in same_engine)
        say_on_stderr(f"{names}: building, then {how.rounds} rounds")
        if width != (width := same_engine[0].model.hidden_size):
            torch._dynamo.reset()  # else code for any width is compiled, which is slower
        measured += measure_cases(same_engine, how, world)
        say_on_stderr(f"{names}: {time.monotonic() - started:.0f} s")
    accumulation: dict[str, Any] = {"not_measured": "left out"}
    if with_accumulation:
        say_on_stderr(f"{ACCUMULATION}: building, then {how.rounds} rounds")
        full = _cases(options, world.device.type)[0]
        accumulation = measure_accumulation(full, how, world)
    elif world.device.type != "cpu":
        accumulation = {"not_measured": "hide the GPUs for it"}
    return {
        "device": world.device.type,
        "zero_stage": options.zero_stage,
        "rounds": options.rounds,
        "kernels": options.kernels,
        "cases": measured,
        "accumulation": accumulation,
    }

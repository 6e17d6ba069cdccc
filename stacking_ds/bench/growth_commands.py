"""The options of `stacking-ds bench growth`, and what it prints."""

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from stacking_ds.bench.step_commands import add_how, keeps_memory, require_no_launcher
from stacking_ds.errors import ConfigError

if TYPE_CHECKING:
    from stacking_ds.bench.step_case import StepCase


_ROUNDS = {"cpu": 10, "cuda": 10}
_LENGTH, _QUICK_LENGTH, _QUICK_STEP_TOKENS = 128, 32, 1 << 12
_CPU_ROWS, _CPU_MICRO_STEPS = 4, 4
_LAYERS, _QUICK_LAYERS = 3, 1
_DEPTHS = (1, 2, 4)  # of the shallowest, as two growths by stacking


def add_growth(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Whole optimizer steps of one process at three depths, each the double of the one before, "
        "in turn. With a GPU of BERT-base in bf16; without one of a small width in fp32, in CPU "
        "time of one thread, beside a plain torch loop."
    )
    parser.add_argument(
        "--layers", type=int, help=f"of the shallowest ({_LAYERS}: measures 3, 6 and 12)"
    )
    parser.add_argument("--hidden-size", type=int, help="(256; on a GPU 768)")
    parser.add_argument("--sequence-length", type=int, help=f"({_LENGTH})")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(fp32; on a GPU bf16)")
    add_how(parser, _ROUNDS)
    parser.set_defaults(command=_growth)


def _growth(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu

    say_if_no_gpu()
    import torch

    require_no_launcher()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.rounds is None:
        options.rounds = 2 if options.quick else _ROUNDS[device]
    if options.rounds < 1:
        raise ConfigError(f"--rounds={options.rounds} must be at least 1")
    cases = _cases(options, device)
    for case in cases:
        _ = case.config  # says what is wrong with the sizes before anything is measured
    from stacking_ds.bench.growth import measure_growth
    from stacking_ds.bench.growth_table import growth_table, growth_targets
    from stacking_ds.bench.machine import describe_machine
    from stacking_ds.bench.step import How
    from stacking_ds.distributed import process_group

    how = How(options.kernels, options.zero_stage, options.rounds, with_compile=False)
    depths = ", ".join(str(case.model.layers) for case in cases)
    print(f"{depths} layers: building, then {how.rounds} rounds", file=sys.stderr, flush=True)
    world = process_group.start()
    try:
        figures = {
            "machine": describe_machine(),
            "keeps_memory": keeps_memory(options, device),
            "device": device,
            "zero_stage": how.zero_stage,
            "rounds": how.rounds,
            "kernels": how.kernels,
            **measure_growth(cases, how, world),
        }
    finally:
        process_group.stop()
    targets = [{**one._asdict(), "verdict": one.verdict} for one in growth_targets(figures)]
    print(growth_table(figures))
    if options.json is not None:
        found = json.dumps({**figures, "targets": targets}, indent=1)
        options.json.write_text(found + "\n", encoding="utf-8")
    if options.quick:
        print("--quick: fixed costs decide at this size; judge times without it", file=sys.stderr)
    return 0


def _cases(options: argparse.Namespace, device: str) -> list["StepCase"]:
    from stacking_ds.bench.step_case import SMALL, TINY, chosen_model, cpu_cases, gpu_cases

    usual = TINY if options.quick else SMALL
    hidden_size, layers, length = options.hidden_size, options.layers, options.sequence_length
    if hidden_size is None and device == "cuda" and not options.quick:
        hidden_size = 768
    if layers is None:
        layers = _QUICK_LAYERS if options.quick else _LAYERS
    if length is None:
        length = _QUICK_LENGTH if options.quick else _LENGTH
    if layers < 1 or length < 8:
        raise ConfigError(f"--layers={layers} and --sequence-length={length}: at least 1 and 8")
    models = [chosen_model(usual, hidden_size, times * layers) for times in _DEPTHS]
    if device == "cuda":
        step_tokens = {"step_tokens": _QUICK_STEP_TOKENS} if options.quick else {}
        cases = [gpu_cases(model, length, **step_tokens)[0] for model in models]
    else:
        # micro-steps are timed one by one
        cases = [
            replace(cpu_cases(model, length, _CPU_ROWS)[0], micro_steps=_CPU_MICRO_STEPS)
            for model in models
        ]
    return [replace(case, precision=options.precision or case.precision) for case in cases]

"""The options of `stacking-ds bench kernels`, and the order of its parts."""

import argparse
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stacking_ds.bench.options import add_json, numbers
from stacking_ds.console import say_on_stderr
from stacking_ds.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from stacking_ds.bench.kernels_clock import Clock


_PARTS = ("operations", "attention", "products")
_SIZES: dict[str, dict[str, Any]] = {
    # base and large of Devlin et al. 2019 §3, and a batch that is far larger than a GPU's caches
    "cuda": {"tokens": 32768, "hidden_size": (768, 1024), "vocab_size": 30522, "rounds": 20},
    "cpu": {"tokens": 2048, "hidden_size": (256,), "vocab_size": 30522, "rounds": 10},
    "quick": {"tokens": 256, "hidden_size": (64,), "vocab_size": 512, "rounds": 2},
}
_LONGEST = (128, 512)
_PRODUCT_TOKENS, _PRODUCT_WIDTH = 16384, 1024  # of BERT-large, for which FP8 is


def add_kernels(parser: argparse.ArgumentParser) -> None:
    gpu, cpu = _SIZES["cuda"], _SIZES["cpu"]
    parser.description = (
        "Times the fused operations forward and backward in every form that runs here, beside what "
        "their bytes would take at the speed of a plain copy; attention in all its forms; and "
        "products in FP8 beside bf16. On a GPU where there is one, else on one CPU thread. With "
        "the usual sizes it takes 7 GB of a GPU's memory."
    )
    parser.add_argument(
        "--only", metavar="PARTS", help=f"e.g. operations,attention ({','.join(_PARTS)})"
    )
    parser.add_argument("--tokens", type=int, help=f"({gpu['tokens']}; on a CPU {cpu['tokens']})")
    parser.add_argument(
        "--hidden-size", type=numbers, metavar="SIZES", help="(768,1024; on a CPU 256)"
    )
    parser.add_argument("--vocab-size", type=int, help=f"({gpu['vocab_size']})")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, help=f"({gpu['rounds']}; on a CPU {cpu['rounds']})")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="measure torch.compile too, which takes some seconds for each operation and size",
    )
    parser.add_argument("--quick", action="store_true", help="tiny tensors: does it work")
    add_json(parser)
    parser.set_defaults(command=_kernels)


def _kernels(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu, under_launcher

    say_if_no_gpu()
    import torch

    from stacking_ds.bench.kernels_clock import CpuClock, GpuClock
    from stacking_ds.bench.machine import one_thread

    if under_launcher():
        raise ConfigError("bench kernels measures one device: start it without a launcher")
    parts = _PARTS if options.only is None else tuple(options.only.split(","))
    if unknown := sorted(set(parts) - set(_PARTS)):
        raise ConfigError(f"--only={options.only}: {unknown[0]!r} is none of {', '.join(_PARTS)}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    _fill_in(options, "quick" if options.quick else device.type)
    figures = {}
    with one_thread():
        clock = GpuClock(device) if on_gpu else CpuClock()
        for part in parts:
            started = time.monotonic()
            figures[part] = _measure(part, options, device, clock)
            say_on_stderr(f"{part}: {time.monotonic() - started:.0f} s")
    _report(figures, options, device, clock)
    if options.quick:
        say_on_stderr("--quick: fixed costs decide at this size; judge times without it")
    return 0


def _fill_in(options: argparse.Namespace, sizes: str) -> None:
    for name, value in _SIZES[sizes].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("tokens", "vocab_size", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)} starts at 1")
    if min(options.hidden_size) < 1:
        raise ConfigError(f"--hidden-size={min(options.hidden_size)} starts at 1")


def _measure(
    part: str, options: argparse.Namespace, device: "torch.device", clock: "Clock"
) -> dict[str, Any]:
    import torch

    from stacking_ds.bench.kernels_attention import measure_attention
    from stacking_ds.bench.kernels_operations import Sizes, measure_operations
    from stacking_ds.bench.kernels_products import measure_products
    from stacking_ds.kernels.registry import DTYPES

    dtype = DTYPES[options.precision]
    tokens, rounds = options.tokens, options.rounds
    try:
        if part == "operations":
            return measure_operations(
                options.hidden_size,
                lambda width: Sizes(tokens, width, options.vocab_size, dtype),
                device,
                clock,
                rounds,
                compiled=options.compile,
            )
        if part == "attention":
            width = options.hidden_size[0]
            return measure_attention(tokens, width, _LONGEST, dtype, device, clock, rounds)
        if device.type != "cuda":
            return {"not_measured": "no GPU, and FP8 is slow on a CPU"}
        large = not options.quick
        return measure_products(
            _PRODUCT_TOKENS if large else tokens,
            _PRODUCT_WIDTH if large else options.hidden_size[0],
            device,
            clock,
            rounds,
        )
    except ConfigError as error:
        return {"not_measured": str(error)}
    except torch.OutOfMemoryError:
        return {"not_measured": f"out of memory at --tokens={tokens}; choose less"}


def _report(
    measured: Mapping[str, Any],
    options: argparse.Namespace,
    device: "torch.device",
    clock: "Clock",
) -> None:
    from stacking_ds.bench.kernels_table import kernel_targets, kernels_table
    from stacking_ds.bench.machine import describe_machine

    found = {
        "machine": describe_machine(),
        "device": device.type,
        "precision": options.precision,
        "sizes": {name: getattr(options, name) for name in _SIZES["cpu"]},
        "summary": clock.summary,
        "times_the_host_was_behind": getattr(clock, "host_was_behind", 0),
        **{part: {"not_measured": "left out by --only"} for part in _PARTS},
        **measured,
    }
    print(kernels_table(found))
    if options.json is not None:
        targets = [{**one._asdict(), "verdict": one.verdict} for one in kernel_targets(found)]
        text = json.dumps({**found, "targets": targets}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")

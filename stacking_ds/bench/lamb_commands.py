"""The options of `stacking-ds bench lamb`, and the order of its parts."""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacking_ds.bench.options import add_json
from stacking_ds.console import say_on_stderr
from stacking_ds.errors import ConfigError

if TYPE_CHECKING:
    from stacking_ds.bench.lamb import Sizes


_SIZES: dict[str, dict[str, int]] = {
    # Devlin et al. 2019 §3, BERT-base
    "default": {"hidden_size": 768, "layers": 12, "vocab_size": 30522, "rounds": 5},
    "quick": {"hidden_size": 64, "layers": 2, "vocab_size": 512, "rounds": 2},
}
_PARTS = ("communication", "cpu", "gpu")
_RANKS = 2


def add_lamb(parser: argparse.ArgumentParser) -> None:
    usual = _SIZES["default"]
    parser.description = (
        "Counts what the optimizer's step sends, and times it on one CPU thread and on a GPU where "
        "there is one. It starts the ranks that it needs itself; under a launcher say "
        "--only=communication. With the usual sizes it takes 4 GB of host memory, 14 GB on a GPU."
    )
    parser.add_argument(
        "--only", metavar="PARTS", help=f"e.g. communication,gpu ({','.join(_PARTS)})"
    )
    for name in ("hidden-size", "layers", "vocab-size"):
        parser.add_argument(f"--{name}", type=int, help=f"({usual[name.replace('-', '_')]})")
    parser.add_argument(
        "--rounds", type=int, help=f"({usual['rounds']}); on a GPU ten for each of them"
    )
    parser.add_argument(
        "--deepspeed-fused-lamb",
        action="store_true",
        help="compare with it on the GPU; it is compiled first, for a minute, which needs nvcc",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: does it work, how it looks"
    )
    add_json(parser)
    parser.set_defaults(command=_lamb)


def _lamb(options: argparse.Namespace) -> int:
    from stacking_ds.bench.launch import say_if_no_gpu, under_launcher

    say_if_no_gpu()
    from stacking_ds.bench.lamb import Sizes

    parts = _PARTS if options.only is None else tuple(options.only.split(","))
    if unknown := sorted(set(parts) - set(_PARTS)):
        raise ConfigError(f"--only={options.only}: {unknown[0]!r} is none of {', '.join(_PARTS)}")
    if options.deepspeed_fused_lamb and "gpu" not in parts:
        raise ConfigError("--deepspeed-fused-lamb is timed on a GPU: add gpu to --only")
    for name, value in _SIZES["quick" if options.quick else "default"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rounds < 1:
        raise ConfigError(f"--rounds={options.rounds} must be at least 1")
    sizes = Sizes(options.hidden_size, options.layers, options.vocab_size)
    _ = sizes.config  # says what is wrong with them before anything is measured
    if under_launcher():
        return _measure_here(options, parts, sizes)
    figures = {}
    for part in parts:
        started = time.monotonic()
        figures[part] = _measure(part, sizes, options)
        say_on_stderr(f"{part}: {time.monotonic() - started:.0f} s")
    _report(figures, sizes, options)
    if options.quick:
        say_on_stderr("--quick: fixed costs decide at this size; judge times without it")
    return 0


def _measure_here(options: argparse.Namespace, parts: Sequence[str], sizes: "Sizes") -> int:
    """On the launcher's ranks."""
    from stacking_ds.bench.lamb_traffic import measure_communication
    from stacking_ds.distributed import process_group

    if set(parts) != {"communication"}:
        raise ConfigError("under a launcher say --only=communication, or start without one")
    world = process_group.start()
    try:
        found = measure_communication(world)
        if world.is_first:
            _report({"communication": found}, sizes, options)
    finally:
        process_group.stop()
    return 0


def _measure(part: str, sizes: "Sizes", options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from stacking_ds.bench.lamb import measure_cpu, measure_gpu

    if part == "communication":
        return _on_ranks()
    if part == "cpu":
        return measure_cpu(sizes, options.rounds)
    if not torch.cuda.is_available():
        return {"not_measured": "no GPU"}
    return measure_gpu(sizes, options.rounds, fused_lamb=options.deepspeed_fused_lamb)


def _on_ranks() -> dict[str, Any]:
    from stacking_ds.bench.launch import run_on_ranks

    with tempfile.TemporaryDirectory(prefix="stacking-ds-bench-") as folder:
        path = Path(folder) / "figures.json"
        run_on_ranks(["bench", "lamb", "--only=communication", f"--json={path}"], _RANKS)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["communication"]
        return found


def _report(measured: Mapping[str, Any], sizes: "Sizes", options: argparse.Namespace) -> None:
    from stacking_ds.bench.lamb_table import lamb_table, lamb_targets
    from stacking_ds.bench.machine import describe_machine

    figures = {part: {"not_measured": "left out by --only"} for part in _PARTS} | dict(measured)
    machine = describe_machine()
    print(lamb_table(figures, asdict(sizes), machine))
    if options.json is not None:
        targets = [{**one._asdict(), "verdict": one.verdict} for one in lamb_targets(figures)]
        found = {"machine": machine, "sizes": asdict(sizes), **figures, "targets": targets}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

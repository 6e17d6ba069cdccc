"""The options of `stacking-ds bench data`, and the order of its parts."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_ds.bench.options import add_json
from stacking_ds.errors import ConfigError

_PARTS = ("prepare", "memory", "masking", "loader")
_VOCAB_SIZE = 8192


def add_data_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prepares text beside the usual way with `datasets`, watches its memory, and times masking "
        "and loading. It needs room for a few copies of the text in the temporary folder."
    )
    parser.add_argument(
        "sources",
        nargs="*",
        default=["embedded"],
        metavar="SOURCE",
        help="as for prepare; `embedded` if not given, which is a few MB: give more to see rates",
    )
    parser.add_argument("--vocab", type=Path, help="vocab.txt or tokenizer.json; else one is made")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loading (%(default)s)")
    parser.add_argument("--only", metavar="PARTS", help=f"e.g. masking,loader ({','.join(_PARTS)})")
    add_json(parser)
    parser.set_defaults(command=_data)


def _data(options: argparse.Namespace) -> int:
    parts = _PARTS if options.only is None else tuple(options.only.split(","))
    if unknown := sorted(set(parts) - set(_PARTS)):
        raise ConfigError(f"--only={options.only}: {unknown[0]!r} is none of {', '.join(_PARTS)}")
    for name in ("workers", "rounds", "seconds"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name}={getattr(options, name)} must be above 0")

    from stacking_ds.bench.data_table import data_table, data_targets
    from stacking_ds.bench.launch import say_if_no_gpu

    say_if_no_gpu()
    from stacking_ds.bench.machine import describe_machine

    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="stacking-ds-bench-") as folder:
        figures = {part: {"not_measured": "left out by --only"} for part in _PARTS}
        figures |= _measure(options, parts, Path(folder))
    print(data_table(figures, machine))
    if options.json is not None:
        targets = [{**one._asdict(), "verdict": one.verdict} for one in data_targets(figures)]
        found = {"machine": machine, **figures, "targets": targets}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(
    options: argparse.Namespace, parts: tuple[str, ...], folder: Path
) -> Mapping[str, dict[str, Any]]:
    from stacking_ds.bench import data
    from stacking_ds.data.prepare.folder import PrepareOptions
    from stacking_ds.data.prepare.preparation import prepare
    from stacking_ds.data.shards import TokenShards

    workers, rounds = options.workers, options.rounds
    corpus = data.Corpus.write(options.sources, folder / "text")
    first = folder / "first"
    sources = corpus.files("whole")
    prepare(PrepareOptions(sources, first, vocabulary=options.vocab, vocab_size=_VOCAB_SIZE))
    vocabulary, shards = first / "vocab.txt", TokenShards.open(first)
    measures = {
        "prepare": lambda: data.measure_prepare(corpus, vocabulary, workers, rounds, folder),
        "memory": lambda: data.measure_memory(corpus, vocabulary, workers, folder),
        "masking": lambda: data.measure_masking(shards, rounds),
        "loader": lambda: data.measure_loader(shards, workers, options.seconds),
    }
    found = {}
    for part in (part for part in _PARTS if part in parts):
        started = time.monotonic()
        found[part] = measures[part]()
        print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found

"""`stacking-ds data inspect · layout`."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from stacking_ds.commands.train import add_set
from stacking_ds.config.mistakes import sentences
from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import DataSection
from stacking_ds.console import say
from stacking_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from stacking_ds.data.shards import TokenShards


_SEQUENCE_LENGTH = 128


def add_data(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the two actions; each sets `command`, which returns the exit code."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser(
        allow_abbrev=False,
        name="inspect",
        help="what is in it, the rows it makes, how many epochs a recipe reads, and examples; exit "
        "code 2 if held-out documents are trained on",
    )
    _take_recipe(action, required=False)
    add = action.add_argument_group("without a recipe").add_argument
    add("--sequence-length", type=int, help=f"tokens of a row ({_SEQUENCE_LENGTH} if not given)")
    add("--examples", choices=("pairs", "documents"), help="default pairs")
    add("--masking", choices=("tokens", "whole_words", "spans"))
    add("--packing", action="store_true", default=None, help="several examples share a row")
    add = action.add_argument
    add("--examples-shown", type=int, default=3, metavar="N", help="default %(default)s")
    add("--verify", action="store_true", help="read every byte: is all of it whole")
    add("--json", action="store_true", help="for programs")
    action.set_defaults(command=_inspect)

    action = actions.add_parser(
        allow_abbrev=False,
        name="layout",
        help="fix the rows of a recipe ahead of its run, which otherwise does it when it starts",
    )
    _take_recipe(action, required=True)
    action.set_defaults(command=_layout)


def _take_recipe(action: argparse.ArgumentParser, required: bool) -> None:
    add = action.add_argument
    add("shards", type=Path, help="folder that `stacking-ds prepare` wrote")
    add("--recipe", required=required, help="a bundled recipe's name, or a .yaml file")
    add_set(action, "data.packing=true")
    add("--workers", type=int, help="processes that lay out rows (all cores this process may use)")


def _inspect(options: argparse.Namespace) -> int:
    from stacking_ds.data.shards import TokenShards

    if options.examples_shown < 0:
        raise ConfigError(f"--examples-shown is {options.examples_shown}; it must be at least 0")
    config, section = _recipe(options)
    shards = TokenShards.open(options.shards, options.verify)
    from stacking_ds.data.inspect_report import as_text  # seconds of imports, for what is there

    found = {}
    for name, facts in _findings(options, shards, config, section):
        found[name] = facts
        if not options.json:
            say(as_text(name, facts))
    if options.json:
        say(json.dumps(found, indent=1, default=to_jsonable_python))
    if overlap := found["overlap"]["documents"]:
        raise DataError(
            f"{overlap:,} training documents of {shards.folder} are held out too, the first at "
            f"{', '.join(found['overlap']['first'])}: a held-out loss would say nothing; delete "
            "the folder and prepare it again"
        )
    return 0


def _findings(
    options: argparse.Namespace,
    shards: "TokenShards",
    config: RunConfig | None,
    section: DataSection,
) -> Iterator[tuple[str, Any]]:
    """Each part of the report by its name, as soon as it is known."""
    from stacking_ds.data import inspection
    from stacking_ds.data.loader import PretrainingData

    train, heldout = shards.split("train"), shards.split("heldout")
    yield "folder", inspection.folder_facts(shards, options.verify)
    yield "splits", [inspection.split_facts(split) for split in (train, heldout)]
    yield "overlap", inspection.find_overlap(shards)
    seed, sections = 0 if config is None else config.seed, _sections(section, config)
    rows, rows_by_length = [], {}
    for length, row in sections.items():
        rows_by_length[length] = inspection.row_facts(train, row, options.workers)
        # a run evaluates on the first variant only
        held_out = inspection.row_facts(heldout, row.changed(variants=1), options.workers)
        rows += [rows_by_length[length], held_out]
    yield "rows", rows
    yield "readings", config and inspection.readings(config, rows_by_length)
    data = {
        length: PretrainingData(shards, "train", row, seed=seed) for length, row in sections.items()
    }
    for phase in config.phase_schedule().phases if config else ():
        data[phase.sequence_length].require_rows(phase.global_batch_size)
    yield (
        "examples",
        inspection.shown_examples(data[section.sequence_length], options.examples_shown),
    )


def _layout(options: argparse.Namespace) -> int:
    from stacking_ds.data.shards import TokenShards

    config, section = _recipe(options)
    shards = TokenShards.open(options.shards)
    from stacking_ds.data.rows import LayoutSpec, open_layout  # seconds of imports

    # a run evaluates on the first variant only
    for split, variants in (
        (shards.split("train"), section.variants),
        (shards.split("heldout"), 1),
    ):
        for row in _sections(section, config).values():
            for variant in range(variants):
                started = time.monotonic()
                found = open_layout(split, LayoutSpec.of(row, variant), options.workers)
                say(
                    f"{found.folder}: {found.num_rows:,} rows, {found.fill:.1%} full, "
                    f"{time.monotonic() - started:.1f} s"
                )
    return 0


def _recipe(options: argparse.Namespace) -> tuple[RunConfig | None, DataSection]:
    """The recipe, None if none is given, and how rows are to be made; `workers` is a number from
    now on."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}; it must be at least 1")
    options.workers = options.workers or len(os.sched_getaffinity(0))
    names = ("sequence_length", "examples", "masking", "packing")
    plain = {name: getattr(options, name, None) for name in names}
    plain = {name: value for name, value in plain.items() if value is not None}
    if options.recipe is None:
        if options.set:
            raise ConfigError(f"--set {options.set[0]} overrides a recipe; give --recipe too")
        try:
            return None, DataSection.model_validate({"path": str(options.shards), **plain})
        except ValidationError as error:
            # choices are argparse's to check, so that it is the length
            problems = "; ".join(sentences(error.errors()))
            raise ConfigError(
                f"--sequence-length is {options.sequence_length}, but {problems}"
            ) from None
    if plain:
        name, value = next(iter(plain.items()))
        option = "--" + name.replace("_", "-")
        raise ConfigError(
            f"{option} is for use without a recipe; write --set data.{name}={json.dumps(value)}"
        )
    path = f"data.path={options.shards}"
    config = load_run_config(options.recipe, [*options.set, path])
    config.stage_schedule()
    return config, config.data


def _sections(section: DataSection, config: RunConfig | None) -> dict[int, DataSection]:
    """How rows of each sequence length are to be made, over all phases."""
    lengths = {section.sequence_length}
    if config is not None:
        lengths = {phase.sequence_length for phase in config.phase_schedule().phases}
    return {length: section.changed(sequence_length=length) for length in sorted(lengths)}

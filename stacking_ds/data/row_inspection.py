"""What rows a prepared folder makes, and how often a recipe will read it.

Shapes: R rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stacking_ds.config.run import RunConfig
from stacking_ds.data.inspection import LengthBin
from stacking_ds.data.loader import RowOptions
from stacking_ds.data.row_store import open_layout
from stacking_ds.data.rows import Layout
from stacking_ds.data.shard_manifest import SplitName
from stacking_ds.data.shards import TokenSplit

__all__ = ["PhaseReading", "Readings", "RowFacts", "readings", "row_facts"]

_ROWS_AT_ONCE = 2**16
_LENGTH_BINS = 8


@dataclass(frozen=True)
class RowFacts:
    """The rows of one split and one sequence length; means over the variants."""

    split: SplitName
    sequence_length: int
    variants: int
    rows_per_epoch: float
    examples_per_row: float
    tokens_per_row: float
    """[CLS] and [SEP] included."""
    fill: float
    """The share of the slots that hold a token."""
    empty_slots_per_epoch: float
    random_share: float | None
    """Of the sentence pairs; None if there are none."""
    example_lengths: tuple[LengthBin, ...]
    """With [CLS] and [SEP], over all variants."""


def row_facts(split: TokenSplit, options: RowOptions, workers: int = 1) -> RowFacts:
    """Opens the layouts of these rows, and makes those that are not there.

    Raises DataError when they cannot be made, or are none.
    """
    layouts = [
        open_layout(split, options.layout(variant), workers) for variant in range(options.variants)
    ]
    variants, length = len(layouts), options.sequence_length
    rows = sum(layout.num_rows for layout in layouts)
    used = sum(layout.used_slots for layout in layouts)
    random_pairs = sum(layout.total("random_pairs") for layout in layouts)
    pairs = random_pairs + sum(layout.total("true_pairs") for layout in layouts)
    return RowFacts(
        split=split.name,
        sequence_length=length,
        variants=variants,
        rows_per_epoch=rows / variants,
        examples_per_row=sum(layout.total("examples") for layout in layouts) / rows,
        tokens_per_row=used / rows,
        fill=used / (rows * length),
        empty_slots_per_epoch=(rows * length - used) / variants,
        random_share=random_pairs / pairs if pairs else None,
        example_lengths=_example_lengths(layouts, length),
    )


def _example_lengths(layouts: Sequence[Layout], sequence_length: int) -> tuple[LengthBin, ...]:
    counts = np.zeros(sequence_length + 1, dtype=np.int64)
    for layout in layouts:
        for first in range(0, layout.num_rows, _ROWS_AT_ONCE):
            rows_R = np.arange(first, min(first + _ROWS_AT_ONCE, layout.num_rows))
            _, examples = layout.examples_of(rows_R)
            counts += np.bincount(examples.slots, minlength=len(counts))
    width = -(-sequence_length // _LENGTH_BINS)
    bins: list[LengthBin] = []
    for low in range(1, sequence_length + 1, width):
        high = min(low + width - 1, sequence_length)
        bins.append(LengthBin(low, high, int(counts[low : high + 1].sum())))
    return tuple(bins)


@dataclass(frozen=True)
class PhaseReading:
    """What the steps [start_step, end_step) of a run read."""

    phase: int
    start_step: int
    end_step: int
    sequence_length: int
    global_batch_size: int
    rows: int
    first_epoch: float
    """How many epochs of rows of this length earlier phases have read."""
    epochs: float
    tokens: float
    """Expected: rows times the mean of the tokens in a row, [CLS] and [SEP] included."""
    slots: int
    """Padding included."""


@dataclass(frozen=True)
class Readings:
    """A run's phases, and their sums. An epoch, of rows of whatever length, is once through the
    text, so `epochs` is how often each document is read."""

    phases: tuple[PhaseReading, ...]
    steps: int
    rows: int
    epochs: float
    tokens: float
    slots: int


def readings(config: RunConfig, rows_by_length: Mapping[int, RowFacts]) -> Readings:
    """How often the run reads the training text; `rows_by_length` has each of its lengths.

    Raises StageError for a schedule that cannot be trained.
    """
    steps = config.stage_schedule().total_steps
    phases = []
    for phase, end_step in config.phase_schedule().between(0, steps):
        facts = rows_by_length[phase.sequence_length]
        rows = phase.first_row(end_step) - phase.rows_before
        phases.append(
            PhaseReading(
                phase=phase.index,
                start_step=phase.start_step,
                end_step=end_step,
                sequence_length=phase.sequence_length,
                global_batch_size=phase.global_batch_size,
                rows=rows,
                first_epoch=phase.rows_before / facts.rows_per_epoch,
                epochs=rows / facts.rows_per_epoch,
                tokens=rows * facts.tokens_per_row,
                slots=rows * phase.sequence_length,
            )
        )
    return Readings(
        phases=tuple(phases),
        steps=steps,
        rows=sum(phase.rows for phase in phases),
        epochs=sum(phase.epochs for phase in phases),
        tokens=sum(phase.tokens for phase in phases),
        slots=sum(phase.slots for phase in phases),
    )

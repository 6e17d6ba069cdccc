"""Report of `stacking-ds data inspect` as text: one part, or table, at a time."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from stacking_ds.console import aligned, readable_size
from stacking_ds.data.inspection import (
    REPEATS_FROM_TOKENS,
    FolderFacts,
    LengthBin,
    Overlap,
    PhaseReading,
    Readings,
    RowFacts,
    ShownExample,
    SplitFacts,
)
from stacking_ds.data.shard_files import MANY_UNKNOWN

_SOURCES_SHOWN = 8
_BAR, _LINE = 40, 100
_SPLITS = {"train": "train", "heldout": "held out"}
_Column = tuple[str, Callable[[Any], str]]


def as_text(name: str, facts: Any) -> str:
    """One part of the report, by its name; ends with an empty line."""
    return "\n".join([*_PARTS[name](facts), ""])


def _folder(facts: FolderFacts) -> list[str]:
    lines = [
        ("folder", facts.folder),
        (
            "vocabulary",
            f"{facts.vocab_size:,} tokens, {facts.normalization}, sha256 "
            f"{facts.vocabulary_sha256[:16]}",
        ),
        (
            "text",
            f"{readable_size(facts.text_bytes)}, {facts.bytes_per_token:.2f} bytes a token, "
            "duplicates included",
        ),
        ("licence", facts.licence or "-"),
        ("on disk", f"{readable_size(facts.size_bytes)} of shards"),
        (
            "verified",
            "every byte" if facts.every_byte_verified else "the sizes; --verify reads all",
        ),
    ]
    text = aligned(lines, left=(0, 1))
    if facts.sources:
        columns: list[_Column] = [
            ("source", lambda source: source.name),
            ("size", lambda one: "-" if one.size_bytes is None else readable_size(one.size_bytes)),
            ("licence", lambda source: source.licence or "-"),
            ("", lambda source: "held out" if source.heldout else ""),
        ]
        text += ["", *_table(columns, facts.sources[:_SOURCES_SHOWN], left=(0, 2, 3))]
        if len(facts.sources) > _SOURCES_SHOWN:
            text.append(f"and {len(facts.sources) - _SOURCES_SHOWN:,} more; --json has all")
    if facts.rejected:
        text += ["", *(rejected.sentence for rejected in facts.rejected)]
    return text


def _splits(splits: Sequence[SplitFacts]) -> list[str]:
    rows: list[_Column] = [
        ("", lambda facts: _SPLITS[facts.split]),
        ("documents", lambda facts: f"{facts.documents:,}"),
        ("sentences", lambda facts: f"{facts.sentences:,}"),
        ("tokens", lambda facts: f"{facts.tokens:,}"),
        ("[UNK] among them", lambda facts: f"{facts.unknown_tokens / max(facts.tokens, 1):.3%}"),
        ("files", lambda facts: f"{facts.files:,}"),
        ("size", lambda facts: readable_size(facts.size_bytes)),
        ("duplicates left out", lambda facts: f"{facts.duplicate_documents:,} documents"),
        ("", lambda facts: f"{facts.duplicate_tokens:,} tokens"),
        ("", lambda facts: f"{facts.duplicate_share:.2%} of all documents"),
        ("sentences that come again", lambda facts: f"{facts.repeated_share:.2%}"),
    ]
    text = aligned([(name, *map(cell, splits)) for name, cell in rows], left=(0,))
    train = splits[0]
    unknown = max(facts.unknown_tokens / max(facts.tokens, 1) for facts in splits)
    if unknown > MANY_UNKNOWN:
        text.append(
            f"warning: {unknown:.1%} of the tokens, more than {MANY_UNKNOWN:.0%}, are [UNK], of "
            "which nothing is learned"
        )
    sample = "all" if train.one_in == 1 else f"a sample, 1 in {train.one_in:,}, of the"
    text.append(
        f"the last over {sample} sentences of {REPEATS_FROM_TOKENS} or more tokens "
        f"({train.sampled_sentences:,} of train)"
    )
    return [*text, "", "train's documents by their tokens", *_bars(train.document_lengths)]


def _overlap(overlap: Overlap) -> list[str]:
    return [f"train documents that are held out too: {overlap.documents:,}"]


def _rows(rows: Sequence[RowFacts]) -> list[str]:
    columns: list[_Column] = [
        ("rows of", lambda facts: f"{facts.sequence_length:,}"),
        ("split", lambda facts: _SPLITS[facts.split]),
        ("rows an epoch", lambda facts: f"{facts.rows_per_epoch:,.0f}"),
        ("examples a row", lambda facts: f"{facts.examples_per_row:.2f}"),
        ("fill", lambda facts: f"{facts.fill:.1%}"),
        ("empty slots an epoch", lambda facts: f"{facts.empty_slots_per_epoch:,.0f}"),
        (
            "random pairs",
            lambda one: "-" if one.random_share is None else f"{one.random_share:.1%}",
        ),
    ]
    text = _table(columns, rows, left=(1,))
    if (variants := max(facts.variants for facts in rows)) > 1:
        text.append(
            f"train has {variants:,} variants of its rows, which take turns; these are means"
        )
    for facts in rows:
        if facts.split == "train":
            title = f"train's examples for rows of {facts.sequence_length:,} by their tokens"
            text += ["", title, *_bars(facts.example_lengths)]
    return text


def _readings(readings: Readings | None) -> list[str]:
    if readings is None:
        return ["give --recipe to see how many epochs it reads"]

    def steps(phase: PhaseReading) -> str:
        return f"{phase.start_step:,} to {phase.end_step:,}"

    columns: list[_Column] = [
        ("phase", lambda phase: f"{phase.phase}"),
        ("steps", steps),
        ("rows of", lambda phase: f"{phase.sequence_length:,}"),
        ("rows a step", lambda phase: f"{phase.global_batch_size:,}"),
        ("rows read", lambda phase: f"{phase.rows:,}"),
        ("epochs", lambda phase: _epochs(phase.epochs)),
        ("from epoch", lambda phase: _epochs(phase.first_epoch)),
        ("to epoch", lambda phase: _epochs(phase.first_epoch + phase.epochs)),
        ("tokens", lambda phase: f"{phase.tokens:,.0f}"),
    ]
    total = ("all", f"{readings.steps:,}", "", "", f"{readings.rows:,}",
             _epochs(readings.epochs), "", "", f"{readings.tokens:,.0f}")  # fmt: skip
    return [
        *_table(columns, readings.phases, left=(), last=[total]),
        f"the recipe reads each training document {_epochs(readings.epochs)} times; with padding "
        f"{readings.slots:,} token slots",
    ]


def _epochs(epochs: float) -> str:
    return f"{epochs:,.3g}" if epochs < 1 else f"{epochs:,.2f}"


def _examples(examples: Sequence[ShownExample]) -> list[str]:
    text = (
        ["[quick->MASK]: quick is to be predicted where the model reads [MASK]"] if examples else []
    )
    for shown in examples:
        place = f"row {shown.row:,}, {shown.row_fill:.0%} full"
        if shown.examples_in_row > 1:
            place += f", example {shown.example} of {shown.examples_in_row}"
        label = {True: "true: B follows A", False: "random: B is from elsewhere", None: ""}
        title = ", ".join(filter(None, [place, f"{shown.masked} masked", label[shown.follows]]))
        text += ["", title, *_segment("A", shown.first)]
        if shown.second is not None:
            text += _segment("B", shown.second)
    return text


def _segment(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _LINE,
        initial_indent=f"  {name}  ",
        subsequent_indent="     ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(
    columns: Sequence[_Column],
    things: Sequence[Any],
    left: Sequence[int],
    last: Sequence[Sequence[str]] = (),
) -> list[str]:
    """A line of heads, a line for each thing, and the `last` ones."""
    heads = [head for head, _ in columns]
    return aligned([heads, *([cell(one) for _, cell in columns] for one in things), *last], left)


def _bars(bins: Sequence[LengthBin]) -> list[str]:
    if not bins:
        return ["none"]
    total = max(sum(bin.count for bin in bins), 1)
    most = max(1, *(bin.count for bin in bins))
    rows = [
        (f"{bin.first:,}", "-", f"{bin.last:,}", f"{bin.count:,}", f"{bin.count / total:.1%}",
         "#" * -(-_BAR * bin.count // most))
        for bin in bins
    ]  # fmt: skip
    return [f"  {line}" for line in aligned(rows, left=(5,))]


_PARTS: dict[str, Callable[[Any], list[str]]] = {
    "folder": _folder,
    "splits": _splits,
    "overlap": _overlap,
    "rows": _rows,
    "readings": _readings,
    "examples": _examples,
}

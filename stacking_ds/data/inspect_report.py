"""What `stacking-ds data inspect` found, as text for people."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from stacking_ds.console import aligned, readable_size
from stacking_ds.data.inspection import (
    REPEATS_FROM_TOKENS,
    FolderFacts,
    LengthBin,
    Overlap,
    Readings,
    RowFacts,
    ShownExample,
    SplitFacts,
)
from stacking_ds.data.shard_files import MANY_UNKNOWN

_SOURCES_SHOWN, _PLACES_SHOWN = 8, 3
_BAR, _LINE = 40, 100
_SPLITS = {"train": "train", "heldout": "held out"}


def as_text(name: str, facts: Any) -> str:
    """One part of the report, by its name; ends with an empty line."""
    return "\n".join([*_PARTS[name](facts), ""])


# ----------------------------------------------------------------- folder and splits


def _folder(facts: FolderFacts) -> list[str]:
    lines = {
        "folder": facts.folder,
        "vocabulary": f"{facts.vocab_size:,} tokens, {facts.normalization}, sha256 "
        f"{facts.vocabulary_sha256[:16]}",
        "text": f"{readable_size(facts.text_bytes)}, {facts.bytes_per_token:.2f} bytes a token, "
        "duplicates included",
        "licence": facts.licence or "-",
        "on disk": f"{readable_size(facts.size_bytes)} of shards",
        "verified": "every byte" if facts.every_byte_verified else "the sizes; --verify reads all",
    }
    width = max(map(len, lines))
    text = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    if facts.sources:
        cells = [
            (
                source.name,
                "-" if source.size_bytes is None else readable_size(source.size_bytes),
                source.licence or "-",
                "held out" if source.heldout else "",
            )
            for source in facts.sources[:_SOURCES_SHOWN]
        ]
        text += ["", *aligned([("source", "size", "licence", ""), *cells], left=(0, 2, 3))]
        if len(facts.sources) > _SOURCES_SHOWN:
            text.append(f"and {len(facts.sources) - _SOURCES_SHOWN:,} more; --json has all")
    if facts.rejected:
        text.append("")
    for rejected in facts.rejected:
        text.append(
            f"left out, {rejected.reason}: {rejected.documents:,} documents, the first at "
            f"{', '.join(rejected.first[:_PLACES_SHOWN])}"
        )
    return text


def _splits(splits: Sequence[SplitFacts]) -> list[str]:
    rows: list[tuple[str, Callable[[SplitFacts], str]]] = [
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


# ----------------------------------------------------------------- rows and readings


def _rows(rows: Sequence[RowFacts]) -> list[str]:
    head = ("rows of", "split", "rows an epoch", "examples a row", "fill", "empty slots an epoch",
            "random pairs")  # fmt: skip
    cells = [
        (
            f"{facts.sequence_length:,}",
            _SPLITS[facts.split],
            f"{facts.rows_per_epoch:,.0f}",
            f"{facts.examples_per_row:.2f}",
            f"{facts.fill:.1%}",
            f"{facts.empty_slots_per_epoch:,.0f}",
            "-" if facts.random_share is None else f"{facts.random_share:.1%}",
        )
        for facts in rows
    ]
    text = aligned([head, *cells], left=(1,))
    variants = max(facts.variants for facts in rows)
    if variants > 1:
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
    head = ("phase", "steps", "rows of", "rows a step", "rows read", "epochs", "from epoch",
            "to epoch", "tokens")  # fmt: skip
    cells = [
        (
            f"{phase.phase}",
            f"{phase.start_step:,} to {phase.end_step:,}",
            f"{phase.sequence_length:,}",
            f"{phase.global_batch_size:,}",
            f"{phase.rows:,}",
            _epochs(phase.epochs),
            _epochs(phase.first_epoch),
            _epochs(phase.first_epoch + phase.epochs),
            f"{phase.tokens:,.0f}",
        )
        for phase in readings.phases
    ]
    total = ("all", f"{readings.steps:,}", "", "", f"{readings.rows:,}",
             _epochs(readings.epochs), "", "", f"{readings.tokens:,.0f}")  # fmt: skip
    return [
        *aligned([head, *cells, total], left=()),
        f"the recipe reads each training document {_epochs(readings.epochs)} times; with padding "
        f"{readings.slots:,} token slots",
    ]


def _epochs(epochs: float) -> str:
    return f"{epochs:,.3g}" if epochs < 1 else f"{epochs:,.2f}"


# ------------------------------------------------------------------------- examples


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


# --------------------------------------------------------------------------- layout


def _bars(bins: Sequence[LengthBin]) -> list[str]:
    if not bins:
        return ["none"]
    total = max(sum(bin.count for bin in bins), 1)
    most = max(1, *(bin.count for bin in bins))
    rows = [
        (
            f"{bin.first:,}",
            "-",
            f"{bin.last:,}",
            f"{bin.count:,}",
            f"{bin.count / total:.1%}",
            "#" * -(-_BAR * bin.count // most),
        )
        for bin in bins
    ]
    return [f"  {line}" for line in aligned(rows, left=(5,))]


_PARTS: dict[str, Callable[[Any], list[str]]] = {
    "folder": _folder,
    "splits": _splits,
    "overlap": _overlap,
    "rows": _rows,
    "readings": _readings,
    "examples": _examples,
}

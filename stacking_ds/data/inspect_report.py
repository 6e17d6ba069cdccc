"""Report of `stacking-ds data inspect` as text: one part, or table, at a time."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from stacking_ds.console import aligned, readable_size
from stacking_ds.data.inspection import REPEATS_FROM_TOKENS, Facts
from stacking_ds.data.shard_files import MANY_UNKNOWN

_SOURCES_SHOWN = 8
_BAR, _LINE = 40, 100
_Columns = Sequence[tuple[str, str | Callable[[Any], str]]]
"""Their heads, and what stands below: a format of the facts, or a function of them."""


def as_text(name: str, facts: Any) -> str:
    """One part of the report, by its name; ends with an empty line."""
    return "\n".join([*_PARTS[name](facts), ""])


def _folder(facts: Facts) -> list[str]:
    text_size, size = readable_size(facts["text_bytes"]), readable_size(facts["size_bytes"])
    verified = "every byte" if facts["every_byte_verified"] else "the sizes; --verify reads all"
    lines = [
        ("folder", "{folder}"),
        ("vocabulary", "{vocab_size:,} tokens, {normalization}, sha256 {vocabulary_sha256:.16}"),
        ("text", f"{text_size}, {{bytes_per_token:.2f}} bytes a token, duplicates included"),
        ("licence", "{licence}" if facts["licence"] else "-"),
        ("on disk", f"{size} of shards"),
        ("verified", verified),
    ]
    text = aligned([(name, form.format_map(facts)) for name, form in lines], left=(0, 1))
    if sources := facts["sources"]:
        columns: _Columns = [
            ("source", lambda one: one.name),
            ("size", lambda one: "-" if one.size_bytes is None else readable_size(one.size_bytes)),
            ("licence", lambda one: one.licence or "-"),
            ("", lambda one: "held out" if one.heldout else ""),
        ]
        text += ["", *aligned(_table(columns, sources[:_SOURCES_SHOWN]), left=(0, 2, 3))]
        if len(sources) > _SOURCES_SHOWN:
            text.append(f"and {len(sources) - _SOURCES_SHOWN:,} more; --json has all")
    if facts["rejected"]:
        text += ["", *(rejected.sentence for rejected in facts["rejected"])]
    return text


def _splits(splits: Sequence[Facts]) -> list[str]:
    rows: _Columns = [
        ("", _split),
        ("documents", "{documents:,}"),
        ("sentences", "{sentences:,}"),
        ("tokens", "{tokens:,}"),
        ("[UNK] among them", lambda facts: f"{_unknown(facts):.3%}"),
        ("files", "{files:,}"),
        ("size", lambda facts: readable_size(facts["size_bytes"])),
        ("duplicates left out", "{duplicate_documents:,} documents"),
        ("", "{duplicate_tokens:,} tokens"),
        ("", "{duplicate_share:.2%} of all documents"),
        ("sentences that come again", "{repeated_share:.2%}"),
    ]
    text = aligned(list(zip(*_table(rows, splits), strict=True)), left=(0,))
    if (unknown := max(map(_unknown, splits))) > MANY_UNKNOWN:
        text.append(
            f"warning: {unknown:.1%} of the tokens, more than {MANY_UNKNOWN:.0%}, are [UNK], of "
            "which nothing is learned"
        )
    train = splits[0]
    sample = "all" if train["one_in"] == 1 else f"a sample, 1 in {train['one_in']:,}, of the"
    text.append(
        f"the last over {sample} sentences of {REPEATS_FROM_TOKENS} or more tokens "
        f"({train['sampled_sentences']:,} of train)"
    )
    return [*text, "", "train's documents by their tokens", *_bars(train["document_lengths"])]


def _rows(rows: Sequence[Facts]) -> list[str]:
    columns: _Columns = [
        ("rows of", "{sequence_length:,}"),
        ("split", _split),
        ("rows an epoch", "{rows_per_epoch:,.0f}"),
        ("examples a row", "{examples_per_row:.2f}"),
        ("fill", "{fill:.1%}"),
        ("empty slots an epoch", "{empty_slots_per_epoch:,.0f}"),
        (
            "random pairs",
            lambda facts: "-" if facts["random_share"] is None else f"{facts['random_share']:.1%}",
        ),
    ]
    text = aligned(_table(columns, rows), left=(1,))
    if (variants := max(facts["variants"] for facts in rows)) > 1:
        text.append(
            f"train has {variants:,} variants of its rows, which take turns; these are means"
        )
    for facts in rows:
        if facts["split"] == "train":
            title = f"train's examples for rows of {facts['sequence_length']:,} by their tokens"
            text += ["", title, *_bars(facts["example_lengths"])]
    return text


def _readings(readings: Facts | None) -> list[str]:
    if readings is None:
        return ["give --recipe to see how many epochs it reads"]
    columns: _Columns = [
        ("phase", "{phase}"),
        ("steps", "{start_step:,} to {end_step:,}"),
        ("rows of", "{sequence_length:,}"),
        ("rows a step", "{global_batch_size:,}"),
        ("rows read", "{rows:,}"),
        ("epochs", lambda phase: _epochs(phase["epochs"])),
        ("from epoch", lambda phase: _epochs(phase["first_epoch"])),
        ("to epoch", lambda phase: _epochs(phase["first_epoch"] + phase["epochs"])),
        ("tokens", "{tokens:,.0f}"),
    ]
    times = _epochs(readings["epochs"])
    total = ["all", "{steps:,}", "", "", "{rows:,}", times, "", "", "{tokens:,.0f}"]
    return [
        *aligned(
            [*_table(columns, readings["phases"]), [cell.format_map(readings) for cell in total]],
            left=(),
        ),
        f"the recipe reads each training document {times} times; with padding "
        f"{readings['slots']:,} token slots",
    ]


def _epochs(epochs: float) -> str:
    return f"{epochs:,.3g}" if epochs < 1 else f"{epochs:,.2f}"


def _examples(examples: Sequence[Facts]) -> list[str]:
    text = ["[quick->MASK]: quick is to be predicted where the model reads [MASK]"][: len(examples)]
    labels = {True: ", true: B follows A", False: ", random: B is from elsewhere", None: ""}
    for shown in examples:
        title = "row {row:,}, {row_fill:.0%} full"
        if shown["examples_in_row"] > 1:
            title += ", example {example} of {examples_in_row}"
        title += ", {masked} masked" + labels[shown["follows"]]
        text += ["", title.format_map(shown)]
        for name, segment in (("A", shown["first"]), ("B", shown["second"])):
            text += textwrap.wrap(
                segment or "",
                _LINE,
                initial_indent=f"  {name}  ",
                subsequent_indent="     ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return text


def _split(facts: Facts) -> str:
    return "train" if facts["split"] == "train" else "held out"


def _unknown(facts: Facts) -> float:
    return float(facts["unknown_tokens"] / max(facts["tokens"], 1))


def _table(columns: _Columns, things: Sequence[Any]) -> list[list[str]]:
    """A line of heads, and a line for each thing."""
    heads = [head for head, _ in columns]
    cells = [cell.format_map if isinstance(cell, str) else cell for _, cell in columns]
    return [heads, *([cell(one) for cell in cells] for one in things)]


def _bars(bins: Sequence[Facts]) -> list[str]:
    if not bins:
        return ["none"]
    counts = [bin["count"] for bin in bins]
    total, most = max(sum(counts), 1), max(1, *counts)
    rows = [
        (f"{bin['first']:,}", "-", f"{bin['last']:,}", f"{count:,}", f"{count / total:.1%}",
         "#" * -(-_BAR * count // most))
        for bin, count in zip(bins, counts, strict=True)
    ]  # fmt: skip
    return [f"  {line}" for line in aligned(rows, left=(5,))]


_PARTS: dict[str, Callable[[Any], list[str]]] = {
    "folder": _folder,
    "splits": _splits,
    "overlap": lambda found: [f"train documents that are held out too: {found['documents']:,}"],
    "rows": _rows,
    "readings": _readings,
    "examples": _examples,
}

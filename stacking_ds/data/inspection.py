"""Numbers of a prepared folder: its documents, duplicates and sentences, whether its
splits overlap, the rows it makes, how often a recipe reads it, and examples as text.

Everything is read in pieces from the mapped files, so that memory does not grow with the text.
`inspect_report` prints these records for people, `--json` for programs.

Shapes: D documents, S sentences, T tokens, R rows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders

from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import DataSection
from stacking_ds.data.batches import Batch
from stacking_ds.data.counter_random import derive_key, random_bits
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.row_store import open_layout
from stacking_ds.data.rows import Layout, LayoutSpec
from stacking_ds.data.shard_files import MANIFEST_NAME, Rejected, SourceFile, SplitName
from stacking_ds.data.shards import TokenShards, TokenSplit
from stacking_ds.data.tokenizer import Normalization, build_tokenizer
from stacking_ds.errors import DataError
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX

REPEATS_FROM_TOKENS = 8
"""Shorter sentences ("he said.") come again in any text, and say nothing about duplicates."""

_TOKENS_AT_ONCE = 2**20
_SENTENCES_IN_SAMPLE = 2**20
_PLACES = 5

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class LengthBin:
    """The number of things that are `first` to `last` tokens long, both included."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class FolderFacts:
    """Facts of the folder as a whole, from its manifest. `size_bytes` counts shards, lists of
    duplicates and vocabulary files, and no layouts."""

    folder: str
    every_byte_verified: bool
    vocab_size: int
    vocabulary_sha256: str
    normalization: Normalization
    licence: str | None
    size_bytes: int
    text_bytes: int
    bytes_per_token: float
    """Of the text as it was read, duplicates included."""
    sources: tuple[SourceFile, ...]
    rejected: tuple[Rejected, ...]


def folder_facts(shards: TokenShards, every_byte_verified: bool) -> FolderFacts:
    """The facts of an opened folder."""
    manifest = shards.manifest
    tokens = sum(file.tokens for file in (*manifest.train.shards, *manifest.heldout.shards))
    return FolderFacts(
        folder=str(shards.folder),
        every_byte_verified=every_byte_verified,
        vocab_size=manifest.vocab_size,
        vocabulary_sha256=manifest.vocabulary_sha256,
        normalization=manifest.request.normalization,
        licence=manifest.licence,
        size_bytes=sum(file.size_bytes for file in shards.files),
        text_bytes=manifest.text_bytes,
        bytes_per_token=manifest.text_bytes / max(tokens, 1),
        sources=manifest.sources,
        rejected=manifest.rejected,
    )


@dataclass(frozen=True)
class SplitFacts:
    """The documents of a split that count, and those that do not because they are duplicates.

    `repeated_share` is the share of sentences that repeat an earlier one token by token: over
    `sampled_sentences` sentences of at least 8 tokens, which are all whose hash falls into one of
    `one_in` classes, so that a sentence is in the sample with all of its copies or not at all.
    """

    split: SplitName
    documents: int
    sentences: int
    tokens: int
    files: int
    size_bytes: int
    duplicate_documents: int
    duplicate_tokens: int
    duplicate_share: float
    """Of all documents."""
    unknown_tokens: int
    document_lengths: tuple[LengthBin, ...]
    one_in: int
    sampled_sentences: int
    repeated_share: float


def split_facts(split: TokenSplit) -> SplitFacts:
    """Reads the whole split once.

    Raises DataError when other documents or tokens count than the manifest says.
    """
    record = split.shards.manifest.split(split.name)
    one_in = 1
    while record.sentences > one_in * _SENTENCES_IN_SAMPLE:
        one_in *= 2
    lengths_by_bits = np.zeros(64, dtype=np.int64)
    tokens = unknown = 0
    sampled: list[NDArray[np.uint64]] = []
    for shard, arrays in enumerate(split.arrays):
        lengths_D = np.diff(arrays.token_offsets)[split.counted(shard)].astype(np.int64)
        tokens += int(lengths_D.sum())
        # frexp's exponent is the number of bits, exact for any length
        lengths_by_bits += np.bincount(np.frexp(lengths_D)[1], minlength=64)
        for tokens_T, lengths_S in _counting_sentences(split, shard):
            unknown += int((tokens_T == split.shards.special_ids.unk).sum())
            sampled.append(_sample(tokens_T, lengths_S, one_in))
    documents = int(lengths_by_bits.sum())
    if (documents, tokens) != (record.documents, record.tokens):
        raise DataError(
            f"{split.shards.folder / MANIFEST_NAME} says that {record.documents:,} documents and "
            f"{record.tokens:,} tokens of the {split.name} split count, its files say "
            f"{documents:,} and {tokens:,}; delete the folder and prepare it again"
        )
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *sampled])
    return SplitFacts(
        split=split.name,
        documents=documents,
        sentences=record.sentences,
        tokens=tokens,
        files=len(record.shards),
        size_bytes=sum(file.size_bytes for file in record.shards),
        duplicate_documents=record.duplicates.documents,
        duplicate_tokens=record.duplicates.tokens,
        duplicate_share=record.duplicates.documents / max(split.num_documents, 1),
        unknown_tokens=unknown,
        document_lengths=_by_powers_of_two(lengths_by_bits),
        one_in=one_in,
        sampled_sentences=len(hashes),
        repeated_share=(len(hashes) - len(np.unique(hashes))) / max(len(hashes), 1),
    )


def _counting_sentences(
    split: TokenSplit, shard: int
) -> Iterator[tuple[NDArray[np.unsignedinteger], Integers]]:
    """The sentences of a file that count, about a million tokens at a time: their tokens one after
    the other [T], and their lengths [S]."""
    arrays = split.arrays[shard]
    counts_S = np.repeat(split.counted(shard), np.diff(arrays.sentence_offsets))
    offsets = np.concatenate([[0], np.cumsum(arrays.sentence_lengths, dtype=np.int64)])
    first = 0
    while first < len(counts_S):
        stop = int(np.searchsorted(offsets, offsets[first] + _TOKENS_AT_ONCE, side="right")) - 1
        stop = max(stop, first + 1)
        lengths_S, counting_S = np.diff(offsets[first : stop + 1]), counts_S[first:stop]
        tokens_T = arrays.tokens[offsets[first] : offsets[stop]]
        if not counting_S.all():
            tokens_T = tokens_T[np.repeat(counting_S, lengths_S)]
        yield tokens_T, lengths_S[counting_S]
        first = stop


def _sample(
    tokens_T: NDArray[np.unsignedinteger], lengths_S: Integers, one_in: int
) -> NDArray[np.uint64]:
    """The hashes of those sentences that are in the sample; `one_in` is a power of two."""
    if not len(lengths_S):
        return np.zeros(0, dtype=np.uint64)
    starts_S = np.cumsum(lengths_S) - lengths_S
    place_T = np.arange(len(tokens_T)) - np.repeat(starts_S, lengths_S)
    mixed_T = random_bits(derive_key(0), tokens_T.astype(np.int64) | place_T << 32)
    hashes_S = np.add.reduceat(mixed_T, starts_S)
    chosen_S = hashes_S & np.uint64(one_in - 1) == 0
    chosen: NDArray[np.uint64] = hashes_S[chosen_S & (lengths_S >= REPEATS_FROM_TOKENS)]
    return chosen


def _by_powers_of_two(counts: Integers) -> tuple[LengthBin, ...]:
    """1, 2-3, 4-7, ... from the shortest to the longest that there are; `counts` by bits."""
    there = np.flatnonzero(counts).tolist()
    bits = range(there[0], there[-1] + 1) if there else range(0)
    return tuple(LengthBin(2 ** (bit - 1), 2**bit - 1, int(counts[bit])) for bit in bits)


@dataclass(frozen=True)
class Overlap:
    """Documents of the training split that count and whose words are a held-out document's."""

    documents: int
    first: tuple[str, ...]
    """Where the first few lie, as `train-00000-000.arrow:17` (row 17 of the file, from 0)."""


def find_overlap(shards: TokenShards) -> Overlap:
    """Compares the documents of the two splits by their hashes."""
    train, heldout = shards.split("train"), shards.split("heldout")
    hashes = [np.zeros(0, dtype=np.uint64), *(arrays.document_hashes for arrays in heldout.arrays)]
    held_out = np.unique(np.concatenate(hashes))
    found = 0
    places: list[str] = []
    for shard, arrays in enumerate(train.arrays):
        both_D = np.isin(arrays.document_hashes, held_out) & train.counted(shard)
        rows = np.flatnonzero(both_D)
        found += len(rows)
        name = shards.manifest.train.shards[shard].name
        places += [f"{name}:{row}" for row in rows[: _PLACES - len(places)]]
    return Overlap(found, tuple(places))


# ---- What rows a prepared folder makes, and how often a recipe will read it.


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


def row_facts(split: TokenSplit, section: DataSection, workers: int = 1) -> RowFacts:
    """Opens the layouts of these rows, and makes those that are not there.

    Raises DataError when they cannot be made, or are none.
    """
    layouts = [
        open_layout(split, LayoutSpec.of(section, variant), workers)
        for variant in range(section.variants)
    ]
    variants, length = len(layouts), section.sequence_length
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
    """The text that the steps [start_step, end_step) of a run read."""

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
    """The epochs that the run reads of the training text; `rows_by_length` has each of its lengths.

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
    names = ("rows", "epochs", "tokens", "slots")
    sums = {name: sum(getattr(phase, name) for phase in phases) for name in names}
    return Readings(phases=tuple(phases), steps=steps, **sums)


# ---- Training examples as text, with what is masked in view.


_CONTINUATION = "##"


@dataclass(frozen=True)
class ShownExample:
    """One example of a batch. `follows` is the next-sentence label: True where B continues A, None
    where there is no B."""

    row: int
    """In the order of the run, from 0."""
    example: int
    """Within the row, from 1."""
    examples_in_row: int
    row_fill: float
    """The share of the row's slots that hold a token."""
    first: str
    second: str | None
    follows: bool | None
    masked: int
    """Masked tokens."""


def shown_examples(data: PretrainingData, count: int) -> list[ShownExample]:
    """The first `count` examples that a run with this data reads, as its loader gives them; fewer
    where an epoch has fewer rows."""
    rows = min(count, data.num_rows)
    if rows < 1:
        return []
    vocabulary = data.shards.vocabulary
    decoder = build_tokenizer(vocabulary).decoder
    row_by_row = data.step(0, rows, micro_batch_size=1).micro_batches
    shown: list[ShownExample] = []
    for row, batch in enumerate(row_by_row):
        shown += _shown(row, batch, vocabulary, decoder)
    return shown[:count]


def _shown(
    row: int, batch: Batch, vocabulary: Sequence[str], decoder: decoders.Decoder
) -> list[ShownExample]:
    """The examples of one row."""
    labels = dict(zip(batch.mlm_positions_M.tolist(), batch.mlm_labels_M.tolist(), strict=True))
    ids, types = batch.input_ids_T.tolist(), batch.token_type_ids_T.tolist()
    bounds = itertools.pairwise(batch.sequences.starts_E1.tolist())
    shown: list[ShownExample] = []
    for (start, stop), label in zip(bounds, batch.next_sentence_label_E.tolist(), strict=True):
        has_second = types[stop - 1] == 1
        middle = types.index(1, start) if has_second else stop
        # [CLS] A [SEP] is [start, middle), B [SEP] is [middle, stop)
        first = _pieces(range(start + 1, middle - 1), ids, labels, vocabulary)
        second = _pieces(range(middle, stop - 1), ids, labels, vocabulary)
        shown.append(
            ShownExample(
                row=row,
                example=len(shown) + 1,
                examples_in_row=len(batch.next_sentence_label_E),
                row_fill=len(ids) / batch.sequences.slots,
                first=decoder.decode(first),
                second=decoder.decode(second) if has_second else None,
                follows=None if label == IGNORE_INDEX else label == 0,
                masked=sum(position in labels for position in range(start, stop)),
            )
        )
    return shown


def _pieces(
    positions: range, ids: Sequence[int], labels: Mapping[int, int], vocabulary: Sequence[str]
) -> list[str]:
    """The tokens at `positions`, a masked one in brackets, behind ## where it continues a word so
    that the decoder joins it."""
    pieces = []
    for position in positions:
        piece = vocabulary[ids[position]]
        if position in labels:
            hidden = vocabulary[labels[position]]
            joined = _CONTINUATION if hidden.startswith(_CONTINUATION) else ""
            piece = f"{joined}[{hidden}->{'MASK' if piece == '[MASK]' else piece}]"
        pieces.append(piece)
    return pieces

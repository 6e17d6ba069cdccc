"""Numbers of a prepared folder: its documents, duplicates and sentences, whether its
splits overlap, the rows it makes, how often a recipe reads it, and examples as text.

Each part of the report is a dictionary, or a list of them: `--json` prints it as it is,
`inspect_report` for people. Everything is read in pieces from the mapped files, so that memory does
not grow with the text.

Shapes: D documents, S sentences, T tokens, R rows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders

from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import DataSection
from stacking_ds.data.batches import Batch
from stacking_ds.data.counter_random import Integers, Words, derive_key, random_bits
from stacking_ds.data.examples import ranges
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.rows import Layout, LayoutSpec, open_layout
from stacking_ds.data.shards import TokenShards, TokenSplit
from stacking_ds.data.tokenizer import CONTINUATION, build_tokenizer
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX

REPEATS_FROM_TOKENS = 8
"""Shorter sentences ("he said.") come again in any text, and say nothing about duplicates."""

_TOKENS_AT_ONCE = 2**20
_SENTENCES_IN_SAMPLE = 2**20
_PLACES = 5

Facts = dict[str, Any]


def folder_facts(shards: TokenShards, every_byte_verified: bool) -> Facts:
    """The facts of an opened folder as a whole, from its manifest."""
    manifest = shards.manifest
    tokens = sum(file.tokens for file in (*manifest.train.shards, *manifest.heldout.shards))
    return {
        "folder": str(shards.folder),
        "every_byte_verified": every_byte_verified,
        "vocab_size": manifest.vocab_size,
        "vocabulary_sha256": manifest.vocabulary_sha256,
        "normalization": manifest.request.normalization,
        "licence": manifest.licence,
        # shards, lists of duplicates and vocabulary files, and no layouts
        "size_bytes": sum(file.size_bytes for file in shards.files),
        "text_bytes": manifest.text_bytes,
        # of the text as it was read, duplicates included
        "bytes_per_token": manifest.text_bytes / max(tokens, 1),
        "sources": manifest.sources,
        "rejected": manifest.rejected,
    }


def split_facts(split: TokenSplit) -> Facts:
    """The documents of a split that count, and those that do not because they are duplicates.

    `repeated_share` is the share of sentences that repeat an earlier one token by token: over
    `sampled_sentences` sentences of at least 8 tokens, which are all whose hash falls into one of
    `one_in` classes, so that a sentence is in the sample with all of its copies or not at all.

    Raises DataError when other duplicates are left out than the manifest says.
    """
    split.require_duplicates()
    record = split.shards.manifest.split(split.name)
    one_in = 1
    while record.sentences > one_in * _SENTENCES_IN_SAMPLE:
        one_in *= 2
    lengths_by_bits = np.zeros(64, dtype=np.int64)
    unknown = 0
    sampled = [np.zeros(0, dtype=np.uint64)]
    for shard, arrays in enumerate(split.arrays):
        lengths_D = np.diff(arrays.token_offsets)[split.counted(shard)].astype(np.int64)
        # frexp's exponent is the number of bits, exact for any length
        lengths_by_bits += np.bincount(np.frexp(lengths_D)[1], minlength=64)
        for tokens_T, lengths_S in _counting_sentences(split, shard):
            unknown += int((tokens_T == split.shards.special_ids.unk).sum())
            sampled.append(_sample(tokens_T, lengths_S, one_in))
    hashes = np.concatenate(sampled)
    bits = np.flatnonzero(lengths_by_bits)
    return {
        "split": split.name,
        "documents": record.documents,
        "sentences": record.sentences,
        "tokens": record.tokens,
        "files": len(record.shards),
        "size_bytes": sum(file.size_bytes for file in record.shards),
        "duplicate_documents": record.duplicates.documents,
        "duplicate_tokens": record.duplicates.tokens,
        # of all documents
        "duplicate_share": record.duplicates.documents / max(split.num_documents, 1),
        "unknown_tokens": unknown,
        # 1, 2-3, 4-7, ... tokens, from the shortest to the longest that there are
        "document_lengths": [
            _bin(2 ** (bit - 1), 2**bit - 1, lengths_by_bits[bit])
            for bit in (range(int(bits[0]), int(bits[-1]) + 1) if len(bits) else ())
        ],
        "one_in": one_in,
        "sampled_sentences": len(hashes),
        "repeated_share": (len(hashes) - len(np.unique(hashes))) / max(len(hashes), 1),
    }


def _bin(first: int, last: int, count: Any) -> Facts:
    """The number of things that are `first` to `last` tokens long, both included."""
    return {"first": first, "last": last, "count": int(count)}


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


def _sample(tokens_T: NDArray[np.unsignedinteger], lengths_S: Integers, one_in: int) -> Words:
    """The hashes of those sentences that are in the sample; `one_in` is a power of two."""
    if not len(lengths_S):
        return np.zeros(0, dtype=np.uint64)
    starts_S = np.cumsum(lengths_S) - lengths_S
    place_T = ranges(np.zeros_like(lengths_S), lengths_S)
    mixed_T = random_bits(derive_key(0), tokens_T.astype(np.int64) | place_T << 32)
    hashes_S = np.add.reduceat(mixed_T, starts_S)
    chosen_S = hashes_S & np.uint64(one_in - 1) == 0
    chosen: Words = hashes_S[chosen_S & (lengths_S >= REPEATS_FROM_TOKENS)]
    return chosen


def find_overlap(shards: TokenShards) -> Facts:
    """The documents of the training split that count and whose words are a held-out document's, and
    where the first few lie, as `train-00000-000.arrow:17` (row 17 of the file, from 0)."""
    train, heldout = shards.split("train"), shards.split("heldout")
    hashes = [np.zeros(0, dtype=np.uint64), *(arrays.document_hashes for arrays in heldout.arrays)]
    held_out = np.unique(np.concatenate(hashes))
    documents = 0
    first: list[str] = []
    for shard, (file, arrays) in enumerate(
        zip(shards.manifest.train.shards, train.arrays, strict=True)
    ):
        both_D = np.isin(arrays.document_hashes, held_out) & train.counted(shard)
        rows = np.flatnonzero(both_D)
        documents += len(rows)
        first += [f"{file.name}:{row}" for row in rows[: _PLACES - len(first)]]
    return {"documents": documents, "first": first}


# ---- What rows a prepared folder makes, and how often a recipe will read it.


_ROWS_AT_ONCE = 2**16
_LENGTH_BINS = 8


def row_facts(split: TokenSplit, section: DataSection, workers: int = 1) -> Facts:
    """The rows of one split and one sequence length, [CLS] and [SEP] included; means over the
    variants. Makes the layouts that are not there; raises what `open_layout` does."""
    layouts = [
        open_layout(split, LayoutSpec.of(section, variant), workers)
        for variant in range(section.variants)
    ]
    variants, length = len(layouts), section.sequence_length
    rows = sum(layout.num_rows for layout in layouts)
    used = sum(layout.used_slots for layout in layouts)
    examples, true_pairs, random_pairs = (
        sum(layout.total(count) for layout in layouts)
        for count in ("examples", "true_pairs", "random_pairs")
    )
    pairs = true_pairs + random_pairs
    return {
        "split": split.name,
        "sequence_length": length,
        "variants": variants,
        "rows_per_epoch": rows / variants,
        "examples_per_row": examples / rows,
        "tokens_per_row": used / rows,
        # the share of the slots that hold a token
        "fill": used / (rows * length),
        "empty_slots_per_epoch": (rows * length - used) / variants,
        # of the sentence pairs; None if there are none
        "random_share": random_pairs / pairs if pairs else None,
        # over all variants
        "example_lengths": _example_lengths(layouts, length),
    }


def _example_lengths(layouts: Sequence[Layout], sequence_length: int) -> list[Facts]:
    counts = np.zeros(sequence_length + 1, dtype=np.int64)
    for layout in layouts:
        for first in range(0, layout.num_rows, _ROWS_AT_ONCE):
            rows_R = np.arange(first, min(first + _ROWS_AT_ONCE, layout.num_rows))
            _, examples = layout.examples_of(rows_R)
            counts += np.bincount(examples.slots, minlength=len(counts))
    width = -(-sequence_length // _LENGTH_BINS)
    return [
        _bin(low, min(low + width - 1, sequence_length), counts[low : low + width].sum())
        for low in range(1, sequence_length + 1, width)
    ]


def readings(config: RunConfig, rows_by_length: Mapping[int, Facts]) -> Facts:
    """The text that each phase of the run reads of the training split, and the sums; the
    `row_facts` of each sequence length are given.

    An epoch, of rows of whatever length, is once through the text, so `epochs` is how often each
    document is read. Raises StageError for a schedule that cannot be trained.
    """
    steps = config.stage_schedule().total_steps
    phases: list[Facts] = []
    for phase, end_step in config.phase_schedule().between(0, steps):
        facts = rows_by_length[phase.sequence_length]
        rows = phase.first_row(end_step) - phase.rows_before
        phases.append(
            {
                "phase": phase.index,
                "start_step": phase.start_step,
                "end_step": end_step,
                "sequence_length": phase.sequence_length,
                "global_batch_size": phase.global_batch_size,
                "rows": rows,
                # how many epochs of rows of this length earlier phases have read
                "first_epoch": phase.rows_before / facts["rows_per_epoch"],
                "epochs": rows / facts["rows_per_epoch"],
                # expected: [CLS] and [SEP] included
                "tokens": rows * facts["tokens_per_row"],
                # padding included
                "slots": rows * phase.sequence_length,
            }
        )
    names = ("rows", "epochs", "tokens", "slots")
    sums = {name: sum(phase[name] for phase in phases) for name in names}
    return {"phases": phases, "steps": steps, **sums}


# ---- Training examples as text, with what is masked in view.


def shown_examples(data: PretrainingData, count: int) -> list[Facts]:
    """The first `count` examples that a run with this data reads, as its loader gives them; fewer
    where an epoch has fewer rows."""
    rows = min(count, data.num_rows)
    if rows < 1:
        return []
    vocabulary = data.shards.vocabulary
    decoder = build_tokenizer(vocabulary).decoder
    row_by_row = data.step(0, rows, micro_batch_size=1).micro_batches
    shown = (_shown(row, batch, vocabulary, decoder) for row, batch in enumerate(row_by_row))
    return list(itertools.islice(itertools.chain.from_iterable(shown), count))


def _shown(
    row: int, batch: Batch, vocabulary: Sequence[str], decoder: decoders.Decoder
) -> Iterator[Facts]:
    """The examples of one row."""
    labels = dict(zip(batch.mlm_positions_M.tolist(), batch.mlm_labels_M.tolist(), strict=True))
    pieces = [vocabulary[token] for token in batch.input_ids_T.tolist()]
    for position, label in labels.items():
        read, hidden = pieces[position], vocabulary[label]
        # behind ## where it continues a word, so that the decoder joins it
        joined = CONTINUATION if hidden.startswith(CONTINUATION) else ""
        pieces[position] = f"{joined}[{hidden}->{'MASK' if read == '[MASK]' else read}]"
    types, labels_E = batch.token_type_ids_T.tolist(), batch.next_sentence_label_E.tolist()
    bounds = itertools.pairwise(batch.sequences.starts_E1.tolist())
    for number, ((start, stop), label) in enumerate(zip(bounds, labels_E, strict=True), start=1):
        has_second = types[stop - 1] == 1
        middle = types.index(1, start) if has_second else stop
        # [CLS] A [SEP] is [start, middle), B [SEP] is [middle, stop)
        yield {
            "row": row,  # in the order of the run, from 0
            "example": number,  # within the row, from 1
            "examples_in_row": len(labels_E),
            "row_fill": len(pieces) / batch.sequences.slots,
            "first": decoder.decode(pieces[start + 1 : middle - 1]),
            "second": decoder.decode(pieces[middle : stop - 1]) if has_second else None,
            # whether B continues A; None where there is no B
            "follows": None if label == IGNORE_INDEX else label == 0,
            "masked": sum(position in labels for position in range(start, stop)),
        }

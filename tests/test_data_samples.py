"""Spans hold every token once; pairs are true or from another document, never in between."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.manifest import (
    DataManifest,
    PrepareRequest,
    SplitManifest,
)
from stacking_ds.data.samples import build_samples, draw_pairs
from stacking_ds.data.shard_writer import SplitWriter
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from tests import prose


def split_of(folder, documents, shard_tokens=2**20):
    """A split with the given sentence lengths; its tokens count up from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(folder, "train", vocab_size=70_000, shard_tokens=shard_tokens)
    token = 0
    for lengths in documents:
        sentences = []
        for length in lengths:
            sentences.append(range(token, token + length))
            token += length
        writer.add(sentences)
    empty = SplitManifest(documents=0, sentences=0, tokens=0, shards=())
    manifest = DataManifest(
        request=PrepareRequest(
            sources=(), heldout_sources=(), heldout_fraction=0.0, vocabulary="trained:70000"
        ),
        licence=None,
        vocab_size=70_000,
        vocabulary_sha256="",
        vocabulary_files=(),
        duplicate_documents=0,
        empty_documents=0,
        train=writer.finish(),
        heldout=empty,
    )
    return TokenShards(folder, manifest).split("train")


def spans(index):
    return [
        (int(document), int(start), int(start + length))
        for document, start, length in zip(
            index.document_N, index.start_N, index.length_N, strict=True
        )
    ]


def boundaries(index, sample):
    low, high = index.boundary_offsets_N[sample : sample + 2]
    return index.boundaries[low:high].tolist()


def test_spans_of_a_small_example(tmp_path):
    # sequence_length 13 leaves ten tokens; the sentence of 23 is cut into 10, 10 and 3.
    split = split_of(tmp_path, [[4, 4, 4], [23, 5, 5], [10], [1]])
    index = build_samples(split, 13)
    assert spans(index) == [
        (0, 0, 8),
        (0, 8, 12),
        (1, 12, 22),
        (1, 22, 32),
        (1, 32, 40),
        (1, 40, 45),
        (2, 45, 55),
        (3, 55, 56),
    ]
    assert [boundaries(index, k) for k in range(8)] == [[4], [], [], [], [3], [], [], []]


documents_of_lengths = st.lists(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=2, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_lengths, length=st.integers(8, 64), shard=st.integers(1, 400))
def test_every_token_lies_in_exactly_one_span(tmp_path_factory, documents, length, shard):
    split = split_of(tmp_path_factory.mktemp("s"), documents, shard_tokens=shard)
    index = build_samples(split, length)
    covered = np.concatenate([np.arange(start, stop) for _, start, stop in spans(index)])
    assert covered.tolist() == list(range(split.num_tokens))
    starts = np.cumsum([0, *map(sum, documents)])
    sentence_starts = set(np.cumsum([0, *(n for document in documents for n in document)]).tolist())
    for sample, (document, start, stop) in enumerate(spans(index)):
        assert starts[document] <= start < stop <= starts[document + 1]
        assert stop - start <= length - 3
        inner = [place for place in sentence_starts if start < place < stop]
        assert boundaries(index, sample) == [place - start for place in sorted(inner)]
        # Greedy: the following sentence, or its first piece, would not have fitted.
        if stop != starts[document + 1]:
            upper = min(place for place in sentence_starts if place > stop)
            assert min(upper, stop + length - 3) - start > length - 3


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_lengths, length=st.integers(8, 64), seed=st.integers(0, 1000))
def test_pairs_are_true_or_from_another_document(tmp_path_factory, documents, length, seed):
    split = split_of(tmp_path_factory.mktemp("p"), documents)
    index = build_samples(split, length)
    samples = np.tile(np.arange(len(index)), 5)
    pairs = draw_pairs(index, samples, derive_key(seed, np.arange(len(samples))))
    starts = np.cumsum([0, *map(sum, documents)])
    document_of = np.searchsorted(starts, np.arange(starts[-1]), side="right") - 1
    known = spans(index)
    for row, sample in enumerate(samples):
        document, start, stop = known[sample]
        first = range(
            pairs.first_start_B[row], pairs.first_start_B[row] + pairs.first_length_B[row]
        )
        second = range(
            pairs.second_start_B[row], pairs.second_start_B[row] + pairs.second_length_B[row]
        )
        assert len(first) >= 1
        assert len(second) >= 1
        assert len(first) + len(second) <= length - 3
        assert first.start == start
        own_boundaries = boundaries(index, sample)
        if own_boundaries:
            assert len(first) in own_boundaries
        if pairs.is_random_B[row]:
            others = set(document_of[list(second)].tolist())
            assert len(others) == 1
            assert document not in others
        else:
            assert (second.start, second.stop) == (first.stop, stop)


def test_half_of_the_pairs_are_random_and_others_are_drawn_evenly(tmp_path):
    split = split_of(tmp_path, [[5] * 8] * 20)
    index = build_samples(split, 33)
    assert len(index) == 40
    samples = np.zeros(20_000, dtype=np.int64)
    pairs = draw_pairs(index, samples, derive_key(1, np.arange(len(samples))))
    assert abs(pairs.is_random_B.mean() - 0.5) < 5 * 0.5 / 20_000**0.5
    assert np.unique(pairs.first_length_B).tolist() == [5, 10, 15, 20, 25]
    other = pairs.second_start_B[pairs.is_random_B] // 40
    counts = np.bincount(other, minlength=20)
    assert counts[0] == 0
    expected = counts.sum() / 19
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 18 + 5 * 6
    # A random second part is as long as the true one would be, so length gives nothing away.
    total = pairs.first_length_B + pairs.second_length_B
    assert total[pairs.is_random_B].mean() > 0.75 * total[~pairs.is_random_B].mean()


def test_a_sentence_cut_between_pairs_reaches_every_inner_token(tmp_path):
    index = build_samples(split_of(tmp_path, [[9], [9]]), 12)
    pairs = draw_pairs(index, np.zeros(500, dtype=np.int64), derive_key(2, np.arange(500)))
    assert np.unique(pairs.first_length_B).tolist() == list(range(1, 9))


def test_real_prose_starts_pairs_at_sentences(tmp_path):
    split = TokenShards.open(prose.tiny_shards(tmp_path)).split("train")
    index = build_samples(split, 64)
    assert int(index.length_N.sum()) == split.num_tokens
    starts = set()
    base = 0
    for document in range(split.num_documents):
        lengths = split.sentence_lengths_of(document)
        starts.update((base + np.cumsum(lengths) - lengths).tolist())
        base += int(lengths.sum())
    pairs = draw_pairs(index, np.arange(len(index)), derive_key(3, np.arange(len(index))))
    assert np.isin(pairs.first_start_B, sorted(starts)).all()
    at_sentence = np.isin(pairs.second_start_B, sorted(starts))
    whole = np.diff(index.boundary_offsets_N) > 0
    assert at_sentence[pairs.is_random_B].all()
    assert at_sentence[whole].all()


def test_sequences_too_short_and_single_documents_are_refused(tmp_path):
    split = split_of(tmp_path, [[5], [6]])
    with pytest.raises(DataError, match="sequence_length is 7; sentence pairs need at least 8"):
        build_samples(split, 7)
    with pytest.raises(DataError, match=r"the train split of .* has 1 document\(s\)"):
        build_samples(split_of(tmp_path / "one", [[5, 5]]), 16)

"""Examples hold every token once; pairs go on in their document or in another, never in between."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.examples import Passages, concatenate, cut_documents, cut_pairs
from stacking_ds.errors import DataError


def passages_of(documents, gap=0):
    """Documents of the given sentence lengths, `gap` tokens that do not count between them."""
    starts, ends, counts = [], [], [0]
    place = 0
    for lengths in documents:
        starts.append(place)
        ends.extend((place + np.cumsum(lengths)).tolist())
        place = ends[-1] + gap
        counts.append(len(ends))
    stops = [ends[count - 1] for count in counts[1:]]
    return Passages(*(np.array(each, dtype=np.int64) for each in (starts, stops, counts, ends)))


def tokens_of(examples):
    """Every token of every example, in their order."""
    first = zip(examples.first_start_E, examples.first_length_E, strict=True)
    second = zip(examples.second_start_E, examples.second_length_E, strict=True)
    return [
        token
        for pair in zip(first, second, strict=True)
        for start, length in pair
        for token in range(start, start + length)
    ]


def document_of(passages, token):
    return int(np.searchsorted(passages.starts, token, side="right")) - 1


documents_of_lengths = st.lists(
    st.lists(st.integers(1, 60) | st.just(700), min_size=1, max_size=12), min_size=1, max_size=12
)
# rows of 512 have Bs of every fourth length only
row_lengths = st.integers(8, 64) | st.just(512)


@settings(max_examples=150)
@given(
    documents=documents_of_lengths,
    length=row_lengths,
    seed=st.integers(0, 1000),
    gap=st.sampled_from([0, 7]),
)
def test_pairs_hold_every_token_once_and_know_where_they_come_from(documents, length, seed, gap):
    passages = passages_of(documents, gap)
    pairs = cut_pairs(passages, length, derive_key(seed))
    expected = [
        token
        for start, stop in zip(passages.starts, passages.stops, strict=True)
        for token in range(start, stop)
    ]
    assert sorted(tokens_of(pairs)) == expected
    assert (pairs.slots <= length).all()
    assert (pairs.first_length_E > 0).all()
    stops = dict(zip(passages.starts, passages.stops, strict=True))
    for row in range(len(pairs)):
        first, second = int(pairs.first_start_E[row]), int(pairs.second_start_E[row])
        first_stop = first + int(pairs.first_length_E[row])
        own = document_of(passages, first)
        assert document_of(passages, first_stop - 1) == own
        if pairs.second_length_E[row] == 0:
            assert not pairs.is_random_E[row]
            assert pairs.second_start_E[row] == 0
            continue
        other = document_of(passages, second)
        stop = second + int(pairs.second_length_E[row])
        assert document_of(passages, stop - 1) == other
        assert pairs.is_random_E[row] == (other != own)
        assert second not in stops, "nothing follows on to the beginning of a document"
        if not pairs.is_random_E[row]:
            assert second == first_stop
            # B takes the room there is: it ends where the room or its document does
            step = max(1, (length - 3) // 125)
            assert pairs.slots[row] > length - step or stop == passages.stops[other]


@settings(max_examples=80)
@given(documents=documents_of_lengths, length=row_lengths, seed=st.integers(0, 1000))
def test_a_second_begins_with_a_sentence_whether_true_or_random(documents, length, seed):
    passages = passages_of(documents)
    pairs = cut_pairs(passages, length, derive_key(seed))
    begins = {0, *passages.sentence_ends.tolist()}
    longest = max(max(lengths) for lengths in documents)
    for start, size in zip(pairs.second_start_E, pairs.second_length_E, strict=True):
        if size and longest <= length - 4:
            assert int(start) in begins


def differently_distributed(feature, is_random):
    """Kolmogorov and Smirnov's distance of a feature between true and random pairs, as a multiple
    of what chance allows once in a million."""
    true, random = np.sort(feature[~is_random]), np.sort(feature[is_random])
    places = np.union1d(true, random)
    shares = [np.searchsorted(each, places, side="right") / len(each) for each in (true, random)]
    chance = (7.25 * (len(true) + len(random)) / (len(true) * len(random))) ** 0.5
    return np.abs(shares[0] - shares[1]).max() / chance


@pytest.mark.parametrize("sentences", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("length", [64, 256])
def test_half_of_the_pairs_are_random_and_nothing_around_them_tells(sentences, length):
    random_source = np.random.default_rng(0)
    counts = np.ceil(random_source.lognormal(sentences, 1.0, int(60_000 / np.exp(sentences))))
    passages = passages_of([random_source.integers(3, 40, int(n)).tolist() for n in counts])
    found = cut_pairs(passages, length, derive_key(5))
    pairs = found[np.flatnonzero(found.second_length_E > 0)]
    share, count = pairs.is_random_E.mean(), len(pairs)
    assert count > 1000
    assert abs(share - 0.5) < 5 * 0.5 / count**0.5
    first_stop = pairs.first_start_E + pairs.first_length_E
    second_stop = pairs.second_start_E + pairs.second_length_E
    features = {
        "A begins a document": np.isin(pairs.first_start_E, passages.starts),
        "A ends a document": np.isin(first_stop, passages.stops),
        "A ends a sentence": np.isin(first_stop, passages.sentence_ends),
        "B begins a document": np.isin(pairs.second_start_E, passages.starts),
        "B begins a sentence": np.isin(pairs.second_start_E, passages.sentence_ends),
        "B ends a document": np.isin(second_stop, passages.stops),
        "length of A": pairs.first_length_E,
        "length of B": pairs.second_length_E,
    }
    for name, feature in features.items():
        assert differently_distributed(feature, pairs.is_random_E) < 1, name
    # an exchanged B is shorter by the step to the next length, and there are few such steps
    full = [
        (pairs.slots[mine] == length).mean() for mine in (pairs.is_random_E, ~pairs.is_random_E)
    ]
    assert abs(full[0] - full[1]) < 0.1


def test_seconds_come_from_all_over_and_few_examples_are_alone():
    random_source = np.random.default_rng(1)
    passages = passages_of([random_source.integers(3, 40, 40).tolist() for _ in range(300)])
    pairs = cut_pairs(passages, 128, derive_key(6))
    alone = pairs.second_length_E == 0
    # a rest of one sentence at the end of a document, and the two ends of the exchange
    assert 0 < alone.mean() < 0.06
    rests = (pairs.first_start_E + pairs.first_length_E)[alone]
    assert (~np.isin(rests, passages.stops)).sum() <= 6
    own = np.searchsorted(passages.starts, pairs.first_start_E, side="right")
    other = np.searchsorted(passages.starts, pairs.second_start_E, side="right")
    mine = pairs.is_random_E
    assert len(np.unique(other[mine])) > 290
    assert np.abs(own - other)[mine].mean() > 60, "not the neighbours"
    # neither part is the long one, and B has enough to be judged by
    full = pairs.slots == 128
    assert abs(pairs.first_length_E[full].mean() - 125 / 2) < 8
    assert pairs.second_length_E[full].min() >= 125 // 8


def test_one_large_document_gives_what_the_small_ones_can_take():
    pairs = cut_pairs(passages_of([[5] * 4000, *[[5] * 8] * 20]), 32, derive_key(1))
    assert 20 <= pairs.is_random_E.sum() <= 80
    assert (pairs.second_length_E > 0).mean() > 0.9, "the others stay true"


def test_other_keys_pair_otherwise_and_the_same_key_the_same():
    passages = passages_of([[5] * 20] * 20)
    one, again, other = (cut_pairs(passages, 32, derive_key(key)) for key in (1, 1, 2))
    assert tokens_of(one) == tokens_of(again)
    assert tokens_of(one) != tokens_of(other)
    assert sorted(tokens_of(one)) == sorted(tokens_of(other))


def test_a_single_document_gives_true_pairs_only():
    pairs = cut_pairs(passages_of([[5] * 20]), 32, derive_key(1))
    assert not pairs.is_random_E.any()
    assert tokens_of(pairs) == list(range(100))


@settings(max_examples=100)
@given(documents=documents_of_lengths, length=row_lengths, shifted=st.booleans())
def test_documents_are_cut_into_full_pieces_in_order(documents, length, shifted):
    passages = passages_of(documents, gap=3)
    pieces = cut_documents(passages, length, derive_key(1) if shifted else None)
    expected = [
        token
        for start, stop in zip(passages.starts, passages.stops, strict=True)
        for token in range(start, stop)
    ]
    assert tokens_of(pieces) == expected
    assert (pieces.second_length_E == 0).all()
    assert (pieces.first_length_E > 0).all()
    assert (pieces.slots <= length).all()
    stops = pieces.first_start_E + pieces.first_length_E
    ends_document = np.isin(stops, passages.stops)
    begins_document = np.isin(pieces.first_start_E, passages.starts)
    assert ((pieces.slots == length) | ends_document | (shifted & begins_document)).all()


def test_a_key_shifts_the_cuts_of_long_documents():
    passages = passages_of([[100]] * 50)
    first = cut_documents(passages, 22, derive_key(1)).first_length_E
    lengths = first[np.concatenate([[True], np.cumsum(first)[:-1] % 100 == 0])]
    assert len(np.unique(lengths)) > 10
    assert lengths.max() <= 20


def test_a_sequence_too_short_is_refused():
    with pytest.raises(DataError, match="sequence_length is 7; examples need at least 8"):
        cut_pairs(passages_of([[5], [6]]), 7, derive_key(1))
    with pytest.raises(DataError, match="sequence_length is 7; examples need at least 8"):
        cut_documents(passages_of([[5], [6]]), 7, None)


def test_nothing_concatenates_to_nothing():
    assert len(concatenate([])) == 0

"""The global batch is a function of (seed, position), whoever computes it."""

import itertools
import pickle
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.config.sections import DataSection
from stacking_ds.data.batches import Batch, RankStep, rows_of_rank, split_batch
from stacking_ds.data.loader import (
    PretrainingData,
    PretrainingSteps,
    evaluation_steps,
    load_steps,
    unigram_log_probabilities,
    unigram_mlm_loss,
)
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import ConfigError, DataError
from stacking_ds.schedule.phases import PhaseSchedule
from tests import prose
from tests.token_shards import FIRST_TOKEN, make_shards

LENGTH = 48
PAIRS = DataSection(path="-", sequence_length=LENGTH, mlm_probability=0.15)
KINDS = {
    "pairs": PAIRS,
    "packed pairs": PAIRS.changed(packing=True),
    "packed documents": PAIRS.changed(packing=True, examples="documents", masking="whole_words"),
    "variants": PAIRS.changed(packing=True, variants=3, masking="spans"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return TokenShards.open(prose.tiny_shards(tmp_path_factory.mktemp("loader"), documents=60))


@pytest.fixture(scope="module")
def opened(shards):
    return {kind: PretrainingData(shards, "train", KINDS[kind], seed=7) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def data(request, opened):
    return opened[request.param]


def evaluation(shards, options=PAIRS, **changes):
    return evaluation_steps(
        shards, options, **({"max_rows": 10**6, "micro_batch_size": 8} | changes)
    )


def phase(global_batch_size, micro_batch_size):
    return PhaseSchedule.from_shapes([(0, LENGTH, global_batch_size, micro_batch_size)]).phases[0]


def examples_of(steps):
    """The examples that carry weight, over ranks and micro-batches in order, unmasked: (label,
    [ids], [types], [masked places], [what is read there])."""
    found = []
    for step in steps:
        for batch in step.micro_batches:
            ids_T, types_T = batch.input_ids_T.tolist(), batch.token_type_ids_T.tolist()
            masked = dict(
                zip(batch.mlm_positions_M.tolist(), batch.mlm_labels_M.tolist(), strict=True)
            )
            starts_E1 = batch.sequences.starts_E1.tolist()
            assert starts_E1[-1] == len(ids_T)
            for label, start, stop in zip(
                batch.next_sentence_label_E.tolist(), starts_E1[:-1], starts_E1[1:], strict=True
            ):
                places = batch.position_ids_T[start:stop].tolist()
                assert places == list(range(stop - start))
                inside = [place for place in places if start + place in masked]
                example = (
                    label,
                    tuple(masked.get(at, ids_T[at]) for at in range(start, stop)),
                    tuple(types_T[start:stop]),
                    tuple(inside),
                    tuple(ids_T[start + place] for place in inside),
                )
                if stop - start > 2:
                    found.append(example)
                else:
                    assert example == (-100, (2, 3), (0, 0), (), ()), "a row without weight"
    return found


def examples_by_row(data, first, count):
    """How many examples each of the rows from `first` on holds, all of them in its slots."""
    rows = data.step(first, count, micro_batch_size=1).micro_batches
    for row in rows:
        assert len(row.input_ids_T) <= row.sequences.slots == data.section.sequence_length
    return [len(row.next_sentence_label_E) for row in rows]


@given(batch=st.integers(1, 5000), world=st.integers(1, 300), micro=st.integers(1, 600))
def test_split_covers_the_batch_with_little_waste(batch, world, micro):
    size, count = split_batch(batch, world, micro)
    rows = -(-batch // world)
    assert 1 <= size <= micro
    assert size * count >= rows
    assert count == -(-rows // micro)
    assert size * count - rows < count
    shares = [rows_of_rank(batch, world, micro, rank) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(batch))
    assert all(len(share) <= size * count for share in shares)


def test_split_of_the_documented_example():
    assert split_batch(10, 3, 3) == (2, 2)
    assert [rows_of_rank(10, 3, 3, rank) for rank in range(3)] == [
        range(4),
        range(4, 8),
        range(8, 10),
    ]
    with pytest.raises(ConfigError, match="micro_batch_size is 0; it must be at least 1"):
        split_batch(8, 2, 0)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(KINDS)),
    world_size=st.sampled_from([1, 2, 3, 4, 8, 25]),
    micro_batch_size=st.integers(1, 30),
    first=st.integers(0, 10**12),
    batch=st.integers(1, 30),
)
def test_any_split_computes_the_same_global_batch(
    opened, kind, world_size, micro_batch_size, first, batch
):
    data = opened[kind]
    whole = data.step(first, batch, micro_batch_size=batch)
    steps = [
        data.step(first, batch, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    by_row = examples_by_row(data, first, batch)
    assert len(by_row) == batch
    assert sum(by_row) == len(examples_of([whole]))
    assert examples_of(steps) == examples_of([whole])
    assert len({(len(step.sizes), step.slots) for step in steps}) == 1
    for count in ("mlm_targets", "nsp_targets", "real_tokens"):
        assert sum(getattr(step, count) for step in steps) == getattr(whole, count)
    (only,) = whole.micro_batches
    assert whole.nsp_targets == int((only.next_sentence_label_E >= 0).sum())
    assert whole.real_tokens == len(only.input_ids_T)
    assert whole.mlm_targets == len(only.mlm_labels_M)


@settings(max_examples=25)
@given(
    documents=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=4, max_size=10
    ),
    kind=st.sampled_from(list(KINDS)),
    batch=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_token_of_every_document_is_in_each_epoch_once(
    tmp_path_factory, documents, kind, batch, seed
):
    folder = tmp_path_factory.mktemp("epoch")
    made = make_shards(folder, documents, documents_per_shard=3, duplicates=[1])
    options = KINDS[kind].changed(sequence_length=24)
    data = PretrainingData(made, "train", options, seed=seed)
    sizes = [data.layout(variant).num_rows for variant in range(options.variants)] * 2
    batch = min(batch, *sizes)
    bases = np.cumsum([0, *(sum(lengths) for lengths in documents)])
    counting = sorted(
        token + FIRST_TOKEN
        for number in range(len(documents))
        if number != 1
        for token in range(bases[number], bases[number + 1])
    )
    first, orders = 0, []
    for size in sizes:
        # batches up to the end of the epoch, which need not divide by them
        steps = [
            data.step(row, min(batch, first + size - row), micro_batch_size=3)
            for row in range(first, first + size, batch)
        ]
        seen = [
            token for _, ids, types, _, _ in examples_of(steps) for token in ids[1:-1] if token != 3
        ]
        assert sorted(seen) == counting
        orders.append(seen)
        first += size
    if len(documents) > 6:
        assert orders[0] != orders[len(sizes) // 2], "the next epoch has another order"


def test_masks_change_with_the_epoch_and_the_seed_and_not_with_the_row(shards, opened):
    packed, single = opened["packed pairs"], opened["pairs"]
    whole = [
        examples_of([data.step(0, data.num_rows, micro_batch_size=data.num_rows)])
        for data in (packed, single)
    ]
    assert sorted(whole[0]) == sorted(whole[1]), "packing moves examples and changes none"
    again = examples_of([packed.step(packed.num_rows, packed.num_rows, micro_batch_size=10**6)])
    other = PretrainingData(shards, "train", KINDS["packed pairs"], seed=8)
    otherwise = examples_of([other.step(0, packed.num_rows, micro_batch_size=10**6)])
    first = [examples_of([data.step(0, 8, micro_batch_size=8)]) for data in (packed, other)]
    texts = [[example[1] for example in examples] for examples in first]
    assert texts[0] != texts[1], "another seed, another order of the rows"
    for changed in (again, otherwise):
        assert [e[:3] for e in sorted(changed)] == [e[:3] for e in sorted(whole[0])]
        same = set(changed) & set(whole[0])
        assert len(same) < 0.1 * len(changed)


def test_variants_take_turns(opened):
    data = opened["variants"]
    sizes = [data.layout(variant).num_rows for variant in range(3)]
    epochs, first = [], 0
    for size in sizes * 2:
        step = data.step(first, size, micro_batch_size=size)
        epochs.append(sorted(ids for _, ids, *_ in examples_of([step])))
        first += size
    assert epochs[:3] == epochs[3:]
    assert epochs[0] != epochs[1] != epochs[2]


def test_examples_are_framed_text_with_right_labels(shards, data):
    step = data.step(0, data.num_rows, micro_batch_size=data.num_rows)
    split = shards.split("train")
    documents = [split.tokens_of(d).tobytes() for d in range(split.num_documents)]

    def homes(tokens):
        part = np.array(tokens, dtype=np.uint16).tobytes()
        return {number for number, text in enumerate(documents) if part in text}

    labels = []
    for label, ids, types, _, _ in examples_of([step]):
        assert ids[0] == 2
        assert ids[-1] == 3
        ends = [place for place, token in enumerate(ids) if token == 3]
        labels.append(label)
        if len(ends) == 1:
            assert label == -100
            assert homes(ids[1:-1])
            continue
        middle, end = ends
        assert types == tuple([0] * (middle + 1) + [1] * (end - middle))
        first, second = ids[1:middle], ids[middle + 1 : end]
        together = homes(first + second)
        if label == 0:
            assert together
        elif len(first) > 12 and len(second) > 12:
            assert homes(first)
            assert homes(second)
            assert not together
    if data.section.examples == "pairs":
        pairs = [label for label in labels if label >= 0]
        assert len(labels) - len(pairs) < 0.15 * len(labels)
        assert abs(np.mean(pairs) - 0.5) < 5 * 0.5 / len(pairs) ** 0.5
    else:
        assert set(labels) == {-100}
        assert step.nsp_targets == 0


def test_special_tokens_and_unknown_words_are_read_but_never_asked_for(shards, tmp_path):
    text = tmp_path / "unknown.txt"
    text.write_text(
        "".join(f"{t} 漢 漢 漢 漢 漢\n\n" for t in prose.documents(30, seed=3)), "utf-8"
    )
    vocabulary = shards.folder / "vocab.txt"
    prose.prepare(str(text), tmp_path / "out", vocabulary=vocabulary, heldout_fraction=0.2)
    unknown = TokenShards.open(tmp_path / "out")
    for kind in KINDS:
        data = PretrainingData(unknown, "train", KINDS[kind].changed(mlm_probability=0.5), seed=1)
        (batch,) = data.step(0, data.num_rows, micro_batch_size=data.num_rows).micro_batches
        assert int((batch.input_ids_T == 1).sum()) > 50, kind
        assert len(batch.mlm_labels_M) > 100
        assert not np.isin(batch.mlm_labels_M.numpy(), [0, 1, 2, 3, 4]).any()
        assert (batch.mlm_positions_M.diff() > 0).all()


def test_masks_have_the_recipes_share(data):
    step = data.step(0, data.num_rows, micro_batch_size=data.num_rows)
    (batch,) = step.micro_batches
    text = step.real_tokens - int((batch.input_ids_T == 3).sum()) - len(batch.next_sentence_label_E)
    share = step.mlm_targets / text
    # whole words and spans stop below the budget; on rows of 48 tokens that shows
    assert 0.15 - 0.05 * (data.section.masking != "tokens") < share < 0.16
    masked = (batch.input_ids_T[batch.mlm_positions_M] == 4).double().mean()
    bound = 5 * (0.8 * 0.2 / (step.mlm_targets / 4)) ** 0.5  # spans decide for 4 tokens at once
    assert abs(masked - 0.8) < bound


def test_steps_are_loaded_from_anywhere_on(data):
    steps = PretrainingSteps(data, phase(12, 5))
    straight = [steps[step] for step in range(20)]
    for start in (0, 13, 19):
        loading = load_steps(steps, range(start, 20), workers=2 * (start == 13), pin_memory=False)
        with closing(loading) as loader:
            resumed = list(loader)
        assert all(isinstance(step, RankStep) for step in resumed)
        assert examples_of(resumed) == examples_of(straight[start:])
    again = pickle.loads(pickle.dumps(steps))
    assert examples_of([again[3]]) == examples_of([straight[3]])
    assert len(pickle.dumps(steps)) < 50_000, "a worker is sent names of files, not their rows"


def test_a_far_step_is_reached_without_the_steps_before(opened):
    data = opened["packed pairs"]
    read = []
    data._layouts[0], kept = _Recording(data.layout(0), read), data.layout(0)
    try:
        data.step(10**15, 8, micro_batch_size=8)
    finally:
        data._layouts[0] = kept
    assert sum(map(len, read)) == 8


class _Recording:
    def __init__(self, layout, read):
        self._layout, self._read = layout, read
        self.num_rows = layout.num_rows

    def examples_of(self, rows_R):
        self._read.append(rows_R.tolist())
        return self._layout.examples_of(rows_R)


def test_batches_move_to_a_device_whole(data):
    step = data.step(0, 4, micro_batch_size=4)
    moved = step.micro_batches[0].to("meta")
    assert isinstance(moved, Batch)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in (*tensors, moved.sequences.starts_E1))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_is_made_of_its_micro_batches_again(data, rank):
    """Also of later micro-batches, and of the rows without weight that fill the last rank up."""
    step = data.step(0, 10, rank=rank, world_size=3, micro_batch_size=2)
    batches = step.micro_batches
    assert len(batches) > 1
    for batch in [batch.to("cpu") for batch in batches]:
        inputs = batch.model_inputs
        assert inputs[3] is batch.sequences
        assert batch.sequences.starts_E1.dtype == torch.int32
        assert all(inputs[n].dtype == torch.int64 for n in (0, 1, 2, 4))
        assert not batch.mlm_positions_M.numel() or batch.mlm_positions_M.max() < len(inputs[0])
    again = RankStep.of(batches, step.real_tokens)
    assert torch.equal(again.content, step.content)
    assert replace(again, content=step.content) == step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning memory needs a GPU")
def test_loading_pins_whole_steps(data):
    steps = PretrainingSteps(data, phase(12, 5))
    with closing(load_steps(steps, range(2), workers=1, pin_memory=True)) as loader:
        pinned = list(loader)
    assert examples_of(pinned) == examples_of([steps[0], steps[1]])
    assert all(step.content.is_pinned() for step in pinned)


def test_evaluation_draws_its_rows_from_all(shards):
    """Packing puts the longest examples into the first rows."""
    options = KINDS["packed pairs"]
    some = evaluation(shards, options, max_rows=12, micro_batch_size=12)[0]
    whole = PretrainingData(shards, "heldout", options, seed=0).layout(0)
    _, first = whole.examples_of(np.arange(12))
    assert len(first) < len(examples_of([some])), "the first rows hold one example each"
    variants = evaluation(shards, KINDS["variants"])
    one_way = PretrainingData(shards, "heldout", KINDS["variants"], seed=0).layout(0)
    assert len(variants) == -(-one_way.num_rows // 8)
    read = examples_of(variants)
    assert len(read) == one_way.total("examples"), "one pass over one way of pairing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_rows", [1, 17, 10**6])
def test_evaluation_is_one_fixed_pass_for_any_world(shards, kind, max_rows):
    options = KINDS[kind]
    whole = evaluation(shards, options, max_rows=max_rows)
    examples = examples_of(whole)
    num_rows = min(max_rows, PretrainingData(shards, "heldout", options, seed=0).num_rows)
    row_by_row = evaluation(shards, options, max_rows=max_rows, micro_batch_size=1)
    assert len(row_by_row) == num_rows
    assert examples_of(row_by_row) == examples
    for world_size in (2, 3, 6):
        ranks = [
            evaluation(shards, options, max_rows=max_rows, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert {len(steps) for steps in ranks} == {-(-num_rows // (8 * world_size))}
        steps = [steps[step] for step in range(len(ranks[0])) for steps in ranks]
        assert examples == examples_of(steps)
    first = examples_of([evaluation(shards, options, micro_batch_size=1)[0]])
    assert examples[: len(first)] == first


def test_unigram_loss_is_the_mean_over_the_masked_tokens(shards):
    rank_steps = evaluation(shards)
    batches = itertools.chain.from_iterable(step.micro_batches for step in rank_steps)
    labels = [label for batch in batches for label in batch.mlm_labels_M.tolist()]
    counts = np.zeros(shards.manifest.vocab_size)
    train = shards.split("train")
    for document in range(train.num_documents):
        np.add.at(counts, train.tokens_of(document), 1)
    probability = (counts + 1) / (counts + 1).sum()
    unigram = unigram_log_probabilities(shards)
    assert unigram_mlm_loss(unigram, rank_steps) == pytest.approx(
        -np.log(probability[labels]).mean()
    )
    assert np.exp(unigram).sum() == pytest.approx(1)
    assert 3 < unigram_mlm_loss(unigram, rank_steps) < np.log(len(counts))
    with pytest.raises(DataError, match="masks no token"):
        unigram_mlm_loss(unigram, [])


def test_too_little_data_and_impossible_settings_are_refused(shards, opened, tmp_path):
    data = opened["pairs"]
    with pytest.raises(DataError, match=r"train split of .* has \d+ rows of 48 tokens, fewer"):
        data.require_rows(data.num_rows + 1)
    with pytest.raises(DataError, match="fewer than one global batch of 100000"):
        PretrainingSteps(data, phase(100_000, 8))
    with pytest.raises(ConfigError, match="max_rows is 0"):
        evaluation(shards, max_rows=0)
    single = make_shards(tmp_path, [[5, 5]] * 20, heldout=[[5, 5]])
    with pytest.raises(DataError, match=r"the heldout split of .* has 1 document\(s\)"):
        evaluation(single)


def _exchange(path, old, new):
    """Other content of the same size, as from a disk that fails."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_no_vocabulary_entry_are_one_sentence(tmp_path, kind):
    made = make_shards(tmp_path, [[9, 8], [7, 9], [8, 8]] * 4, documents_per_shard=3)
    data = PretrainingData(made, "train", KINDS[kind].changed(sequence_length=24), seed=1)
    rows = data.num_rows
    path = tmp_path / "train-00002-000.arrow"
    old = np.arange(FIRST_TOKEN + 104, FIRST_TOKEN + 109, dtype=np.uint16)
    _exchange(path, old.tobytes(), np.array([5, 6, 60_000, 8, 9], dtype=np.uint16).tobytes())
    said = r"train-00002-000\.arrow .*it holds the id 60000, and the vocabulary 201 tokens"
    with pytest.raises(DataError, match=said):
        data.step(0, rows, micro_batch_size=rows)
    with pytest.raises(DataError, match=said):
        made.split("train").unigram_counts()


@pytest.mark.parametrize("kind", ["pairs", "packed documents"])
@pytest.mark.parametrize(
    ("column", "value"),
    [("first_start", -3), ("first_start", 10**6), ("first_length", -3), ("first_length", 40)],
)
def test_rows_that_no_layout_says_are_one_sentence(tmp_path, kind, column, value):
    made = make_shards(tmp_path, [[9, 8], [7, 9], [8, 8]] * 4)
    options = KINDS[kind].changed(sequence_length=24)
    layout = PretrainingData(made, "train", options, seed=1).layout(0)
    path = layout.folder / "part-00000.arrow"
    stored = pa.ipc.open_file(path).get_batch(0).column("examples").values.field(column)
    old = stored.to_numpy()
    new = old.copy()
    new[1] = value
    _exchange(path, old.tobytes(), new.tobytes())
    data = PretrainingData(made, "train", options, seed=1)
    with pytest.raises(DataError, match=r"layouts.*(it will be|which is) made again"):
        data.step(0, data.num_rows, micro_batch_size=data.num_rows)

"""The global batch is a function of (seed, position), whoever computes it."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.data.batch_split import rows_of_rank, split_batch
from stacking_ds.data.batches import Batch, RankStep
from stacking_ds.data.loader import EvaluationSteps, PretrainingData, PretrainingSteps
from stacking_ds.data.prepare import prepare
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.unigram import unigram_log_probabilities, unigram_mlm_loss
from stacking_ds.errors import ConfigError, DataError
from tests import prose

LENGTH = 48
FIELDS = ("input_ids_BS", "token_type_ids_BS", "attention_mask_BS", "next_sentence_label_B")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return TokenShards.open(prose.tiny_shards(tmp_path_factory.mktemp("loader"), documents=60))


@pytest.fixture(scope="module")
def data(shards):
    return PretrainingData(shards, "train", sequence_length=LENGTH, mlm_probability=0.15, seed=7)


def evaluation(shards, **changes):
    settings = {
        "sequence_length": LENGTH,
        "mlm_probability": 0.15,
        "max_samples": 10**6,
        "global_batch_size": 16,
        "micro_batch_size": 8,
    }
    return EvaluationSteps(shards, **(settings | changes))


def rows_with_weight(steps):
    """Everything about each row that carries weight, over ranks and micro-batches in order."""
    rows = []
    for step in steps:
        for batch in step.micro_batches:
            position_rows = batch.mlm_positions_M // LENGTH
            for row, label in enumerate(batch.next_sentence_label_B.tolist()):
                mine = position_rows == row
                if label == -100:
                    assert not mine.any()
                    assert batch.attention_mask_BS[row].tolist() == [True] * 2 + [False] * 46
                    assert batch.input_ids_BS[row].tolist() == [2, 3] + [0] * 46
                    continue
                rows.append(
                    (
                        label,
                        batch.input_ids_BS[row].tolist(),
                        batch.token_type_ids_BS[row].tolist(),
                        batch.attention_mask_BS[row].tolist(),
                        (batch.mlm_positions_M[mine] % LENGTH).tolist(),
                        batch.mlm_labels_M[mine].tolist(),
                    )
                )
    return rows


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 25])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 64])
def test_any_split_computes_the_same_global_batch(data, world_size, micro_batch_size):
    first, batch = 3 * data.num_samples - 9, 22  # across the end of an epoch
    whole = data.step(first, batch, micro_batch_size=batch)
    steps = [
        data.step(first, batch, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert rows_with_weight(steps) == rows_with_weight([whole])
    shapes = {tuple(b.input_ids_BS.shape for b in step.micro_batches) for step in steps}
    assert len(shapes) == 1
    for count in ("mlm_targets", "nsp_targets", "real_tokens"):
        assert sum(getattr(step, count) for step in steps) == getattr(whole, count)
    assert whole.nsp_targets == batch
    assert whole.real_tokens == int(whole.micro_batches[0].attention_mask_BS.sum())
    assert whole.mlm_targets == len(whole.micro_batches[0].mlm_labels_M)


def test_an_epoch_has_each_sample_once_and_the_next_another_order(shards):
    # One epoch in one batch: without masks the first tokens of A identify a span.
    data = PretrainingData(shards, "train", sequence_length=LENGTH, mlm_probability=0.01, seed=1)
    size = data.num_samples
    drawn = []

    def record(sample_R, epoch_R, micro, count):
        drawn.append(sample_R.tolist())
        return PretrainingData._rank_step(data, sample_R, epoch_R, micro, count)

    data._rank_step = record
    for epoch in range(2):
        for first in range(0, size - 10, 10):
            data.step(epoch * size + first, 10, micro_batch_size=10)
        data.step(epoch * size + (first + 10), size - first - 10, micro_batch_size=10)
    flat = [sample for batch in drawn for sample in batch]
    assert sorted(flat[:size]) == sorted(flat[size:]) == list(range(size))
    assert flat[:size] != flat[size:]


def test_masks_and_pairs_change_with_the_epoch_and_the_seed(shards, data):
    other = PretrainingData(shards, "train", sequence_length=LENGTH, mlm_probability=0.15, seed=8)
    first = rows_with_weight([data.step(0, 16, micro_batch_size=16)])
    assert rows_with_weight([data.step(0, 16, micro_batch_size=16)]) == first
    assert rows_with_weight([other.step(0, 16, micro_batch_size=16)]) != first
    a, b = (data._rows(np.arange(16), np.full(16, epoch), 16) for epoch in (0, 1))
    assert not np.array_equal(a.input_ids, b.input_ids)
    assert not np.array_equal(a.next_sentence, b.next_sentence)


def test_rows_are_framed_pairs_of_the_text(shards, data):
    step = data.step(0, data.num_samples, micro_batch_size=data.num_samples)
    (batch,) = step.micro_batches
    ids = batch.input_ids_BS.clone()
    ids.view(-1)[batch.mlm_positions_M] = batch.mlm_labels_M
    text = np.concatenate(
        [shards.split("train").tokens_of(d) for d in range(shards.split("train").num_documents)]
    ).astype(np.uint16)
    haystack = text.tobytes()
    for row in range(len(ids)):
        length = int(batch.attention_mask_BS[row].sum())
        tokens, types = ids[row].tolist(), batch.token_type_ids_BS[row].tolist()
        assert all(batch.attention_mask_BS[row, :length])
        assert set(tokens[length:]) <= {0}
        middle, end = (place for place, token in enumerate(tokens) if token == 3)
        assert tokens[0] == 2
        assert end == length - 1
        assert types == [0] * (middle + 1) + [1] * (end - middle) + [0] * (LENGTH - length)
        first, second = tokens[1:middle], tokens[middle + 1 : end]
        joined = np.array(first + second, dtype=np.uint16).tobytes()
        if batch.next_sentence_label_B[row] == 0:
            assert joined in haystack
        for part in (first, second):
            assert np.array(part, dtype=np.uint16).tobytes() in haystack
    assert not np.isin(batch.mlm_labels_M.numpy(), [0, 1, 2, 3, 4]).any()
    share = (batch.next_sentence_label_B == 1).double().mean()
    assert 0.35 < share < 0.65


def test_unknown_words_are_read_but_never_asked_for(shards, tmp_path):
    text = tmp_path / "unknown.txt"
    text.write_text(
        "".join(f"{t} 漢 漢 漢 漢 漢\n\n" for t in prose.documents(30, seed=3)), "utf-8"
    )
    vocabulary = shards.folder / "vocab.txt"
    prepare(str(text), tmp_path / "out", vocabulary=vocabulary, heldout_fraction=0.2)
    unknown = TokenShards.open(tmp_path / "out")
    data = PretrainingData(unknown, "train", sequence_length=LENGTH, mlm_probability=0.5, seed=1)
    (batch,) = data.step(0, data.num_samples, micro_batch_size=data.num_samples).micro_batches
    assert int((batch.input_ids_BS == 1).sum()) > 50
    assert not (batch.mlm_labels_M == 1).any()


def test_steps_feed_a_data_loader_that_starts_anywhere(data):
    steps = PretrainingSteps(data, global_batch_size=12, micro_batch_size=5, num_steps=20)
    straight = [steps[step] for step in range(20)]
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(13, 20), num_workers=2
    )
    resumed = list(loader)
    assert all(isinstance(step, RankStep) for step in resumed)
    assert rows_with_weight(resumed) == rows_with_weight(straight[13:])
    assert len(steps) == 20
    with pytest.raises(IndexError, match="step 20 of 20"):
        steps[20]
    again = pickle.loads(pickle.dumps(steps))
    assert rows_with_weight([again[3]]) == rows_with_weight([straight[3]])


def test_batches_move_to_a_device_whole(data):
    step = data.step(0, 4, micro_batch_size=4)
    moved = step.micro_batches[0].to("meta")
    assert isinstance(moved, Batch)
    assert all(getattr(moved, name).device.type == "meta" for name in FIELDS)
    assert moved.mlm_labels_M.is_meta
    assert moved.mlm_positions_M.is_meta
    assert moved.real_tokens == step.real_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning memory needs a GPU")
def test_data_loader_pins_whole_steps(data):
    steps = PretrainingSteps(data, global_batch_size=12, micro_batch_size=5, num_steps=2)
    loader = torch.utils.data.DataLoader(steps, batch_size=None, num_workers=1, pin_memory=True)
    pinned = list(loader)
    assert rows_with_weight(pinned) == rows_with_weight([steps[0], steps[1]])
    assert all(
        b.input_ids_BS.is_pinned() and b.mlm_labels_M.is_pinned()
        for step in pinned
        for b in step.micro_batches
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("max_samples", [1, 37, 10**6])
def test_evaluation_is_one_fixed_pass_for_any_world(shards, world_size, max_samples):
    whole = evaluation(shards, max_samples=max_samples)
    ranks = [
        evaluation(shards, max_samples=max_samples, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(steps) for steps in ranks}) == 1
    rows = rows_with_weight([whole[step] for step in range(len(whole))])
    assert len(rows) == whole.num_samples == min(max_samples, evaluation(shards).num_samples)
    assert rows == rows_with_weight([steps[step] for step in range(len(whole)) for steps in ranks])
    first = rows_with_weight([evaluation(shards, global_batch_size=1, micro_batch_size=1)[0]])
    assert rows[:1] == first


def test_unigram_loss_is_the_mean_over_the_masked_tokens(shards):
    steps = evaluation(shards)
    rank_steps = [steps[step] for step in range(len(steps))]
    labels = [label for row in rows_with_weight(rank_steps) for label in row[5]]
    counts = np.zeros(shards.manifest.vocab_size)
    train = shards.split("train")
    for document in range(train.num_documents):
        np.add.at(counts, train.tokens_of(document), 1)
    probability = (counts + 1) / (counts + 1).sum()
    assert unigram_mlm_loss(shards, rank_steps) == pytest.approx(
        -np.log(probability[labels]).mean()
    )
    assert np.exp(unigram_log_probabilities(shards)).sum() == pytest.approx(1)
    assert 3 < unigram_mlm_loss(shards, rank_steps) < np.log(len(counts))
    with pytest.raises(DataError, match="masks no token"):
        unigram_mlm_loss(shards, [])


def test_too_little_data_and_impossible_settings_are_refused(shards, data, tmp_path):
    with pytest.raises(DataError, match=r"train split of .* has \d+ samples of 48 tokens, fewer"):
        data.step(0, data.num_samples + 1, micro_batch_size=8)
    with pytest.raises(DataError, match="fewer than one global batch of 100000"):
        PretrainingSteps(data, global_batch_size=100_000, micro_batch_size=8, num_steps=1)
    with pytest.raises(ConfigError, match=r"mlm_probability is 1\.5; it must lie in"):
        PretrainingData(shards, "train", sequence_length=48, mlm_probability=1.5, seed=1)
    with pytest.raises(ConfigError, match="max_samples is 0"):
        evaluation(shards, max_samples=0)
    text = prose.write_text(tmp_path / "a.txt", 20)
    single = tmp_path / "b.txt"
    single.write_text("One document alone is held out.\n")
    prepare(str(text), tmp_path / "out", vocab_size=300, heldout_sources=[str(single)])
    few = r"the heldout split of .* has 1 document\(s\).*--heldout-fraction, or .* --heldout SOURCE"
    with pytest.raises(DataError, match=few):
        evaluation(TokenShards.open(tmp_path / "out"))

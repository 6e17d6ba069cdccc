"""Reading shards: damage is noticed and named, and views of the map hold what was written."""

import json
import pickle

import numpy as np
import pytest

from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from tests import prose
from tests.prose import prepare
from tests.token_shards import make_shards, sentence_lengths_of


@pytest.fixture
def folder(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    prepare(text, tmp_path / "out", vocab_size=300, heldout_fraction=0.2, shard_characters=3000)
    return tmp_path / "out"


def test_documents_and_positions_agree_over_the_files(folder):
    train = TokenShards.open(folder).split("train")
    assert len(train.arrays) > 2
    documents = [train.tokens_of(k) for k in range(train.num_documents)]
    assert all(
        int(sentence_lengths_of(train, k).sum()) == len(tokens)
        for k, tokens in enumerate(documents)
    )
    whole = np.concatenate(documents)
    assert len(whole) == train.num_tokens
    ends = np.cumsum([len(tokens) for tokens in documents])
    for order in (range(len(documents)), [3, 0, len(documents) - 1, 3]):
        lengths = np.array([len(documents[k]) for k in order])
        read = train.read(ends[order] - lengths, lengths)
        assert (read == np.concatenate([documents[k] for k in order])).all()
    assert (
        train.read(np.array([ends[4] - 3]), np.array([2])).tolist()
        == whole[ends[4] - 3 : ends[4] - 1].tolist()
    )
    assert len(train.read(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))) == 0
    assert (train.unigram_counts() == np.bincount(whole, minlength=300)).all()
    with pytest.raises(IndexError):
        train.tokens_of(train.num_documents)


def test_views_are_not_copies_and_survive_pickling(folder):
    train = TokenShards.open(folder).split("train")
    assert np.shares_memory(train.tokens_of(0), train.arrays[0].tokens)
    small = pickle.dumps(train)
    assert len(small) < 20_000
    assert (pickle.loads(small).tokens_of(3) == train.tokens_of(3)).all()


def test_special_ids_and_vocabulary(folder):
    shards = TokenShards.open(folder)
    assert shards.special_ids.mask == 4
    assert shards.vocabulary[4] == "[MASK]"


def test_a_missing_folder_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=r"nothing holds no prepared data .*stacking-ds prepare"):
        TokenShards.open(tmp_path / "nothing")


def test_missing_truncated_and_altered_files_are_named(folder):
    path = folder / "train-00000-001.arrow"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(
        DataError, match=r"train-00000-001\.arrow is damaged: it has \d+ bytes, its manifest says"
    ):
        TokenShards.open(folder)
    altered = bytearray(good)
    altered[len(good) // 2] ^= 1
    path.write_bytes(altered)
    TokenShards.open(folder)
    with pytest.raises(
        DataError, match=r"train-00000-001\.arrow is damaged: it is not the file its manifest"
    ):
        TokenShards.open(folder, verify=True)
    path.write_bytes(b"x" * len(good))
    with pytest.raises(DataError, match=r"train-00000-001\.arrow is damaged: .*Arrow"):
        TokenShards.open(folder).split("train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000-001\.arrow is missing; bring it back"):
        TokenShards.open(folder)


def test_another_file_in_a_shards_place_is_noticed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["train"]["shards"][0]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="its documents are not those of its files without the dup"):
        TokenShards.open(folder)
    manifest["train"]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=r"train-00000-000\.arrow is damaged: it holds .* not what its manifest"
    ):
        TokenShards.open(folder).split("train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(format_version=1), "in another version of the format; delete it"),
        (lambda m: m.pop("train"), "train: Field required"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
    ],
)
def test_damaged_manifests_are_refused(folder, change, sentence):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=sentence):
        TokenShards.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        TokenShards.open(folder)


def test_documents_that_do_not_count_are_known_by_file(tmp_path):
    documents = [[3], [4, 1], [3], [5], [4, 1], [2]]
    train = make_shards(tmp_path, documents, documents_per_shard=2, duplicates=[2, 4]).split(
        "train"
    )
    counted = [train.counted(shard).tolist() for shard in range(3)]
    assert counted == [[True, True], [False, True], [False, True]]
    assert train.unigram_counts().sum() == 3 + 5 + 5 + 2
    assert train.num_tokens == 3 + 5 + 3 + 5 + 5 + 2
    path = tmp_path / "train-duplicates.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"train-duplicates\.arrow is damaged: .*Arrow"):
        TokenShards.open(tmp_path).split("train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-duplicates\.arrow is missing; bring it back"):
        TokenShards.open(tmp_path)


def test_an_index_out_of_range_is_no_duplicate(tmp_path):
    train = make_shards(tmp_path, [[3], [4]], duplicates=[1])
    make_shards(tmp_path / "longer", [[3], [4], [5], [6]], duplicates=[3])
    other = (tmp_path / "longer" / "train-duplicates.arrow").read_bytes()
    (train.folder / "train-duplicates.arrow").write_bytes(other)
    with pytest.raises(DataError, match="names documents that the train split does not have"):
        TokenShards.open(train.folder).split("train")


def test_lists_that_overlap_are_damage_and_not_documents(tmp_path):
    train = make_shards(tmp_path, [[3, 4], [5], [6, 7]]).split("train")
    path = tmp_path / "train-00000-000.arrow"
    content = bytearray(path.read_bytes())
    offsets = train.arrays[0].token_offsets.tobytes()
    place = content.index(offsets)
    content[place + 4 : place + 8] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-000\.arrow is damaged: its lists overlap"):
        TokenShards.open(tmp_path).split("train")

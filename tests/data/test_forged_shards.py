"""Shards and layouts of a stranger, whose sums are right: no number leads outside what is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stacking_ds.config.sections import DataSection
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.rows import LayoutSpec, find_layout, open_layout
from stacking_ds.data.shard_files import MANIFEST_NAME
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from tests.forging import ODD_VALUES, Change, forge_arrow, places, put
from tests.token_shards import make_shards

SHARD = "train-00000-000.arrow"
DOCUMENTS = [[9, 6], [12], [3, 4, 5], [9, 6], [7, 7], [8, 2]]
OPTIONS = DataSection(path="-", sequence_length=16, mlm_probability=0.2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six documents of 78 tokens, one of which does not count; 83 tokens are in the vocabulary."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_shards(tmp_path / "shards", DOCUMENTS, duplicates=[3])
    return tmp_path / "shards"


def _columns(folder: Path) -> dict[str, pa.Array]:
    batch = pa.ipc.open_file((folder / SHARD).read_bytes()).get_batch(0)
    return {name: batch.column(name) for name in batch.schema.names}


def _lists(offsets: Any, values: Any, kind: Any) -> pa.Array:
    return pa.ListArray.from_arrays(
        pa.array(np.array(offsets, dtype=np.int32)), pa.array(np.array(values, dtype=kind))
    )


def _tokens(folder: Path, change: Callable[[Any], object]) -> pa.Array:
    column = _columns(folder)["tokens"]
    values = column.values.to_numpy().copy()
    change(values)
    return _lists(column.offsets, values, values.dtype)


def _lengths(folder: Path, change: Callable[[Any], object]) -> pa.Array:
    column = _columns(folder)["sentence_lengths"]
    values = column.values.to_numpy().copy()
    change(values)
    return _lists(column.offsets, values, np.int32)


def _assign(index: int, *values: int) -> Callable[[Any], object]:
    def change(array: Any) -> None:
        array[index : index + len(values)] = values

    return change


def _refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        TokenShards.open(folder, verify=True)
    message = str(caught.value)
    assert message.isprintable()
    return message


# ------------------------------------------------------------------ shards


@pytest.mark.parametrize(
    ("column", "change", "what"),
    [
        ("tokens", _assign(5, 83), "it holds the id 83, and the vocabulary 83 tokens"),
        ("tokens", _assign(77, 65535), "it holds the id 65535, and the vocabulary 83"),
        ("sentence_lengths", _assign(0, -9, 24), "it has a sentence without a token"),
        ("sentence_lengths", _assign(0, 0, 15), "it has a sentence without a token"),
        ("sentence_lengths", _assign(1, 7, 11), "its sentences have other tokens than its doc"),
        ("sentence_lengths", _assign(0, 2**31 - 1), "its sentences have other tokens than its"),
    ],
)
def test_numbers_that_lead_elsewhere_are_damage(
    folder: Path, column: str, change: Callable[[Any], object], what: str
) -> None:
    forged = (_tokens if column == "tokens" else _lengths)(folder, change)
    forge_arrow(folder, SHARD, {**_columns(folder), column: forged})
    assert f"{SHARD} is damaged: {what}" in _refused(folder)
    if column == "tokens":
        with pytest.raises(DataError, match="it holds the id"):
            TokenShards.open(folder).split("train").unigram_counts()


def test_ids_as_large_as_integers_take_no_memory(folder: Path) -> None:
    values = np.full(78, 2**32 - 1, dtype=np.uint32)
    columns = _columns(folder)
    forged = _lists(columns["tokens"].offsets, values, np.uint32)
    forge_arrow(folder, SHARD, {**columns, "tokens": forged})
    assert "it holds the id 4294967295" in _refused(folder)
    with pytest.raises(DataError, match="it holds the id 4294967295"):
        TokenShards.open(folder).split("train").unigram_counts()


@pytest.mark.parametrize(
    ("column", "made"),
    [
        ("tokens", lambda tokens: tokens.cast(pa.list_(pa.int64()))),
        ("tokens", lambda tokens: tokens.cast(pa.large_list(pa.uint16()))),
        ("tokens", lambda tokens: pa.array(["text"] * len(tokens))),
        ("tokens", lambda tokens: pa.array([None] * len(tokens), tokens.type)),
        ("tokens", lambda tokens: pa.array([[1, None]] * len(tokens), tokens.type)),
        ("sentence_lengths", lambda lengths: lengths.cast(pa.list_(pa.float64()))),
        ("document_hash", lambda hashes: pa.array(np.zeros(len(hashes)))),
        ("document_hash", lambda hashes: pa.nulls(len(hashes), pa.uint64())),
    ],
)
def test_columns_of_another_kind_are_no_shard(
    folder: Path, column: str, made: Callable[[pa.Array], pa.Array]
) -> None:
    columns = _columns(folder)
    forge_arrow(folder, SHARD, {**columns, column: made(columns[column])})
    assert f"{SHARD} is damaged: " in _refused(folder)
    with pytest.raises(DataError, match=f"{SHARD} is damaged: "):
        TokenShards.open(folder).split("train")


def test_columns_and_batches_that_are_too_many_or_too_few(folder: Path) -> None:
    columns = _columns(folder)
    forge_arrow(folder, SHARD, columns, batches=2)
    assert "it has 2 record batches instead of 1" in _refused(folder)
    forge_arrow(folder, SHARD, columns, batches=0)
    assert "it has 0 record batches instead of 1" in _refused(folder)
    forge_arrow(folder, SHARD, {"tokens": columns["tokens"]})
    assert f"{SHARD} is damaged: " in _refused(folder)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("offset", [-1, 2**31 - 1, 40])
def test_offsets_that_go_back_or_beyond_are_damage(folder: Path, place: int, offset: int) -> None:
    train = TokenShards.open(folder).split("train")
    content = bytearray((folder / SHARD).read_bytes())
    start = content.index(train.arrays[0].token_offsets.tobytes()) + 4 * place
    content[start : start + 4] = offset.to_bytes(4, "little", signed=True)
    (folder / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=SHARD):
        TokenShards(folder, train.shards.manifest).split("train").check()


@pytest.mark.parametrize(
    ("listed", "what"),
    [
        ([-1], "names documents that the train split does not have"),
        ([6], "names documents that the train split does not have"),
        ([3, 1], "names documents that the train split does not have"),
        ([3, 3], "names documents that the train split does not have"),
        ([2, 3], "lists 2 documents, not what its manifest says"),
        ([], "lists 0 documents, not what its manifest says"),
        ([1], r"lists \(1, 12\) sentences and tokens, not what its manifest says"),
    ],
)
def test_duplicates_that_cannot_be_are_damage(folder: Path, listed: list[int], what: str) -> None:
    column = pa.array(np.array(listed, dtype=np.int64))
    forge_arrow(folder, "train-duplicates.arrow", {"document": column})
    with pytest.raises(DataError, match=what):
        TokenShards.open(folder, verify=True)


def _set(*path: Any, to: Any) -> Change:
    return lambda record: put(record, path, to)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_set("train", "shards", 0, "name", to="../../x.arrow"), "train.shards.0.name"),
        (_set("train", "shards", 0, "name", to="/etc/passwd"), "train.shards.0.name"),
        (_set("train", "duplicates", "name", to=".."), "train.duplicates.name"),
        (_set("vocabulary_files", 0, "name", to="a/vocab.txt"), "vocabulary_files.0.name"),
        (_set("vocabulary_files", to=[]), "vocab.txt is not among its vocabulary_files"),
        (_set("train", "shards", 0, "tokens", to=-78), "train.shards.0.tokens"),
        (_set("train", "documents", to=10**30), "train.documents"),
        (_set("train", "tokens", to=5), "its tokens are not those of its files without the dup"),
        (_set("vocab_size", to=0), "vocab_size"),
        (_set("vocab_size", to=2**40), "vocab_size"),
        (_set("train", to={"a\x1b\n": 1}), r"train\.[a-z]*: Field required"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_damage(folder: Path, change: Change, what: str) -> None:
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=what) as caught:
        TokenShards.open(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change", [_set("vocab_size", to=84), _set("vocabulary_sha256", to="0" * 64)]
)
def test_a_vocabulary_that_is_not_the_manifests_is_refused(folder: Path, change: Change) -> None:
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"vocab\.txt is not the vocabulary of 8. tokens"):
        TokenShards.open(folder).special_ids  # noqa: B018 - looked up when it is first needed


@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_is_exchanged_in_a_manifest_is_whole_or_damaged(folder: Path, data: Any) -> None:
    path = folder / MANIFEST_NAME
    text = path.read_text()
    record = json.loads(text)
    place = data.draw(st.sampled_from(places(record)))
    put(record, place, data.draw(st.sampled_from(ODD_VALUES)))
    path.write_text(json.dumps(record))
    said = ""
    try:
        _ = TokenShards.open(folder, verify=True).special_ids
    except DataError as error:
        said = str(error)
    finally:
        path.write_text(text)
    assert not said or said.isprintable()


# ------------------------------------------------------------------ layouts


def _first_step(folder: Path) -> Any:
    return PretrainingData(TokenShards.open(folder), "train", OPTIONS, seed=0).step(
        0, 4, micro_batch_size=4
    )


def _forge_layout(folder: Path, field: str, value: int) -> Path:
    """The first example's `field` is `value`, and the sums are right."""
    layout = open_layout(TokenShards.open(folder).split("train"), LayoutSpec.of(OPTIONS))
    name = "part-00000.arrow"
    column = pa.ipc.open_file((layout.folder / name).read_bytes()).get_batch(0).column(0)
    structs, offsets = column.values, column.offsets.to_numpy().copy()
    fields = {f.name: structs.field(f.name).to_numpy().copy() for f in structs.type}
    if field == "offsets":
        offsets[1] = value
    else:
        fields[field][:] = value
    rebuilt = pa.StructArray.from_arrays([pa.array(fields[f]) for f in fields], names=[*fields])
    rows = pa.ListArray.from_arrays(pa.array(offsets), rebuilt)
    forge_arrow(layout.folder, name, {"examples": rows})
    return layout.folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("first_start", -1),
        ("first_start", 10**6),
        ("first_start", 2**63 - 1),
        ("first_start", 77),
        ("first_length", -5),
        ("first_length", 0),
        ("first_length", 2**31 - 1),
        ("second_length", -1),
        ("second_length", 14),
        ("second_start", -(2**63)),
        ("offsets", -1),
        ("offsets", 0),
        ("offsets", 2**31 - 1),
    ],
)
def test_rows_that_lead_elsewhere_are_damage(folder: Path, field: str, value: int) -> None:
    assert len(_first_step(folder).micro_batches) == 1
    laid_out = _forge_layout(folder, field, value)
    assert find_layout(TokenShards.open(folder).split("train"), LayoutSpec.of(OPTIONS)) is not None
    with pytest.raises(DataError, match="is damaged") as caught:
        _first_step(folder)
    assert "layouts" in str(caught.value)
    assert "made again" in str(caught.value)
    assert laid_out.parent.name == "layouts"


@pytest.mark.parametrize(
    "change",
    [
        _set("parts", 0, "name", to="../part-00000.arrow"),
        _set("parts", 0, "rows", to=0),
        _set("parts", 0, "rows", to=10**6),
        _set("parts", 0, "examples", to=10**6),
        _set("parts", to=[]),
        _set("spec", "sequence_length", to=10**9),
    ],
)
def test_a_layout_whose_record_cannot_be_true_is_made_again(folder: Path, change: Change) -> None:
    split = TokenShards.open(folder).split("train")
    made = open_layout(split, LayoutSpec.of(OPTIONS))
    path = made.folder / "layout.json"
    text = path.read_text()
    record = json.loads(text)
    change(record)
    path.write_text(json.dumps(record))
    assert find_layout(split, LayoutSpec.of(OPTIONS)) is None
    assert open_layout(split, LayoutSpec.of(OPTIONS)).num_rows == made.num_rows
    assert path.read_text() == text

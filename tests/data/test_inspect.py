"""`stacking-ds data inspect`: documents, overlap and refusals."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.cli import main
from stacking_ds.data import inspection
from stacking_ds.data.shard_files import Rejected, SourceFile, read_manifest
from stacking_ds.data.shards import TokenShards
from tests.inspecting import (
    bins,
    counted_text,
    inspected,
    recipe,
    refused,
    rewrite_manifest,
    rewrite_split,
    run,
)
from tests.tables import same_as_golden
from tests.token_shards import FIRST_TOKEN, make_shards

DOCUMENTS = [[3, 4], [9], [10, 10, 12], [1]]


SIZE = r"\d+\.\d+(?= KiB)"  # of files, which is Arrow's


# ------------------------------------------------------------- folder and documents


def test_the_numbers_of_a_folder_that_was_counted_by_hand(tmp_path, capsys):
    make_shards(tmp_path, DOCUMENTS, documents_per_shard=2, duplicates=[1])
    rejected = Rejected(reason="empty", documents=4, first=("a.txt:3", "a.txt:8", "b:1", "b:2"))
    source = {"heldout": False, "size_bytes": 2048, "sha256": None, "licence": None}
    sources = (
        SourceFile(name="a.txt", **source),
        SourceFile(name="b", **source | {"size_bytes": None, "heldout": True, "licence": "CC0"}),
    )
    rewrite_manifest(tmp_path, rejected=(rejected,), sources=sources, text_bytes=252)
    found = inspected(capsys, tmp_path, "--sequence-length", 8)
    train, heldout = found["splits"]
    files = {
        "train": [tmp_path / f"train-0000{number}-000.arrow" for number in (0, 1)],
        "heldout": [tmp_path / "heldout-00000-000.arrow"],
    }
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    assert train == {
        "split": "train", "documents": 3, "sentences": 6, "tokens": 40, "files": 2,
        "size_bytes": sizes["train"], "duplicate_documents": 1, "duplicate_tokens": 9,
        "duplicate_share": 0.25, "unknown_tokens": 0, "one_in": 1, "sampled_sentences": 3,
        "repeated_share": 0.0, "document_lengths": train["document_lengths"],
    }  # fmt: skip
    assert bins(train["document_lengths"]) == [
        *((1, 1, 1), (2, 3, 0), (4, 7, 1), (8, 15, 0), (16, 31, 0), (32, 63, 1)),
    ]
    assert (heldout["documents"], heldout["tokens"], heldout["sampled_sentences"]) == (2, 14, 0)
    assert heldout["repeated_share"] == 0
    assert found["overlap"] == {"documents": 0, "first": []}
    folder = found["folder"]
    kept = [*tmp_path.glob("*.arrow"), tmp_path / "vocab.txt"]
    assert folder["size_bytes"] == sum(path.stat().st_size for path in kept)
    assert folder["vocab_size"] == FIRST_TOKEN + 49
    assert folder["bytes_per_token"] == 252 / (49 + 14)
    assert folder["sources"][1]["licence"] == "CC0"
    assert folder["rejected"][0]["first"] == ["a.txt:3", "a.txt:8", "b:1", "b:2"]
    assert folder["every_byte_verified"] is False

    text, _ = run(capsys, "inspect", tmp_path, "--sequence-length", 8)
    same_as_golden(text, tmp_path, "data_inspect.txt", SIZE)


@settings(max_examples=40)
@given(data=st.data(), at_once=st.integers(1, 40))
def test_a_split_read_in_pieces_is_the_whole_split(tmp_path_factory, data, at_once):
    folder = tmp_path_factory.mktemp("split")
    sentence = st.integers(0, 4).flatmap(
        lambda pick: st.just([1, 7, 8, 9, 7, 6, 5, 9 + pick] if pick < 4 else [5] * 3)
    )
    texts = data.draw(st.lists(st.lists(sentence, min_size=1, max_size=5), min_size=3, max_size=9))
    dropped = data.draw(st.integers(0, 2))
    lengths = [[len(each) for each in text] for text in texts]
    make_shards(folder, lengths, duplicates=[dropped])
    documents = [[token for each in text for token in each] for text in texts]
    rewrite_split(folder, "train", documents, lengths=lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "_TOKENS_AT_ONCE", at_once)
        facts = inspection.split_facts(TokenShards.open(folder).split("train"))
    counting = [text for number, text in enumerate(texts) if number != dropped]
    long = [tuple(each) for text in counting for each in text if len(each) >= 8]
    assert facts["unknown_tokens"] == sum(each.count(1) for text in counting for each in text)
    assert facts["sampled_sentences"] == len(long)
    assert facts["repeated_share"] == (len(long) - len(set(long))) / max(len(long), 1)
    for each in facts["document_lengths"]:
        inside = [text for text in counting if each["first"] <= sum(map(len, text)) <= each["last"]]
        assert each["count"] == len(inside)
    assert sum(each["count"] for each in facts["document_lengths"]) == len(counting)


def test_a_sample_holds_all_copies_of_a_sentence_or_none(tmp_path, monkeypatch):
    make_shards(tmp_path, [[8]] * 400)
    sentences = [[5 + number % 90, 6 + number // 90, *range(5, 11)] for number in range(200)]
    rewrite_split(tmp_path, "train", sentences + sentences[::-1])
    monkeypatch.setattr(inspection, "_SENTENCES_IN_SAMPLE", 100)
    facts = inspection.split_facts(TokenShards.open(tmp_path).split("train"))
    assert facts["one_in"] == 4
    assert 40 < facts["sampled_sentences"] < 160
    assert facts["repeated_share"] == 0.5


def test_the_order_of_tokens_tells_sentences_apart(tmp_path):
    make_shards(tmp_path, [[8]] * 3)
    rewrite_split(tmp_path, "train", [[*range(5, 13)], [*range(12, 4, -1)], [*range(5, 13)]])
    facts = inspection.split_facts(TokenShards.open(tmp_path).split("train"))
    assert facts["repeated_share"] == pytest.approx(1 / 3)


# --------------------------------------------------------------------------- overlap


def overlapping(folder):
    """Train's documents 1 and 2 have the hash of held-out ones, as has 3, which does not count."""
    make_shards(folder, [[8]] * 5, duplicates=[3])
    rewrite_split(folder, "train", [[5] * 8] * 5, hashes=[1, 20, 10, 20, 5])
    rewrite_split(folder, "heldout", [[5] * 8] * 2, hashes=[20, 10])


def test_held_out_documents_that_are_trained_on_are_an_error(tmp_path, capsys):
    overlapping(tmp_path)
    out, error = run(capsys, "inspect", tmp_path, "--sequence-length", 8, code=2)
    assert error == (
        f"stacking-ds: error: 2 training documents of {tmp_path} are held out too, the first at "
        "train-00000-000.arrow:1, train-00000-000.arrow:2: a held-out loss would say nothing; "
        "delete the folder and prepare it again\n"
    )
    assert "train documents that are held out too: 2\n" in out
    assert "row 0, " in out, "the rest of the report is there"
    found = inspected(capsys, tmp_path, "--sequence-length", 8, code=2)
    assert found["overlap"]["documents"] == 2


def test_only_a_few_places_of_an_overlap_are_listed(tmp_path):
    make_shards(tmp_path, [[8]] * 20)
    rewrite_split(tmp_path, "train", [[5] * 8] * 20, hashes=[9] * 20)
    rewrite_split(tmp_path, "heldout", [[5] * 8] * 2, hashes=[9, 8])
    found = inspection.find_overlap(TokenShards.open(tmp_path))
    assert found["documents"] == 20
    assert len(found["first"]) == 5


@pytest.fixture
def text(tmp_path):
    return counted_text(tmp_path / "text")


# -------------------------------------------------------------------------- refusals


def test_damage_is_named(text, tmp_path, capsys):
    assert "nothing holds no prepared data" in refused(capsys, "inspect", tmp_path / "nothing")
    flipped = shutil.copytree(text, tmp_path / "flipped")
    path = flipped / "train-00000-000.arrow"
    content = bytearray(path.read_bytes())
    place = content.index(np.arange(5, 25, dtype=np.uint16).tobytes())
    content[place] ^= 64
    path.write_bytes(content)
    plain = ("inspect", flipped, "--sequence-length", 10)
    # without --verify too, where rows have to be laid out: they would outlive the damage
    said, error = run(capsys, *plain, code=2)
    assert "verified    the sizes" in said
    assert f"{path} is damaged: it is not the file its manifest describes" in error
    assert not list(flipped.glob("layouts/*/layout.json"))
    assert f"{path} is damaged: it is not the file its manifest describes" in refused(
        capsys, *plain, "--verify"
    )
    whole = run(capsys, "inspect", text, "--sequence-length", 10, "--verify")[0]
    assert "verified    every byte" in whole
    path.write_bytes(content[:-8])
    assert f"{path} is damaged: it has {len(content) - 8} bytes" in refused(capsys, *plain)
    path.unlink()
    assert f"{path} is missing" in refused(capsys, *plain)


def test_a_manifest_that_counts_otherwise_is_refused(text, capsys):
    record = read_manifest(text).train
    rewrite_manifest(text, train=record.model_copy(update={"tokens": record.tokens + 1}))
    _, error = run(capsys, "inspect", text, code=2)
    assert "its tokens are not those of its files without the duplicates" in error


def test_a_recipe_of_several_phases_is_told_as_ever(text, tmp_path, capsys):
    out, _ = run(capsys, "inspect", text, *recipe(tmp_path, "data.variants=2"))
    same_as_golden(out, text, "data_inspect_recipe.txt", SIZE)


def test_options_that_cannot_be_used_are_refused(text, tmp_path, capsys):
    small = recipe(tmp_path)
    for arguments, message in (
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        ((*small, "--set", "data.pakcing=true"), "did you mean data.packing?"),
        ((*small, "--set", "phases.0.from_step=99"), "phase 2 starts at step 8, not after"),
        ((*small, "--set", "phases.1.from_step=99"), "is not before the end of the run at step 10"),
        (("--set", "data.packing=true"), "--set data.packing=true overrides a recipe; give"),
        ((*small, "--packing"), "--packing is for use without a recipe; write --set data.packing"),
        ((*small, "--sequence-length", 16), "write --set data.sequence_length=16"),
        (
            ("--sequence-length", 7),
            "--sequence-length is 7, but sequence_length must be at least 8",
        ),
        (("--examples-shown", -1), "--examples-shown is -1; it must be at least 0"),
        (("--workers", 0), "--workers is 0; it must be at least 1"),
    ):
        assert message in refused(capsys, "inspect", text, *arguments), arguments
    with pytest.raises(SystemExit):
        main(["data", "layout", str(text)])
    assert "the following arguments are required: --recipe" in capsys.readouterr().err


def test_a_batch_larger_than_an_epoch_is_refused_after_the_numbers(text, tmp_path, capsys):
    arguments = (text, *recipe(tmp_path), "--set", "phases.0.global_batch_size=13")
    out, error = run(capsys, "inspect", *arguments, code=2)
    assert "has 12 rows of 22 tokens, fewer than one global batch of 13" in error
    assert "the recipe reads each training document" in out
    assert run(capsys, "inspect", *arguments, "--json", code=2)[0] == ""

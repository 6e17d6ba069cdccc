"""A prepared folder is complete, reproducible, recognised, and holds each document on one side."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_ds.data.prepare import prepare
from stacking_ds.data.sentences import split_sentences
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.tokenizer import build_tokenizer, train_wordpiece
from stacking_ds.errors import DataError
from tests import prose


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def decoded(folder, split):
    shards = TokenShards.open(folder, verify=True)
    tokenizer = build_tokenizer(shards.vocabulary)
    documents = shards.split(split)
    return [
        tokenizer.decode(documents.tokens_of(k).tolist()) for k in range(documents.num_documents)
    ]


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def test_two_runs_give_the_same_bytes(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 80))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        assert not prepare(text, folder, vocab_size=300, shard_tokens=3000).reused
    assert content(folders[0]) == content(folders[1])
    assert len([name for name in content(folders[0]) if name.startswith("train-")]) > 3
    assert not list(tmp_path.glob("*.tmp-*"))


def test_shard_size_changes_files_but_not_documents(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 80))
    prepare(text, tmp_path / "one", vocab_size=300)
    prepare(text, tmp_path / "many", vocab_size=300, shard_tokens=1)
    many = TokenShards.open(tmp_path / "many")
    assert len(many.manifest.train.shards) == many.manifest.train.documents
    assert decoded(tmp_path / "one", "train") == decoded(tmp_path / "many", "train")


def test_a_second_run_reuses_what_is_there(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    first = prepare(text, tmp_path / "out", vocab_size=300, heldout_fraction=0.2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = prepare(text, tmp_path / "out", vocab_size=300, heldout_fraction=0.2)
    assert (first.reused, second.reused) == (False, True)
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    out = tmp_path / "out"
    prepare(text, out, vocab_size=300, heldout_fraction=0.2)
    with pytest.raises(DataError, match=r"out holds data prepared otherwise .*'trained:300' there"):
        prepare(text, out, vocab_size=301, heldout_fraction=0.2)
    prose.write_text(tmp_path / "a.txt", 41)
    with pytest.raises(DataError, match=r"prepared otherwise .sources is"):
        prepare(text, out, vocab_size=300, heldout_fraction=0.2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(DataError, match="notes exists and is not prepared data"):
        prepare(text, tmp_path / "notes", vocab_size=300)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_documents_stay_whole_and_on_their_side(tmp_path):
    texts = list(prose.documents(100))
    source = write_json_lines(tmp_path / "a.jsonl", texts)
    prepare(source, tmp_path / "few", vocab_size=400, heldout_fraction=0.1)
    few = [set(decoded(tmp_path / "few", split)) for split in ("train", "heldout")]
    tokenizer = build_tokenizer(TokenShards.open(tmp_path / "few").vocabulary)
    expected = {
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts
    }
    assert few[0] | few[1] == expected
    assert not few[0] & few[1]
    assert 3 <= len(few[1]) <= 20
    # More documents, another order: those that were held out still are.
    more = write_json_lines(tmp_path / "b.jsonl", [*prose.documents(150, seed=5), *texts[::-1]])
    vocabulary = tmp_path / "few" / "vocab.txt"
    prepare(more, tmp_path / "more", vocabulary=vocabulary, heldout_fraction=0.1)
    assert few[1] <= set(decoded(tmp_path / "more", "heldout"))


def test_duplicates_are_dropped_also_between_the_splits(tmp_path):
    texts = list(prose.documents(30))
    train = write_json_lines(tmp_path / "a.jsonl", [*texts, "", texts[0].replace(" ", "  "), " \n"])
    heldout = write_json_lines(tmp_path / "b.jsonl", texts[5:9])
    manifest = prepare(
        train, tmp_path / "out", vocab_size=300, heldout_sources=[heldout], licence="CC0-1.0"
    ).manifest
    assert manifest.train.documents == 26
    assert manifest.heldout.documents == 4
    assert manifest.duplicate_documents == 5
    assert manifest.empty_documents == 2
    assert manifest.licence == "CC0-1.0"
    assert not set(decoded(tmp_path / "out", "train")) & set(decoded(tmp_path / "out", "heldout"))


def test_sentences_and_counts_are_kept(tmp_path):
    texts = list(prose.documents(20))
    source = write_json_lines(tmp_path / "a.jsonl", texts)
    heldout = write_json_lines(tmp_path / "b.jsonl", prose.documents(2, seed=9))
    manifest = prepare(source, tmp_path / "out", vocab_size=400, heldout_sources=[heldout]).manifest
    shards = TokenShards.open(tmp_path / "out")
    tokenizer = build_tokenizer(shards.vocabulary)
    train = shards.split("train")
    for document, text in enumerate(texts):
        ids, start = train.tokens_of(document), 0
        for length, sentence in zip(
            train.sentence_lengths_of(document), split_sentences(text), strict=True
        ):
            piece = ids[start : start + length].tolist()
            assert piece == tokenizer.encode(sentence, add_special_tokens=False).ids
            start += length
        assert start == len(ids)
    sentences = sum(len(split_sentences(text)) for text in texts)
    assert (manifest.train.documents, manifest.train.sentences) == (20, sentences)
    assert manifest.train.tokens == train.num_tokens == int(train.unigram_counts().sum())
    assert manifest.vocab_size == len(shards.vocabulary)


def test_sentence_splitter_keeps_every_word():
    text = 'Dr. Smith came.  "Who?" she asked. See pathlib.Path for it.\nIt cost 3.50 in the U.S.'
    assert split_sentences(text) == [
        "Dr. Smith came.",
        '"Who?" she asked.',
        "See pathlib.Path for it.",
        "It cost 3.50 in the U.S.",
    ]


def test_text_that_spells_special_tokens_is_text(tmp_path):
    texts = [f"{text} The mark [MASK] and [SEP] mean nothing." for text in prose.documents(20)]
    source = write_json_lines(tmp_path / "a.jsonl", texts)
    prepare(source, tmp_path / "out", vocab_size=400, heldout_fraction=0.2)
    counts = TokenShards.open(tmp_path / "out").split("train").unigram_counts()
    assert counts[[0, 2, 3, 4]].tolist() == [0, 0, 0, 0]


def test_large_vocabularies_use_wider_tokens(tmp_path):
    vocabulary = train_wordpiece(prose.documents(20), 300)
    vocabulary += [f"filler{number}" for number in range(70_000)] + ["zebra"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    source = write_json_lines(tmp_path / "a.jsonl", [f"{t} A zebra." for t in prose.documents(5)])
    heldout = [write_json_lines(tmp_path / "b.jsonl", prose.documents(2, seed=9))]
    prepare(source, tmp_path / "out", vocabulary=tmp_path / "vocab.txt", heldout_sources=heldout)
    tokens = TokenShards.open(tmp_path / "out").split("train").tokens_of(0)
    assert tokens.dtype == "uint32"
    assert tokens.max() == 70_300


def test_progress_is_reported(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    reports = []
    prepare(text, tmp_path / "out", vocab_size=300, heldout_fraction=0.2, progress=reports.append)
    assert {report.task for report in reports} == {"vocabulary", "shards"}
    assert reports[-1].documents == 40
    assert reports[-1].characters > 10_000


def test_unusable_requests_leave_nothing_behind(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 5))
    (tmp_path / "empty.txt").write_text("\n\n")
    out = tmp_path / "out"
    for sources, options, sentence in [
        (text, {"heldout_fraction": 0.7}, "heldout_fraction is 0.7; it must lie between 0 and 0.5"),
        (text, {"heldout_fraction": 1e-9}, "none of the 5 documents fell into the held-out split"),
        (text, {"heldout_fraction": 0}, "is 0 and no held-out source .* raise --heldout-fraction"),
        (text, {"vocab_size": 10}, "vocab_size 10 is too small"),
        (str(tmp_path / "empty.txt"), {}, "the sources hold no training document"),
    ]:
        with pytest.raises(DataError, match=sentence):
            prepare(sources, out, **({"vocab_size": 300} | options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path, monkeypatch):
    text = str(prose.write_text(tmp_path / "a.txt", 20))
    options = {"vocab_size": 300, "heldout_fraction": 0.2}
    prepare(text, tmp_path / "new", **options)
    here = tmp_path / "here"
    (here / ".tmp-of-a-killed-run").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert not prepare(text, Path(), **options).reused
    assert TokenShards.open(Path(), verify=True).manifest.heldout.documents > 0
    assert prepare(text, Path(), **options).reused
    (here / ".tmp-of-a-killed-run").rmdir()
    assert content(here) == content(tmp_path / "new")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 20))
    with pytest.raises(DataError, match=r"a\.txt/out cannot be written: .*Not a directory"):
        prepare(text, tmp_path / "a.txt" / "out", vocab_size=300)


def test_two_processes_at_once_agree_on_one_folder(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    out = tmp_path / "out"
    options = {"vocab_size": 300, "heldout_fraction": 0.2}

    def be_late(progress):
        # The other process starts after this one and finishes before it.
        if progress.task == "shards":
            prepare(text, tmp_path / "other", **options)
            (tmp_path / "other").rename(out)

    late = prepare(text, out, **options, progress=be_late)
    assert late.reused
    assert TokenShards.open(out, verify=True).manifest == late.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path):
    text = prose.write_text(tmp_path / "a.txt", 200)
    out = tmp_path / "out"
    # The child stops itself while the first documents are being written, and is killed there.
    program = f"""
import signal, os
from pathlib import Path
from stacking_ds.data.prepare import prepare
def stop(progress):
    if progress.task == "shards":
        print("writing", flush=True)
        signal.pause()
prepare({str(text)!r}, Path({str(out)!r}), vocab_size=300, progress=stop)
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "writing\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not out.exists()
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1
    assert not prepare(str(text), out, vocab_size=300).reused
    assert TokenShards.open(out, verify=True).manifest.train.documents > 150

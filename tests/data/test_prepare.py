"""A prepared folder is complete, reproducible, recognised, and holds each document on one side."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from stacking_ds.cli import main
from stacking_ds.data.prepare.finish import finish_splits
from stacking_ds.data.prepare.folder import PrepareOptions
from stacking_ds.data.prepare.unit import document_hash, words_of
from stacking_ds.data.prepare.vocabulary import VocabularySample
from stacking_ds.data.prepare.work_plan import make_plan, open_corpus
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.sources.documents import Reading, split_sentences
from stacking_ds.data.tokenizer import UNCASED, build_tokenizer, train_wordpiece
from stacking_ds.errors import DataError
from tests import prose
from tests.prose import prepare
from tests.token_shards import sentence_lengths_of


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def decoded(folder, split):
    shards = TokenShards.open(folder, verify=True)
    tokenizer = build_tokenizer(shards.vocabulary)
    documents = shards.split(split)
    return [
        tokenizer.decode(documents.tokens_of(k).tolist())
        for k in range(documents.num_documents)
        if k not in documents.duplicates
    ]


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def test_two_runs_give_the_same_bytes(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 80))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        assert not prepare(text, folder, vocab_size=300, shard_characters=3000).reused
    assert content(folders[0]) == content(folders[1])
    assert len([name for name in content(folders[0]) if name.startswith("train-")]) > 3
    assert not list(tmp_path.glob("*.tmp-*"))


def test_shard_size_changes_files_but_not_documents(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 80))
    prepare(text, tmp_path / "one", vocab_size=300)
    prepare(text, tmp_path / "many", vocab_size=300, shard_characters=1)
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


def test_what_becomes_of_capitals_and_accents_is_part_of_what_was_asked_for(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    out, options = tmp_path / "out", {"vocab_size": 300, "heldout_fraction": 0.2}
    first = prepare(text, out, **options, cased=True)
    assert str(first.manifest.request.normalization) == "cased"
    assert any(token.startswith("T") for token in TokenShards.open(out).vocabulary)
    assert prepare(text, out, **options, cased=True).reused
    with pytest.raises(DataError, match=r"\(normalization is cased there and uncased here\)"):
        prepare(text, out, **options)
    # one that goes on, as a process of several, reads it from the folder
    other = tmp_path / "other"
    small = options | {"unit_bytes": 5000, "shard_characters": 2000}
    assert prepare(text, other, **small, cased=True, part=(1, 2)).manifest is None
    with pytest.raises(DataError, match=r"normalization is cased there and uncased, accents kept"):
        prepare(text, other, **small, keep_accents=True)
    prepare(text, other, **small, cased=True)
    assert decoded(other, "train") == decoded(out, "train")
    assert any("The " in document for document in decoded(other, "train"))


def test_folders_of_earlier_versions_are_uncased(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    options = {"vocab_size": 300, "heldout_fraction": 0.2}
    prepare(text, tmp_path / "out", **options)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    del content["request"]["normalization"]
    for split in ("train", "heldout"):
        for file in (*content[split]["shards"], content[split]["duplicates"]):
            del file["unknown_tokens"]
    path.write_text(json.dumps(content))
    old = prepare(text, tmp_path / "out", **options)
    assert old.reused
    assert old.manifest.train.unknown_share is None
    assert TokenShards.open(tmp_path / "out").manifest.request.normalization == UNCASED
    with pytest.raises(DataError, match="normalization is uncased there and cased here"):
        prepare(text, tmp_path / "out", **options, cased=True)


def test_text_that_the_vocabulary_does_not_spell_is_told(tmp_path, capsys):
    vocabulary = tmp_path / "vocab.txt"
    tokens = train_wordpiece(prose.documents(20), 300)
    vocabulary.write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    heldout = write_json_lines(tmp_path / "b.jsonl", ["漢字 The end."])
    shares = {
        "good": (["The baker sells bread."], "0.000% of the tokens of train, 33.333% of"),
        "all": (["漢字 " * 40, "字" * 80], "100.000% of the tokens of train, 33"),
        "some": (["漢 " + "The baker sells bread. " * 9], r"1\.\d+% of the tokens of train"),
    }
    for name, (texts, share) in shares.items():
        source = write_json_lines(tmp_path / f"{name}.jsonl", texts)
        command = ["prepare", source, "--heldout", heldout, "--vocab", str(vocabulary)]
        out = tmp_path / name
        assert main([*command, "--out", str(out), "--workers", "1"]) == 0
        said = capsys.readouterr()
        assert re.search(rf"^\[UNK\]: {share}", said.out, re.MULTILINE), said.out
        assert re.search(r"^warning: [\d.]+% of the tokens, more than 1%, are \[UNK\]", said.err)
        assert "take a vocabulary of its language" in said.err
        shards = TokenShards.open(out)
        counts = shards.split("train").unigram_counts()
        assert shards.manifest.train.unknown_share == counts[1] / counts.sum()
        main(["data", "inspect", str(out)])
        assert "% of the tokens, more than 1%, are [UNK]" in capsys.readouterr().out
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    assert main(["prepare", text, "--out", str(tmp_path / "fine"), "--vocab-size", "300"]) == 0
    said = capsys.readouterr()
    assert "[UNK]: 0.0" in said.out
    assert "warning" not in said.err


def test_what_differs_in_a_folder_of_many_files_is_counted_and_named_once(tmp_path):
    texts = list(prose.documents(68))
    many = tmp_path / "many"
    many.mkdir()
    for number, text in enumerate(texts[:60]):
        (many / f"article-{number:04d}.txt").write_text(text, "utf-8")
    out, options = tmp_path / "out", {"vocab_size": 300, "heldout_fraction": 0.2}
    prepare(str(many), out, **options)
    for name, text, sentence in (
        ("article-0007.txt", texts[60], r"sources are 60 there and 60 here, the first that "),
        ("z.txt", texts[61], r"60 there and 61 here, the first that differs '[^']*article-0007"),
        ("article-0000.txt", texts[62], r"61 here, the first that differs '[^']*article-0000"),
    ):
        (many / name).write_text(text, "utf-8")
        with pytest.raises(DataError, match=sentence) as caught:
            prepare(str(many), out, **options)
        assert len(str(caught.value)) < 600 + len(str(out))


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
    assert (manifest.train.duplicates.documents, manifest.heldout.duplicates.documents) == (5, 0)
    assert [(one.reason, one.documents, one.first) for one in manifest.rejected] == [
        ("empty", 2, ("a.jsonl:31", "a.jsonl:33"))
    ]
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
            sentence_lengths_of(train, document), split_sentences(text), strict=True
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
    size = (tmp_path / "a.txt").stat().st_size
    assert {report.total_bytes for report in reports} == {size}
    assert (
        reports[-1].source_bytes == reports[-1].total_bytes == (tmp_path / "a.txt").stat().st_size
    )


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
    here.mkdir()
    inode = here.stat().st_ino
    monkeypatch.chdir(here)
    assert not prepare(text, Path(), **options).reused
    assert TokenShards.open(Path(), verify=True).manifest.heldout.documents > 0
    assert prepare(text, Path(), **options).reused
    assert here.stat().st_ino == inode
    assert content(here) == content(tmp_path / "new")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 20))
    with pytest.raises(DataError, match=r"a\.txt/out cannot be written: .*Not a directory"):
        prepare(text, tmp_path / "a.txt" / "out", vocab_size=300)


def test_two_processes_at_once_agree_on_one_folder(tmp_path):
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    out = tmp_path / "out"
    options = {"vocab_size": 300, "heldout_fraction": 0.2}

    prepare(text, tmp_path / "alone", **options)
    others = []

    def be_late(progress):
        # The other process starts after this one and finishes before it.
        if not others and progress.task == "shards":
            others.append(prepare(text, out, **options))

    late = prepare(text, out, **options, progress=be_late)
    assert late.reused
    assert not others[0].reused
    assert content(out) == content(tmp_path / "alone")
    assert TokenShards.open(out, verify=True).manifest == late.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "alone", "out"]


def test_duplicates_are_found_in_bounded_memory(tmp_path):
    texts = list(prose.documents(40))
    random.Random(2).shuffle(texts)
    source = write_json_lines(tmp_path / "a.jsonl", [*texts, *texts[:25], texts[3]])
    heldout = write_json_lines(tmp_path / "b.jsonl", [texts[3], texts[30], texts[3]])
    options = {"vocab_size": 400, "heldout_sources": [heldout], "unit_bytes": 9000}
    manifest = prepare(source, tmp_path / "out", **options).manifest
    assert len(manifest.train.shards) > 3
    train = TokenShards.open(tmp_path / "out").split("train")
    expected = [3, 30, *range(40, 66)]
    assert train.duplicates.tolist() == expected
    assert TokenShards.open(tmp_path / "out").split("heldout").duplicates.tolist() == [2]
    counted = [k for k in range(66) if k not in expected]
    assert manifest.train.documents == len(counted) == 38
    assert manifest.train.tokens == sum(len(train.tokens_of(k)) for k in counted)
    assert manifest.train.sentences == sum(len(sentence_lengths_of(train, k)) for k in counted)
    assert manifest.train.tokens + manifest.train.duplicates.tokens == train.num_tokens
    shards = {split: manifest.split(split).shards for split in ("train", "heldout")}
    for hashes_at_once in (1, 7, 68, 69, 1000):
        found = finish_splits(tmp_path / "out", shards, tmp_path, hashes_at_once)
        assert found == {"train": manifest.train, "heldout": manifest.heldout}


def test_the_vocabulary_is_learned_from_the_start_of_every_unit_and_not_from_what_is_held_out(
    tmp_path,
):
    texts = [f"{number} {text}" for number, text in enumerate(prose.documents(80))]
    source = write_json_lines(tmp_path / "a.jsonl", [texts[0], *texts])
    corpus = open_corpus([source], [])
    plan = make_plan(corpus, Reading(), 10_000)
    assert len(plan.units) > 5

    options = PrepareOptions((source,), tmp_path / "out", heldout_fraction=0.25)

    def sample(characters):
        return VocabularySample(corpus, plan, options, lambda *_: None, characters)

    train = [text for text in texts if document_hash(words_of(text)) >= 2**62]
    assert 40 < len(train) < 75
    assert list(sample(10**9)) == train
    some = sample(30_000)
    assert list(some) == list(some)
    assert 30_000 <= sum(map(len, some)) < 60_000
    numbers = [int(text.split()[0]) for text in some]
    assert max(numbers) > 70
    assert len(numbers) < len(train)
    assert list(sample(1)) == [
        next(text for text in train if text in unit_texts)
        for unit_texts in (
            [item.text for item, _ in corpus.read(unit, Reading())] for unit in plan.units
        )
        if any(text in unit_texts for text in train)
    ]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = prose.write_text(tmp_path / "a.txt", 40)

    def change(progress):
        if progress.task == "shards":
            path.write_text(path.read_text().replace("river", "RIVER"))

    options = {"vocab_size": 300, "heldout_fraction": 0.2, "shard_characters": 10_000}
    with pytest.raises(DataError, match=r"a\.txt changed while it was read; delete .*out"):
        prepare(str(path), tmp_path / "out", **options, progress=change)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_plans_share_small_files_and_cut_large_ones(tmp_path):
    for number in range(9):
        prose.write_text(tmp_path / f"small-{number}.txt", 2)
    prose.write_text(tmp_path / "zlarge.txt", 60)
    prose.write_text(tmp_path / "heldout.txt", 3)
    names = [str(tmp_path / "small-*.txt"), str(tmp_path / "zlarge.txt")]
    plan = make_plan(open_corpus(names, [str(tmp_path / "heldout.txt")]), Reading(), 20_000)
    assert [unit.heldout for unit in plan.units] == [True] + [False] * (len(plan.units) - 1)
    assert len(plan.units[1].segments) > 2
    assert len([1 for unit in plan.units if unit.segments[0].source == 2]) >= 3
    assert plan.source_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert make_plan(open_corpus(names, []), Reading()).units[0].source_bytes == (
        plan.source_bytes - (tmp_path / "heldout.txt").stat().st_size
    )


def test_batch_jobs_get_lines_instead_of_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stacking_ds.commands.prepare._SECONDS_BETWEEN_LINES", -1)
    text = str(prose.write_text(tmp_path / "a.txt", 40))
    command = ["prepare", text, "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert main([*command, "--heldout-fraction", "0.2"]) == 0
    said = capsys.readouterr()
    rest = r"0\.\d of 0\.\d MB at [\d.]+ MB/s, 100%, 0 s left$"
    for what in ("vocabulary, pass 1 of 2", "vocabulary, pass 2 of 2", "tokenizing"):
        assert re.search(rf"^{what}: \d+ documents, {rest}", said.err, re.MULTILINE), said.err
    assert re.search(r"^prepared in \d+ s \([\d.]+ MB/s of text\): .* 0 duplicates", said.out, re.M)


def test_one_source_may_be_given_by_itself(tmp_path):
    options = PrepareOptions("notes.txt", tmp_path, heldout_sources=["a.txt", "b.txt"])
    assert (options.sources, options.heldout_sources) == (("notes.txt",), ("a.txt", "b.txt"))

"""`stacking-ds data inspect · layout`: rows, epochs and examples."""

import re
from pathlib import Path

import pytest

from stacking_ds.config.sections import DataSection
from stacking_ds.data import inspection
from stacking_ds.data.inspection import shown_examples
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.shards import TokenShards
from tests.inspecting import (
    bins,
    counted_text,
    inspected,
    recipe,
    rename_tokens,
    rewrite_split,
    run,
)
from tests.token_shards import make_shards


@pytest.fixture
def text(tmp_path):
    return counted_text(tmp_path / "text")


# ------------------------------------------------------------------ rows and readings


def test_rows_that_were_counted_by_hand(text, capsys):
    arguments = (text, "--sequence-length", 10, "--examples", "documents")
    train, heldout = inspected(capsys, *arguments)["rows"]
    slots = 3 * (10 + 10 + 6 + 10 + 5 + 10 + 10)
    assert train == {
        "split": "train", "sequence_length": 10, "variants": 1, "rows_per_epoch": 21.0,
        "examples_per_row": 1.0, "tokens_per_row": slots / 21, "fill": slots / 210,
        "empty_slots_per_epoch": 210.0 - slots, "random_share": None,
        "example_lengths": train["example_lengths"],
    }  # fmt: skip
    assert bins(train["example_lengths"]) == [
        *((1, 2, 0), (3, 4, 0), (5, 6, 6), (7, 8, 0), (9, 10, 15)),
    ]
    assert (heldout["rows_per_epoch"], heldout["fill"]) == (2, 1)
    out, _ = run(capsys, "inspect", *arguments)
    assert re.search(r"^ +10  train +21 +1\.00 +87\.1% +27 +-$", out, re.MULTILINE)
    packed, _ = inspected(capsys, *arguments, "--packing")["rows"]
    # of the three examples of 5 slots two share a row
    assert (packed["rows_per_epoch"], packed["examples_per_row"]) == (20, 21 / 20)
    assert packed["fill"] == slots / 200


def test_packed_pairs_are_what_the_loader_gives(text, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "_ROWS_AT_ONCE", 2)
    train, _ = inspected(capsys, text, "--sequence-length", 24, "--packing")["rows"]
    options = DataSection(path="-", sequence_length=24, mlm_probability=0.15, packing=True)
    data = PretrainingData(TokenShards.open(text), "train", options, seed=0)
    rows = data.num_rows
    step = data.step(0, rows, micro_batch_size=rows)
    (batch,) = step.micro_batches
    labels = batch.next_sentence_label_E
    assert train["rows_per_epoch"] == rows
    assert train["examples_per_row"] == len(labels) / rows
    assert train["fill"] == pytest.approx(step.real_tokens / (24 * rows))
    assert train["random_share"] == int((labels == 1).sum()) / int((labels >= 0).sum())
    assert sum(each["count"] for each in train["example_lengths"]) == len(labels)
    assert train["examples_per_row"] > 1


def test_epochs_of_phases_that_were_counted_by_hand(text, tmp_path, capsys):
    found = inspected(capsys, text, *recipe(tmp_path))
    rows = {each["sequence_length"]: each for each in found["rows"] if each["split"] == "train"}
    assert {length: each["rows_per_epoch"] for length, each in rows.items()} == {10: 21, 22: 12}
    tokens = {10: 3 * 61 / 21, 22: 3 * (22 + 10 + 5 + 18) / 12}
    readings = found["readings"]
    wanted = [
        (0, 0, 3, 10, 7, 21, 0, 1, 21 * tokens[10], 210),
        (1, 3, 8, 22, 3, 15, 0, 1.25, 15 * tokens[22], 330),
        (2, 8, 10, 10, 14, 28, 1, 28 / 21, 28 * tokens[10], 280),
    ]
    got = [tuple(phase.values()) for phase in readings["phases"]]
    assert [pytest.approx(each) for each in wanted] == got
    assert (readings["steps"], readings["rows"], readings["slots"]) == (10, 64, 820)
    assert readings["epochs"] == pytest.approx(1 + 1.25 + 28 / 21)
    assert readings["tokens"] == pytest.approx(sum(each[-2] for each in wanted))
    out, _ = run(capsys, "inspect", text, *recipe(tmp_path))
    line = r"^ +2  8 to 10 +10 +14 +28 +1\.33 +1\.00 +2\.33 +244$"
    assert re.search(line, out, re.MULTILINE)
    assert "reads each training document 3.58 times; with padding 820 token slots" in out


def test_examples_are_those_of_the_recipes_first_step(text, tmp_path, capsys):
    arguments = recipe(tmp_path)
    path = tmp_path / "small.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("  path:")))
    found = inspected(capsys, text, *arguments)["examples"]
    options = DataSection(path="-", sequence_length=10, mlm_probability=0.2, examples="documents")
    data = PretrainingData(TokenShards.open(text), "train", options, seed=3)
    assert found == shown_examples(data, 3)


def test_stages_in_tokens_and_variants_are_counted_too(text, tmp_path, capsys):
    overrides = ("data.variants=3", "stages=[{num_hidden_layers: 1, tokens: 541}]")
    found = inspected(capsys, text, *recipe(tmp_path, *overrides))
    readings = found["readings"]
    # 210 slots in phase 0, 330 in phase 1, and one slot more
    assert [phase["end_step"] for phase in readings["phases"]] == [3, 8, 9]
    train = found["rows"][0]
    shards = TokenShards.open(text)
    options = DataSection(
        path="-", sequence_length=10, mlm_probability=0.15, examples="documents", variants=3
    )
    data = PretrainingData(shards, "train", options, seed=0)
    rows = [data.layout(variant).num_rows for variant in range(options.variants)]
    assert len(set(rows)) > 1
    assert train["rows_per_epoch"] == sum(rows) / 3
    assert readings["phases"][2]["first_epoch"] == 21 / (sum(rows) / 3)
    assert found["rows"][1]["variants"] == 1, "held-out rows have no variants"
    assert "train has 3 variants" in run(capsys, "inspect", text, *recipe(tmp_path, *overrides))[0]


# -------------------------------------------------------------------------- examples

MASKED = re.compile(r"\[(\S+?)->(\S+?)\]")


def unmasked(text):
    return MASKED.sub(lambda found: found[1], text)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "documents"])
def test_examples_show_the_masks_that_the_batch_has(tmp_path, kind, packing):
    text = make_shards(tmp_path, [[4, 3, 5, 6, 3]] * 12).folder
    options = DataSection(
        path="-", sequence_length=24, mlm_probability=0.3, examples=kind, packing=packing
    )
    data = PretrainingData(TokenShards.open(text), "train", options, seed=4)
    rows = data.num_rows
    (batch,) = data.step(0, rows, micro_batch_size=rows).micro_batches
    vocabulary = data.shards.vocabulary
    shown = shown_examples(data, 10**6)
    words = [MASKED.findall(f"{each['first']} {each['second'] or ''}") for each in shown]
    by_row = data.step(0, rows, micro_batch_size=1).micro_batches
    rows_E = [row for row, one in enumerate(by_row) for _ in one.next_sentence_label_E]
    assert [each["row"] for each in shown] == rows_E
    ids = batch.input_ids_T
    wanted = [
        (vocabulary[label], vocabulary[ids[position]].replace("[MASK]", "MASK"))
        for position, label in zip(batch.mlm_positions_M, batch.mlm_labels_M, strict=True)
    ]
    assert [pair for each in words for pair in each] == wanted
    assert {read for _, read in wanted} > {"MASK"}
    whole = ids.clone()
    whole[batch.mlm_positions_M] = batch.mlm_labels_M
    for number, each in enumerate(shown):
        start, stop = batch.sequences.starts_E1[number : number + 2].tolist()
        row = by_row[each["row"]]
        tokens = [vocabulary[token] for token in whole[start:stop].tolist()]
        assert each["masked"] == len(words[number])
        assert each["row_fill"] == pytest.approx(len(row.input_ids_T) / 24)
        assert each["examples_in_row"] == len(row.next_sentence_label_E)
        assert each["example"] == number - rows_E.index(each["row"]) + 1
        framed = f"[CLS] {unmasked(each['first'])} [SEP]"
        framed += f" {unmasked(each['second'])} [SEP]" if each["second"] is not None else ""
        assert framed == " ".join(tokens)
        label = int(batch.next_sentence_label_E[number])
        assert each["follows"] == {0: True, 1: False, -100: None}[label]
    assert len(shown_examples(data, 4)) == 4
    assert shown_examples(data, 0) == []
    if kind == "pairs":
        assert {each["follows"] for each in shown} >= {True, False}


def test_pieces_are_joined_to_words(tmp_path, capsys):
    make_shards(tmp_path, [[6]] * 3)
    rewrite_split(tmp_path, "train", [[5, 6, 7, 8, 9, 8, 1]] * 3)
    rename_tokens(tmp_path, {5: "un", 6: "##believ", 7: "##able", 8: "fox", 9: ","})
    arguments = ("--sequence-length", 10, "--examples", "documents", "--examples-shown", 3)
    seen = set()
    for seed in range(40):
        options = DataSection(
            path="-", sequence_length=10, mlm_probability=0.15, examples="documents"
        )
        data = PretrainingData(TokenShards.open(tmp_path), "train", options, seed=seed)
        seen |= {each["first"] for each in shown_examples(data, 3)}
    assert {
        "un[##believ->MASK]able fox, fox [UNK]",
        "[un->MASK]believable fox, fox [UNK]",
        "unbelievable [fox->MASK], fox [UNK]",
        "unbelievable fox [,->MASK] fox [UNK]",
    } <= seen
    assert all(each.count("->") == 1 for each in seen)
    out, _ = run(capsys, "inspect", tmp_path, *arguments)
    assert len(re.findall(r"^row \d, 90% full, 1 masked$", out, re.MULTILINE)) == 3
    assert "\n  A  " in out
    assert "\n  B  " not in out


def test_pairs_are_shown_with_their_label_and_place(text, capsys):
    arguments = (text, "--sequence-length", 24, "--packing", "--examples-shown", 6)
    out, _ = run(capsys, "inspect", *arguments)
    found = inspected(capsys, *arguments)["examples"]
    assert len(found) == 6
    titles = re.findall(r"^row (\d+), (\d+)% full(?:, example (\d) of (\d))?, ", out, re.MULTILINE)
    assert [int(row) for row, *_ in titles] == [each["row"] for each in found]
    assert any(count for *_, count in titles)
    labels = re.findall(r"^row .* masked(.*)$", out, re.MULTILINE)
    told = {True: ", true: B follows A", False: ", random: B is from elsewhere", None: ""}
    assert labels == [told[each["follows"]] for each in found]
    assert "row 0" not in run(capsys, "inspect", *arguments[:-1], 0)[0]


# ---------------------------------------------------------------------------- layout


def test_layout_makes_all_that_the_recipe_needs(text, tmp_path, capsys):
    arguments = ("layout", text, *recipe(tmp_path, "data.variants=2"), "--workers", 2)
    out, _ = run(capsys, *arguments)
    expected = {
        f"documents-{length}-single-{variant}-{split}"
        for length in (10, 22)
        for variant, split in ((0, "train"), (1, "train"), (0, "heldout"))
    }
    lines = [re.fullmatch(r"(.+): ([\d,]+) rows, ([\d.]+)% full, \d+\.\d s", line) for line in
             out.splitlines()]  # fmt: skip
    folders = [Path(line[1]) for line in lines]
    assert {folder.parent for folder in folders} == {text / "layouts"}
    rows = {
        folder.name.rpartition("-")[0]: (line[2], line[3])
        for folder, line in zip(folders, lines, strict=True)
    }
    assert rows.keys() == expected
    assert rows["documents-10-single-0-train"] == ("21", "87.1")
    assert rows["documents-22-single-0-train"] == ("12", "62.5")
    records = {folder: (folder / "layout.json").stat().st_mtime_ns for folder in folders}
    run(capsys, *arguments)
    again = {folder: (folder / "layout.json").stat().st_mtime_ns for folder in folders}
    assert again == records, "what is there is not made anew"

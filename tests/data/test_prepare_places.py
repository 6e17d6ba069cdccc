"""What `prepare` says of what it leaves alone, and in whose folder it works."""

import gzip
import json

import pytest

from stacking_ds.cli import main
from stacking_ds.commands import prepare as commands_prepare
from stacking_ds.data.prepare.preparation import PrepareProgress
from stacking_ds.data.sources import text_files
from stacking_ds.data.tokenizer import SPECIAL_TOKENS
from stacking_ds.errors import DataError
from tests import prose
from tests.prose import prepare


def test_a_zipped_document_is_measured_in_text(tmp_path):
    path = tmp_path / "long.txt.gz"
    with gzip.open(path, "wt") as file:
        file.writelines("the same words again and again\n" for _ in range(3000))
    with pytest.raises(DataError, match=r"long\.txt\.gz, line 1 starts a line or document of more"):
        prepare(str(path), tmp_path / "out", max_document_bytes=50_000)


def test_places_in_a_cut_file_are_counted_once_a_piece(tmp_path, monkeypatch):
    texts = ["" if number % 5 == 0 else f"word {number} and more" for number in range(400)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    counted = []
    count = text_files._count_lines
    monkeypatch.setattr(
        text_files, "_count_lines", lambda path, stop: counted.append(stop) or count(path, stop)
    )
    done = prepare(
        str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=60, heldout_fraction=0.2,
        unit_bytes=2000, shard_characters=300,
    )  # fmt: skip
    (empty,) = done.manifest.rejected
    assert (empty.documents, empty.first[:2], empty.first[-1]) == (
        80, ("a.jsonl:1", "a.jsonl:6"), "a.jsonl:96",
    )  # fmt: skip
    assert len(counted) == len(set(counted)) <= 8


def test_what_lies_beside_in_a_folder_is_named(tmp_path, caplog):
    prose.write_text(tmp_path / "a.txt", 40)
    (tmp_path / "b.jsonl.lz4").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    prepare(str(tmp_path), tmp_path.with_name("out"), vocab_size=300, heldout_fraction=0.2)
    assert "only its files of known kinds are read; left alone: b.jsonl.lz4, sub" in caplog.text


def test_nothing_left_says_what_became_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("no json\nnor this\n")
    with pytest.raises(
        DataError, match=r"no training document .* \(2 left out, not JSON: a\.jsonl:1"
    ):
        prepare(
            str(tmp_path / "a.jsonl"), tmp_path / "out", bad_documents="count",
            vocabulary=vocabulary_of(tmp_path),
        )  # fmt: skip
    text = str(prose.write_text(tmp_path / "b.txt", 30))
    with pytest.raises(DataError, match=r"30 that are held out, or occur twice"):
        prepare(text, tmp_path / "out2", vocab_size=300, heldout_sources=[text],
                vocabulary=vocabulary_of(tmp_path))  # fmt: skip


def vocabulary_of(folder):
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in (*SPECIAL_TOKENS, *"abcdefghijklmnopqrst")))
    return path


def test_modules_in_the_users_folder_are_none_of_ours(tmp_path, monkeypatch):
    for name in ("tokenizers.py", "json.py", "numpy.py"):
        (tmp_path / name).write_text("raise ImportError('this is the user\\'s own')\n")
    text = prose.write_text(tmp_path / "a.txt", 60)
    monkeypatch.chdir(tmp_path)
    done = prepare(
        str(text), tmp_path / "out", vocab_size=300, heldout_fraction=0.2, workers=2,
        unit_bytes=5000,
    )  # fmt: skip
    assert done.manifest.train.documents


def test_an_array_job_with_gaps_is_refused(monkeypatch, tmp_path, capsys):
    for name, value in (("MIN", 1), ("ID", 3), ("MAX", 7), ("STEP", 1), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert main(["prepare", "embedded", "--out", str(tmp_path / "out"), "--part", "auto"]) == 2
    assert "the array job has 3 tasks from 1 to 7, so --part auto cannot tell" in (
        capsys.readouterr().err
    )


def test_work_of_an_earlier_run_is_no_speed_of_this_one(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(commands_prepare.time, "monotonic", lambda: next(clock))
    display = commands_prepare._Display()
    for source_bytes in (10_000_000, 60_000_000, 100_000_000):
        display(PrepareProgress("shards", 5, source_bytes, 200_000_000, kept_bytes=60_000_000))
    said = capsys.readouterr().err.splitlines()
    assert "at 0.0 MB/s" in said[0]
    assert "100.0 of 200.0 MB at 0." in said[-1]
    assert "50%" in said[-1]
    display(PrepareProgress("vocabulary", 1, 9_000_000, None))
    display(PrepareProgress("vocabulary", 1, 2_000_000, None))  # the second time through
    display(PrepareProgress("vocabulary", 1, 4_000_000, None))
    assert "4.0 MB at 0.0 MB/s" in capsys.readouterr().err.splitlines()[-1]

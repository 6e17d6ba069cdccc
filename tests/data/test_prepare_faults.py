"""Bad input and full disks: one sentence with file and line, counted when asked, never silent."""

import errno
import gzip
import json
import os
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacking_ds.cli import main
from stacking_ds.data import shard_files
from stacking_ds.data.prepare import finish
from stacking_ds.data.prepare.unit import Rejections
from stacking_ds.data.shard_files import read_manifest
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from tests import prose
from tests.prose import prepare

TEXTS = list(prose.documents(12, seed=4))
GOOD = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
LIMIT = 64 * 2**20
ZIPPED = gzip.compress(b"".join(GOOD))


def lines(*bad, at=5):
    return b"".join([*GOOD[:at], *bad, *GOOD[at:]])


BAD = {
    "not-json": ("a.jsonl", lines(b'{"text": "x\n'), "a.jsonl, line 6 is not JSON", "not JSON"),
    "no-text": ("a.jsonl", lines(b'{"body": "x"}\n'), "a.jsonl, line 6 has no string", "no text"),
    "half": (
        "a.jsonl",
        lines(b'{"text": "a \\ud800 b"}\n'),
        "a.jsonl, line 6 holds half a character",
        "half a character",
    ),
    "latin-1": ("a.jsonl", lines(b'{"text": "\xe9"}\n'), "line 6 is not UTF-8", "not UTF-8"),
    "latin-1-text": (
        "a.txt",
        b"\n\n".join([*(text.encode() for text in TEXTS[:5]), b"fine\nnot fine: \xe9\n", b"fine"]),
        "is not UTF-8 (byte 10 of the line)",
        "not UTF-8",
    ),
    "long-line": (
        "a.jsonl",
        lines(b'{"text": "' + b"x" * 200_000_000 + b'"}\n'),
        "a.jsonl, line 6 starts a line or document of more than 67,108,864 bytes",
        "too long",
    ),
    "long-document": (
        "a.txt",
        (
            TEXTS[0] + "\n\n" + ("some words " * 100 + "\n") * 70_000 + "\n" + TEXTS[1] + "\n"
        ).encode(),
        "starts a line or document of more than 67,108,864 bytes",
        "too long",
    ),
    "cut-gzip": ("a.jsonl.gz", ZIPPED[:-300], "is in a broken gzip file: ", "broken gzip"),
    "no-gzip": ("a.jsonl.gz", b"".join(GOOD), "line 1 is in a broken gzip file: ", "broken gzip"),
    "empty-gzip": (
        "a.jsonl.gz",
        b"",
        "line 1 is in a broken gzip file: it is empty",
        "broken gzip",
    ),
}


@pytest.fixture
def command(tmp_path):
    """The command line around a source; what it needs besides is good."""
    heldout = prose.write_text(tmp_path / "heldout.txt", 5, seed=8)
    prose.write_text(tmp_path / "good.txt", 20, seed=9)
    vocabulary = tmp_path / "vocabulary"
    prepare(str(tmp_path / "good.txt"), vocabulary, vocab_size=300, heldout_fraction=0.2)
    fixed = ["--out", str(tmp_path / "out"), "--heldout", str(heldout), "--workers", "1"]
    fixed += ["--vocab", str(vocabulary / "vocab.txt")]
    return lambda *arguments: ["prepare", *map(str, arguments), *fixed]


@pytest.mark.parametrize(("name", "content", "sentence", "reason"), BAD.values(), ids=BAD)
def test_bad_documents_are_named_or_counted(
    command, tmp_path, capsys, name, content, sentence, reason
):
    path, good, out = tmp_path / name, tmp_path / "good.txt", tmp_path / "out"
    path.write_bytes(content)
    assert main(command(good, path)) == 2
    said = capsys.readouterr().err
    assert said.startswith("stacking-ds: error: ")
    assert said.count("\n") == 1
    assert f"{path}, line " in said
    assert sentence in said
    assert "--bad-documents count" in said
    assert not (out / "manifest.json").exists()
    assert main([*command(good, path), "--bad-documents", "count"]) == 0
    line = said.partition(f"{path}, line ")[2].split(" ")[0]
    place = f"{name}:{line}"
    assert f"left out, {reason}: 1 documents, the first at {place}" in capsys.readouterr().out
    (rejected,) = read_manifest(out).rejected
    assert (rejected.reason, rejected.documents, rejected.first) == (reason, 1, (place,))
    kept = TokenShards.open(out, verify=True).manifest.train.documents - 20
    if name == "a.jsonl":
        assert kept == len(TEXTS)
    else:
        assert kept < len(TEXTS)
    # without saying so again, what was left out is not taken for granted
    assert main(command(good, path)) == 2
    assert f"was prepared with --bad-documents count and lacks 1 documents ({reason}: {place})" in (
        capsys.readouterr().err
    )


def test_what_comes_before_a_broken_gzip_is_kept_when_counting(command, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(GOOD[:9])) + ZIPPED[:50])
    assert main([*command(path), "--bad-documents", "count"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.train.documents == 9
    assert manifest.rejected[0].first == ("a.jsonl.gz:10",)


def test_only_the_first_places_are_kept_and_lines_count_from_the_files_start(tmp_path):
    text = "".join(f'{{"text": "word {number}"}}\n' + "{}\n" * (number % 2) for number in range(99))
    (tmp_path / "a.jsonl").write_text(text)
    heldout = prose.write_text(tmp_path / "b.txt", 3)
    options = {"vocab_size": 300, "heldout_sources": [str(heldout)], "bad_documents": "count"}
    for unit_bytes in (None, 300):
        manifest = prepare(
            str(tmp_path / "a.jsonl"), tmp_path / f"{unit_bytes}", **options, unit_bytes=unit_bytes
        ).manifest
        (rejected,) = manifest.rejected
        assert rejected.documents == 49
        assert rejected.first == tuple(f"a.jsonl:{3 * number + 3}" for number in range(20))
    assert len(manifest.train.shards) > 5


def test_empty_documents_are_counted_and_said(command, tmp_path, capsys):
    empty = [b'{"text": ""}\n', b'{"text": " \\n\\t"}\n', b'{"text": "\\u0000\\u0001"}\n']
    (tmp_path / "a.jsonl").write_bytes(lines(*empty))
    assert main(command(tmp_path / "a.jsonl")) == 0
    assert "left out, empty: 3 documents, the first at a.jsonl:6, a.jsonl:7, a.jsonl:8" in (
        capsys.readouterr().out
    )
    assert main(command(tmp_path / "a.jsonl")) == 0


def test_bad_rows_of_tables(command, tmp_path, capsys):
    values = pa.array([*(text.encode() for text in TEXTS[:3]), b"\xff", None, b"good words"])
    table = pa.table({"body": values.view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert main(command(tmp_path / "a.parquet")) == 2
    said = capsys.readouterr().err
    assert "a.parquet has no column 'text', only ['body']; name the one that holds the" in said
    keyed = [*command(tmp_path / "a.parquet"), "--text-key", "body"]
    assert main(keyed) == 2
    assert "a.parquet, row 4 is not UTF-8" in capsys.readouterr().err
    assert main([*keyed, "--bad-documents", "count"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.train.documents == 4
    assert [(one.reason, one.first) for one in manifest.rejected] == [
        ("empty", ("a.parquet:5",)),
        ("not UTF-8", ("a.parquet:4",)),
    ]


def test_files_that_cannot_be_opened_are_named(command, tmp_path, capsys):
    for name, sentence in (
        ("a.parquet", "a.parquet cannot be read: "),
        ("a.arrow", "a.arrow cannot be read: "),
    ):
        (tmp_path / name).write_bytes(b"nonsense " * 99)
        for option in ("refuse", "count"):
            assert main([*command(tmp_path / name), "--bad-documents", option]) == 2
            assert sentence in capsys.readouterr().err
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2**20 + 1, 99999999999, 10**30])
def test_a_vocabulary_larger_than_any_is_refused(command, tmp_path, capsys, size):
    assert main([*command(tmp_path / "good.txt"), "--vocab-size", str(size)]) == 2
    assert f"vocab_size is {size:,}; it can be 1,048,576 at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_too_long_are_told_in_a_short_sentence(tmp_path, capsys):
    long = str(tmp_path / ("x" * 300))
    (tmp_path / "a.txt").write_text("some words")
    out = str(tmp_path / "out")
    for words in (
        ("prepare", long, "--out", out),
        ("prepare", str(tmp_path / "a.txt"), "--out", long),
        ("prepare", str(tmp_path / "a.txt"), "--out", out, "--vocab", long),
        ("data", "inspect", long),
    ):
        assert main(list(words)) == 2
        told = capsys.readouterr().err
        assert "File name too long" in told
        assert "make room" not in told
        assert len(told) < 300


def test_a_vocabulary_without_mask_is_refused_before_anything_is_read(command, tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    arguments = [*command(tmp_path / "good.txt"), "--vocab", str(tmp_path / "vocab.txt")]
    assert main(arguments) == 2
    assert "vocab.txt lacks [MASK]: BERT needs all of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_edited_after_the_manifest_is_named(command, tmp_path):
    assert main(command(tmp_path / "good.txt")) == 0
    shard = next((tmp_path / "out").glob("train-0*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{shard.name} is damaged: it is not the file its manifest describes"
    ):
        TokenShards.open(tmp_path / "out", verify=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=rf"{shard.name} is damaged: it has \d+ bytes, its manifest says"
    ):
        TokenShards.open(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_keeps_what_is_finished(tmp_path, workers):
    path = prose.write_text(tmp_path / "a.txt", 60)
    # the last unit is the one with a large shard
    path.write_text(path.read_text() + " ".join(prose.documents(20)).replace("\n", " "))
    text = str(path)
    sizes = {"unit_bytes": 20_000, "vocab_size": 400, "heldout_fraction": 0.2}
    prepare(text, tmp_path / "alone", **sizes)
    largest = max(path.stat().st_size for path in (tmp_path / "alone").glob("train-0*"))
    # files above the limit fail with EFBIG, also in the workers, which inherit it
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(DataError, match=r"out cannot be written: File too large; what is"):
            prepare(text, tmp_path / "out", **sizes, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    notes = tmp_path / "out" / ".unfinished"
    records = "".join(path.read_text() for path in notes.glob("unit-*.json"))
    shards = (tmp_path / "out").glob("*.arrow")
    there = {path.name: path.stat().st_ino for path in shards if path.name in records}
    assert there
    assert not list(notes.glob("*.arrow*"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(text, tmp_path / "out", **sizes, workers=workers).resumed
    for name, inode in there.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_no_space_left_is_said_in_one_sentence(command, tmp_path, capsys, monkeypatch):
    def full(path, content, temporary):
        if path.suffix == ".arrow":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_file(path, content, temporary)

    write_file = shard_files.write_file
    monkeypatch.setattr(shard_files, "write_file", full)
    assert main(command(tmp_path / "good.txt")) == 2
    assert (
        "out cannot be written: No space left on device; what is finished is kept (0 of 2 units): "
        "make room and run the same command again"
    ) in capsys.readouterr().err


def test_interrupted_by_the_keyboard(command, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_files, "write_arrow", interrupt)
    assert main(command(tmp_path / "good.txt")) == 130
    monkeypatch.undo()
    assert main(command(tmp_path / "good.txt")) == 0
    assert "prepared in" in capsys.readouterr().out


def test_rejections_keep_twenty_places_however_many_there_are():
    rejections = Rejections()
    for number in range(100):
        rejections.add("not JSON", f"a.jsonl:{number}".format)
    (rejected,) = rejections.found()
    assert (rejected.documents, len(rejected.first)) == (100, 20)
    rejections.extend([rejected])
    (rejected,) = rejections.found()
    assert (rejected.documents, len(rejected.first)) == (200, 20)


def test_what_was_counted_is_refused_when_an_unfinished_prepare_goes_on_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(b"{}\n", at=1))
    options = {"vocab_size": 300, "heldout_fraction": 0.3, "unit_bytes": 5000}
    source, out = str(tmp_path / "a.jsonl"), tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has no string"):
        prepare(source, out, **options, part=(1, 2))
    # another part may be at work there
    assert (out / ".unfinished" / "started.json").exists()
    counted = prepare(source, out, **options, part=(1, 2), bad_documents="count")
    assert counted.missing_units > 0
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has no string"):
        prepare(source, out, **options)
    manifest = prepare(source, out, **options, bad_documents="count").manifest
    assert manifest.rejected[0].first == ("a.jsonl:2",)


def test_nothing_is_published_if_a_training_document_is_held_out(tmp_path, monkeypatch):
    heldout = prose.write_text(tmp_path / "b.txt", 3)
    text = prose.write_text(tmp_path / "a.txt", 10)
    monkeypatch.setattr(finish, "_repeated", lambda *_: np.empty(0, np.int64))
    with pytest.raises(DataError, match="3 documents are in the training and in the held-out"):
        prepare(str(text), tmp_path / "out", vocab_size=300, heldout_sources=[str(heldout)])
    assert not (tmp_path / "out" / "manifest.json").exists()

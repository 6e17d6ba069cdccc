"""Every kind of source gives the same documents, and says what is wrong with it and where."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacking_ds.data.sources import open_source
from stacking_ds.errors import DataError

TEXTS = ["The first document.\nIt has two paragraphs.", "The second döcument."]


def texts_of(name):
    return [document.text for document in open_source(str(name)).documents()]


def json_lines(texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def test_text_files_join_lines_and_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone line\n  and its rest\r\n\n \n\nanother döcument".encode())
    assert texts_of(path) == ["one line and its rest", "another döcument"]


def test_json_lines_plain_and_compressed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "b.jsonl.gz") == TEXTS


def test_parquet_and_arrow(tmp_path):
    table = pa.table({"text": TEXTS, "other": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
        assert texts_of(tmp_path / name) == TEXTS
    assert texts_of(tmp_path / "a.parquet") == TEXTS


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    for name in ("c.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(f"document {name}")
    (tmp_path / "notes.md").write_text("not a document")
    assert texts_of(tmp_path) == ["document a.txt", "document b.txt", "document c.txt"]
    assert texts_of(tmp_path / "[bc].txt") == ["document b.txt", "document c.txt"]


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_source(str(path)).identity()
    path.write_text("two")
    assert open_source(str(path)).identity() != before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', r"a.jsonl, line 2 has no string .*\['body'\]"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1 has no string under the key 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 has no string under the key 'text' .it has list"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "a.jsonl, line 1 holds half a character"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1 is not UTF-8"),
        ("a.txt", b"fine\nnot \xff fine\n", r"a.txt, line 2 is not UTF-8 \(byte 4 of the line\)"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz is a broken gzip file"),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS * 99))[:60], "is a broken gzip file"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet cannot be read"),
        ("a.arrow", b"ARROW1 nonsense", "a.arrow cannot be read"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        texts_of(tmp_path / name)


def test_tables_without_text_are_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'text', only \['body'\]"):
        texts_of(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the column 'text' holds int64, not strings"):
        texts_of(tmp_path / "b.parquet")


def test_sources_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt' does not exist, or matches no"):
        open_source(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"holds no \.txt"):
        open_source(str(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv is none of the known kinds: .txt, .jsonl"):
        open_source(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="names no dataset"):
        open_source("hf:")


def test_hugging_face_names_are_taken_apart_and_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split, streaming))
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("hf:wikimedia/wikipedia:20231101.en@train[:1%]") == TEXTS
    assert texts_of("hf:books") == TEXTS
    assert open_source("hf:books@train").identity() == ["hf:books@train"]
    assert asked == [
        ("wikimedia/wikipedia", "20231101.en", "train[:1%]", True),
        ("books", None, "train", True),
    ]


def test_an_unreachable_dataset_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\n  the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hf:books: the dataset cannot be read .* reach the Hub$"):
        texts_of("hf:books")

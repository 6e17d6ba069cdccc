"""Every kind of source gives the same documents, and says what is wrong with it and where."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.sources.documents import Document, Fault, Reading
from stacking_ds.data.sources.kinds import open_source
from stacking_ds.errors import DataError

TEXTS = ["The first document.\nIt has two paragraphs.", "The second döcument."]


def items_of(name, piece_bytes=2**40, text_key="text", documents="blank-line", **options):
    """What a source yields, piece by piece, with the places."""
    source, found = open_source(str(name), **options), []
    reading = Reading(text_key, 1000, documents)
    for piece in source.pieces(piece_bytes, reading):
        reader = source.open(piece, reading)
        found.extend((item, reader.place(item.number)) for item in reader.items())
    return found


def texts_of(name, *arguments, **options):
    items = [item for item, _ in items_of(name, *arguments, **options)]
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


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


TEXT = st.text(st.sampled_from("ab é\r\n\t\x85"), max_size=60)


@given(TEXT, st.integers(1, 40))
@settings(max_examples=300)
def test_a_text_file_cut_anywhere_has_the_same_documents_and_places(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(text.encode())
    whole, cut = items_of(path), items_of(path, size)
    assert [(item.text, place) for item, place in cut] == [
        (item.text, place) for item, place in whole
    ]
    words = [" ".join(part.split()) for part in text.split()]
    assert " ".join(item.text for item, _ in whole).split() == words


@given(st.lists(st.text("ab\n é", max_size=12), max_size=12), st.integers(1, 60))
@settings(max_examples=200)
def test_json_lines_cut_anywhere_have_the_same_documents(tmp_path_factory, texts, size):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(json_lines(texts).replace(b"}\n", b"}\n \n"))
    assert texts_of(path, size) == texts
    assert [place for _, (place, _) in items_of(path, size)] == [
        f"cut.jsonl:{2 * number + 1}" for number in range(len(texts))
    ]


def test_large_files_are_cut_into_pieces_of_the_size_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([f"document {number}" for number in range(1000)]))
    size = path.stat().st_size
    pieces = open_source(str(path)).pieces(size // 10, Reading())
    assert len(pieces) == 10
    assert (pieces[0].start, pieces[-1].stop) == (0, size)
    assert all(abs(piece.stop - piece.start - size // 10) < 100 for piece in pieces)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(open_source(str(tmp_path / "a.jsonl.gz")).pieces(10, Reading())) == 1


def test_tables_are_cut_between_row_groups_and_batches(tmp_path):
    texts = [f"document {number}" for number in range(100)]
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    with (
        pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=7)
    for name in ("a.parquet", "b.arrow"):
        assert len(open_source(str(tmp_path / name)).pieces(500, Reading())) > 3
        items = items_of(tmp_path / name, 500)
        assert [item.text for item, _ in items] == texts
        assert [place for _, (place, _) in items] == [f"{name}:{row}" for row in range(1, 101)]
    sizes = [item.source_bytes for item, _ in items_of(tmp_path / "a.parquet", 500)]
    assert abs(sum(sizes) - (tmp_path / "a.parquet").stat().st_size) < 200


def test_identity_needs_no_reading_and_follows_name_and_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert open_source(str(path)).identity() == ["a.txt, 3 bytes"]
    path.write_text("three")
    assert open_source(str(path)).identity() == ["a.txt, 5 bytes"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', r"a.jsonl, line 2 has no string .*\['body'\]"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1 has no string under the key 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 has no string under the key 'text' .it has list"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "a.jsonl, line 1 holds half a character"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[" * 900 + b"\n", "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1 is not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "' + b"x" * 999 + b'"}',
            "a.jsonl, line 1 starts a line .* 1,000 by",
        ),
        ("a.txt", b"fine\nnot \xff fine\n", r"a.txt, line 2 is not UTF-8 \(byte 4 of the line\)"),
        ("a.txt", b"fine\n\n" + b"not fine\n" * 120, "a.txt, line 3 starts a line or document of"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz, line 1 is in a broken gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS * 99), mtime=0)[:60],
            "is in a broken gzip file",
        ),
    ],
)
def test_faults_are_named_with_the_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    faults = [
        f"{place} {item.sentence}"
        for item, (_, place) in items_of(tmp_path / name)
        if isinstance(item, Fault)
    ]
    assert len(faults) == 1
    assert re.search(sentence, faults[0]), faults


def test_damaged_tables_and_tables_without_text_are_refused_before_they_are_read(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"ARROW1 nonsense")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            open_source(str(tmp_path / name)).pieces(1000, Reading())
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'text', only \['body'\]"):
        texts_of(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_key="body") == ["x"]
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the column 'text' holds int64, not strings"):
        texts_of(tmp_path / "b.parquet")


def test_sources_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt' does not exist, or matches no"):
        open_source(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"holds no \.txt"):
        open_source(str(tmp_path))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"a.md is none of the known kinds: .txt, .jsonl, .ndjson"):
        open_source(str(tmp_path / "a.md"))
    with pytest.raises(DataError, match="names no dataset"):
        open_source("hf:")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of three files in a folder, which `datasets` reads without a network."""
    pytest.importorskip("datasets")
    folder = tmp_path / "books"
    folder.mkdir()
    for shard in range(3):
        table = pa.table({"text": [f"document {shard} {row}" for row in range(4)]})
        pq.write_table(table, folder / f"train-{shard}.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return f"hf:{folder}"


def test_hugging_face_datasets_are_streamed_a_shard_a_piece(dataset):
    items = items_of(dataset)
    assert [item.text for item, _ in items] == [
        f"document {s} {r}" for s in range(3) for r in range(4)
    ]
    assert items[5][1] == (f"{dataset}:1:2", f"{dataset}, shard 1, row 2")
    assert len(open_source(dataset).pieces(1, Reading())) == 3
    assert open_source(dataset).identity() == [dataset]
    with pytest.raises(DataError, match=r"books has no column 'body', only \['text'\]"):
        items_of(dataset, text_key="body")


def test_hugging_face_datasets_are_downloaded_and_cut_by_rows(dataset, tmp_path, monkeypatch):
    import datasets

    load_dataset, asked = datasets.load_dataset, []

    def load(path, config, **options):
        asked.append((path, config, options))
        return load_dataset(path, config, **options, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = f"{dataset}@train[:75%]"
    items = items_of(source, 40, download=True)
    expected = [f"document {s} {r}" for s in range(3) for r in range(4)][:9]
    assert [item.text for item, _ in items] == expected
    assert [place for _, (place, _) in items] == [f"{source}:{row}" for row in range(1, 10)]
    assert len(open_source(source, download=True).pieces(40, Reading())) > 2
    assert asked[0] == (
        dataset.removeprefix("hf:"),
        None,
        {"split": "train[:75%]", "streaming": False},
    )


def test_hugging_face_names_are_taken_apart(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("hf:wikimedia/wikipedia:20231101.en@validation") == ["one"]
    assert texts_of("hf:books") == ["one"]
    assert asked == [
        ("wikimedia/wikipedia", "20231101.en", "validation", True),
        ("books", None, "train", True),
    ]


def test_an_unreachable_dataset_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\n  the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hf:books: the dataset cannot be read .* reach the Hub$"):
        texts_of("hf:books")

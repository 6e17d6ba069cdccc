"""Every kind of file that is read, however it is packed and however its lines end."""

import bz2
import gzip
import json
import lzma
import os
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacking_ds.data.sources.documents import Document, Fault, Reading
from stacking_ds.data.sources.kinds import open_source
from stacking_ds.data.sources.lines import content_suffix
from stacking_ds.errors import DataError
from tests.data.test_sources import items_of, json_lines, texts_of

TEXTS = ["The first document.", "The second döcument.", "The third."]
PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def rows_of(texts):
    return "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))


CONTENTS = {
    ".txt": "\n\n".join(TEXTS),
    ".jsonl": json_lines(TEXTS).decode(),
    ".ndjson": json_lines(TEXTS).decode(),
    ".json": json.dumps([{"text": text, "n": [1, {}]} for text in TEXTS], indent=1),
    ".csv": "id,text\n" + rows_of(TEXTS),
    ".tsv": "text\tid\n" + "".join(f"{text}\t1\n" for text in TEXTS),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_is_read_plain_and_compressed(tmp_path, kind, packed):
    content = PACKED[packed](CONTENTS[kind].encode())
    for path in (tmp_path / f"a{kind}{packed}", tmp_path / f"A{kind}{packed}".upper()):
        if packed:  # in two parts, as `cat a.gz b.gz` makes it
            path.write_bytes(content + PACKED[packed](b"\n"))
        else:
            path.write_bytes(b"\xef\xbb\xbf" + content)
        assert texts_of(path) == TEXTS


@pytest.mark.parametrize("packed", [name for name in PACKED if name])
@pytest.mark.parametrize("kind", [".txt", ".json", ".csv"])
def test_a_broken_compressed_file_is_named(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    content = {".txt": "some words\n\n", ".json": '{"text": "x"}\n', ".csv": "x\n"}[kind]
    random = os.urandom(5000).hex()
    text = f"text\n{random}\n" if kind == ".csv" else content + random
    for damaged in (PACKED[packed](text.encode())[:-900], b"nonsense" * 9, b""):
        path.write_bytes(damaged)
        try:
            found = [item for item, _ in items_of(path)][-1]
            sentence = found.sentence
            assert found.rest_is_lost or kind == ".json"
        except DataError as error:  # a table's first line
            sentence = str(error)
        if damaged or kind == ".txt":
            assert re.search("in a broken (gzip|bzip2|xz|zstd) file|not JSON", sentence)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n", "\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_all_kinds_of_line_ends(tmp_path, end, packed):
    texts = [f"Document {i} of a few words." for i in range(30)]
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACKED[packed](end.join(texts).encode()))
    assert texts_of(path, documents="line") == texts
    assert texts_of(path) == texts_of(path, documents="file") == [" ".join(texts)]
    path.write_bytes(PACKED[packed]((end * 2).join(texts).encode()))
    assert texts_of(path) == texts_of(path, documents="line") == texts
    assert texts_of(path, documents="file") == ["\n".join(texts)]


def test_line_ends_across_the_blocks_that_are_read(tmp_path):
    texts = [("é" * (i % 7) + "word") for i in range(12_000)]
    for end in ("\u2028", "\x85", "\r"):
        (tmp_path / "a.txt").write_bytes((end * 2).join(texts).encode())
        assert texts_of(tmp_path / "a.txt", 10_000) == texts


@pytest.mark.parametrize(
    "blank", ["", " ", "\t", "\u00a0", "\ufeff", "\f", "\v", " \u200b", "\u3000"]
)
def test_all_kinds_of_blank_lines(tmp_path, blank):
    path = tmp_path / "a.txt"
    path.write_text(f"{blank}one\nand\n{blank}\n{blank}two{blank}\n{blank}\n", "utf-8")
    assert texts_of(path) == ["one and", "two"]
    assert texts_of(path, documents="line") == ["one", "and", "two"]


def test_lone_carriage_returns_among_newlines_end_lines_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo\r\rthree\n\nfour\rand\n")
    assert texts_of(path) == ["one", "two", "three", "four and"]
    # a separator that stands beside newlines is a blank, as in text from the web
    path.write_text("one\u2028\nand\u2028\u2028more\n\ntwo", "utf-8")
    assert texts_of(path) == ["one and\u2028\u2028more", "two"]
    # and one in a line of JSON is the text's
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}', "utf-8")
    assert texts_of(tmp_path / "a.jsonl") == ["a\u2028b"]


@pytest.mark.parametrize("documents", ["line", "file", "blank-line"])
def test_a_text_file_cut_anywhere_has_the_same_documents(tmp_path, documents):
    path = tmp_path / "a.txt"
    path.write_text("a b\nc\n\n \nd\re\r\rf\n\n\n\n\ng\r\n\r\n" * 9, "utf-8")
    whole = items_of(path, documents=documents)
    for size in (1, 7, 20, 50):
        cut = items_of(path, size, documents=documents)
        assert [(item.text, place) for item, place in cut] == [
            (item.text, place) for item, place in whole
        ]


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b" \t\n"])
def test_nothing_but_newlines_is_read_fast(tmp_path, line):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n" + line * (2**24 // len(line)) + b"two\n"))
    started = time.process_time()
    _, (_, last) = items_of(path)
    assert last[0] == f"a.txt.gz:{2 + 2**24 // len(line)}"
    # line by line it takes ten seconds and more
    assert time.process_time() - started < 3


@pytest.mark.parametrize("blanks", [b"\n", b" \t", b"\r\n"])
def test_nothing_but_blanks_between_objects_is_read_fast(tmp_path, blanks):
    path = tmp_path / "a.json.gz"
    between = blanks * (2**24 // len(blanks))
    path.write_bytes(gzip.compress(between + b'{"text": "one"}' + between + b'{"text": "two"}', 1))
    started = time.process_time()
    assert texts_of(path) == ["one", "two"]
    # character by character it takes twenty seconds
    assert time.process_time() - started < 5


JSON = {
    "array": (json.dumps([{"text": text} for text in TEXTS]), 3),
    "pretty": (json.dumps([{"text": text} for text in TEXTS], indent=4), 3),
    "lines": ("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), 3),
    "stream": ("".join(json.dumps({"text": text}, indent=2) + "\n" for text in TEXTS), 3),
    "one": ('{"text": "The first document."}', 1),
    "empty": (" [ ]\n", 0),
    "nothing": ("", 0),
}


@pytest.mark.parametrize(("content", "count"), JSON.values(), ids=JSON)
def test_json_files(tmp_path, content, count):
    (tmp_path / "a.json").write_text(content, "utf-8")
    assert texts_of(tmp_path / "a.json", 10) == TEXTS[:count]


def test_places_in_a_cut_json_file_of_lines_are_counted_from_its_start(tmp_path):
    (tmp_path / "a.json").write_bytes(json_lines([f"document {n}" for n in range(50)]))
    assert len(open_source(str(tmp_path / "a.json")).pieces(200, Reading())) > 5
    places = [place for _, (place, _) in items_of(tmp_path / "a.json", 200)]
    assert places == [f"a.json:{n}" for n in range(1, 51)]


def test_large_json_arrays_are_read_in_blocks(tmp_path):
    texts = [f"document {i} " + "é" * (i % 97) for i in range(8_000)]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps([{"text": text} for text in texts], indent=indent), "utf-8")
        assert texts_of(path) == texts
    items = items_of(path)
    assert items[7][1] == ("a.json:8", f"{path}, object 8")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "x"}, {"text": ', "not JSON: .*; the rest is not read"),
        ('[{"text": "x"} {"text": "y"}]', "not JSON: a comma is missing"),
        ('[{"text": "x"},\n', "not JSON: its array does not end"),
        ('[{"text": "x"}, 3]', "has no string under the key 'text' .it has int"),
        ('[{"text": "x"}, {"text": "' + "y" * 1200 + '"}]', "more than 1,000 bytes"),
        ('[{"text": "x"}, ' + "[" * 900 + "]", "not JSON"),
        ('{"text": "x"}\n{"text": 1}\n', "has no string under the key 'text'"),
    ],
)
def test_faults_of_json_files(tmp_path, content, sentence):
    (tmp_path / "a.json").write_text(content)
    (first, _), (fault, (place, _)) = items_of(tmp_path / "a.json")
    assert (first.text, place) == ("x", "a.json:2")
    assert re.search(sentence, fault.sentence)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson", "b.json"])
def test_json_whose_text_is_under_another_key_names_the_keys(tmp_path, name):
    rows = [{"body": "x", "id": 1}, {"body": "y", "title": "z"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "b.json":
        content = json.dumps(rows)
    packed = PACKED[".gz" if name.endswith(".gz") else ""]
    (tmp_path / name).write_bytes(packed(content.encode()))
    with pytest.raises(DataError, match=r"only the keys \['body', 'id', 'title'\].*--text-key"):
        items_of(tmp_path / name)
    assert texts_of(tmp_path / name, text_key="body") == ["x", "y"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_rows_without_text_at_the_start_are_left_out_where_that_is_asked_for(
    tmp_path, name, caplog
):
    rows = [*({"meta": n} for n in range(25)), *({"text": text} for text in TEXTS * 20)]
    content = (
        json.dumps(rows) if name == "b.json" else "".join(f"{json.dumps(row)}\n" for row in rows)
    )
    (tmp_path / name).write_text(content, "utf-8")
    source = open_source(str(tmp_path / name))
    with pytest.raises(DataError, match=r"has in its first 20 rows no text under the key 'text'"):
        source.pieces(10**6, Reading())
    (piece,) = source.pieces(10**6, Reading(leaves_out=True))
    items = list(source.open(piece, Reading(leaves_out=True)).items())
    assert [isinstance(item, Fault) for item in items] == [True] * 25 + [False] * 60
    assert "only the keys ['meta']; such rows are left out" in caplog.text


def test_rows_of_delimited_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\r\n1,"a ""quoted"", text\n\nof two paragraphs"\r\n\r\n2,plain 5" text\r\n3,\r\n'
    )
    items = items_of(path)
    assert [item.text for item, _ in items] == [
        'a "quoted", text\n\nof two paragraphs',
        'plain 5" text',
        "",
    ]
    assert [place for _, (place, _) in items] == ["a.csv:2", "a.csv:6", "a.csv:7"]


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    texts = ['"Hello', 'he "said"', "more", 'and left."', '"all of it"', 'a "" b']
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts)))
    assert texts_of(path) == texts
    path.write_text("text\tid\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(texts)))
    assert texts_of(path) == texts
    path.write_text('"id"\t"text"\n1\t"words"\n')
    with pytest.raises(DataError, match=r"a\.tsv puts its fields in double quotes, which a \.tsv"):
        items_of(path)


@pytest.mark.parametrize(
    ("rows", "sentence", "texts"),
    [
        (b"1\n2,x\n", "starts a row of 1 columns, where the first has 2", ["x"]),
        (b"1,a,b\n2,x\n", "starts a row of 3 columns, where the first has 2", ["x"]),
        (b"1,\xff\n2,x\n", "is not UTF-8", ["x"]),
        (b'1,"a"b\n2,x\n', "starts what cannot be read as a row", ["x"]),
        (b'2,x\n1,"never ends\n3,y\n', "unexpected end of data", ["x"]),
        (b'2,x\n1,"never ends\n' + b"3,y\n" * 300, "more than 1,000 bytes", ["x"]),
    ],
)
def test_faults_of_delimited_files(tmp_path, rows, sentence, texts):
    (tmp_path / "a.csv").write_bytes(b"id,text\n" + rows)
    items = [item for item, _ in items_of(tmp_path / "a.csv")]
    assert [item.text for item in items if isinstance(item, Document)] == texts
    (fault,) = (item for item in items if isinstance(item, Fault))
    assert re.search(sentence, fault.sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id,body\n1,x\n", r"a.csv has no column 'text' .* only \['id', 'body'\]; .*--text-key"),
        (b"text,text\nx,y\n", "a.csv has 2 columns 'text'; rename all but one"),
        (b"", "a.csv has no column 'text'"),
        (b"\xff\xfet\x00", "a.csv cannot be read: its first line is not UTF-8"),
    ],
)
def test_delimited_files_without_such_a_column(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        items_of(tmp_path / "a.csv")


COLUMNS = {
    "large": pa.array(TEXTS, pa.large_string()),
    "view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "large-dictionary": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "binary": pa.array([text.encode() for text in TEXTS]),
    "large-binary": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_columns_of_text_of_every_type(tmp_path, column):
    table = pa.table({"text.html": ["no", "not", "this"], "text": column})
    pq.write_table(table, tmp_path / "a.PARQUET")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts_of(tmp_path / "a.PARQUET") == texts_of(tmp_path / "a.arrow") == TEXTS


def test_columns_of_nulls_are_documents_without_words(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["", "", ""]
    column = pa.DictionaryArray.from_arrays(pa.array([0, None, 0]), pa.array(["x"]))
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "b.parquet") == ["x", "", "x"]


def test_bytes_that_are_no_text_are_faults(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"x", b"\xff", b"y"])}), tmp_path / "a.parquet")
    found = [item for item, _ in items_of(tmp_path / "a.parquet")]
    assert [getattr(item, "text", getattr(item, "reason", "")) for item in found] == [
        "x",
        "not UTF-8",
        "y",
    ]


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (
            pa.array([1]),
            r"holds int64, not strings; its columns \['other'\] do, of which",
        ),
        (pa.array([["x"]]), "holds list<.*>, not strings"),
        (pa.array([{"x": "y"}]), "holds struct<.*>, not strings"),
        (pa.array([1]).dictionary_encode(), "holds int64, not strings"),
        (pa.array([b"ab"], pa.binary(2)), "holds fixed_size_binary.*, not strings"),
    ],
)
def test_columns_that_hold_no_text_are_refused(tmp_path, column, sentence):
    pq.write_table(pa.table({"text": column, "other": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=sentence):
        items_of(tmp_path / "a.parquet")
    dataset = f"hf:{tmp_path}"
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="not strings"):
        items_of(dataset, download=True)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=f"{name} has 2 columns 'text'; rename all but one"):
            items_of(tmp_path / name)


def test_folders_read_what_is_text_without_doubt(tmp_path):
    (tmp_path / "b.JSONL").write_bytes(json_lines(["one"]))
    (tmp_path / "a.TXT").write_text("two")
    (tmp_path / "dataset_info.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert [path.name for path in source.paths] == ["a.TXT", "b.JSONL"]
    assert source.unread == ["dataset_info.json"]
    for path in source.paths:
        path.unlink()
    with pytest.raises(DataError, match=r"name the files, as '.*dataset_info.json', to have"):
        open_source(str(tmp_path))


def test_what_a_file_holds_is_in_its_name(tmp_path):
    assert content_suffix(tmp_path / "a.b.TXT.Gz") == ".txt"
    assert content_suffix(tmp_path / ".txt") == ""
    with pytest.raises(DataError, match=r"does not exist, or matches no \.txt, \.jsonl"):
        open_source(str(tmp_path / "*.parquet.gz"))
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is none of the known kinds"):
        open_source(str(tmp_path / "a.parquet.gz"))


# ------------------------------------------------------------- one file, several names


def test_a_home_is_found_that_no_shell_has_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("words")
    for name in ("~/a.txt", "~/*.txt", "~/"):
        assert [path.name for path in open_source(name).paths] == ["a.txt"]


def test_a_file_of_several_names_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "a" / "y.txt").symlink_to("x.txt")
    os.link(tmp_path / "a" / "x.txt", tmp_path / "a" / "z.txt")
    source = open_source(str(tmp_path / "**" / "*.txt"))
    assert [path.name for path in source.paths] == ["x.txt"]
    assert len(source.repeated) > 100
    folder = open_source(str(tmp_path / "a"))
    assert [path.name for path in folder.paths] == ["x.txt"]
    assert folder.unread == ["loop"]


def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    for name in ("a.txt", "b.txt"):
        with pytest.raises(DataError, match=f"{name} is not a regular file but a pipe or a device"):
            open_source(str(tmp_path / name))
    with pytest.raises(DataError, match="/dev/stdin is not a regular file but"):
        open_source("/dev/stdin")


def test_links_in_a_circle_and_names_too_long(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Too many levels of sym"):
        open_source(str(tmp_path / "a.txt"))
    for name in ("x" * 300, "x" * 300 + ".txt", "é" * 200):
        with pytest.raises(
            DataError, match=r"\.\.\. cannot be read: File name too long$"
        ) as raised:
            open_source(str(tmp_path / name))
        assert len(str(raised.value)) < 220


def test_names_that_are_not_utf8_are_refused_in_words(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    with open(path, "w") as file:
        file.write("words")
    for name in (path, str(tmp_path), str(tmp_path / "*.txt")):
        with pytest.raises(DataError, match=r"the name of .*/caf\\xe9.txt is not UTF-8; rename it"):
            open_source(name)
    os.rename(path, path.replace(".txt", ".md"))
    (tmp_path / "a.txt").write_text("words")
    assert open_source(str(tmp_path)).unread == ["caf\\xe9.md"]

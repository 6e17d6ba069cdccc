"""What .txt files are taken for is said first, and what is odd about it."""

import errno
import gzip
import re
import textwrap

import pytest

from stacking_ds.cli import main
from stacking_ds.data.prepare.work_plan import look_at, odd_documents, open_corpus
from stacking_ds.data.shard_files import read_manifest
from stacking_ds.data.sources import lines
from stacking_ds.data.sources.documents import Reading
from stacking_ds.data.sources.lines import start_of
from stacking_ds.errors import DataError
from stacking_ds.files import open_regular
from tests import prose
from tests.prose import prepare

TEXTS = [" ".join(text.split()) for text in prose.documents(120, seed=3)]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def look(*names, documents="blank-line"):
    return look_at(open_corpus(names, []), Reading(documents=documents))


def articles(folder, count, paragraphs=30):
    for number in range(count):
        text = "\n\n".join(f"Part {i}\n\n{TEXTS[i][:300]}" for i in range(paragraphs))
        write(folder / f"{number:03}.txt", text)
    return str(folder)


def test_a_folder_of_articles_that_blank_lines_would_tear_apart(tmp_path):
    folder = articles(tmp_path / "articles", 20)
    found = look(folder)
    assert "20 .txt files: a document is what stands between blank lines" in found.statement
    assert "which makes 1,200 of" in found.statement
    assert "1,200 with --documents line, 20 with --documents file" in found.statement
    (warning,) = found.warnings
    assert "60 to a file, as paragraphs are: if a file is a document, say --documents file" in (
        warning
    )
    whole = look(folder, documents="file")
    assert "a document is a file (--documents file), which makes 20 of" in whole.statement
    assert whole.warnings == ()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_of_a_large_file_the_number_of_documents_is_estimated(tmp_path, end):
    text = end.join(TEXTS[n % 120][:140] for n in range(40_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert (tmp_path / "a.txt").stat().st_size > 5e6
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text[:3_000_000].encode(), 1))
    found = look(str(tmp_path / "a.txt"), documents="line").statement
    assert re.search("which makes about 4[01],000 of", found)
    seen = text[:3_000_000].count(end) + 1
    packed = look(str(tmp_path / "a.txt.gz"), documents="line").statement
    assert f"which makes {seen:,} of" in packed


def test_of_a_broken_file_what_can_be_read_is_looked_at(tmp_path):
    text = "\n".join(TEXTS * 30).encode()
    content = gzip.compress(text)
    (tmp_path / "a.txt.gz").write_bytes(content[: len(content) // 2])
    found = look(str(tmp_path / "a.txt.gz"), documents="line").statement
    count = int(found.partition("which makes ")[2].partition(" of")[0].replace(",", ""))
    assert 500 < count < 3_500


def test_a_file_is_seen_whole_or_not_to_the_byte(tmp_path):
    for content in (b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\ntwo"):
        (tmp_path / "a.txt").write_bytes(content)
        for size in range(4, len(content) + 3):
            found = start_of(tmp_path / "a.txt", size)
            assert found.is_all == (size >= len(content))
            assert found.content_bytes == min(size, len(content))


def test_a_file_that_cannot_be_read_is_blamed_and_leaves_nothing(tmp_path, monkeypatch):
    names = [write(tmp_path / name, "\n\n".join(TEXTS)) for name in ("a.txt", "b.txt")]

    def refuse(path):
        if path.name == "b.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_regular(path)

    monkeypatch.setattr(lines, "open_regular", refuse)
    with pytest.raises(DataError, match=r"b\.txt cannot be read: Permission denied"):
        prepare(names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_document_a_line_is_not_taken_for_one_document_silently(tmp_path):
    names = [write(tmp_path / name, "\n".join(TEXTS[:60])) for name in ("a.txt", "b.txt")]
    (warning,) = look(names[0]).warnings
    assert warning.startswith("a.txt has no blank line, so it is taken for one document, though")
    assert "the 60 lines look like documents" in warning
    (warning,) = look(*names).warnings
    assert warning.startswith("2 of them have no blank line, a.txt for one, so each is taken for")
    assert "the 120 lines" in warning
    assert look(*names, documents="line").warnings == ()


@pytest.mark.parametrize(
    ("text", "documents", "warning"),
    [
        ("\n\n".join(f"Line {i} is short." for i in range(2000)), "blank-line", "4 words in the"),
        ("\n".join(f"Line {i} is short." for i in range(2000)), "line", "4 words in the median"),
        ("\n\n".join(textwrap.fill(text, 70) for text in TEXTS), "line", "end within a sentence"),
        ("\n\n".join(TEXTS[:3]), "blank-line", "that is few (3 in all)"),
        (" ".join(TEXTS), "blank-line", "that is few (1 in all)"),
        ("\n\n".join(textwrap.fill(text, 70) for text in TEXTS), "blank-line", None),
        ("\n\n".join(text.replace(". ", ".\n") for text in TEXTS), "blank-line", None),
        ("\n".join(TEXTS), "line", None),
    ],
)
def test_odd_numbers_are_warned_of_and_others_are_not(tmp_path, text, documents, warning):
    found = look(write(tmp_path / "a.txt", text), documents=documents).warnings
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]


def test_large_files_are_estimated_and_other_kinds_not_looked_at(tmp_path):
    text = "\n\n".join(TEXTS) + "\n\n"
    count = 9 * 2**20 // len(text)
    name = write(tmp_path / "a.txt", text * count)
    made = look(name).statement.partition("which makes about ")[2].split(" ")[0]
    assert abs(int(made.replace(",", "")) - 120 * count) < 0.1 * 120 * count
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert "which makes 120 of" in look(str(tmp_path / "b.txt.gz")).statement
    assert look(write(tmp_path / "a.jsonl", '{"text": "x"}\n')).statement == ""


def test_the_choice_is_part_of_what_was_asked_for(tmp_path, capsys):
    name = write(tmp_path / "a.txt", "\n".join(TEXTS))
    command = ["prepare", name, "--vocab-size", "300", "--heldout-fraction", "0.2"]
    command += ["--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--documents", "line"]) == 0
    assert "1 .txt file: a document is a line (--documents line), which makes 120" in (
        capsys.readouterr().out
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.request.documents == "line"
    assert manifest.train.documents + manifest.heldout.documents == 120
    assert main(command) == 2
    assert "documents is 'line' there and 'blank-line' here" in capsys.readouterr().err


def test_an_unfinished_prepare_is_not_gone_on_with_otherwise(tmp_path):
    name = write(tmp_path / "a.txt", "\n\n".join(TEXTS))
    options = {"vocab_size": 300, "heldout_fraction": 0.2, "unit_bytes": 10_000}
    assert prepare(name, tmp_path / "out", **options, part=(1, 2)).missing_units
    with pytest.raises(DataError, match="documents is 'blank-line' there and 'line' here"):
        prepare(name, tmp_path / "out", **options, part=(2, 2), documents="line")
    assert prepare(name, tmp_path / "out", **options, part=(2, 2)).manifest


def test_the_choice_has_to_be_about_something(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    with pytest.raises(DataError, match=r"--documents line says what a document of a .txt file is"):
        prepare(name, tmp_path / "out", documents="line")


def test_an_empty_split_is_no_circle(tmp_path):
    one = write(tmp_path / "a.txt", "\n".join(TEXTS))
    options = {"vocab_size": 300, "heldout_fraction": 0.0001}
    with pytest.raises(DataError, match=r"one document, .* by --documents .it is blank-line"):
        prepare(one, tmp_path / "out", **options)
    with pytest.raises(DataError, match=r"is 0.5., or few since .* by --documents blank-line"):
        prepare(one, tmp_path / "out", vocab_size=300, heldout_fraction=0.5)
    many = write(tmp_path / "b.txt", "\n\n".join(TEXTS[:20]))
    with pytest.raises(DataError, match="none of the 20 documents") as caught:
        prepare(many, tmp_path / "out", **options)
    enough = float(str(caught.value).partition("raise --heldout-fraction to ")[2].split(",")[0])
    manifest = prepare(many, tmp_path / "out", vocab_size=300, heldout_fraction=enough).manifest
    assert manifest.heldout.documents == 1
    empty = write(tmp_path / "c.txt", " \n")
    with pytest.raises(DataError, match="the sources to hold out hold no document with any text"):
        prepare(many, tmp_path / "other", vocab_size=300, heldout_sources=[empty])


def test_prepared_sentences_are_told_from_documents_whatever_they_lay_in(tmp_path):
    rows = "".join(f'{{"text": "word{i} is here"}}\n' for i in range(1200))
    manifest = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out", vocab_size=300).manifest
    assert "have 1.0 sentences in the mean" in odd_documents(manifest)
    texts = write(tmp_path / "b.txt", "\n\n".join(TEXTS))
    manifest = prepare(texts, tmp_path / "texts", vocab_size=300, heldout_fraction=0.2).manifest
    assert odd_documents(manifest) is None

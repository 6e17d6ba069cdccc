"""The vocabulary is reproducible, and the tokenizer is BERT's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    UNCASED,
    Normalization,
    build_tokenizer,
    load_vocabulary,
    special_ids,
    train_wordpiece,
    vocabulary_sha256,
)
from stacking_ds.errors import DataError
from tests import prose

VOCAB = Path(__file__).parents[3] / "shared" / "data" / "vocab"


@pytest.mark.skipif(not VOCAB.exists(), reason="shared/data/vocab is not there")
def test_reproduces_the_published_bert_uncased_vectors():
    vocabulary = load_vocabulary(VOCAB / "bert-base-uncased-vocab.txt")
    tokenizer = build_tokenizer(vocabulary)
    vectors = json.loads((VOCAB / "bert-uncased-tokenization-vectors.json").read_text("utf-8"))
    assert len(vectors) == 46
    for vector in vectors:
        ids = tokenizer.encode(vector["text"], add_special_tokens=False).ids
        assert ids == vector["ids"], vector["text"]
    assert vocabulary_sha256(vocabulary) == (
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    )
    assert tuple(special_ids(vocabulary)) == (0, 100, 101, 102, 103)


def test_special_tokens_come_first_and_the_size_is_kept():
    vocabulary = train_wordpiece(prose.documents(60), 300)
    assert tuple(vocabulary[:5]) == SPECIAL_TOKENS
    assert len(vocabulary) == len(set(vocabulary)) == 300
    assert tuple(special_ids(vocabulary)) == (0, 1, 2, 3, 4)
    assert "the" in vocabulary


def test_training_gives_the_same_vocabulary_in_every_process():
    # The trainer of `tokenizers` seeds its hash maps anew in each process.
    program = (
        "import prose; from stacking_ds.data.tokenizer import *;"
        "print(vocabulary_sha256(train_wordpiece(prose.documents(60), 400)))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(3)
    }
    hashes.add(vocabulary_sha256(train_wordpiece(prose.documents(60), 400)) + "\n")
    assert len(hashes) == 1


def test_words_come_back_and_unknown_ones_are_unk():
    vocabulary = train_wordpiece(prose.documents(60), 400)
    tokenizer = build_tokenizer(vocabulary)
    ids = tokenizer.encode("The BAKER sells bread.", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "the baker sells bread."
    assert tokenizer.encode("漢", add_special_tokens=False).ids == [1]
    assert tokenizer.encode("b" * 101, add_special_tokens=False).ids == [1]
    assert tokenizer.encode("b" * 100, add_special_tokens=False).ids != [1]
    assert tokenizer.encode("bread").tokens == ["[CLS]", "bread", "[SEP]"]


def test_cased_text_keeps_capitals_and_accents():
    texts = [*prose.documents(60), *["Élan and élan"] * 3]
    cased = Normalization.keeping(cased=True, accents=False)
    vocabulary = train_wordpiece(texts, 400, cased)
    tokenizer = build_tokenizer(vocabulary, cased)
    ids = tokenizer.encode("The Baker sells Élan.", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "The Baker sells Élan."
    accents = Normalization.keeping(cased=False, accents=True)
    vocabulary = train_wordpiece(texts, 400, accents)
    assert "é" in vocabulary
    assert "É" not in vocabulary
    tokenizer = build_tokenizer(vocabulary, accents)
    ids = tokenizer.encode("The Élan.", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "the élan."
    assert [str(one) for one in (UNCASED, cased, accents)] == [
        "uncased",
        "cased",
        "uncased, accents kept",
    ]


def test_rare_characters_are_left_out_of_the_alphabet():
    vocabulary = train_wordpiece([*prose.documents(60), "a single Ω"], 400)
    assert not any("ω" in token for token in vocabulary)


MARKERS = "".join(f"{token}\n" for token in SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "content",
    [
        f"{MARKERS}the\n##s\n",
        f"{MARKERS}the\n##s",
        f"\ufeff{MARKERS}the\n##s\n",
        f"{MARKERS}the\n##s\n".replace("\n", "\r\n"),
        f"{MARKERS}the\n##s\n".replace("\n", "\r"),
        f"{MARKERS}the \n\t##s\t\n\n \n",
    ],
    ids=["plain", "no end", "byte order mark", "CRLF", "CR", "blanks"],
)
def test_a_vocabulary_is_read_however_its_lines_end(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content.encode())
    assert load_vocabulary(tmp_path / "vocab.txt") == [*SPECIAL_TOKENS, "the", "##s"]


def test_a_prepared_folder_keeps_the_ids_it_was_written_with(tmp_path):
    tokens = [*SPECIAL_TOKENS, "the ", "", "the", "\u00a0", ""]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    assert load_vocabulary(tmp_path / "vocab.txt", as_written=True) == tokens
    (tmp_path / "vocab.txt").write_text("the\n")
    with pytest.raises(DataError, match=r"lacks \[PAD\]"):
        load_vocabulary(tmp_path / "vocab.txt", as_written=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (MARKERS.replace("[MASK]", "the").encode(), r"vocab.txt lacks \[MASK\]: BERT needs"),
        (f"{MARKERS}a\nb\na \n".encode(), "holds the token 'a' twice, at line 6 and 8: take one"),
        (f"{MARKERS}a\n\nb\n".encode(), "vocab.txt has no token at line 7: every id needs one"),
        (b"\xff\xfe", r"vocab.txt cannot be used: byte 0 is not UTF-8"),
        (b"", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]: BERT needs"),
    ],
)
def test_unusable_vocabularies_are_refused(tmp_path, content, sentence):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_vocabulary(tmp_path / "vocab.txt")


def test_missing_vocabulary_and_hopeless_training_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing-here\.txt cannot be read: No such file"):
        load_vocabulary(tmp_path / "nothing-here.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe cannot be used: it is not a regular file"):
        load_vocabulary(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"vocab_size 20 is too small: .* alone need"):
        train_wordpiece(prose.documents(5), 20)
    with pytest.raises(DataError, match="no character occurs twice"):
        train_wordpiece(["", " \n"], 100)


def test_importing_leaves_the_environment_alone():
    program = (
        "import os; before = dict(os.environ); import stacking_ds.data.tokenizer;"
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)

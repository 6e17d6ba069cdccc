"""The vocabulary is reproducible, and the tokenizer is BERT's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from stacking_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    build_tokenizer,
    load_vocabulary,
    special_ids,
    train_wordpiece,
    vocabulary_sha256,
)
from stacking_ds.errors import DataError
from tests import prose

VOCAB = Path(__file__).parents[2] / "shared" / "data" / "vocab"


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
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
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


def test_rare_characters_are_left_out_of_the_alphabet():
    vocabulary = train_wordpiece([*prose.documents(60), "a single Ω"], 400)
    assert not any("ω" in token for token in vocabulary)


def test_vocabulary_files_are_read_back(tmp_path):
    vocabulary = train_wordpiece(prose.documents(30), 200)
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\r\n" for token in vocabulary), "utf-8")
    build_tokenizer(vocabulary).save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(tmp_path / "vocab.txt") == vocabulary
    assert load_vocabulary(tmp_path / "tokenizer.json") == vocabulary
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 200


def test_cased_vocabularies_are_refused_and_a_few_additions_are_not(tmp_path):
    path = tmp_path / "vocab.txt"
    uncased = [*SPECIAL_TOKENS, "[unused0]", *(f"word{number}" for number in range(400))]
    path.write_text("\n".join([*uncased, "[ENT]", "<NAME>"]), "utf-8")
    assert load_vocabulary(path)[-1] == "<NAME>"
    cased = [*uncased, *(f"##Word{number}" for number in range(200))]
    path.write_text("\n".join(cased), "utf-8")
    sentence = (
        r"vocab\.txt is cased \(200 of its 606 .*'##Word0'.*uncased .*or train .*--vocab-size"
    )
    with pytest.raises(DataError, match=sentence):
        load_vocabulary(path)
    build_tokenizer(cased).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json is cased"):
        load_vocabulary(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "usable"),
    [
        ({}, True),
        ({"strip_accents": None}, True),
        ({"strip_accents": False}, False),
        ({"lowercase": False, "strip_accents": None}, False),
        ({"handle_chinese_chars": False}, False),
        ({"type": "Lowercase"}, False),
        (None, False),
    ],
)
def test_a_tokenizer_with_another_normalizer_is_refused(tmp_path, change, usable):
    path = tmp_path / "tokenizer.json"
    content = json.loads(build_tokenizer([*SPECIAL_TOKENS, "a"]).to_str())
    content["normalizer"] = None if change is None else {**content["normalizer"], **change}
    path.write_text(json.dumps(content), "utf-8")
    if usable:
        assert load_vocabulary(path)[5:] == ["a"]
    else:
        with pytest.raises(DataError, match=r"has the normalizer .*: take an uncased vocabulary"):
            load_vocabulary(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "vocab.txt",
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n",
            r"vocab.txt lacks \[MASK\]: BERT needs",
        ),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "holds the token 'a' twice"),
        ("vocab.txt", b"\xff\xfe", "is not UTF-8"),
        ("tokenizer.json", b"{}", "is not the tokenizer.json of a WordPiece tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "holds a BPE model"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": 3}}}', "without gaps"),
    ],
)
def test_unusable_vocabularies_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_vocabulary(tmp_path / name)


def test_missing_vocabulary_and_hopeless_training_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing-here\.txt cannot be read: No such file"):
        load_vocabulary(tmp_path / "nothing-here.txt")
    with pytest.raises(DataError, match=r"vocab_size 20 is too small: .* alone need"):
        train_wordpiece(prose.documents(5), 20)
    with pytest.raises(DataError, match="no character occurs twice"):
        train_wordpiece(["", " \n"], 100)


def test_importing_leaves_the_environment_alone():
    program = (
        "import os; before = dict(os.environ); import stacking_ds.data.tokenizer;"
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)

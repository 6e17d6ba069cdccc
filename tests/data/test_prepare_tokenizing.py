"""Tokenizing by pieces is the library's tokenizing, whatever the text holds."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.prepare import unit
from stacking_ds.data.prepare.unit import SentenceTokenizer, words_of
from stacking_ds.data.tokenizer import (
    Normalization,
    build_tokenizer,
    load_vocabulary,
    train_wordpiece,
)
from tests import prose

VOCAB = Path(__file__).parents[3] / "shared" / "data" / "vocab" / "bert-base-uncased-vocab.txt"
NASTY = [
    *("\u0301", "e\u0301", "\u0130", "\u03a3", "\u03c2", "\u1e9e", "\u212a", "\ufb01", "\u00df"),
    *(
        "\u4e2d",
        "\u6587",
        "\u3042",
        "\uac00",
        "\U00020000",
        "\u0e01\u0e33",
        "\u0938\u094d",
        "\u05d0\u05b0",
    ),
    *("\t", "\n", "\r", "\x00", "\x1c", "\x7f", "\x85", "\ufffd", "\ufeff", "\u00ad", "\ue000"),
    *("\u00a0", "\u2003", "\u2028", "\u3000", "\u200b", "\u200d", "\u202e", "\u180e"),
    *("\u2019", "\u201c", "\u2014", "\u3002", "\u00a1", "\u00b7", "\U0001f468\u200d\U0001f469"),
    *("[MASK]", "[CLS]", "[UNK]", "[PAD", "##ing", "##", "don't", "U.S.", "3.50", "x" * 99),
    *("x" * 100, "x" * 101, "\u00e9" * 101, "the", "The", "THE", "quick", "running", "unaffable"),
    *(" ", "  ", ".", ",", "(", '"', "$", "+", "~", "`", "^", "|", "_", "\\"),
]
SENTENCE = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    max_size=12,
).map("".join)


def vocabulary():
    if VOCAB.exists():
        return load_vocabulary(VOCAB)
    return train_wordpiece(prose.documents(60), 600)


TOKENS = vocabulary()
LIBRARY = build_tokenizer(TOKENS)
LIBRARY.encode_special_tokens = True
OURS = SentenceTokenizer(TOKENS)


def expected(sentences):
    return [LIBRARY.encode(text, add_special_tokens=False).ids for text in sentences]


def found(tokenizer, sentences):
    tokens, lengths = tokenizer(sentences)
    assert len(lengths) == len(sentences)
    assert lengths.sum() == len(tokens)
    return [part.tolist() for part in np.split(tokens, lengths.cumsum()[:-1])]


NORMALIZATIONS = [
    Normalization(lowercase, strip_accents, handle_chinese_chars)
    for lowercase in (True, False)
    for strip_accents in (True, False)
    for handle_chinese_chars in (True, False)
]


@lru_cache
def pair(normalization):
    """The library's tokenizer and ours."""
    texts = [*prose.documents(60), *["Über été ÉTÉ naïve 中文 文字"] * 3]
    tokens = train_wordpiece(texts, 600, normalization)
    library = build_tokenizer(tokens, normalization)
    library.encode_special_tokens = True
    return library, SentenceTokenizer(tokens, normalization)


@given(st.lists(SENTENCE, min_size=1, max_size=6))
@settings(max_examples=400)
def test_any_sentences_are_tokenized_as_by_the_library(sentences):
    assert found(OURS, sentences) == expected(sentences)


@given(st.sampled_from(NORMALIZATIONS), st.lists(SENTENCE, min_size=1, max_size=6))
@settings(max_examples=150)
def test_however_they_are_normalised(normalization, sentences):
    library, ours = pair(normalization)
    expected = [library.encode(text, add_special_tokens=False).ids for text in sentences]
    assert found(ours, sentences) == expected


@pytest.mark.parametrize("stop", [0x3100, pytest.param(0x30000, marks=pytest.mark.slow)])
def test_every_character_alone_and_between_others(stop):
    characters = [chr(code) for code in range(stop) if not 0xD800 <= code < 0xE000]
    for form in ("{}", "a{}b", "A{} {}.", "\u0301{}\u0301"):
        sentences = [form.format(character, character) for character in characters]
        tokens, lengths = OURS(sentences)
        encodings = LIBRARY.encode_batch_fast(sentences, add_special_tokens=False)
        assert lengths.tolist() == [len(encoding.ids) for encoding in encodings]
        assert tokens.tolist() == [token for encoding in encodings for token in encoding.ids]


def test_forgetting_changes_nothing_and_bounds_memory(monkeypatch):
    monkeypatch.setattr(unit, "_MAX_PIECES", 50)
    tokenizer = SentenceTokenizer(TOKENS)
    for seed in range(20):
        sentences = [text.replace("\n", " ") for text in prose.documents(3, seed=seed)]
        assert found(tokenizer, sentences) == expected(sentences)
        assert len(tokenizer._slot) < 600
    monkeypatch.setattr(unit, "_MAX_PIECE_BYTES", 1000)
    assert found(tokenizer, ["y" * 5000, "", "end"]) == expected(["y" * 5000, "", "end"])
    assert found(tokenizer, ["the end"]) == expected(["the end"])
    assert len(tokenizer._slot) == 2


@pytest.mark.parametrize("sentences", [[], [""], ["", ""], ["", "a", "", "b c", ""]])
def test_empty_sentences_have_no_tokens(sentences):
    tokens, lengths = OURS(sentences)
    assert lengths.tolist() == [len(ids) for ids in expected(sentences)]
    assert len(tokens) == lengths.sum()


@given(st.text() | SENTENCE)
@settings(max_examples=500)
def test_words_are_those_of_str_split(text):
    text = text.encode("utf-8", "ignore").decode()
    assert words_of(text) == " ".join(text.split()).encode()

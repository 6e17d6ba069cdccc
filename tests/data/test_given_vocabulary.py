"""A tokenizer that is given is taken over with all it says, or refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    implementations,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stacking_ds.data.prepare.vocabulary import read_vocabulary
from stacking_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    UNCASED,
    Normalization,
    build_tokenizer,
    train_wordpiece,
)
from stacking_ds.errors import DataError
from tests import prose

ACCENTS = ["Café déjà vu Été. Ångström! naïve façade", "中文 漢字, 中文 漢字"]
TEXTS = [*prose.documents(20), *ACCENTS * 3]
SAMPLES = [
    *("The BAKER sells bread.", "Café déjà VU", "e\u0301te\u0301", "the 中文 oven", "Ångström"),
    *("a\tb\x01c don't U.S.", "word" * 30, "oven" * 10, "x_y-z $1+2", "\u00a0İstanbul ſ ß"),
    *("", "…", "ﬁne \ufeffbread\u200b", "가나다 ありがとう"),
]
CASED = Normalization.keeping(cased=True, accents=False)


def wordpiece(prefix: str = "##", unk: str = "[UNK]", longest: int = 100) -> Tokenizer:
    """A BERT tokenizer but for these, made with the library alone."""
    specials = [token.replace("[UNK]", unk) for token in SPECIAL_TOKENS]
    tokenizer = Tokenizer(
        models.WordPiece(
            {token: index for index, token in enumerate(specials)},
            unk_token=unk,
            max_input_chars_per_word=longest,
            continuing_subword_prefix=prefix,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=specials,
        continuing_subword_prefix=prefix,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def bert(**options: Any) -> Tokenizer:
    made = implementations.BertWordPieceTokenizer(**options)
    made.train_from_iterator(TEXTS, vocab_size=300, show_progress=False)
    return made._tokenizer


def changed(**parts: Any) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = wordpiece()
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        return tokenizer

    return make


def added(*tokens: str | AddedToken, special: bool = False) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = wordpiece()
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
        return tokenizer

    return make


def mask_added_afterwards() -> Tokenizer:
    ids = wordpiece().get_vocab()
    ids["other"] = ids.pop("[MASK]")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def framed_and_bounded() -> Tokenizer:
    tokenizer = wordpiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bert, UNCASED),
        (lambda: bert(lowercase=False), CASED),
        (lambda: bert(strip_accents=False), Normalization(strip_accents=False)),
        (lambda: bert(lowercase=False, strip_accents=True), Normalization(lowercase=False)),
        (lambda: bert(handle_chinese_chars=False), Normalization(handle_chinese_chars=False)),
        (mask_added_afterwards, UNCASED),
        (framed_and_bounded, UNCASED),
    ],
    ids=["uncased", "cased", "accents", "stripped", "chinese", "mask added", "framed"],
)
def test_a_bert_is_taken_over_with_its_switches(tmp_path, make, expected):
    theirs = make()
    theirs.save(str(tmp_path / "tokenizer.json"))
    vocabulary, normalization = read_vocabulary(tmp_path / "tokenizer.json")
    assert normalization == expected
    assert vocabulary is not None
    ours = build_tokenizer(vocabulary, normalization)
    theirs.no_truncation()
    theirs.no_padding()
    for text in SAMPLES:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs.encode(text, add_special_tokens=False).ids, text


def byte_level() -> Tokenizer:
    made = implementations.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, show_progress=False)
    return made._tokenizer


def unigram() -> Tokenizer:
    made = implementations.SentencePieceUnigramTokenizer()
    made.train_from_iterator(TEXTS, vocab_size=200, show_progress=False)
    return made._tokenizer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (byte_level, "holds a BPE model; stacking_ds needs WordPiece: take"),
        (unigram, "holds a Unigram model"),
        (lambda: wordpiece(prefix="@@"), 'it has continuing_subword_prefix "@@" and not "##"'),
        (lambda: wordpiece(unk="<unk>"), 'it has unk_token "<unk>" and not "\\[UNK\\]"'),
        (lambda: wordpiece(longest=20), "it has max_input_chars_per_word 20 and not 100"),
        (changed(pre_tokenizer=None), "it has the pre-tokenizer null"),
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), 'the pre-tokenizer .*"Whitespace"'),
        (changed(normalizer=None), "has the normalizer null, not BERT's"),
        (changed(normalizer=normalizers.Lowercase()), 'normalizer {"type": "Lowercase"}, not'),
        (
            changed(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
            "has the normalizer .*NFKC.*, not BERT's",
        ),
        (lambda: bert(clean_text=False), 'has the normalizer .*"clean_text": false'),
        (added("bread[ENT]"), r'adds tokens .*: "bread\[ENT\]": take'),
        (added("[ENT]", special=True), r'adds tokens .*: "\[ENT\]": take'),
        (added(*(f"t{n}x" for n in range(900))), 'adds tokens.*"t0x", "t1x", "t2x" and 897 more:'),
        (added(AddedToken("[SEP]", normalized=True)), r"looks for \[SEP\] .*normalized=True"),
        (
            changed(post_processor=processors.TemplateProcessing(single="$A", pair="$A $B")),
            "has the post-processor .*TemplateProcessing",
        ),
    ],
)
def test_another_tokenizer_is_refused_by_name(tmp_path, make, sentence):
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=sentence) as caught:
        read_vocabulary(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{}", "is not the tokenizer.json of a WordPiece tokenizer"),
        ("[1]", "cannot be used: it is not a JSON object"),
        ("[" * 100_000, "cannot be used: it is nested too deeply"),
        ('{"model": {"type": "WordPiece", "vocab": {"a": 3}}}', "WordPiece tokenizer: "),
        ('{"model": {"type": ["WordPiece"], "vocab": {}}}', r"holds a \['WordPiece'\] model"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, content, sentence):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_vocabulary(tmp_path / "tokenizer.json")


def test_ids_have_no_gaps_and_tokens_fit_into_lines(tmp_path):
    path = tmp_path / "tokenizer.json"
    for token, number, sentence in (
        ("a", 400, "the ids of the vocabulary are not 0, 1, 2, ... without gaps"),
        ("a\nb", 300, r"tokenizer.json holds 'a\\nb' at id 300: .*neither a line end"),
        ("", 300, "has no token at id 300"),
    ):
        content = json.loads(wordpiece().to_str())
        content["model"]["vocab"][token] = number
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=sentence):
            read_vocabulary(path)


# ------------------------------------------------------------------- plain vocabularies


def write_vocabulary(path: Path, tokens: list[str]) -> Path:
    path.write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    return path


def test_a_plain_vocabulary_has_to_go_with_the_options(tmp_path):
    path = tmp_path / "vocab.txt"
    uncased = [*SPECIAL_TOKENS, "[unused0]", *(f"word{number}" for number in range(400))]
    write_vocabulary(path, [*uncased, "[ENT]", "<NAME>"])
    assert read_vocabulary(path) == ([*uncased, "[ENT]", "<NAME>"], UNCASED)
    assert read_vocabulary(path, keep_accents=True)[1] == Normalization(strip_accents=False)
    with pytest.raises(DataError, match=r"vocab.txt is uncased .*: leave --cased out"):
        read_vocabulary(path, cased=True)

    cased = [*uncased, *(f"##Word{number}" for number in range(200))]
    write_vocabulary(path, cased)
    sentence = (
        r"vocab\.txt is cased \(200 of its 606 .*'Word0'.*give --cased, .*or train .*--vocab-"
    )
    with pytest.raises(DataError, match=sentence):
        read_vocabulary(path)
    assert read_vocabulary(path, cased=True) == (cased, CASED)

    write_vocabulary(path, [*uncased, *(f"für{number}" for number in range(30))])
    with pytest.raises(DataError, match=r"'für0', are never met without\): give --keep-accents"):
        read_vocabulary(path)
    assert read_vocabulary(path, keep_accents=True)[1] == Normalization(strip_accents=False)

    write_vocabulary(path, [*SPECIAL_TOKENS, *(f"word{number}\t-3.5" for number in range(30))])
    with pytest.raises(DataError, match=r"blanks in 30 of its 35 .*: write one token a line"):
        read_vocabulary(path)


def test_a_tokenizer_that_says_otherwise_than_the_options_is_refused(tmp_path):
    bert().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="lowercases its text: leave --cased out"):
        read_vocabulary(tmp_path / "tokenizer.json", cased=True)
    with pytest.raises(DataError, match="strips accents: leave --keep-accents out"):
        read_vocabulary(tmp_path / "tokenizer.json", keep_accents=True)
    bert(lowercase=False).save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path / "tokenizer.json", cased=True)[1] == CASED


def test_what_a_file_states_is_not_blamed_on_the_options(tmp_path):
    words = {"uncased": "word{}", "cased": "Word{}", "accents": "für{}"}
    for name, lowercases in (("uncased", False), ("cased", True), ("accents", True)):
        folder = tmp_path / name
        folder.mkdir()
        tokens = [words[name].format(number) for number in range(100)]
        write_vocabulary(folder / "vocab.txt", [*SPECIAL_TOKENS, *tokens])
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercases}))
        with pytest.raises(
            DataError, match=r"mend .*tokenizer_config\.json, which says so"
        ) as raised:
            read_vocabulary(folder)
        assert not re.search("--cased|--keep", str(raised.value))
        build_tokenizer(
            [*SPECIAL_TOKENS, *tokens], Normalization.keeping(cased=not lowercases, accents=False)
        ).save(str(folder / "tokenizer.json"))
        with pytest.raises(DataError, match=r"mend .*tokenizer\.json, which says so"):
            read_vocabulary(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"^vocabulary x*\.\.\. cannot be read: File name too long"):
        read_vocabulary(Path("x" * 300))


# ---------------------------------------------------------------- transformers' folders


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("plain", [False, True], ids=["tokenizer.json", "vocab.txt"])
def test_a_folder_of_transformers_is_taken_over(tmp_path, options, plain):
    rules = {
        "lowercase": options.get("do_lower_case", True),
        "strip_accents": options.get("strip_accents", options.get("do_lower_case", True)),
        "handle_chinese_chars": options.get("tokenize_chinese_chars", True),
    }
    tokens = train_wordpiece(TEXTS, 300, Normalization(**rules))
    theirs = transformers.BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, **options)
    theirs.save_pretrained(tmp_path)
    if plain:
        (tmp_path / "tokenizer.json").unlink()
        write_vocabulary(tmp_path / "vocab.txt", tokens)
    vocabulary, normalization = read_vocabulary(tmp_path)
    assert (vocabulary, normalization) == (tokens, Normalization(**rules))
    ours = build_tokenizer(vocabulary, normalization)
    for text in SAMPLES:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert ours.encode("the", "oven").type_ids == theirs("the", "oven")["token_type_ids"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"do_lower_case": False}, "says lowercase=True and tokenizer_config.json False: make"),
        ({"strip_accents": False}, "says strip_accents=True and tokenizer_config.json False"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "is of a BertJapaneseTokenizer, not of"),
        ({"unk_token": "<unk>"}, """has unk_token "<unk>", and BERT '.UNK.'"""),
        ({"mask_token": {"content": "<m>"}}, 'has mask_token "<m>", and BERT'),
        ({"do_basic_tokenize": False}, "has do_basic_tokenize false, and BERT True"),
        ({"never_split": ["U.S."]}, r'has never_split \["U.S."\], which BERT has not'),
        ({"added_tokens_decoder": {"9": {"content": "<e>"}}}, 'adds tokens .*: "<e>"'),
        ({"do_lower_case": "yes"}, "are true or false, not"),
        ({"added_tokens_decoder": [1]}, "tokenizer_config.json cannot be used"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(tmp_path, config, sentence):
    bert().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=sentence):
        read_vocabulary(tmp_path)


def test_tokens_added_in_a_file_of_their_own_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor"):
        read_vocabulary(tmp_path)
    bert().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text('{"[MASK]": 4, "<e>": 300}')
    with pytest.raises(DataError, match=r'added_tokens\.json adds tokens .*: "<e>"'):
        read_vocabulary(tmp_path)

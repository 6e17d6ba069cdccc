"""BERT's uncased WordPiece: training a vocabulary, reading one, and turning text into ids.

Devlin et al. 2019, section 3; the algorithm is that of the `tokenizers` library.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stacking_ds.errors import DataError

__all__ = [
    "SPECIAL_TOKENS",
    "SpecialIds",
    "build_tokenizer",
    "load_vocabulary",
    "special_ids",
    "train_wordpiece",
    "vocabulary_sha256",
]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUATION = "##"
_MAX_ALPHABET = 1000
_MIN_FREQUENCY = 2
_NORMALIZER = {
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": True,
    "lowercase": True,
}
# BERT's uncased vocabulary has no capital letter outside its markers; a few are someone's additions
_CASED_SHARE = 0.01
_CAPITAL = re.compile("[A-Z]")
_REMEDY = (
    "take an uncased vocabulary such as that of bert-base-uncased, or train one with --vocab-size"
)


@dataclass(frozen=True)
class SpecialIds:
    """The ids of the five special tokens in one vocabulary."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.pad, self.unk, self.cls, self.sep, self.mask))


def special_ids(vocabulary: Sequence[str]) -> SpecialIds:
    """Where the five special tokens stand in `vocabulary` (token of id i at index i)."""
    return SpecialIds(*(vocabulary.index(token) for token in SPECIAL_TOKENS))


def vocabulary_sha256(vocabulary: Sequence[str]) -> str:
    """The hash of the vocabulary as a `vocab.txt`: one token a line, in the order of the ids."""
    return hashlib.sha256("".join(f"{token}\n" for token in vocabulary).encode()).hexdigest()


def build_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """The uncased BERT tokenizer over `vocabulary`, framing texts by [CLS] and [SEP] on request.

    Words of more than 100 characters, and words no pieces fit, become [UNK].
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> list[str]:
    """A WordPiece vocabulary of at most `vocab_size` tokens, special tokens first.

    The same texts give the same vocabulary in every process. Left alone, the trainer numbers the
    characters in the order of a randomly seeded hash map and breaks ties between equally frequent
    pairs by these numbers; so the alphabet is counted here, ordered by code point, and handed over
    in that order. `texts` is iterated twice, and only its words are held in memory; an iterator,
    which gives them once, is turned into a list. Raises DataError when `vocab_size` has no room for
    the alphabet or the texts are empty.
    """
    if iter(texts) is texts:
        texts = list(texts)
    normalize = _normalizer().normalize_str
    alphabet, foreign = _alphabet(map(normalize, texts))
    if not alphabet:
        raise DataError("no vocabulary can be trained: no character occurs twice in the text")
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = [*alphabet]
    for character in alphabet:
        if len(pre_tokenizer.pre_tokenize_str("a" + character)) == 1:
            pieces.append(_CONTINUATION + character)
    first = [*SPECIAL_TOKENS, *pieces]
    if vocab_size < len(first):
        raise DataError(
            f"vocab_size {vocab_size} is too small: the special tokens and the alphabet of the "
            f"text alone need {len(first)}"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=first,
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    gaps = dict.fromkeys(map(ord, foreign), " ")
    tokenizer.train_from_iterator((normalize(text).translate(gaps) for text in texts), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def load_vocabulary(path: Path) -> list[str]:
    """The tokens of a `vocab.txt`, or of a `tokenizer.json` with a WordPiece model, by id.

    Raises DataError for a missing or unreadable file, repeated tokens, gaps in the ids, another
    model than WordPiece, a vocabulary without the five special tokens, and one that is cased or
    belongs to another normalizer than BERT's uncased one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"vocabulary {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"vocabulary {path} is not UTF-8 (byte {error.start})") from error
    if path.suffix == ".json":
        vocabulary = _tokens_of_json(path, text)
    else:
        lines = text.split("\n")
        vocabulary = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(set(vocabulary)) != len(vocabulary):
        twice = next(token for i, token in enumerate(vocabulary) if token in vocabulary[:i])
        raise DataError(f"vocabulary {path} holds the token {twice!r} twice")
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(
            f"vocabulary {path} lacks {', '.join(missing)}: BERT needs all of "
            f"{', '.join(SPECIAL_TOKENS)}"
        )
    cased = [token for token in vocabulary if _CAPITAL.search(token) and not _is_marker(token)]
    if len(cased) > _CASED_SHARE * len(vocabulary):
        raise DataError(
            f"vocabulary {path} is cased ({len(cased)} of its {len(vocabulary)} tokens hold "
            f"capital letters, such as {cased[0]!r}), and the text is lowercased: {_REMEDY}"
        )
    return vocabulary


def _is_marker(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _tokens_of_json(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
        kind, ids = content["model"]["type"], content["model"]["vocab"]
        ordered = sorted(ids, key=ids.__getitem__)
        gapless = [ids[token] for token in ordered] == list(range(len(ordered)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the tokenizer.json of a WordPiece tokenizer") from error
    if kind != "WordPiece":
        raise DataError(f"{path} holds a {kind} model; stacking_ds needs WordPiece")
    if not gapless:
        raise DataError(f"{path}: the ids of the vocabulary are not 0, 1, 2, ... without gaps")
    written, ours = content.get("normalizer"), {"type": "BertNormalizer", **_NORMALIZER}
    # published files leave strip_accents null, which means: as lowercase says
    if written not in (ours, {**ours, "strip_accents": None}):
        raise DataError(
            f"{path} has the normalizer {json.dumps(written)}, not that of BERT's uncased "
            f"tokenizer, {json.dumps(ours)}: {_REMEDY}"
        )
    return ordered


def _normalizer() -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(**_NORMALIZER)


def _alphabet(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The characters worth a token, and those that are not, each ordered by code point."""
    counts: dict[int, int] = {}
    for text in texts:
        codes, code_counts = np.unique(
            np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_counts=True
        )
        for code, count in zip(codes.tolist(), code_counts.tolist(), strict=True):
            counts[code] = counts.get(code, 0) + count
    visible = [
        code
        for code in counts
        if not chr(code).isspace() and unicodedata.category(chr(code)) != "Zs"
    ]
    visible.sort(key=lambda code: (-counts[code], code))
    kept = [code for code in visible[:_MAX_ALPHABET] if counts[code] >= _MIN_FREQUENCY]
    foreign = set(visible) - set(kept)
    return [chr(code) for code in sorted(kept)], [chr(code) for code in sorted(foreign)]

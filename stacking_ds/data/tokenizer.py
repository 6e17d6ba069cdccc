"""WordPiece of BERT: training a vocabulary, reading one, and turning text into ids.

Devlin et al. 2019, section 3; the algorithm is that of the `tokenizers` library.
"""

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

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

from stacking_ds.console import shortened
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
_MAX_ALPHABET = 1000
_MIN_FREQUENCY = 2
# around a token in a vocab.txt; other white space may be a token of somebody's
_BLANKS = " \t\r"


@dataclass(frozen=True)
class Normalization:
    """The three switches of BERT's normaliser: what it does to text besides cleaning it."""

    lowercase: bool = True
    strip_accents: bool = True
    handle_chinese_chars: bool = True
    """Each Chinese character is a word of its own."""

    @classmethod
    def keeping(cls, *, cased: bool, accents: bool) -> "Normalization":
        """The switches that keep capitals, and with them accents, or accents alone."""
        return cls(lowercase=not cased, strip_accents=not (cased or accents))

    def __str__(self) -> str:
        parts = ["uncased" if self.lowercase else "cased"]
        if self.strip_accents != self.lowercase:
            parts.append("accents stripped" if self.strip_accents else "accents kept")
        if not self.handle_chinese_chars:
            parts.append("Chinese characters not apart")
        return ", ".join(parts)

    def normalizer(self) -> normalizers.BertNormalizer:
        """The library's normaliser with these switches."""
        return normalizers.BertNormalizer(clean_text=True, **asdict(self))


UNCASED = Normalization()


class SpecialIds(NamedTuple):
    """The ids of the five special tokens in one vocabulary."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_ids(vocabulary: Sequence[str]) -> SpecialIds:
    """The ids of the five special tokens in `vocabulary` (token of id i at index i)."""
    return SpecialIds(*(vocabulary.index(token) for token in SPECIAL_TOKENS))


def vocabulary_sha256(vocabulary: Sequence[str]) -> str:
    """The hash of the vocabulary as a `vocab.txt`: one token a line, in the order of the ids."""
    return hashlib.sha256("".join(f"{token}\n" for token in vocabulary).encode()).hexdigest()


def build_tokenizer(vocabulary: Sequence[str], normalization: Normalization = UNCASED) -> Tokenizer:
    """BERT's tokenizer over `vocabulary`, framing texts by [CLS] and [SEP] on request. Words of
    more than 100 characters, and words no pieces fit, become [UNK]."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalization.normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, normalization: Normalization = UNCASED
) -> list[str]:
    """A WordPiece vocabulary of at most `vocab_size` tokens, special tokens first.

    The same texts give the same vocabulary in every process. Left alone, the trainer numbers the
    characters in the order of a randomly seeded hash map and breaks ties between equally frequent
    pairs by these numbers; so the alphabet is counted here, and handed over by code point. `texts`
    is iterated twice, and only its words are held in memory; an iterator becomes a list. Raises
    DataError when `vocab_size` has no room for the alphabet or the texts are empty.
    """
    if iter(texts) is texts:
        texts = list(texts)
    normalize = normalization.normalizer().normalize_str
    alphabet, foreign = _alphabet(map(normalize, texts))
    if not alphabet:
        raise DataError("no vocabulary can be trained: no character occurs twice in the text")
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner = (one for one in alphabet if len(pre_tokenizer.pre_tokenize_str("a" + one)) == 1)
    first = [*SPECIAL_TOKENS, *alphabet, *(CONTINUATION + one for one in inner)]
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
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    gaps = dict.fromkeys(map(ord, foreign), " ")
    tokenizer.train_from_iterator((normalize(text).translate(gaps) for text in texts), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


@contextmanager
def reading_vocabulary(path: Path) -> Iterator[None]:
    """Raises DataError, which names the file, for whatever keeps it from being read."""
    try:
        yield
    except OSError as error:
        name = shortened(str(path), 160)
        raise DataError(f"vocabulary {name} cannot be read: {error.strerror or error}") from error
    except DamagedFileError as error:
        raise DataError(f"vocabulary {path} cannot be used: {error.reason}") from error


def load_vocabulary(path: Path, *, as_written: bool = False) -> list[str]:
    """The tokens of a `vocab.txt` by id: one a line, whatever ends the line, without the blanks
    around it, the byte order mark that some editors add, and empty lines at the end. With
    `as_written`, for the file of a prepared folder, the lines are the tokens to the byte: earlier
    versions took what they were given.

    Raises DataError for a missing or unreadable file, and as `require_tokens` does.
    """
    with reading_vocabulary(path):
        text = read_text(path)
    if as_written:
        vocabulary = text.removesuffix("\n").split("\n")
        _require_special_tokens(vocabulary, path)
        return vocabulary
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    vocabulary = [line.strip(_BLANKS) for line in lines]
    while vocabulary and not vocabulary[-1]:
        vocabulary.pop()
    require_tokens(vocabulary, path, "line", first=1)
    return vocabulary


def require_tokens(vocabulary: Sequence[str], path: Path, unit: str, first: int) -> None:
    """Raises DataError, naming `path` and the place (`unit` and a number from `first`), for a token
    that is empty, comes twice or does not fit into a line, and for special tokens that are missing.
    """
    places: dict[str, int] = {}
    for place, token in enumerate(vocabulary, start=first):
        if not token:
            raise DataError(f"vocabulary {path} has no token at {unit} {place}: every id needs one")
        if "\n" in token or token != token.strip(_BLANKS):
            raise DataError(
                f"vocabulary {path} holds {shortened(repr(token))} at {unit} {place}: a token has "
                "neither a line end nor blanks around it"
            )
        if places.setdefault(token, place) != place:
            raise DataError(
                f"vocabulary {path} holds the token {shortened(repr(token))} twice, at {unit} "
                f"{places[token]} and {place}: take one out, and mind that the ids behind it move"
            )
    _require_special_tokens(places, path)


def _require_special_tokens(vocabulary: Container[str], path: Path) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(
            f"vocabulary {path} lacks {', '.join(missing)}: BERT needs all of "
            f"{', '.join(SPECIAL_TOKENS)}"
        )


def _alphabet(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The characters worth a token, and those that are not, each ordered by code point."""
    counts = Counter[int]()
    for text in texts:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        found, times = np.unique(codes, return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    visible = [code for code in counts if not chr(code).isspace()]
    visible.sort(key=lambda code: (-counts[code], code))
    kept = {code for code in visible[:_MAX_ALPHABET] if counts[code] >= _MIN_FREQUENCY}
    return list(map(chr, sorted(kept))), list(map(chr, sorted(set(visible) - kept)))

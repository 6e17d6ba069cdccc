"""Vocabulary of a prepare: a given one, which is BERT's or refused; or one that is learned.

A vocab.txt, a tokenizer.json or a folder of transformers can be given. What such a file says
besides its tokens is either BERT's three switches, which are taken over, or what BERT's tokenizer
does anyway. Everything else is refused by name: it would be lost on the way to the export, and the
model would be used with other ids than it was trained with.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from stacking_ds.console import first_of, shortened
from stacking_ds.data.prepare.folder import PrepareOptions
from stacking_ds.data.prepare.unit import document_hash, words_of
from stacking_ds.data.prepare.work_plan import Corpus, WorkPlan
from stacking_ds.data.sources.documents import Fault
from stacking_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    Normalization,
    build_tokenizer,
    load_vocabulary,
    reading_vocabulary,
    require_tokens,
    train_wordpiece,
)
from stacking_ds.errors import DataError
from stacking_ds.files import read_json

SAMPLE_CHARACTERS = 128 * 2**20
# a vocabulary has few tokens that its text never spells; a few are someone's additions
_STRANGE_SHARE = 0.01
_CAPITAL, _SMALL = re.compile("[A-Z]"), re.compile("[a-z]")

# tokenizer_config.json's names of what `tokenizers` calls otherwise
_SWITCHES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_CLASSES = {
    *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
    *("PreTrainedTokenizer", "TokenizersBackend"),
}
# other keys of a tokenizer_config.json that decide about ids, and BERT's value
_BERTS = {
    **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    "do_basic_tokenize": True,
    "clean_text": True,
    "wordpieces_prefix": "##",
    "word_tokenizer_type": "basic",
    "subword_tokenizer_type": "wordpiece",
}


def read_vocabulary(
    path: Path | None, *, cased: bool = False, keep_accents: bool = False
) -> tuple[list[str] | None, Normalization]:
    """The tokens by id, None where no `path` is given, and how text is normalised before they are
    looked up: as a tokenizer.json or a tokenizer_config.json says; else as `cased` and
    `keep_accents` do.

    Raises DataError for files that are missing, damaged or of another tokenizer than BERT's, that
    contradict each other or the options, and for tokens that the text would not spell.
    """
    normalization = Normalization.keeping(cased=cased, accents=keep_accents)
    if path is None:
        return None, normalization
    stated, stated_by = None, None
    with reading_vocabulary(path):
        is_folder = path.is_dir()
    if is_folder:
        folder, names = path, ("tokenizer.json", "vocab.txt")
        path = next((path / name for name in names if (path / name).exists()), path)
        if path == folder:
            raise DataError(f"{folder} holds neither tokenizer.json nor vocab.txt")
        stated = _stated_by_config(folder)
    if path.suffix == ".json":
        vocabulary, normalization = _read_json(path)
        stated_by = path
        for switch, value in (stated or {}).items():
            if (other := getattr(normalization, switch)) != value:
                raise DataError(
                    f"{path.parent}: tokenizer.json says {switch}={other} and "
                    f"tokenizer_config.json {value}: make them agree"
                )
    else:
        vocabulary = load_vocabulary(path)
        if stated is not None:
            normalization = Normalization(**stated)
            stated_by = path.parent / "tokenizer_config.json"
    for option, wanted, does, what in (
        ("--cased", cased, normalization.lowercase, "lowercases its text"),
        ("--keep-accents", keep_accents, normalization.strip_accents, "strips accents"),
    ):
        if wanted and does:
            raise DataError(f"{stated_by} is of a tokenizer that {what}: leave {option} out")
    _require_spelt(path, vocabulary, normalization, stated_by)
    return vocabulary, normalization


# ---- tokenizer.json


def _read_json(path: Path) -> tuple[list[str], Normalization]:
    content = _load(path)
    try:
        kind = content["model"].get("type", "WordPiece")
        # the library fills in what older files leave out
        tokenizer = Tokenizer.from_str(json.dumps(content)) if kind == "WordPiece" else None
    except Exception as error:  # the library knows no narrower one
        raise DataError(
            f"{path} is not the tokenizer.json of a WordPiece tokenizer: {error}"
        ) from error
    if tokenizer is None:
        raise _foreign(path, f"holds a {kind} model; stacking_ds needs WordPiece")
    _require_no_other_parts(path, tokenizer, build_tokenizer(SPECIAL_TOKENS))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    vocabulary = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in vocabulary] != list(range(len(vocabulary))):
        raise DataError(f"{path}: the ids of the vocabulary are not 0, 1, 2, ... without gaps")
    require_tokens(vocabulary, path, "id", first=0)
    written, expected = _parts(tokenizer), build_tokenizer(vocabulary)
    frames = [None, _parts(expected)["post_processor"]]
    expected.post_processor = processors.TemplateProcessing(  # how newer files write the same
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    frame = written["post_processor"]
    if frame not in (*frames, _parts(expected)["post_processor"]):
        raise _foreign(path, f"is not BERT's: it has the post-processor {_shown(frame)}")
    switches = {**(written["normalizer"] or {})}
    if switches.pop("type", None) != "BertNormalizer" or not switches.pop("clean_text"):
        raise _foreign(path, f"has the normalizer {_shown(written['normalizer'])}, not BERT's")
    if switches["strip_accents"] is None:  # which means: as lowercase says
        switches["strip_accents"] = switches["lowercase"]
    return vocabulary, Normalization(**switches)


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    return parts


def _require_no_other_parts(path: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raises DataError for parts that turn text into other tokens than BERT's. Where text is cut
    off or padded is no part of that, nor is how ids become text."""
    written, expected = _parts(theirs), _parts(ours)
    different = [
        f"{part} {_shown(written['model'][part])} and not {_shown(expected['model'][part])}"
        for part in ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word")
        if written["model"][part] != expected["model"][part]
    ]
    if written["pre_tokenizer"] != expected["pre_tokenizer"]:
        different.append(f"the pre-tokenizer {_shown(written['pre_tokenizer'])}")
    if different:
        raise _foreign(path, f"is not BERT's: it has {'; '.join(different)}")
    added = theirs.get_added_tokens_decoder().values()
    _require_none_added(path, [token.content for token in added])
    for token in added:
        if token.single_word or token.normalized:
            raise _foreign(
                path,
                f"looks for {token.content} in another way than BERT (single_word="
                f"{token.single_word}, normalized={token.normalized})",
            )


def _require_none_added(path: Path, tokens: Iterable[str]) -> None:
    if others := [_shown(token) for token in tokens if token not in SPECIAL_TOKENS]:
        tokens = first_of(others, 3)
        raise _foreign(path, f"adds tokens to its vocabulary, which BERT's does not: {tokens}")


def _foreign(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} {what}: take the vocabulary of a BERT, or train one with --vocab-size"
    )


# ---- tokenizer_config.json


def _stated_by_config(folder: Path) -> dict[str, bool] | None:
    """The switches that the folder's tokenizer_config.json sets; None without such a file."""
    added = folder / "added_tokens.json"
    if added.exists():
        _require_none_added(added, _load(added))
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    config = _load(path)
    name = str(config.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")
    if name not in _CLASSES:
        raise _foreign(path, f"is of a {name}, not of BERT's tokenizer")
    for key, expected in _BERTS.items():
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value not in (None, expected):
            raise _foreign(path, f"has {key} {_shown(value)}, and BERT {expected!r}")
    try:
        tokens = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            f"{path} cannot be used: its added_tokens_decoder is no such thing"
        ) from None
    _require_none_added(path, tokens)
    for key in ("never_split", "additional_special_tokens", "extra_special_tokens"):
        if config.get(key):
            raise _foreign(path, f"has {key} {_shown(config[key])}, which BERT has not")
    stated = {
        switch: config[key] for key, switch in _SWITCHES.items() if config.get(key) is not None
    }
    if "lowercase" in stated:
        stated.setdefault("strip_accents", stated["lowercase"])
    if any(not isinstance(value, bool) for value in stated.values()):
        raise DataError(f"{path}: {', '.join(_SWITCHES)} are true or false, not {_shown(stated)}")
    return stated


# ---- tokens and text


def _require_spelt(
    path: Path, vocabulary: Sequence[str], normalization: Normalization, stated_by: Path | None
) -> None:
    """Raises DataError for tokens that the text would not spell. `stated_by` is the file that says
    how the text is normalised; None where the options do."""
    mend = f"mend {stated_by}, which says so" if stated_by else ""
    words = [
        token.removeprefix("##")
        for token in vocabulary
        if not (token.startswith("[") and token.endswith("]"))
    ]
    few = _STRANGE_SHARE * len(vocabulary)
    blanks = [word for word in words if " " in word or "\t" in word]
    if len(blanks) > few:
        raise DataError(
            f"{path} holds blanks in {len(blanks):,} of its {len(vocabulary):,} tokens, such as "
            f"{blanks[0]!r}: write one token a line and nothing else"
        )
    capitals = [word for word in words if _CAPITAL.search(word)]
    if normalization.lowercase and len(capitals) > few:
        raise DataError(
            f"vocabulary {path} is cased ({len(capitals)} of its {len(vocabulary)} tokens hold "
            f"capital letters, such as {capitals[0]!r}), and the text is lowercased: "
            f"{mend or 'give --cased'}, take an uncased vocabulary, or train one with --vocab-size"
        )
    small = sum(map(bool, map(_SMALL.search, words)))
    if not normalization.lowercase and len(capitals) <= few < small:
        raise DataError(
            f"vocabulary {path} is uncased (of its {len(vocabulary)} tokens {len(capitals)} hold "
            f"capital letters), and the text keeps its capitals: {mend or 'leave --cased out'}, "
            f"or take a cased vocabulary"
        )
    normalize = normalization.normalizer().normalize_str
    lost = [word for word in words if normalize(word).strip() != word]
    if len(lost) > few:
        raise DataError(
            f"vocabulary {path} is of text that keeps its accents ({len(lost)} of its "
            f"{len(vocabulary)} tokens, such as {lost[0]!r}, are never met without): "
            f"{mend or 'give --keep-accents'}, take another vocabulary, or train one with "
            f"--vocab-size"
        )


def _load(path: Path) -> Any:
    with reading_vocabulary(path):
        content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"vocabulary {path} cannot be used: it is not a JSON object")
    return content


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 160)


# ---- learned


class VocabularySample:
    """The training documents that a vocabulary is learned from; the same each time it is iterated.

    Every unit gives the same share of its text, from its start, so that about `characters` come
    together; all of it where the corpus has no more. Duplicates count once. `report` is called with
    the documents and the bytes of the sources that were read, from the start each time, and about
    how many bytes there are.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: WorkPlan,
        options: PrepareOptions,
        report: Callable[[int, int, int | None], None],
        characters: int = SAMPLE_CHARACTERS,
    ) -> None:
        self._corpus, self._options, self._report = corpus, options, report
        self._units = [unit for unit in plan.units if not unit.heldout]
        # a shard of unknown size counts as much as the mean of the others
        pieces = [[segment.piece for segment in unit.segments] for unit in self._units]
        sizes = [sum(piece.text_bytes or 0 for piece in unit) for unit in pieces]
        mean = max(1, sum(sizes) // max(1, sum(map(bool, sizes))))
        sizes = [size or mean for size in sizes]
        self._budgets = [-(-characters * size // sum(sizes)) for size in sizes]
        self._source_bytes: int | None = None
        if plan.source_bytes is not None:
            self._source_bytes = sum(
                unit.source_bytes * min(budget, size) // size
                for unit, budget, size in zip(self._units, self._budgets, sizes, strict=True)
            )

    def train(self, normalization: Normalization) -> list[str]:
        """The vocabulary. Raises DataError for too little text, or too small a `vocab_size`."""
        options = self._options
        if next(iter(self), None) is None:
            why = f"all held out (--heldout-fraction is {options.heldout_fraction})"
            if self._corpus.text_files:
                why += f", or few since documents end by --documents {options.documents}"
            else:
                why = f"or {why}"
            raise DataError(
                "the sources hold no training document with any text to train a vocabulary on: "
                f"they are empty, {why}"
            )
        return train_wordpiece(self, options.vocab_size, normalization)

    def __iter__(self) -> Iterator[str]:
        seen: set[int] = set()
        documents = source_bytes = 0
        for unit, budget in zip(self._units, self._budgets, strict=True):
            left = budget
            for item, reader in self._corpus.read(unit, self._options.reading):
                documents, source_bytes = documents + 1, source_bytes + item.source_bytes
                if isinstance(item, Fault):
                    self._options.refuse(item, reader)
                    continue
                words = words_of(item.text)
                number = document_hash(words)
                is_train = self._options.split_of(item, number, heldout=False) == "train"
                if words and is_train and number not in seen:
                    seen.add(number)
                    yield item.text
                    left -= len(item.text)
                    self._report(documents, source_bytes, self._source_bytes)
                if left <= 0:
                    break

"""Vocabulary of a prepare: a given one, which is BERT's or refused; or one that is learned.

A vocab.txt, a tokenizer.json or a folder of transformers can be given. What such a file says
besides its tokens is either BERT's three switches, which are taken over, or what BERT's tokenizer
does anyway. Everything else is refused by name: it would be lost on the way to the export, and the
model would be used with other ids than it was trained with.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

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
    require_tokens,
    train_wordpiece,
)
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_json

SAMPLE_CHARACTERS = 128 * 2**20
_REMEDY = "take the vocabulary of a BERT, or train one with --vocab-size"
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
    looked up.

    A tokenizer.json or a tokenizer_config.json says the latter itself; for a vocab.txt alone, which
    does not, `cased` and `keep_accents` do. Raises DataError for files that are missing, damaged
    or of another tokenizer than BERT's, that contradict each other or the options, and for tokens
    that the text, normalised so, would not spell.
    """
    if path is None:
        return None, Normalization.keeping(cased=cased, accents=keep_accents)
    folder, stated, stated_by = None, None, None
    try:
        is_folder = path.is_dir()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"vocabulary {shortened(str(path), 160)} cannot be read: {reason}"
        ) from error
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
            if asdict(normalization)[switch] != value:
                raise DataError(
                    f"{folder}: tokenizer.json says {switch}={asdict(normalization)[switch]} and "
                    f"tokenizer_config.json {value}: make them agree"
                )
    else:
        vocabulary = load_vocabulary(path)
        normalization = Normalization.keeping(cased=cased, accents=keep_accents)
        if stated is not None:
            normalization = Normalization(**stated)
            stated_by = path.parent / "tokenizer_config.json"
    if cased and normalization.lowercase:
        raise DataError(
            f"{stated_by} is of a tokenizer that lowercases its text: leave --cased out"
        )
    if keep_accents and normalization.strip_accents:
        raise DataError(
            f"{stated_by} is of a tokenizer that strips accents: leave --keep-accents out"
        )
    _require_spelt(path, vocabulary, normalization, stated_by)
    return vocabulary, normalization


# ---- tokenizer.json


def _read_json(path: Path) -> tuple[list[str], Normalization]:
    content = _load(path)
    try:
        kind = content["model"].get("type", "WordPiece")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the tokenizer.json of a WordPiece tokenizer") from error
    if kind != "WordPiece":
        raise DataError(f"{path} holds a {kind} model; stacking_ds needs WordPiece: {_REMEDY}")
    try:
        # the library fills in what older files leave out
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library knows no narrower one
        raise DataError(
            f"{path} is not the tokenizer.json of a WordPiece tokenizer: {error}"
        ) from error
    _require_like_bert(path, tokenizer)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    vocabulary = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in vocabulary] != list(range(len(vocabulary))):
        raise DataError(f"{path}: the ids of the vocabulary are not 0, 1, 2, ... without gaps")
    require_tokens(vocabulary, path, "id", first=0)
    _require_framed(path, tokenizer, build_tokenizer(vocabulary))
    return vocabulary, _normalization(path, json.loads(tokenizer.to_str())["normalizer"])


def _require_like_bert(path: Path, tokenizer: Tokenizer) -> None:
    """Raises DataError for parts that turn text into other tokens than BERT's. Where text is cut
    off or padded is no part of that, nor is how ids become text."""
    written = json.loads(tokenizer.to_str())
    expected = json.loads(build_tokenizer(SPECIAL_TOKENS).to_str())
    different = [
        f"{part} {_shown(written['model'][part])} and not {_shown(expected['model'][part])}"
        for part in ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word")
        if written["model"][part] != expected["model"][part]
    ]
    if written["pre_tokenizer"] != expected["pre_tokenizer"]:
        different.append(f"the pre-tokenizer {_shown(written['pre_tokenizer'])}")
    if different:
        raise DataError(f"{path} is not BERT's: it has {'; '.join(different)}: {_REMEDY}")
    _require_no_added(path, tokenizer.get_added_tokens_decoder().values())


def _require_no_added(path: Path, added: Iterable[AddedToken]) -> None:
    others = [token.content for token in added if token.content not in SPECIAL_TOKENS]
    if others:
        raise _added(path, others)
    for token in added:
        if token.single_word or token.normalized:
            raise DataError(
                f"{path} looks for {token.content} in another way than BERT (single_word="
                f"{token.single_word}, normalized={token.normalized}): {_REMEDY}"
            )


def _added(path: Path, tokens: Sequence[str]) -> DataError:
    return DataError(
        f"{path} adds tokens to its vocabulary, which BERT's does not: "
        f"{first_of(list(map(_shown, tokens)), 3)}: {_REMEDY}"
    )


def _require_framed(path: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raises DataError where a sentence, or a pair, is put between other tokens than BERT's."""
    written, expected = (json.loads(one.to_str())["post_processor"] for one in (theirs, ours))
    ours.post_processor = processors.TemplateProcessing(  # how newer files write the same
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ours.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    if written not in (None, expected, json.loads(ours.to_str())["post_processor"]):
        raise DataError(
            f"{path} is not BERT's: it has the post-processor {_shown(written)}: {_REMEDY}"
        )


def _normalization(path: Path, written: dict[str, Any] | None) -> Normalization:
    switches = {**written} if written else {}
    if switches.pop("type", None) != "BertNormalizer" or not switches.pop("clean_text"):
        raise DataError(f"{path} has the normalizer {_shown(written)}, not BERT's: {_REMEDY}")
    if switches["strip_accents"] is None:  # which means: as lowercase says
        switches["strip_accents"] = switches["lowercase"]
    return Normalization(**switches)


# ---- tokenizer_config.json


def _stated_by_config(folder: Path) -> dict[str, bool] | None:
    """The switches that the folder's tokenizer_config.json sets; None without such a file."""
    added = folder / "added_tokens.json"
    if added.exists() and (others := [one for one in _load(added) if one not in SPECIAL_TOKENS]):
        raise _added(added, others)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    config = _load(path)
    name = str(config.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")
    if name not in _CLASSES:
        raise DataError(f"{path} is of a {name}, not of BERT's tokenizer: {_REMEDY}")
    for key, expected in _BERTS.items():
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value not in (None, expected):
            raise DataError(f"{path} has {key} {_shown(value)}, and BERT {expected!r}: {_REMEDY}")
    try:
        tokens = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            f"{path} cannot be used: its added_tokens_decoder is no such thing"
        ) from None
    if others := [token for token in tokens if token not in SPECIAL_TOKENS]:
        raise _added(path, others)
    for key in ("never_split", "additional_special_tokens", "extra_special_tokens"):
        if config.get(key):
            raise DataError(
                f"{path} has {key} {_shown(config[key])}, which BERT has not: {_REMEDY}"
            )
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
    words = [token.removeprefix("##") for token in vocabulary if not _is_marker(token)]
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


def _is_marker(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _load(path: Path) -> Any:
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(f"vocabulary {path} cannot be read: {error.strerror}") from error
    except DamagedFileError as error:
        raise DataError(f"vocabulary {path} cannot be used: {error.reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"vocabulary {path} cannot be used: it is not a JSON object")
    return content


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 160)


# ---- learned


def train_vocabulary(
    corpus: Corpus,
    plan: WorkPlan,
    options: PrepareOptions,
    normalization: Normalization,
    report: Callable[[int, int, int | None], None],
) -> list[str]:
    """A vocabulary of the training documents. `report` is called with the documents and the bytes
    of the sources that were read, twice from the start, and about how many bytes there are.
    Raises DataError where there is no text, or none that fits into `vocab_size`."""
    sample = VocabularySample(
        corpus,
        plan,
        options,
        lambda documents, read: report(documents, read, sample.source_bytes),
    )
    if next(iter(sample), None) is None:
        why = f"all held out (--heldout-fraction is {options.heldout_fraction})"
        if corpus.text_files:
            rule = f"few since documents end by --documents {options.documents}"
            why = f"empty, {why}, or {rule}"
        else:
            why = f"empty, or {why}"
        raise DataError(
            "the sources hold no training document with any text to train a vocabulary on: they "
            f"are {why}"
        )
    return train_wordpiece(sample, options.vocab_size, normalization)


class VocabularySample:
    """The training documents that a vocabulary is learned from; the same each time it is iterated.

    Every unit gives the same share of its text, from its start, so that about `characters` come
    together; all of it where the corpus has no more. Duplicates count once.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: WorkPlan,
        options: PrepareOptions,
        report: Callable[[int, int], None],
        characters: int = SAMPLE_CHARACTERS,
    ) -> None:
        self._corpus, self._options, self._report = corpus, options, report
        self._units = [unit for unit in plan.units if not unit.heldout]
        # a shard of unknown size counts as much as the mean of the others
        sizes = [
            sum(segment.piece.text_bytes or 0 for segment in unit.segments) for unit in self._units
        ]
        known = [size for size in sizes if size]
        mean = max(1, sum(known) // len(known)) if known else 1
        sizes = [size or mean for size in sizes]
        self._budgets = [-(-characters * size // sum(sizes)) for size in sizes]
        self.source_bytes: int | None = None
        """About how many bytes of the sources are read for it; None where nobody knows."""
        if plan.source_bytes is not None:
            self.source_bytes = sum(
                unit.source_bytes * min(budget, size) // size
                for unit, budget, size in zip(self._units, self._budgets, sizes, strict=True)
            )

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
                    self._report(documents, source_bytes)
                if left <= 0:
                    break

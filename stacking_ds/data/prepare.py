"""From sources to a folder of token shards: split, de-duplicate, find sentences, tokenize, write.

The folder is built under `OUT.tmp-<process>` and renamed at the end, so whatever bears the final
name is complete. An empty folder that is there already stays the same folder, since it may be the
current one or a mount point: the work is done in `OUT/.tmp-<process>`, and the files move up, the
manifest last, without which the folder is refused. A killed run leaves the temporary folder, which
may be deleted.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from stacking_ds.data.manifest import (
    MANIFEST_NAME,
    DataManifest,
    PrepareRequest,
    SplitName,
    VocabularyFile,
    file_sha256,
    read_manifest,
)
from stacking_ds.data.sentences import split_sentences
from stacking_ds.data.shard_writer import SplitWriter
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.sources import Document, Source, open_source
from stacking_ds.data.tokenizer import (
    build_tokenizer,
    load_vocabulary,
    train_wordpiece,
    vocabulary_sha256,
)
from stacking_ds.errors import DataError

__all__ = ["Prepared", "Progress", "prepare", "prepared_matches"]

_UNFINISHED = ".tmp-"
_SPLITS: tuple[SplitName, SplitName] = ("train", "heldout")
_VOCABULARY_SAMPLE_CHARACTERS = 128 * 2**20
_CHARACTERS_PER_GROUP = 2**19
_DEFAULT_SHARD_TOKENS = 2**25


@dataclass(frozen=True)
class Progress:
    """How far a running `prepare` is. `task` is "vocabulary" or "shards"."""

    task: str
    documents: int
    characters: int


@dataclass(frozen=True)
class Prepared:
    """The folder's manifest, and whether it was there already."""

    manifest: DataManifest
    reused: bool


def prepare(
    sources: str | Sequence[str],
    out_dir: Path,
    *,
    vocabulary: Path | None = None,
    vocab_size: int = 8192,
    heldout_sources: Sequence[str] = (),
    heldout_fraction: float = 0.02,
    licence: str | None = None,
    shard_tokens: int = _DEFAULT_SHARD_TOKENS,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Makes token shards in `out_dir`, or finds that it already holds exactly these.

    The vocabulary is read from `vocabulary`, or trained to `vocab_size` on the first 128 Mi
    characters of the training documents. Held out are: all documents of `heldout_sources`, those
    a source itself holds out, and, when there are no `heldout_sources`, the `heldout_fraction` of
    the documents of other sources whose hash falls lowest, so that a document stays on its side
    whatever is added to the corpus. Exact duplicates are dropped over both splits.

    `out_dir` is new, or an empty folder. Raises DataError for unusable sources or vocabularies, for
    a split that stays empty, and for an `out_dir` that holds something else or cannot be written.
    """
    out_dir = out_dir.resolve()
    if not 0 <= heldout_fraction <= 0.5:
        raise DataError(f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 0.5")
    names = (sources,) if isinstance(sources, str) else tuple(sources)
    corpus = _Corpus(
        [open_source(name) for name in names],
        [open_source(name) for name in heldout_sources],
        heldout_fraction,
    )
    if not corpus.can_hold_out:
        raise DataError(
            "heldout_fraction is 0 and no held-out source is named, but training needs held-out "
            "documents: raise --heldout-fraction, or name what to hold out by --heldout SOURCE"
        )
    given = None if vocabulary is None else load_vocabulary(vocabulary)
    request = corpus.request(f"trained:{vocab_size}" if given is None else vocabulary_sha256(given))
    if prepared_matches(out_dir, request):
        return Prepared(TokenShards.open(out_dir).manifest, reused=True)
    report = progress or (lambda _: None)
    suffix = f"{_UNFINISHED}{os.uname().nodename}-{os.getpid()}"
    is_there = out_dir.is_dir()
    building = out_dir / suffix if is_there else out_dir.with_name(out_dir.name + suffix)
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        tokens = given or _trained_vocabulary(corpus, vocab_size, report)
        manifest = _build(corpus, building, request, tokens, licence, shard_tokens, report)
        # Another process may have finished the same work meanwhile; then its folder stays.
        if prepared_matches(out_dir, request):
            return Prepared(manifest, reused=True)
        if is_there:
            _move_up(building, out_dir)
        else:
            os.replace(building, out_dir)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Prepared(manifest, reused=False)


def prepared_matches(out_dir: Path, request: PrepareRequest) -> bool:
    """True if `out_dir` holds what `request` asks for, False if there is nothing finished yet.

    Raises DataError when it holds something else, or is damaged.
    """
    if not out_dir.exists():
        return False
    if out_dir.is_dir() and all(path.name.startswith(_UNFINISHED) for path in out_dir.iterdir()):
        return False
    if not out_dir.is_dir() or not (out_dir / MANIFEST_NAME).exists():
        raise DataError(f"{out_dir} exists and is not prepared data; choose another folder")
    there = read_manifest(out_dir).request
    different = [
        f"{field} is {getattr(there, field)!r} there and {getattr(request, field)!r} here"
        for field in PrepareRequest.model_fields
        if getattr(there, field) != getattr(request, field)
    ]
    if different:
        raise DataError(
            f"{out_dir} holds data prepared otherwise ({'; '.join(different)}); "
            "choose another folder, or delete this one"
        )
    TokenShards.open(out_dir)
    return True


def _move_up(building: Path, out_dir: Path) -> None:
    for path in sorted(building.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        os.replace(path, out_dir / path.name)


class _Corpus:
    """The documents of all sources, each in its split, exact duplicates left out."""

    def __init__(
        self, train: Sequence[Source], heldout: Sequence[Source], heldout_fraction: float
    ) -> None:
        self._train, self._heldout, self._heldout_fraction = train, heldout, heldout_fraction
        self._hash_limit = 0 if heldout else int(heldout_fraction * 2**64)
        self.duplicates = self.empty = 0

    @property
    def can_hold_out(self) -> bool:
        """Whether there is anything the held-out split could come from."""
        return bool(
            self._heldout or self._heldout_fraction or any(s.holds_out for s in self._train)
        )

    def request(self, vocabulary: str) -> PrepareRequest:
        """What makes these documents, tokenized with `vocabulary`, recognisable later."""
        return PrepareRequest(
            sources=tuple(line for source in self._train for line in source.identity()),
            heldout_sources=tuple(line for source in self._heldout for line in source.identity()),
            heldout_fraction=self._heldout_fraction,
            vocabulary=vocabulary,
        )

    def documents(self) -> Iterator[tuple[SplitName, str]]:
        """Held-out sources come first: what they hold is kept out of the training split."""
        self.duplicates = self.empty = 0
        seen: set[int] = set()
        for heldout, sources in ((True, self._heldout), (False, self._train)):
            for document in (document for source in sources for document in source.documents()):
                words = document.text.split()
                if not words:
                    self.empty += 1
                    continue
                digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
                number = int.from_bytes(digest)
                if number in seen:
                    self.duplicates += 1
                    continue
                seen.add(number)
                yield "heldout" if heldout else self._split_of(document, number), document.text

    def _split_of(self, document: Document, number: int) -> SplitName:
        if document.split is not None:
            return document.split
        return "heldout" if number < self._hash_limit else "train"


def _trained_vocabulary(
    corpus: _Corpus, vocab_size: int, report: Callable[[Progress], None]
) -> list[str]:
    texts: list[str] = []
    characters = 0
    for split, text in corpus.documents():
        if split == "train":
            texts.append(text)
            characters += len(text)
            report(Progress("vocabulary", len(texts), characters))
        if characters >= _VOCABULARY_SAMPLE_CHARACTERS:
            break
    if not texts:
        raise DataError("the sources hold no training document with any text")
    return train_wordpiece(texts, vocab_size)


def _build(
    corpus: _Corpus,
    folder: Path,
    request: PrepareRequest,
    vocabulary: Sequence[str],
    licence: str | None,
    shard_tokens: int,
    report: Callable[[Progress], None],
) -> DataManifest:
    tokenizer = build_tokenizer(vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), "utf-8")
    writers = {
        split: SplitWriter(folder, split, vocab_size=len(vocabulary), shard_tokens=shard_tokens)
        for split in _SPLITS
    }
    wordless = _write_documents(corpus, tokenizer, writers, report)
    train, heldout = (writers[split].finish() for split in _SPLITS)
    if not train.documents:
        raise DataError("the sources hold no training document with any text")
    if not heldout.documents:
        raise DataError(
            f"none of the {train.documents} documents fell into the held-out split; raise "
            f"--heldout-fraction (it is {request.heldout_fraction}), or name what to hold out by "
            "--heldout SOURCE"
        )
    manifest = DataManifest(
        request=request,
        licence=licence,
        vocab_size=len(vocabulary),
        vocabulary_sha256=vocabulary_sha256(vocabulary),
        vocabulary_files=tuple(
            VocabularyFile(name=path.name, size_bytes=path.stat().st_size, sha256=file_sha256(path))
            for path in (folder / "tokenizer.json", folder / "vocab.txt")
        ),
        duplicate_documents=corpus.duplicates,
        empty_documents=corpus.empty + wordless,
        train=train,
        heldout=heldout,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return manifest


def _write_documents(
    corpus: _Corpus,
    tokenizer: Tokenizer,
    writers: Mapping[SplitName, SplitWriter],
    report: Callable[[Progress], None],
) -> int:
    """Tokenizes the corpus into `writers`; returns how many documents had no tokens."""
    # Text that spells "[MASK]" is text: it is cut into ordinary pieces.
    tokenizer.encode_special_tokens = True
    documents = characters = wordless = 0
    for group in _groups(corpus.documents()):
        for (split, text), sentences in zip(group, _tokenized(group, tokenizer), strict=True):
            documents, characters = documents + 1, characters + len(text)
            if sentences:
                writers[split].add(sentences)
            else:
                wordless += 1
        report(Progress("shards", documents, characters))
    return wordless


def _groups(
    documents: Iterable[tuple[SplitName, str]],
) -> Iterator[list[tuple[SplitName, str]]]:
    """Runs of documents large enough to keep the tokenizer's threads busy."""
    group: list[tuple[SplitName, str]] = []
    characters = 0
    for split, text in documents:
        group.append((split, text))
        characters += len(text)
        if characters >= _CHARACTERS_PER_GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _tokenized(
    group: Sequence[tuple[SplitName, str]], tokenizer: Tokenizer
) -> Iterator[list[list[int]]]:
    """For each document the token ids of its sentences, sentences without tokens left out."""
    documents = [split_sentences(text) for _, text in group]
    encodings = iter(
        tokenizer.encode_batch_fast(
            [sentence for sentences in documents for sentence in sentences],
            add_special_tokens=False,
        )
    )
    for sentences in documents:
        ids = (encoding.ids for encoding in islice(encodings, len(sentences)))
        yield [sentence_ids for sentence_ids in ids if sentence_ids]

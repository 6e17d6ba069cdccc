"""The vocabulary of a prepare: trained on the beginning of every unit, and written at the end."""

from collections.abc import Callable, Iterator, Sequence

from stacking_ds.data.prepare.finish import no_training_text
from stacking_ds.data.prepare.first_look import text_paths
from stacking_ds.data.prepare.folder import Started, UnfinishedFolder
from stacking_ds.data.prepare.session import hash_limit, reading_of
from stacking_ds.data.prepare.unit import BadDocuments, document_hash, split_of, usable, words_of
from stacking_ds.data.prepare.work_plan import Corpus, Plan
from stacking_ds.data.shard_manifest import VocabularyFile, file_sha256
from stacking_ds.data.shard_writer import write_file
from stacking_ds.data.sources.documents import Document, Reading
from stacking_ds.data.tokenizer import Normalization, build_tokenizer, train_wordpiece

SAMPLE_CHARACTERS = 128 * 2**20


def train_vocabulary(
    corpus: Corpus,
    started: Started,
    vocab_size: int,
    bad_documents: BadDocuments,
    report: Callable[[int, int, int | None], None],
) -> list[str]:
    """A vocabulary of the training documents. `report` is called with the documents and the bytes
    of the sources that were read, twice from the start, and about how many bytes there are.
    Raises DataError where there is no text, or none that fits into `vocab_size`."""
    request = started.request
    sample = VocabularySample(
        corpus,
        started.plan,
        reading_of(request, started.settings),
        hash_limit=hash_limit(request.heldout_fraction, corpus),
        bad_documents=bad_documents,
        report=lambda documents, read: report(documents, read, sample.source_bytes),
    )
    if next(iter(sample), None) is None:
        raise no_training_text(request, bool(text_paths(corpus)))
    return train_wordpiece(sample, vocab_size, request.normalization)


def write_vocabulary(
    folder: UnfinishedFolder, vocabulary: Sequence[str], normalization: Normalization
) -> tuple[VocabularyFile, ...]:
    """Writes `tokenizer.json` and `vocab.txt`; their records."""
    contents = {
        "tokenizer.json": build_tokenizer(vocabulary, normalization).to_str(pretty=True),
        "vocab.txt": "".join(f"{token}\n" for token in vocabulary),
    }
    found = []
    for name, text in contents.items():
        path = folder.path / name
        write_file(path, text.encode(), folder.temporary)
        found.append(
            VocabularyFile(name=name, size_bytes=path.stat().st_size, sha256=file_sha256(path))
        )
    return tuple(found)


class VocabularySample:
    """The training documents that a vocabulary is learned from; the same each time it is iterated.

    Every unit gives the same share of its text, from its start, so that about `characters` come
    together; all of it where the corpus has no more. Duplicates count once.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        reading: Reading,
        *,
        hash_limit: int,
        bad_documents: BadDocuments,
        report: Callable[[int, int], None],
        characters: int = SAMPLE_CHARACTERS,
    ) -> None:
        self._corpus, self._reading, self._report = corpus, reading, report
        self._hash_limit, self._bad_documents = hash_limit, bad_documents
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
            for item, reader in self._corpus.read(unit, self._reading):
                documents, source_bytes = documents + 1, source_bytes + item.source_bytes
                if not usable(item, reader, self._bad_documents):
                    continue
                assert isinstance(item, Document)
                words = words_of(item.text)
                number = document_hash(words)
                is_train = split_of(item, number, False, self._hash_limit) == "train"
                if words and is_train and number not in seen:
                    seen.add(number)
                    yield item.text
                    left -= len(item.text)
                    self._report(documents, source_bytes)
                if left <= 0:
                    break

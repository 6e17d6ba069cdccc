"""The vocabulary of a prepare: given, or trained on the beginning of every unit."""

from collections.abc import Callable, Iterator

from stacking_ds.data.prepare.plan import Corpus, Plan
from stacking_ds.data.prepare.unit import BadDocuments, document_hash, split_of, usable, words_of
from stacking_ds.data.sources.documents import Document, Reading

__all__ = ["SAMPLE_CHARACTERS", "VocabularySample"]

SAMPLE_CHARACTERS = 128 * 2**20


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

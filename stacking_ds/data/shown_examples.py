"""Training examples as text, with what is masked in view.

    the [quick->MASK] brown [fox->fox] [jumps->table] over un[##believ->MASK]able fences.

Each pair of brackets is one masked token: what stood there, and what the model reads instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import decoders

from stacking_ds.data.batches import IGNORE_INDEX, Batch
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.tokenizer import build_tokenizer

__all__ = ["ShownExample", "shown_examples"]

_CONTINUATION = "##"


@dataclass(frozen=True)
class ShownExample:
    """One example of a batch. `follows` is the next-sentence label: True where B continues A, None
    where there is no B."""

    row: int
    """In the order of the run, from 0."""
    example: int
    """Within the row, from 1."""
    examples_in_row: int
    row_fill: float
    """The share of the row's slots that hold a token."""
    first: str
    second: str | None
    follows: bool | None
    masked: int
    """Masked tokens."""


def shown_examples(data: PretrainingData, count: int) -> list[ShownExample]:
    """The first `count` examples that a run with this data reads, as its loader gives them; fewer
    where an epoch has fewer rows."""
    rows = min(count, data.num_rows)
    if rows < 1:
        return []
    (batch,) = data.step(0, rows, micro_batch_size=rows).micro_batches
    vocabulary = data.shards.vocabulary
    return _shown(batch, vocabulary, build_tokenizer(vocabulary).decoder)[:count]


def _shown(
    batch: Batch, vocabulary: Sequence[str], decoder: decoders.Decoder
) -> list[ShownExample]:
    length = batch.input_ids_BS.shape[1]
    labels = dict(zip(batch.mlm_positions_M.tolist(), batch.mlm_labels_M.tolist(), strict=True))
    ids, types = batch.input_ids_BS.flatten().tolist(), batch.token_type_ids_BS.flatten().tolist()
    shown = []
    for start, label in zip(
        batch.first_positions_E.tolist(), batch.next_sentence_label_E.tolist(), strict=True
    ):
        row = start // length
        owner_S = batch.attention_mask_BS[row]
        number = int(owner_S[start % length])
        stop = start + int((owner_S == number).sum())
        has_second = types[stop - 1] == 1
        middle = types.index(1, start) if has_second else stop
        # [CLS] A [SEP] is [start, middle), B [SEP] is [middle, stop)
        first = _pieces(range(start + 1, middle - 1), ids, labels, vocabulary)
        second = _pieces(range(middle, stop - 1), ids, labels, vocabulary)
        shown.append(
            ShownExample(
                row=row,
                example=number,
                examples_in_row=int(owner_S.max()),
                row_fill=float((owner_S > 0).double().mean()),
                first=decoder.decode(first),
                second=decoder.decode(second) if has_second else None,
                follows=None if label == IGNORE_INDEX else label == 0,
                masked=sum(position in labels for position in range(start, stop)),
            )
        )
    return shown


def _pieces(
    positions: range, ids: Sequence[int], labels: Mapping[int, int], vocabulary: Sequence[str]
) -> list[str]:
    """The tokens at `positions`, a masked one in brackets, behind ## where it continues a word so
    that the decoder joins it."""
    pieces = []
    for position in positions:
        piece = vocabulary[ids[position]]
        if position in labels:
            hidden = vocabulary[labels[position]]
            joined = _CONTINUATION if hidden.startswith(_CONTINUATION) else ""
            piece = f"{joined}[{hidden}->{'MASK' if piece == '[MASK]' else piece}]"
        pieces.append(piece)
    return pieces

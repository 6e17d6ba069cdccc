"""The forms of attention on sequences that lie one behind the other, as packed rows have them.

FLOPs are the model's: the two products of each token with the tokens of its own sequence, forward
and twice that backward. What a form computes on padding, or once more backward, does not count.

Shapes: T tokens, N heads, D head size.
"""

from functools import partial
from typing import Any

import torch

from stacking_ds.bench.kernels_clock import Clock, Entrant, race
from stacking_ds.config.sections import AttentionName
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.choice import choose_attention
from stacking_ds.kernels.attention.sequences import Attend, Sequences

HEAD_SIZE = 64
_FORMS: dict[str, tuple[AttentionName, ...]] = {
    "cpu": ("loops", "padded"),
    "cuda": ("flash", "varlen", "padded", "cudnn"),
}
_DROPOUTS = (0.0, 0.1)
_SHORTEST = 0.25  # of the longest


def packed_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths of sequences that have so many tokens together: evenly spread between a quarter of
    `longest` and all of it, the last one cut."""
    generator = torch.Generator().manual_seed(longest)
    lengths: list[int] = []
    shortest = max(1, round(_SHORTEST * longest))
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        lengths.append(min(left, drawn))
    return lengths


def attention_flops(lengths: list[int], heads: int) -> int:
    """Forward and backward."""
    return 3 * 4 * heads * HEAD_SIZE * sum(length**2 for length in lengths)


def measure_attention(
    tokens: int,
    hidden_size: int,
    longest: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    rounds: int,
) -> dict[str, Any]:
    """A row for each longest sequence, dropout and form.

    Raises:
        ConfigError: the hidden size is no multiple of the heads' size.
    """
    heads, rest = divmod(hidden_size, HEAD_SIZE)
    if rest or not heads:
        raise ConfigError(
            f"attention is measured with heads of {HEAD_SIZE}: --hidden-size={hidden_size} must be "
            f"a multiple"
        )
    rows = []
    for length in longest:
        lengths = packed_lengths(tokens, length)
        flops = attention_flops(lengths, heads)
        for dropout in _DROPOUTS:
            shared = {"longest": length, "sequences": len(lengths), "dropout": dropout}
            shared["filled"] = tokens / (len(lengths) * length)
            entrants, absent = _entrants(lengths, length, heads, dropout, dtype, device)
            found = race(entrants, clock, rounds, 4 * tokens * hidden_size * dtype.itemsize)
            for form, seconds in found.seconds.items():
                whole = seconds["forward"] + seconds["backward"]
                speed = flops / whole / 1e12
                rows.append({**shared, "form": form, "seconds": seconds, "tflop_per_second": speed})
            rows += [
                {**shared, "form": form, "not_measured": why}
                for form, why in (absent | found.not_measured).items()
            ]
    return {"tokens": tokens, "heads": heads, "head_size": HEAD_SIZE, "rows": rows}


def _entrants(
    lengths: list[int],
    longest: int,
    heads: int,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """Of all forms that can run, on the same tokens; and why others cannot."""
    generator = torch.Generator(device).manual_seed(0)
    shape = sum(lengths), 3, heads, HEAD_SIZE
    qkv_T3ND = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    gradient_TND = qkv_T3ND[:, 0].clone()
    qkv_T3ND.requires_grad_()
    starts_E1 = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    sequences = Sequences(starts_E1, longest)
    entrants: dict[str, Entrant] = {}
    absent: dict[str, str] = {}
    for name in _FORMS[device.type]:
        try:
            attend: Attend = choose_attention(name, device, dtype)
        except ConfigError as error:
            absent[name] = str(error)
            continue
        forward = partial(attend, qkv_T3ND, sequences, dropout)
        entrants[name] = Entrant(forward, (qkv_T3ND,), gradient_TND)
    return entrants, absent

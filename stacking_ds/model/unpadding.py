"""From rows of slots to the tokens in them, one example behind the other, and back.

Shapes: B rows, S slots a row, T tokens, E examples, M masked positions.
"""

from dataclasses import dataclass

import torch

from stacking_ds.kernels.attention.sequences import Sequences


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch without padding."""

    slots_T: torch.Tensor
    """Where each token stands in the rows, as b * S + s; ascending."""
    sequences: Sequences
    slots: int
    """B * S."""

    def take(self, values_BS: torch.Tensor) -> torch.Tensor:
        """The tokens' values. Shape [T]."""
        return values_BS.reshape(-1).index_select(0, self.slots_T)

    def put(self, values_T: torch.Tensor) -> torch.Tensor:
        """The values in rows of S slots, 0 where there is no token. Shape [B, S, ...]."""
        shape = values_T.shape[1:]
        flat = values_T.new_zeros(self.slots, *shape).index_copy(0, self.slots_T, values_T)
        return flat.view(-1, self.sequences.longest, *shape)

    def places_of(self, slots_M: torch.Tensor) -> torch.Tensor:
        """Which tokens stand in these slots. Shape [M]."""
        return torch.searchsorted(self.slots_T, slots_M)

    @property
    def first_tokens(self) -> torch.Tensor:
        """Each example's first token. Shape [E]."""
        return self.sequences.starts_E1[:-1]


def unpad(
    attention_mask_BS: torch.Tensor,
    first_positions_E: torch.Tensor | None = None,
    token_positions_T: torch.Tensor | None = None,
) -> Tokens:
    """The tokens of rows whose mask is 0 at padding.

    Without `first_positions_E` a row is an example. Without `token_positions_T` the host waits
    for the device to count the tokens, and a row of padding alone has one token, the padding in
    its first slot; whoever gives them sees to it that each example has a token.
    """
    B, S = attention_mask_BS.shape
    device = attention_mask_BS.device
    if token_positions_T is None:
        real_BS = attention_mask_BS != 0
        real_BS[:, 0] |= ~real_BS.any(dim=1)
        token_positions_T = real_BS.flatten().nonzero().flatten()
    if first_positions_E is None:
        first_positions_E = torch.arange(0, B * S, S, device=device)
    starts_E = torch.searchsorted(token_positions_T, first_positions_E, out_int32=True)
    end_1 = starts_E.new_full((1,), len(token_positions_T))
    return Tokens(token_positions_T, Sequences(torch.cat([starts_E, end_1]), S), B * S)

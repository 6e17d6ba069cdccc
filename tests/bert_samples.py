"""Small models with telling weights, and batches for them, that the model's tests share."""

import torch

from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert import BertForPreTraining, from_rows
from stacking_ds.model.bert_config import BertConfig

# Wide initial weights, so that a wrong sum or a forgotten bias shows in the first digits.
TINY = BertConfig(
    vocab_size=97,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)
BATCHES = {"full": (16, 16, 16), "padded": (16, 5, 1)}


def telling_model(
    config: BertConfig, seed: int = 0, compute: Compute | None = None
) -> BertForPreTraining:
    """With random biases and norms too: zeros and ones would hide a missing one."""
    model = BertForPreTraining(config, seed, compute)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class Batch:
    """Random rows of the given lengths; a third of the tokens, and every first, are masked."""

    def __init__(self, config: BertConfig, lengths: tuple[int, ...], seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = len(lengths), max(lengths)
        # id 0 is [PAD], which Hugging Face's embedding gives no gradient
        ids_BS = torch.randint(1, config.vocab_size, shape, generator=generator)
        self.mask_BS = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        self.ids_BS = ids_BS.where(self.mask_BS, 0)
        self.types_BS = torch.randint(0, config.type_vocab_size, shape, generator=generator)
        chosen_BS = (torch.rand(shape, generator=generator) < 0.3) & self.mask_BS
        chosen_BS[:, 0] = True
        self.labels_BS = ids_BS.where(chosen_BS, -100)
        self.positions_M = chosen_BS[self.mask_BS].nonzero().flatten()  # of the T tokens
        self.labels_M = self.labels_BS[chosen_BS]
        self.nsp_labels_B = torch.arange(len(lengths)) % 2

    def inputs(
        self, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
        """What the model takes, but for the masked positions."""
        return from_rows(*(t.to(device) for t in (self.ids_BS, self.types_BS, self.mask_BS)))

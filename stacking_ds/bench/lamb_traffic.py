"""Count what the LAMB step asks torch.distributed for, within a real training step of an engine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stacking_ds.config.sections import OptimizerSection
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, build_engine, release_engine
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.model.bert import BertForPreTraining, from_rows
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.parameters import first_value
from stacking_ds.optim.optimizers import build_optimizer

ZERO_STAGES = (0, 1, 2, 3)
BYTES_PER_TENSOR = 16
"""Two fp64 sums for each parameter tensor: what has to be known of all ranks."""

# nothing counted depends on the sizes, but for the number of layers
_MODEL = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=8,
)
_ROWS = 2


class Collective(NamedTuple):
    operation: str
    bytes: int
    """Of the largest argument."""


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, everything this thread asks torch.distributed for is in `found`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            operation = func._schema.name.partition("::")[2].strip("_")
            self.found.append(Collective(operation, max(map(_bytes, args), default=0)))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    tensors = (leaf for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def measure_communication(world: World, zero_stages: Sequence[int] = ZERO_STAGES) -> dict[str, Any]:
    """What `optimizer.step` sends in one training step of a tiny BERT, at each ZeRO stage.

    Every rank calls it, and gets the same: what the rank that asked for most has asked for.
    """
    return {
        "ranks": world.size,
        "layers": _MODEL.num_hidden_layers,
        "parameter_tensors": len(list(BertForPreTraining(_MODEL, seed=None).parameters())),
        "cases": [_at(zero_stage, world) for zero_stage in zero_stages],
    }


def _at(zero_stage: int, world: World) -> dict[str, Any]:
    engine = _engine(zero_stage, world)
    _train(engine, world)  # what is sent but once is no part of a step
    optimizer, collectives, calls = engine.basic_optimizer, _Collectives(), 0
    step = optimizer.step

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        with collectives:
            return step(*arguments, **options)

    optimizer.step = watched
    _train(engine, world)
    del optimizer.step
    assert calls, "DeepSpeed has stepped without its base optimizer"
    groups = len(optimizer.param_groups)
    release_engine(engine)
    by_rank = world.gather([found._asdict() for found in collectives.found])
    return {
        "zero_stage": zero_stage,
        "parameter_groups": groups,
        "calls": calls,
        "collectives": max(by_rank, key=len),
    }


def _engine(zero_stage: int, world: World) -> Any:
    model = BertForPreTraining(_MODEL, seed=None)
    section = OptimizerSection(name="lamb", learning_rate=1e-3)
    settings = resolve_ds_config(
        load_ds_config(f"zero{zero_stage}"),
        micro_batch_size=_ROWS,
        gradient_accumulation_steps=1,
        world_size=world.size,
        gradient_clipping=1.0,
        precision="bf16",
    )
    return build_engine(
        model,
        build_optimizer(section, model.named_parameters()),
        settings,
        lambda name, shape: first_value(name, shape, 0, _MODEL.initializer_range),
    )


def _train(engine: Any, world: World) -> None:
    shape = (_ROWS, _MODEL.max_position_embeddings)
    ids_BS = torch.randint(0, _MODEL.vocab_size, shape, device=world.device)
    mask_BS = torch.ones(shape, dtype=torch.bool, device=world.device)
    mlm_logits, nsp_logits = engine(*from_rows(ids_BS, torch.zeros_like(ids_BS), mask_BS))
    engine.backward(mlm_logits.float().square().mean() + nsp_logits.float().square().mean())
    advance(engine)

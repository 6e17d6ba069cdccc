"""What a boundary is measured on: a BERT of two depths, its engines, and random token batches."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stacking_ds.bench.step_batch import counts_of, make_batch
from stacking_ds.config.mistakes import checked
from stacking_ds.config.sections import OptimizerSection, Precision
from stacking_ds.data.batches import split_batch
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.engine.zero.compatibility import deepspeed
from stacking_ds.engine.zero.sharded_state import seed_moments
from stacking_ds.growth.operators import layer_map
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.parameters import first_value
from stacking_ds.optim.optimizers import build_optimizer
from stacking_ds.train.step import training_step

_SEED = 0
_LEARNING_RATE = 1e-4
_HEAD_SIZE = 64


@dataclass(frozen=True)
class Workload:
    """One boundary: a BERT of `layers` layers that is stacked to `new_layers`."""

    hidden_size: int
    layers: int
    new_layers: int
    vocab_size: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    precision: Precision
    zero_stage: int
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    """What the JSON's zero_optimization section says otherwise than the bundled one."""

    def config(self, depth: int) -> BertConfig:
        """Raises:
        ConfigError: sizes of which no BERT can be made.
        """
        heads, rest = divmod(self.hidden_size, _HEAD_SIZE)
        return checked(
            BertConfig,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=1 if rest else heads,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.sequence_length,
        )

    def require_possible(self) -> None:
        """Raises:
        ConfigError: no such ZeRO stage, or sizes of which no BERT can be made.
        StageError: the depth does not grow.
        """
        load_ds_config(f"zero{self.zero_stage}")
        for depth in (self.layers, self.new_layers):
            self.config(depth)
        _ = self.layer_map

    @property
    def layer_map(self) -> tuple[int, ...]:
        """Raises:
        StageError: the depth does not grow.
        """
        return layer_map("stack", self.layers, self.new_layers)

    def old_engine(self, world: World) -> Any:
        """The shallow model, trained for one micro-batch, so that its moments are not zero."""
        config = self.config(self.layers)
        model = BertForPreTraining(config, seed=None)
        engine = build_engine(
            model,
            _optimizer(model),
            self._settings(world, accumulation_steps=1),
            lambda name, shape: first_value(name, shape, _SEED, config.initializer_range),
        )
        # before the first step: DeepSpeed links the moments of one parameter group alone in it
        seed_moments(engine, 0)
        self._train(engine, world, micro_steps=1)
        return engine

    def new_engine(self, world: World) -> Any:
        """The deep model without values, as a boundary builds it."""
        model = BertForPreTraining(self.config(self.new_layers), seed=None)
        return build_engine(model, _optimizer(model), self._settings(world))

    def trained_engine(self, world: World) -> Any:
        """The deep model with first values."""
        model = self.stock_model()
        return build_engine(model, _optimizer(model), self._settings(world))

    def stock_model(self) -> BertForPreTraining:
        """The deep model, whole and with first values, as stock DeepSpeed wants it."""
        return BertForPreTraining(self.config(self.new_layers), seed=_SEED)

    def stock_engine(self, model: BertForPreTraining, world: World) -> Any:
        """What `deepspeed.initialize` alone makes of `model`."""
        return deepspeed.initialize(
            model=model, optimizer=_optimizer(model), config=deepcopy(self._settings(world))
        )[0]

    def train_step(self, engine: Any, world: World) -> None:
        """One optimizer step of the deep model on a whole global batch."""
        self._train(engine, world, self._split(world)[1])

    def _split(self, world: World) -> tuple[int, int]:
        return split_batch(self.global_batch_size, world.size, self.micro_batch_size)

    def _settings(self, world: World, accumulation_steps: int | None = None) -> dict[str, Any]:
        micro_batch_size, steps = self._split(world)
        json = load_ds_config(f"zero{self.zero_stage}")
        json["zero_optimization"].update(self.zero_options)
        return resolve_ds_config(
            json,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps or steps,
            world_size=world.size,
            gradient_clipping=1.0,
            precision=self.precision,
        )

    def _train(self, engine: Any, world: World, micro_steps: int) -> None:
        rows = np.full(self._split(world)[0], self.sequence_length, dtype=np.int64)
        batches = [
            make_batch(rows, self.sequence_length, self.vocab_size, seed * world.size + world.rank)
            for seed in range(micro_steps)
        ]
        training_step(
            engine,
            [batch.ours for batch in batches],
            counts_of(batches, world),
            learning_rate=_LEARNING_RATE,
            # the dropout of torch's own generator too, so that every old engine is the same
            seed=_SEED + world.rank,
            world=world,
        )


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSection(learning_rate=_LEARNING_RATE), model.named_parameters())

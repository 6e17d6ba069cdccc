"""Who takes a training step: this package's engine, a plain torch loop, and transformers.

Each on a model of its own and the same rows: forward and backward of every micro-step, gradients
clipped, AdamW. All but the plain loop are DeepSpeed engines of one and the same configuration.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch

from stacking_ds.bench.step_batch import StepBatch, counts_of
from stacking_ds.config.sections import EngineSection, KernelsName, OptimizerSection, Precision
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, build_engine, release_engine, set_learning_rate
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.engine.zero.compatibility import deepspeed
from stacking_ds.kernels.registry import Compute, choose_compute
from stacking_ds.model.bert import BertForPreTraining, forward_loss
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.parameters import first_value
from stacking_ds.optim.optimizers import build_optimizer
from stacking_ds.train.step import forward_backward, training_step

_SEED = 0
_OPTIMIZER = OptimizerSection(learning_rate=1e-4)


class TrainingStep(Protocol):
    """One optimizer step on the same rows each time."""

    batches: Sequence[StepBatch]
    """May be replaced by as many others."""

    def __call__(self) -> float:
        """Its loss in nats, before the update."""

    def parts(self) -> list[Callable[[], Any]]:
        """What makes one step when called in turn, such as each micro-step and the update."""

    def release(self) -> None:
        """Give the memory back."""


def ds_settings(
    zero_stage: int, rows: int, micro_steps: int, precision: Precision
) -> dict[str, Any]:
    """The DeepSpeed configuration of all engines.

    Raises:
        ConfigError: no such ZeRO stage.
    """
    return resolve_ds_config(
        load_ds_config(f"zero{zero_stage}"),
        micro_batch_size=rows,
        gradient_accumulation_steps=micro_steps,
        world_size=1,
        gradient_clipping=_OPTIMIZER.max_grad_norm,
        precision=precision,
    )


def our_compute(
    kernels: KernelsName, precision: Precision, device: torch.device, config: BertConfig
) -> Compute:
    """Raises:
    ConfigError: these kernels cannot run here.
    """
    section = EngineSection(kernels=kernels, precision=precision)
    return choose_compute(section, device, config)


class OurStep:
    """As the trainer takes it."""

    def __init__(
        self,
        config: BertConfig,
        batches: Sequence[StepBatch],
        compute: Compute,
        settings: dict[str, Any],
        world: World,
    ) -> None:
        """Raises:
        ConfigError: DeepSpeed cannot build this engine.
        """
        model = BertForPreTraining(config, seed=None, compute=compute)
        optimizer = build_optimizer(_OPTIMIZER, model.named_parameters())
        value_of = lambda name, shape: first_value(name, shape, _SEED, config.initializer_range)  # noqa: E731 - as in build_engine
        self._engine = build_engine(model, optimizer, settings, value_of)
        self.batches, self._world = batches, world

    def __call__(self) -> float:
        result = training_step(
            self._engine,
            [batch.ours for batch in self.batches],
            counts_of(self.batches, self._world),
            learning_rate=_OPTIMIZER.learning_rate,
            seed=_SEED,
            world=self._world,
        )
        assert result.loss is not None, "rows of a benchmark have targets"
        return result.loss

    def parts(self) -> list[Callable[[], Any]]:
        """Each micro-step, and the update."""
        set_learning_rate(self._engine, _OPTIMIZER.learning_rate)
        torch.manual_seed(_SEED)
        counts = counts_of(self.batches, self._world)
        scale = self._world.size * len(self.batches)

        def micro_step(index: int) -> None:
            if index > 0:
                advance(self._engine)
            batch = self.batches[index].ours.to(self._world.device)
            forward_backward(self._engine, batch, counts, scale)

        def update() -> None:
            norm = advance(self._engine)
            assert norm is not None, "the last micro-step did not complete a step"
            _finite(norm)

        return [*(partial(micro_step, index) for index in range(len(self.batches))), update]

    def release(self) -> None:
        engine, self._engine = self._engine, None
        release_engine(engine)


class PlainStep:
    """Our model in fp32, the optimizer and a loop, without an engine."""

    def __init__(
        self,
        config: BertConfig,
        batches: Sequence[StepBatch],
        compute: Compute,
        device: torch.device,
    ) -> None:
        self._model = BertForPreTraining(config, _SEED, compute).to(device)
        self._optimizer = build_optimizer(_OPTIMIZER, self._model.named_parameters())
        self.batches = batches

    def __call__(self) -> float:
        for part in self.parts():
            part()
        return _finite(float(self._total))

    def parts(self) -> list[Callable[[], Any]]:
        torch.manual_seed(_SEED)
        self._mlm_targets = sum(batch.mlm_targets for batch in self.batches)
        self._nsp_targets = sum(batch.nsp_targets for batch in self.batches)
        self._total = torch.zeros((), device=self.batches[0].ours.input_ids_T.device)
        return [*(partial(self._micro_step, batch) for batch in self.batches), self._update]

    def _micro_step(self, batch: StepBatch) -> None:
        ours = batch.ours.to(self._total.device)  # as a step does it, sequences are grouped anew
        mlm_sum, nsp_sum = forward_loss(
            self._model, ours.model_inputs, ours.mlm_labels_M, ours.next_sentence_label_E
        ).sums
        loss = mlm_sum / self._mlm_targets + nsp_sum / self._nsp_targets
        self._total += loss.detach()
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _OPTIMIZER.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def release(self) -> None:
        del self._model, self._optimizer


# ----------------------------------------------------------------------- transformers


def their_model(config: BertConfig) -> torch.nn.Module:
    """transformers' BERT of the same sizes, with the attention of torch's own kernels."""
    import transformers

    sizes = config.model_dump(exclude={"layer_norm_position"})
    theirs = transformers.BertConfig(**sizes)
    theirs._attn_implementation = "sdpa"
    model: torch.nn.Module = transformers.BertForPreTraining(theirs)
    return model.train()


def their_loss(model: Callable[..., Any], batch: StepBatch) -> torch.Tensor:
    """The mean loss that transformers computes itself; `model` is theirs, or its engine."""
    loss: torch.Tensor = model(**batch.theirs).loss
    return loss


class TheirStep:
    """transformers' model as its users train it in a DeepSpeed engine, rows padded."""

    def __init__(
        self, config: BertConfig, batches: Sequence[StepBatch], settings: dict[str, Any]
    ) -> None:
        """`build_engine` has prepared the process before."""
        torch.manual_seed(_SEED)
        model = their_model(config)
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(_OPTIMIZER, model.named_parameters()),
            config=deepcopy(settings),
        )[0]
        self.batches = batches

    def __call__(self) -> float:
        torch.manual_seed(_SEED)
        total = torch.zeros((), device=self._engine.device)
        for batch in self.batches:
            loss = their_loss(self._engine, batch)
            total += loss.detach()
            self._engine.backward(loss)
            self._engine.step()
        return _finite(float(total) / len(self.batches))

    def parts(self) -> list[Callable[[], Any]]:
        return [self]

    def release(self) -> None:
        engine, self._engine = self._engine, None
        release_engine(engine)


def _finite(value: float) -> float:
    """A step that does not learn is not worth its time."""
    assert math.isfinite(value), f"the loss or the gradient's norm is {value}"
    return value

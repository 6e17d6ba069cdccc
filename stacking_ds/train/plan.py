"""The training plan: recipe, schedules, DeepSpeed JSON and data, checked and resolved once.

Whatever is wrong with one of them shows here, in seconds, without another rank. `train` takes the
plan apart, and hands to each room the parts that it uses.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from stacking_ds.config.run import RunConfig
from stacking_ds.data.batches import split_batch
from stacking_ds.data.run_data import RunData
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.errors import ConfigError
from stacking_ds.growth.operators import layer_map
from stacking_ds.kernels.fp8 import require_fp8_sizes
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.optimizers import require_optimizer
from stacking_ds.schedule.phases import Phase
from stacking_ds.schedule.run_schedule import RunSchedule


@dataclass(frozen=True)
class TrainingPlan:
    """A run's length, learning rates, data and engines, checked; see `open_plan`."""

    config: RunConfig
    schedule: RunSchedule
    data: RunData
    ds_json: dict[str, Any]
    """As it is written, each "auto" still to be filled in."""
    ds_configs: tuple[dict[str, Any], ...]
    """What DeepSpeed is told in each phase; none where no engine will be built."""

    def model_config(self, num_hidden_layers: int) -> BertConfig:
        """The model at a depth, with the vocabulary of the data."""
        return BertConfig.of(self.config.model, num_hidden_layers, self.data.vocab_size)


def open_plan(
    config: RunConfig, world_size: int | None = None, *, with_data: bool = True
) -> TrainingPlan:
    """Open and validate everything that `config` names.

    Args:
        world_size: the ranks to train on; None where no engine will be built.
        with_data: False where the token shards may not be there yet.

    Raises:
        StageError: depths that do not grow, or that the growth operator cannot reach.
        ConfigError: a learning-rate schedule, model or DeepSpeed JSON that cannot be used; recipe
            and JSON that disagree, all disagreements in one message; a LAMB kernel, or CUDA
            graphs, that the ZeRO stage rules out.
        DataError: shards that are missing or damaged, or splits with too few documents.
    """
    schedule = config.run_schedule()
    depths = [stage.num_hidden_layers for stage in schedule.stages.stages]
    for old_depth, new_depth in itertools.pairwise(depths):
        layer_map(config.growth.operator, old_depth, new_depth)
    if config.engine.fp8:
        require_fp8_sizes(config.model.hidden_size, config.model.intermediate_size)
    ds_json = load_ds_config(config.engine.deepspeed)
    phases = schedule.phases.phases if world_size else ()
    ds_configs = tuple(_ds_config(config, ds_json, phase, world_size or 1) for phase in phases)
    data = RunData(config, schedule)
    if with_data:
        data.require()
    return TrainingPlan(config, schedule, data, ds_json, ds_configs)


def _ds_config(
    config: RunConfig, ds_json: dict[str, Any], phase: Phase, world_size: int
) -> dict[str, Any]:
    micro_batch_size, accumulation_steps = split_batch(
        phase.global_batch_size, world_size, phase.micro_batch_size
    )
    resolved = resolve_ds_config(
        ds_json,
        source=config.engine.deepspeed,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        world_size=world_size,
        gradient_clipping=config.optimizer.max_grad_norm,
        precision=config.engine.precision,
    )
    zero_stage = resolved["zero_optimization"].get("stage", 0)
    if config.engine.cuda_graphs and zero_stage == 3:
        raise ConfigError(
            f"engine.cuda_graphs=true needs weights that stay where they are, which ZeRO 3 "
            f"({config.engine.deepspeed}) moves: choose ZeRO 0, 1 or 2, or turn it off"
        )
    require_optimizer(config.optimizer, sharded=zero_stage > 0)
    return resolved

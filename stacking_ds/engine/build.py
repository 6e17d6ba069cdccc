"""The only builder and releaser of DeepSpeed engines."""

import logging
import math
import sys
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.engine.ds_settings import asks_for_log
from stacking_ds.engine.zero import compatibility, lifecycle, sharded_state
from stacking_ds.engine.zero.compatibility import deepspeed
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.registry import DTYPES
from stacking_ds.optim.optimizers import ShardedOptimizer


def build_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: Mapping[str, Any],
    value_of: lifecycle.ValueOf | None = None,
) -> Any:
    """A `DeepSpeedEngine` for `model`, whose fp32 masters are the given values bit for bit.

    `model` and `optimizer` are new for every engine (DeepSpeed's hooks stay on a module for
    ever), and every rank brings the same. A model on the meta device gets its storage here, at
    ZeRO 3 parameter by parameter, and its values from `value_of`; without that it has none, and
    what is captured or saved must be installed before the first step. `ds_config` comes from
    `resolve_ds_config`. The process group must be running.

    Raises:
        ConfigError: another DeepSpeed than the pinned one, a precision this device lacks, or
            values or a form of the optimizer's step that differ between ranks.
    """
    compatibility.require_pinned_deepspeed()
    low_precision = next((k for k in ("bf16", "fp16") if ds_config.get(k, {}).get("enabled")), None)
    if not any(p.is_meta for p in model.parameters()):
        held = {name: p.detach() for name, p in model.named_parameters()}
        value_of = lambda name, shape: held[name]  # noqa: E731 - a method would need a class
    _prepare_process(show_log=asks_for_log(ds_config))
    lifecycle.import_muon()
    compatibility.follow_process_group()
    if isinstance(optimizer, ShardedOptimizer):
        sharded_state.accept_under_zero(type(optimizer))
    sums: list[float] = []
    noted = _noting(value_of, sums) if value_of is not None else None
    dtype = DTYPES[low_precision or "fp32"]
    with sharded_state.without_stepping(optimizer):
        try:
            lifecycle.give_storage(model, ds_config, dtype, _device(), noted)
            total = sum(number * one for number, one in enumerate(sums, 1))
            if noted is not None and not _same_on_all_ranks(total):
                raise ConfigError(
                    "the ranks built models with different weights; build the model with the same "
                    "seed on every rank"
                )
            with lifecycle.without_traffic(model):
                # [0]: a name for the rest of the tuple would keep the optimizer alive for ever
                engine = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=deepcopy(dict(ds_config))
                )[0]
        except ValueError as error:
            raise ConfigError(f"DeepSpeed cannot build this engine: {error}") from error
    lifecycle.return_free_pages()  # what the parameters had before DeepSpeed flattened them
    sharded_state.reset_moments(engine)
    sharded_state.mend_loss_scaling(engine)
    sharded_state.measure_at_once(engine)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.bind(
            sharded_state.shards(engine),
            sharded_state.adder_over_ranks(engine),
            sharded_state.gradient_norm_at_step(engine),
            _same_on_all_ranks,
        )
    if low_precision and value_of is not None:
        # DeepSpeed took the masters from the rounded weights; those are right already
        sharded_state.write_masters(engine, value_of)
    return engine


def release_engine(engine: Any) -> None:
    """Destroy `engine` and give its memory back, or say in the log that it did not come back.

    The caller drops its references to the model first.
    """
    if isinstance(engine.basic_optimizer, ShardedOptimizer):
        engine.basic_optimizer.unbind()
    left = lifecycle.release(engine)
    if left and sys.exc_info()[0] is None:  # an error's traceback holds on to its frames
        logging.getLogger("stacking_ds").warning(
            "%.1f MiB of the released engine's masters are still held; something keeps its model "
            "or its optimizer alive",
            left / 2**20,
        )


def advance(engine: Any) -> float | None:
    """`engine.step()` after each `engine.backward`.

    Returns the global 2-norm of the gradient, before clipping, when this completed an optimizer
    step, else None. A gradient that is not finite never reaches the weights: the step is skipped
    and its norm given as infinite.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = sharded_state.norm_before_step(engine)
    if norm is None:
        engine.step()
        return sharded_state.gradient_norm(engine)
    if math.isfinite(norm):
        engine.step()
        return norm
    # here alone DeepSpeed would step all the same
    with sharded_state.without_stepping(engine.basic_optimizer):
        engine.step()
    return math.inf


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The learning rate of every parameter group, from the next step on."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = learning_rate


def _device() -> torch.device:
    on_cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _same_on_all_ranks(value: float) -> bool:
    """Every rank calls it, and gets the same answer."""
    ends = torch.tensor([value, -value], dtype=torch.float64, device=_device())
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def _noting(value_of: lifecycle.ValueOf, sums: list[float]) -> lifecycle.ValueOf:
    """`value_of`, and the sum of each value that it gives in `sums`."""

    def value(name: str, shape: torch.Size) -> torch.Tensor:
        given = value_of(name, shape)
        sums.append(float(given.sum(dtype=torch.float64)))
        return given

    return value


def _prepare_process(*, show_log: bool) -> None:
    """No JIT build of an op that training never calls, no log line below a warning unless asked."""
    # Asked for the first time, DeepSpeed probes every op with a compiler; and one that it then
    # finds on a CPU, init_distributed compiles for half a minute, or fails without a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    level = logging.INFO if show_log else logging.WARNING
    log = logging.getLogger("DeepSpeed")
    log.setLevel(level)
    for handler in log.handlers:  # DeepSpeed gives its handler a level as well
        handler.setLevel(level)
    # raised inside DeepSpeed at every step, so the filter has to last
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)\."
    )

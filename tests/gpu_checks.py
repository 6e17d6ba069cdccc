"""What must hold on a GPU as on a CPU, as plain functions of a `World` that compute on its device.

`test_gpu.py` calls them; `gpu_kernel_checks.py` has those of the model's kernels.
"""

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.checkpoint import folders, load, manifest
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import TrainingState, capture, install
from stacking_ds.kernels.registry import DTYPES
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.lamb.optimizer import choose_kernel
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from stacking_ds.train.from_checkpoint import load_model
from stacking_ds.train.heldout import evaluate_heldout
from stacking_ds.train.plan import open_plan
from tests.bert_samples import Batch, telling_model
from tests.checkpoints import save_now
from tests.lamb_following import follow_unsharded
from tests.runs import losses, metrics, small_recipe, train_small
from tests.sharded import start_engine, whole_state
from tests.tiny import tiny_batch, tiny_inputs, tiny_loss, tiny_model, tiny_optimizer

__all__ = [
    "RELATIVE_ERROR",
    "WIDE",
    "check_checkpoint",
    "check_growth",
    "check_losses",
    "check_memory",
    "check_overflow",
    "check_padding",
    "check_run",
    "relative_error",
]

# Of a loss or of logits, against fp32 on the CPU; TF32 would miss the first by far.
RELATIVE_ERROR = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}


def _batch(world: World, step: int) -> dict[str, torch.Tensor]:
    return {key: tensor.to(world.device) for key, tensor in tiny_batch(step).items()}


def _engine(world: World, zero_stage: int, precision: str, depth: int, seed: int | None = 0) -> Any:
    engine = start_engine(world, zero_stage, precision, depth=depth, seed=seed)
    sharded_state.set_loss_scale(engine, 256.0)  # the initial one makes fp16 skip its first steps
    return engine


def _train(world: World, engine: Any, steps: range) -> list[float]:
    """The loss of every step."""
    found = []
    for step in steps:
        loss = tiny_loss(engine, _batch(world, step), slice(None))
        engine.backward(loss)
        advance(engine)
        found.append(float(loss.detach()))
    return found


def _logits(world: World, model: Any) -> torch.Tensor:
    batch = _batch(world, 7)
    with torch.no_grad():
        mlm_logits, _ = model(*tiny_inputs(batch))
    return mlm_logits.float()


# ------------------------------------------------------------------ training and growth


def check_losses(world: World, zero_stage: int, precision: str) -> None:
    """Five steps have the losses of plain torch in fp32 on the CPU."""
    model = tiny_model(2)
    optimizer = tiny_optimizer(model)
    expected = []
    for step in range(5):
        optimizer.zero_grad()
        loss = tiny_loss(model, tiny_batch(step), slice(None))
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    engine = _engine(world, zero_stage, precision, 2)
    found = _train(world, engine, range(5))
    assert engine.skipped_steps == 0
    assert next(engine.module.parameters()).device.type == world.device.type
    release_engine(engine)
    assert found == pytest.approx(expected, rel=RELATIVE_ERROR[precision])


def check_growth(world: World, zero_stage: int, precision: str) -> None:
    """Two layers to four: masters and moments bit for bit, the forward pass to rounding."""
    engine = _engine(world, zero_stage, precision, 2)
    _train(world, engine, range(2))
    before = whole_state(world, engine)
    state = capture(engine)
    release_engine(engine)
    engine = _engine(world, zero_stage, precision, 4, seed=None)
    install(state, engine, layer_map("stack", 2, 4), "carry", world)
    after = whole_state(world, engine)
    reference = tiny_model(4, seed=1)
    for name, parameter in reference.named_parameters():
        source = name.replace("layer.2.", "layer.0.").replace("layer.3.", "layer.1.")
        for key in (MASTER, *MOMENTS):
            assert torch.equal(after[name][key], before[source][key]), (name, key)
        with torch.no_grad():
            parameter.copy_(after[name][MASTER])
    query = [before[f"bert.encoder.layer.{i}.attention.self.query.weight"] for i in range(2)]
    assert not torch.equal(query[0][MASTER], query[1][MASTER]), "the layers cannot be told apart"
    plain = reference.to(world.device, DTYPES[precision])
    # other addresses, other matmul kernels: not to the bit on a GPU
    error = relative_error(_logits(world, engine), _logits(world, plain))
    assert error < RELATIVE_ERROR[precision]
    _train(world, engine, range(2, 4))
    assert engine.skipped_steps == 0
    assert sharded_state.optimizer_step(engine) == 4
    moved = whole_state(world, engine)
    assert not torch.equal(moved[name][MASTER], after[name][MASTER])
    assert all(views[MASTER].isfinite().all() for views in moved.values())
    release_engine(engine)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def check_overflow(world: World, zero_stage: int) -> None:
    """A gradient that fp16 cannot hold: the step counts, the weights stay, the run goes on."""
    engine = _engine(world, zero_stage, "fp16", 2)
    _train(world, engine, range(2))
    before, logits = whole_state(world, engine), _logits(world, engine)
    for skipped in (1, 2):  # DeepSpeed forgives the first overflow, and lowers its scale then
        engine.backward(1e30 * tiny_loss(engine, _batch(world, 2), slice(None)))
        norm = advance(engine)
        assert norm is not None
        assert not torch.tensor(norm).isfinite()
        assert (engine.skipped_steps, engine.global_steps) == (skipped, 2 + skipped)
    assert sharded_state.loss_scale(engine) < 256.0
    after = whole_state(world, engine)
    for name, views in before.items():
        for key, value in views.items():
            assert torch.equal(after[name][key], value), (name, key)
    assert torch.equal(_logits(world, engine), logits)
    assert sharded_state.optimizer_step(engine) == 2
    _train(world, engine, range(3, 5))
    assert (engine.skipped_steps, engine.global_steps) == (2, 6)
    assert sharded_state.optimizer_step(engine) == 4
    moved = whole_state(world, engine)
    assert all(views[MASTER].isfinite().all() for views in moved.values())
    assert not torch.equal(moved[name][MASTER], after[name][MASTER])
    release_engine(engine)


# ------------------------------------------------------------------ LAMB


def check_lamb(world: World, zero_stage: int | str, precision: str) -> None:
    """By the kernel that is chosen here: 20 steps, a growth and 5 more have the weights of the
    reference on the CPU, given the same gradients."""
    chosen = type(choose_kernel("auto", world.device)).__name__
    assert chosen == ("TritonLamb" if world.device.type == "cuda" else "BlockedLamb")
    for case in follow_unsharded(world, [(zero_stage, precision, "auto")]):
        for relative, key_bias, absolute in case:
            assert relative <= 1e-6
            assert key_bias <= 1e-6
            assert absolute <= 1e-5


# ------------------------------------------------------------------ memory


def check_memory(world: World, zero_stage: int) -> None:
    """After each of five growths as much is held as after the first release, and an engine held
    far more."""
    depths = range(2, 9)
    held, alive = [], []
    engine = _engine(world, zero_stage, "bf16", depths[0])
    for old, new in itertools.pairwise(depths):
        _train(world, engine, range(1))
        alive.append(_held_bytes(world))
        state = capture(engine)
        release_engine(engine)
        del engine
        held.append(_held_bytes(world) - _state_bytes(world, state))
        engine = _engine(world, zero_stage, "bf16", new, seed=None)
        install(state, engine, layer_map("stack", old, new), "carry", world)
        del state
    release_engine(engine)
    # the first release leaves what is made once in a process, such as a matmul's workspace
    smallest_bytes = 4 * sum(p.numel() for p in tiny_model(depths[0]).parameters())
    assert max(held[1:]) - held[0] < smallest_bytes // 2, held
    assert min(alive) - max(held) > 3 * smallest_bytes, (alive, held)


def _held_bytes(world: World) -> int:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(world.device)
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


def _state_bytes(world: World, state: TrainingState) -> int:
    """What of the state between two engines counts on this world's device."""
    kept = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
            for weight in state.weights.values()}  # fmt: skip
    if world.device.type == "cuda":
        return sum(kept.values())
    copies = [view for fragment in state.fragments for view in fragment.views.values()]
    return sum(kept.values()) + sum(view.nbytes for view in copies)


# ------------------------------------------------------------------ attention

WIDE = BertConfig(
    vocab_size=97,
    hidden_size=128,  # heads of 64 and rows of 128: shapes that every fast backend takes
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.08,
)


def check_padding(world: World, precision: str) -> None:
    """A padded batch has the CPU's logits, and what stands in the padding changes nothing."""
    config = WIDE
    batch = Batch(config, (128, 77, 3, 2))
    model = telling_model(config).eval()
    with torch.no_grad():
        expected = model(*batch.inputs())[0]
        model.to(world.device, DTYPES[precision])
        found = model(*batch.inputs(world.device))[0]
        batch.ids_BS = batch.ids_BS.where(batch.mask_BS, 5)
        other = model(*batch.inputs(world.device))[0]
    assert relative_error(found.float(), expected) < RELATIVE_ERROR[precision]
    assert torch.equal(found, other)


# ------------------------------------------------------------------ checkpoints and whole runs


def check_checkpoint(world: World, folder: Path, zero_stage: int, precision: str) -> None:
    """Saved at one ZeRO stage, loaded at another and into a model on the CPU, to the bit."""
    engine = _engine(world, zero_stage, precision, 2)
    _train(world, engine, range(2))
    saved = whole_state(world, engine)
    found = save_now(
        folder,
        sharded_state.fragments(engine),
        world,
        manifest.Contents(
            step=2,
            optimizer_step=sharded_state.optimizer_step(engine),
            num_hidden_layers=2,
            zero_stage=zero_stage,
            vocabulary_sha256="",
            data_sha256="",
            train_state={"step": 2},
            config={},
        ),
    )
    release_engine(engine)
    engine = _engine(world, 3 - zero_stage, precision, 2, seed=99)
    sharded_state.seed_moments(engine, manifest.read_manifest(found).optimizer_step)
    load.load(found, sharded_state.fragments(engine))
    sharded_state.refresh(engine)
    loaded = whole_state(world, engine)
    release_engine(engine)
    on_cpu = dict(load.read_parameters(found))
    assert on_cpu.keys() == saved.keys() == loaded.keys()
    for name, views in saved.items():
        assert torch.equal(on_cpu[name], views[MASTER]), name
        assert views.keys() == loaded[name].keys()
        assert all(torch.equal(loaded[name][key], value) for key, value in views.items()), name


def check_run(
    world: World, folder: Path, shards: Path, zero_stage: int, precision: str, *overrides: str
) -> None:
    """The trainer's whole path: its held-out loss is that of its checkpoint on the CPU."""
    engine = (f"engine.deepspeed=zero{zero_stage}", f"engine.precision={precision}")
    config = small_recipe(folder, shards, *engine, *overrides)
    assert train_small(world, config, folder / "run") == 10
    assert torch.tensor(losses(folder / "run")).isfinite().all()
    assert [line["num_hidden_layers"] for line in metrics(folder / "run")] == [1] * 4 + [2] * 3 + [
        4
    ] * 3
    assert (folder / "run" / "export" / "model.safetensors").is_file()
    found = folders.latest(folder / "run")
    assert found is not None
    plan = open_plan(config)
    on_cpu = replace(world, device=torch.device("cpu"))
    expected = evaluate_heldout(
        load_model(plan, found), plan.data.heldout_steps(0, 1, plan.schedule.phases.at(0)), on_cpu
    )
    last = metrics(folder / "run")[-1]
    assert last["eval/mlm_loss"] == pytest.approx(expected.mlm_loss, rel=RELATIVE_ERROR[precision])

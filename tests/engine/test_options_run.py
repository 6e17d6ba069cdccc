"""Whole runs through growth under the engine's options: same losses, whatever computes them."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.bench.launch import run_on_ranks
from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import EngineSection
from stacking_ds.distributed.world import World
from stacking_ds.kernels.operations import Operations, Weights
from stacking_ds.kernels.registry import Compute, choose_compute
from stacking_ds.train import stage_engine
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import losses, metrics, small_recipe, train_small

DROPOUT = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")
NO_DROPOUT = ("model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0")
LAMB = ("optimizer.name=lamb", "optimizer.learning_rate=1e-2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [
        pytest.param("full", 3, marks=pytest.mark.slow),
        pytest.param("selective", 1, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_changes_no_loss(
    shards: Path, tmp_path: Path, kind: str, zero_stage: int
) -> None:
    common = (f"engine.deepspeed=zero{zero_stage}", "data.packing=true", *DROPOUT)
    plain = small_recipe(tmp_path, shards, *common)
    run_ranks(train_small, 2, plain, tmp_path / "plain")
    again = small_recipe(tmp_path, shards, *common, f"engine.activation_checkpointing={kind}")
    run_ranks(train_small, 2, again, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")
    assert metrics(tmp_path / "again")[-1]["num_hidden_layers"] > 1


def _operations_used(world: World, config: RunConfig, run_dir: Path) -> tuple[Counter[str], set]:
    """What was called of the operations chosen for a run, and the sections they were chosen by."""
    called: Counter[str] = Counter()
    sections: set[EngineSection] = set()

    class Counting(Operations):
        def linear_gelu(self, x_TI: torch.Tensor, weights: Weights) -> torch.Tensor:
            called["gelu"] += 1
            return super().linear_gelu(x_TI, weights)

        def cross_entropy_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            called["loss in training" if torch.is_grad_enabled() else "loss in evaluation"] += 1
            return super().cross_entropy_sum(logits, labels)

    def choose(section: EngineSection, *others: Any) -> Compute:
        sections.add(section)
        return replace(choose_compute(section, *others), operations=Counting())

    stage_engine.choose_compute = choose  # type: ignore[assignment]
    train_small(world, config, run_dir)
    return called, sections


def test_the_recipe_decides_what_model_and_loss_compute_with(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, "engine.activation_checkpointing=full")
    [(called, sections)] = run_ranks(_operations_used, 1, config, tmp_path / "run")
    assert sections == {config.engine}
    micro_steps = 10 * 3  # of 10 steps
    assert called["loss in training"] == micro_steps
    assert called["loss in evaluation"] > 0
    layer_steps = 3 * (4 * 1 + 3 * 2 + 3 * 4)
    # the head's, each layer's, and each layer's once more, which is what checkpointing does
    assert called["gelu"] >= micro_steps + 2 * layer_steps


@pytest.mark.slow  # Triton's interpreter
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_triton_trains_through_growth(
    shards: Path, tmp_path: Path, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows, the fused kernels and LAMB's, in the interpreter, under DeepSpeed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    common = (f"engine.deepspeed=zero{zero_stage}", "data.packing=true", *NO_DROPOUT, *LAMB)
    plain = small_recipe(tmp_path, shards, *common)
    run_ranks(train_small, 2, plain, tmp_path / "plain")
    kernels = ("engine.kernels=triton", "optimizer.lamb={kernel: triton}")
    small_recipe(tmp_path, shards, name="fused")
    # read when Triton is imported, so it has to be there when the ranks begin
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    overrides = [word for setting in (*common, *kernels) for word in ("--set", setting)]
    recipe = ["--recipe", str(tmp_path / "fused.yaml"), "--run-dir", str(tmp_path / "fused")]
    run_on_ranks(["train", *recipe, *overrides], 2)
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.slow  # a C++ compiler runs for a while
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_compiled_layers_train_through_growth(
    shards: Path, tmp_path: Path, zero_stage: int
) -> None:
    setting = f"engine.deepspeed=zero{zero_stage}"
    run_ranks(train_small, 2, small_recipe(tmp_path, shards, setting), tmp_path / "plain")
    compiled = small_recipe(tmp_path, shards, setting, "engine.kernels=compile")
    run_ranks(train_small, 2, compiled, tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)

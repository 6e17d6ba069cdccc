"""Whole runs through growth under the engine's options: same losses, whatever computes them."""

from pathlib import Path

import pytest

from stacking_ds.bench.launch import run_on_ranks
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
    [("full", 3), pytest.param("selective", 1, marks=pytest.mark.slow)],
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

"""Whole runs with LAMB: through growth, interrupted, at any ZeRO stage, and what they record."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stacking_ds.optim.lamb.optimizer import Lamb, LambStatistics, lamb_metrics
from stacking_ds.train.stage_engine import StageEngine
from tests.prose import tiny_shards
from tests.ranks import RankError, run_ranks
from tests.runs import losses, metrics, parameters, small_recipe, train_small, train_until

LAMB = ("optimizer.name=lamb", "optimizer.learning_rate=1e-2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one rank at ZeRO 0."""
    folder = tmp_path_factory.mktemp("reference")
    config = small_recipe(folder, shards, *LAMB, "engine.deepspeed=zero0")
    assert run_ranks(train_small, 1, config, folder / "run") == [10]
    return folder / "run"


@pytest.mark.parametrize(
    ("zero_stage", "ranks"),
    [
        pytest.param(1, 3, marks=pytest.mark.slow),
        (2, 2),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_the_run_is_the_same_when_it_is_sharded(
    shards: Path, reference: Path, tmp_path: Path, zero_stage: int, ranks: int
) -> None:
    config = small_recipe(tmp_path, shards, *LAMB, f"engine.deepspeed=zero{zero_stage}")
    run_ranks(train_small, ranks, config, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=2e-5)
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key.startswith(("optim/trust_ratio", "optim/weight_norm", "optim/update_norm")):
                assert ours[key] == pytest.approx(value, rel=1e-3), key


@pytest.mark.slow
def test_killed_after_a_boundary_it_ends_the_same(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, *LAMB, "engine.deepspeed=zero2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(train_small, 2, config, whole)
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(train_until, 2, config, broken, "kill", 5)
    assert run_ranks(train_small, 2, config, broken, True) == [10, 10]
    assert losses(broken) == losses(whole)
    ours, theirs = parameters(broken), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_line_has_norms_and_the_ratios_of_every_layer(reference: Path) -> None:
    for line in metrics(reference):
        places = ["all", "outside", *(f"layer.{i}" for i in range(line["num_hidden_layers"]))]
        for place in places:
            low, mean, high = (
                line[f"optim/trust_ratio/{place}/{kind}"] for kind in ("min", "mean", "max")
            )
            assert 0 < low <= mean <= high
        assert f"optim/trust_ratio/layer.{line['num_hidden_layers']}/min" not in line
        assert (line["optim/update_norm"] > 0) == (line["optim/learning_rate"] > 0)
        assert line["optim/update_norm"] < line["optim/weight_norm"]


def test_the_log_says_which_kernel_runs_and_why(reference: Path) -> None:
    said = (reference / "train.log").read_text()
    assert said.count("LAMB kernel: blocked (the masters are on cpu)") == 3, "once for each engine"


def test_tensorboard_has_them_too_with_a_histogram(reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    lines = metrics(reference)
    histograms = events.Histograms("optim/trust_ratio")
    assert [event.step for event in histograms] == [line["step"] for line in lines]
    for event, line in zip(histograms, lines, strict=True):
        # one ratio for each weight that decays: 6 in a layer, and some outside
        assert event.histogram_value.num >= 6 * line["num_hidden_layers"] + 3
        for kind in ("min", "max"):
            found = getattr(event.histogram_value, kind)
            assert found == pytest.approx(line[f"optim/trust_ratio/all/{kind}"])
    scalars = events.Scalars("optim/trust_ratio/layer.0/mean")
    assert [event.value for event in scalars] == pytest.approx(
        [line["optim/trust_ratio/layer.0/mean"] for line in lines]
    )


def test_a_step_that_was_skipped_has_none_of_them() -> None:
    """The optimizer still knows of the step before."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Lamb([weight])
    optimizer.step()
    manager = object.__new__(StageEngine)
    for applied in (True, False):
        manager.engine = SimpleNamespace(
            basic_optimizer=optimizer, was_step_applied=lambda applied=applied: applied
        )
        metrics, histograms = manager.optimizer_metrics()
        assert ("optim/update_norm" in metrics) == bool(histograms) == applied


def test_adamw_has_no_such_metrics(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, "stages=[{num_hidden_layers: 1, steps: 2}]")
    run_ranks(train_small, 1, config, tmp_path / "run")
    assert not [key for line in metrics(tmp_path / "run") for key in line if "trust" in key]


def test_the_metrics_are_those_of_the_step() -> None:
    layer = "bert.encoder.layer.1.output.dense"
    found = [
        LambStatistics(f"{layer}.weight", 3.0, 0.3, 2.0, adapted=True),
        LambStatistics(f"{layer}.bias", 0.0, 0.4, 1.0, adapted=False),
        LambStatistics("cls.weight", 4.0, 0.0, 0.5, adapted=True),
        LambStatistics("bert.pooler.dense.weight", 12.0, 1.2, 1.5, adapted=True),
    ]
    expected: dict[str, Any] = {
        "optim/weight_norm": 13.0,
        "optim/update_norm": 1.3,
        "optim/trust_ratio/all/min": 0.5,
        "optim/trust_ratio/all/mean": 4.0 / 3,
        "optim/trust_ratio/all/max": 2.0,
        "optim/trust_ratio/layer.1/min": 2.0,
        "optim/trust_ratio/layer.1/mean": 2.0,
        "optim/trust_ratio/layer.1/max": 2.0,
        "optim/trust_ratio/outside/min": 0.5,
        "optim/trust_ratio/outside/mean": 1.0,
        "optim/trust_ratio/outside/max": 1.5,
    }
    assert lamb_metrics(found) == pytest.approx(expected)

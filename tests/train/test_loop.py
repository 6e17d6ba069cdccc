"""Whole runs on real ranks: stages, resumption, other rank counts, and the ways a run can end."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertForPreTraining as HuggingFaceBert

from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import NonFiniteError, UserError
from stacking_ds.model import bert
from stacking_ds.run import directory
from stacking_ds.train import loop
from stacking_ds.train.plan import open_plan
from tests.prose import prepare, tiny_shards, write_text
from tests.ranks import RankError, run_ranks
from tests.runs import (
    losses,
    metrics,
    parameters,
    small_recipe,
    train_small,
    train_until,
)

STAGES = [(1, 4), (2, 3), (4, 3)]
DROPOUT = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe in fp32 at ZeRO 0 on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    config = small_recipe(folder, shards, "engine.deepspeed=zero0")
    assert run_ranks(train_small, 1, config, folder / "run") == [10]
    return folder / "run"


@pytest.mark.parametrize(
    ("zero_stage", "world_size"),
    [
        pytest.param(1, 2, marks=pytest.mark.slow),
        (3, 3),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(0, 2, marks=slow),
        pytest.param(1, 6, marks=slow),
        pytest.param(2, 4, marks=slow),
        pytest.param(3, 2, marks=slow),
        pytest.param(0, 12, marks=slow),
    ],
)
def test_the_run_is_the_same_at_any_zero_stage_and_rank_count(
    shards: Path, reference: Path, tmp_path: Path, zero_stage: int, world_size: int
) -> None:
    config = small_recipe(tmp_path, shards, f"engine.deepspeed=zero{zero_stage}")
    run_ranks(train_small, world_size, config, tmp_path / "run", timeout_seconds=240)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=2e-5)
    ours, theirs = parameters(tmp_path / "run"), parameters(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not name.endswith("key.bias"):  # its true gradient is zero: Adam amplifies rounding
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_run_leaves_what_the_documentation_says(reference: Path) -> None:
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["num_hidden_layers"] for line in lines] == [1] * 4 + [2] * 3 + [4] * 3
    assert [line["stage"] for line in lines] == [0] * 4 + [1] * 3 + [2] * 3
    documented = {
        "step",
        "stage",
        "num_hidden_layers",
        "samples_seen",
        "tokens_seen",
        "train/loss",
        "optim/learning_rate",
        "optim/grad_norm",
        "speed/tokens_per_second",
        "speed/model_flops_utilization",
        "memory/peak_gib",
        "wall_seconds",
    }
    for line in lines:
        assert documented <= line.keys()
        assert line["samples_seen"] == 10 * line["step"]
        assert line["optim/grad_norm"] > 0
        assert line["speed/tokens_per_second"] > 0
    evaluated = [line["step"] for line in lines if "eval/mlm_loss" in line]
    assert evaluated == [4, 7, 10], "held-out loss at the end of each stage"
    # every 3 steps and at boundaries; of the others the last two are kept
    kept = sorted(path.name for path in (reference / "checkpoints").glob("step_*"))
    assert {"step_00000004", "step_00000007", "step_00000009", "step_00000010"} <= set(kept)
    assert "step_00000003" not in kept
    assert (reference / "config.yaml").is_file()
    assert list((reference / "tensorboard").iterdir())
    assert "step 10/10" in (reference / "train.log").read_text()


def test_the_exported_model_has_the_trainers_heldout_loss(shards: Path, reference: Path) -> None:
    model = HuggingFaceBert.from_pretrained(reference / "export").eval()
    assert model.config.num_hidden_layers == 4
    config = small_recipe(reference.parent, shards, "engine.deepspeed=zero0")
    total, targets = 0.0, 0
    plan = open_plan(config)
    for rank_step in plan.data.heldout_steps(0, 1, plan.schedule.phases.at(0)):
        for micro_batch in rank_step.micro_batches:
            batch = micro_batch.to("cpu")
            lengths_E = batch.sequences.starts_E1.diff()
            ids_ES, types_ES = (
                pad_sequence(values_T.split(lengths_E.tolist()), batch_first=True)
                for values_T in (batch.input_ids_T, batch.token_type_ids_T)
            )
            mask_ES = torch.arange(ids_ES.shape[1]) < lengths_E[:, None]
            with torch.no_grad():
                logits = model(
                    input_ids=ids_ES, token_type_ids=types_ES, attention_mask=mask_ES.long()
                ).prediction_logits
            at_masks = logits[mask_ES][batch.mlm_positions_M]
            total += float(
                torch.nn.functional.cross_entropy(at_masks, batch.mlm_labels_M, reduction="sum")
            )
            targets += len(batch.mlm_labels_M)
    assert total / targets == pytest.approx(metrics(reference)[-1]["eval/mlm_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("stop", "at_step", "zero_stage"),
    [
        pytest.param("term", 1, 1, marks=pytest.mark.slow),  # inside the first stage
        ("kill", 4, 3),  # just across a boundary: the last checkpoint is before it
        pytest.param("term", 3, 2, marks=slow),  # asked to stop in the step that ends the stage
        pytest.param("kill", 8, 1, marks=slow),
        pytest.param("term", 5, 0, marks=slow),
    ],
)
def test_interrupted_equals_uninterrupted(
    shards: Path, tmp_path: Path, stop: str, at_step: int, zero_stage: int
) -> None:
    config = small_recipe(tmp_path, shards, f"engine.deepspeed=zero{zero_stage}", *DROPOUT)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(train_small, 2, config, whole)
    if stop == "kill":
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(train_until, 2, config, broken, stop, at_step)
    else:
        assert run_ranks(train_until, 2, config, broken, stop, at_step) == [at_step + 1] * 2
    assert run_ranks(train_small, 2, config, broken, True) == [10, 10]
    assert losses(broken) == losses(whole)
    ours, theirs = parameters(broken), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resumed_at_another_rank_count_and_zero_stage(
    shards: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    start = small_recipe(tmp_path, shards, "engine.deepspeed=zero3")
    assert run_ranks(train_until, 3, start, run_dir, "term", 5) == [6] * 3
    go_on = small_recipe(tmp_path, shards, "engine.deepspeed=zero1")
    run_ranks(train_small, 2, go_on, run_dir, True)
    assert losses(run_dir) == pytest.approx(losses(reference), rel=2e-5)


def test_a_finished_run_is_used_as_it_is(shards: Path, reference: Path) -> None:
    config = small_recipe(reference.parent, shards, "engine.deepspeed=zero0")
    before = (reference / "metrics.jsonl").read_bytes()
    assert run_ranks(train_small, 1, config, reference, True) == [10]
    assert (reference / "metrics.jsonl").read_bytes() == before


def _error_of(world: World, config: RunConfig, run_dir: Path, resume: bool) -> tuple[str, str]:
    try:
        train_small(world, config, run_dir, resume)
    except (UserError, NonFiniteError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_a_run_directory_belongs_to_one_run(shards: Path, reference: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, "engine.deepspeed=zero0")
    [(kind, message)] = run_ranks(_error_of, 1, config, reference, False)
    assert (kind, "--resume" in message) == ("CheckpointError", True)
    other = small_recipe(tmp_path, shards, "engine.deepspeed=zero0", "optimizer.learning_rate=1e-4")
    [(kind, message)] = run_ranks(_error_of, 1, other, reference, True)
    assert kind == "CheckpointError"
    assert "optimizer.learning_rate: 0.002 -> 0.0001" in message


def test_other_shards_do_not_continue_a_run(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = small_recipe(tmp_path, shards)
    run_ranks(train_until, 1, config, run_dir, "term", 1)
    given = shards / "vocab.txt"
    text = write_text(tmp_path / "other.txt", 150, seed=9)
    prepare(str(text), tmp_path / "other", vocabulary=given, heldout_fraction=0.1)
    prepare(str(text), tmp_path / "wordy", vocab_size=300, heldout_fraction=0.1)
    for folder, difference in (("other", "other token shards"), ("wordy", "another vocabulary")):
        changed = small_recipe(tmp_path, tmp_path / folder)
        [(kind, message)] = run_ranks(_error_of, 1, changed, run_dir, True)
        assert kind == "CheckpointError"
        assert difference in message


def _with_a_bad_loss(world: World, config: RunConfig, run_dir: Path) -> tuple[str, str, bool]:
    """At step 5 the last rank's loss is NaN; are the weights those from before the step?"""
    original = bert.pretraining_loss
    before: dict[str, torch.Tensor] = {}
    untouched: list[bool] = []
    take = loop.training_step

    def watched(engine: Any, *arguments: Any, **options: Any) -> Any:
        module = engine.module
        if world.pulse.step == 5:
            before.update({n: p.clone() for n, p in module.named_parameters()})
        try:
            return take(engine, *arguments, **options)
        except NonFiniteError:
            now = dict(module.named_parameters())
            untouched.append(all(torch.equal(now[name], value) for name, value in before.items()))
            raise

    def loss(*arguments: Any) -> Any:
        sums = original(*arguments)
        bad = bool(before) and world.rank == world.size - 1
        return sums._replace(mlm_sum=sums.mlm_sum * float("nan")) if bad else sums

    loop.training_step = watched
    bert.pretraining_loss = loss
    kind, message = _error_of(world, config, run_dir, False)
    return kind, message, untouched == [True]


@pytest.mark.parametrize("zero_stage", [0, 1, pytest.param(3, marks=slow)])
def test_a_non_finite_loss_stops_before_the_weights_are_touched(
    shards: Path, tmp_path: Path, zero_stage: int
) -> None:
    config = small_recipe(tmp_path, shards, f"engine.deepspeed=zero{zero_stage}")
    results = run_ranks(_with_a_bad_loss, 2, config, tmp_path / "run")
    for kind, message, untouched in results:
        assert kind == "NonFiniteError"
        assert "after 5 steps (stage 1, 2 layers)" in message
        assert untouched
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000004"


@pytest.mark.slow
def test_lines_of_metrics_have_no_holes_after_a_crash(shards: Path, tmp_path: Path) -> None:
    """Lines every 4 steps, checkpoints every 3: a checkpoint closes the line that is open."""
    config = small_recipe(tmp_path, shards, "logging.every_steps=4")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(train_small, 2, config, whole)
    steps = [line["step"] for line in metrics(whole)]
    assert steps == [3, 4, 6, 7, 8, 9, 10]
    by_step = small_recipe(tmp_path, shards)
    run_ranks(train_small, 2, by_step, tmp_path / "by_step")
    each = losses(tmp_path / "by_step")
    starts = [0, *steps]
    means = [sum(each[a:b]) / (b - a) for a, b in zip(starts, steps, strict=False)]
    assert losses(whole) == pytest.approx(means, rel=1e-12)
    with pytest.raises(RankError):
        run_ranks(train_until, 2, config, broken, "kill", 8)
    run_ranks(train_small, 2, config, broken, True)
    assert [line["step"] for line in metrics(broken)] == steps
    assert losses(broken) == losses(whole)
    for run_dir in (whole, broken):
        seconds = [line["wall_seconds"] for line in metrics(run_dir)]
        assert seconds == sorted(seconds)
        assert seconds[-1] > sum(
            line["stage/train_seconds"] for line in metrics(run_dir) if line["step"] in (4, 7, 10)
        )


def test_a_finished_run_makes_up_for_a_lost_export(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards)
    run_ranks(train_small, 1, config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    run_ranks(train_small, 1, config, tmp_path / "run", True)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_a_job_keeps_others_out_of_its_run(shards: Path, tmp_path: Path) -> None:
    with directory.lock(tmp_path / "run"):
        config = small_recipe(tmp_path, shards)
        [(kind, message)] = run_ranks(_error_of, 1, config, tmp_path / "run", False)
    assert kind == "CheckpointError"
    assert "another job is training in" in message


def test_damaged_shards_are_found_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    path = next(damaged.glob("train-*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    config = small_recipe(tmp_path, damaged)
    [(kind, message)] = run_ranks(_error_of, 1, config, tmp_path / "run", False)
    assert kind == "DataError"
    assert path.name in message
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_damage_since_the_start_is_found_when_the_run_goes_on(shards: Path, tmp_path: Path) -> None:
    damaged, run_dir = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(shards, damaged)
    config = small_recipe(tmp_path, damaged)
    run_ranks(train_until, 1, config, run_dir, "term", 1)
    path = next(damaged.glob("train-*-000.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # training itself would never notice
    path.write_bytes(bytes(content))
    for kind, message in run_ranks(_error_of, 2, config, run_dir, True):
        assert kind == "DataError"
        assert f"{path.name} is damaged: it is not the file its manifest describes" in message
        assert "what was trained after step 2, where this attempt began" in message
    assert not (run_dir / "export").exists()


def test_a_refused_resume_changes_nothing(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(train_until, 1, small_recipe(tmp_path, shards), run_dir, "term", 1)
    before = (run_dir / "config.yaml").read_bytes()
    text = write_text(tmp_path / "other.txt", 150, seed=9)
    prepare(str(text), tmp_path / "other", vocab_size=300, heldout_fraction=0.1)
    run_ranks(_error_of, 1, small_recipe(tmp_path, tmp_path / "other"), run_dir, True)
    assert (run_dir / "config.yaml").read_bytes() == before
    assert str(shards) in before.decode()


@pytest.mark.parametrize(
    "moments",
    [pytest.param("reset", marks=pytest.mark.slow), pytest.param("carry", marks=pytest.mark.slow)],
)
def test_bf16_runs_through_all_stages(shards: Path, tmp_path: Path, moments: str) -> None:
    config = small_recipe(
        tmp_path, shards, "engine.precision=bf16", f"growth.moments={moments}", *DROPOUT
    )
    assert run_ranks(train_small, 2, config, tmp_path / "run") == [10, 10]
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def _with_a_plan_for_others(world: World, config: RunConfig, run_dir: Path) -> str:
    with pytest.raises(ValueError, match="open the plan for the 2 ranks") as found:
        loop.train(open_plan(config, 1), world, run_dir)
    return str(found.value)


def test_a_plan_for_other_ranks_is_refused(tmp_path: Path) -> None:
    config = small_recipe(tmp_path, tiny_shards(tmp_path), "batch.micro_batch_size=5")
    run_ranks(_with_a_plan_for_others, 2, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

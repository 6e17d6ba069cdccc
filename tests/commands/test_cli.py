"""The command line as a person meets it: one sentence, exit code 2, nothing half-written."""

import json
import math
from pathlib import Path

import pytest
import yaml

from stacking_ds.cli import main
from stacking_ds.train.heldout import HeldOut
from tests.prose import tiny_shards, write_text
from tests.runs import small_recipe

NO_TRACEBACK = "Traceback"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    small_recipe(tmp_path, shards)
    return tmp_path / "small.yaml"


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must be refused; the one sentence it says."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = [line for line in printed.err.splitlines() if not line.startswith("laying out the rows")]
    assert said[0].startswith("stacking-ds: error: ")
    assert NO_TRACEBACK not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learnign_rate=1", "did you mean optimizer.learning_rate?"),
        ("stages.1.num_hidden_layers=1", "depths must grow"),
        ("data.path=nowhere", "nowhere holds no prepared data"),
        ("data.sequence_length=64", "max_position_embeddings"),
        ("batch.global_batch_size=1000000", "fewer than one global batch"),
        ("schedule.warmup_steps=11", "warmup_steps=11"),
        ("engine.deepspeed=zero9", "zero0, zero1, zero2"),
        ("model.num_attention_heads=5", "not divisible"),
        (
            "optimizer={name: lamb, learning_rate: 1e-3, lamb: {max_coef: 1}}",
            "mean optimizer.lamb.max_coeff?",
        ),
        ("optimizer={name: lamb, learning_rate: 1e-3, lamb: {kernel: apex}}", "ZeRO 0 alone"),
        ("optimizer={name: adamw, learning_rate: 1e-3, lamb: {}}", "does not go with name=adamw"),
        ("engine={deepspeed: zero3, cuda_graphs: true}", "which ZeRO 3 (zero3) moves"),
        ("engine={cuda_graphs: true, kernels: compile}", "cannot be captured"),
        ("engine={kernels: triton}", "but the model is on cpu: Triton needs"),
        ("engine={attention: flash}", "flash"),
        ("engine={attention: flash, precision: fp32}", "not in fp32"),
        ("engine={fp8: true, precision: fp16}", "not fp16"),
    ],
)
def test_a_recipe_that_cannot_be_trained(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    sentence: str,
) -> None:
    run_dir = tmp_path / "run"
    said = _refused(capsys, "train", "--recipe", recipe, "--run-dir", run_dir, "--set", override)
    assert sentence in said
    assert not run_dir.exists()


def test_a_depth_the_operator_cannot_reach(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _refused(
        capsys,
        "train", "--recipe", recipe, "--run-dir", tmp_path / "run",
        "--set", "growth.operator=interleave", "--set", "stages.2.num_hidden_layers=5",
    )  # fmt: skip
    assert "5" in said
    assert "stack" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"train_batch_size": 4096}, "4096"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin"),
        ({"steps_per_print": 0}, '"steps_per_print" is 0: it must be a whole number from 1 to'),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 1}}, "a multiple of 2 from"),
    ],
)
def test_a_deepspeed_json_that_does_not_fit(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    sentence: str,
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"zero_optimization": {"stage": 1}, **change}))
    said = _refused(
        capsys,
        "train", "--recipe", recipe, "--run-dir", tmp_path / "run",
        "--set", f"engine.deepspeed={broken}",
    )  # fmt: skip
    assert sentence in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "evaluate", "export"):
        assert "holds no run" in _refused(capsys, command, tmp_path)


def test_preparing_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "missing.txt" in _refused(capsys, "prepare", tmp_path / "missing.txt", "--out", out)
    (tmp_path / "empty.txt").write_text("\n\n")
    _refused(capsys, "prepare", tmp_path / "empty.txt", "--out", out)
    assert not out.exists()


def test_prepare_train_evaluate_export_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole story in one process, as a plain user without a launcher."""
    text, out, run_dir = write_text(tmp_path / "text.txt", 120), tmp_path / "out", tmp_path / "run"
    prepare = ["prepare", str(text), "--out", str(out), "--vocab-size", "400"]
    assert main([*prepare, "--heldout-fraction", "0.1"]) == 0
    assert "vocabulary 400" in capsys.readouterr().out
    assert main([*prepare, "--heldout-fraction", "0.1"]) == 0
    assert capsys.readouterr().out.startswith("re-using")

    small_recipe(tmp_path, out)
    train = ["train", "--recipe", str(tmp_path / "small.yaml"), "--run-dir", str(run_dir)]
    assert main([*train, "--dry-run"]) == 0
    assert not run_dir.exists()
    assert "layers" in capsys.readouterr().out
    assert main(train) == 0
    assert f"stacking-ds report {run_dir}" in capsys.readouterr().out
    assert main(["report", str(run_dir)]) == 0
    table = capsys.readouterr().out
    for words in (
        "held-out MLM loss",
        "unigram floor",
        "layer-steps: 22 against 40",
        "tensorboard",
    ):
        assert words in table
    assert "--resume" in _refused(capsys, *train)

    assert main(["evaluate", str(run_dir)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["mlm_loss"] == pytest.approx(last["eval/mlm_loss"], abs=1e-5)

    target = tmp_path / "early"
    checkpoint = ["--checkpoint", "step_00000004", "--out", str(target)]
    assert main(["export", str(run_dir), *checkpoint]) == 0
    assert str(target) in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 1
    assert "step_00000007" in _refused(capsys, "export", run_dir, "--checkpoint", "step_5")


def _train(recipe: Path, run_dir: Path, *settings: str) -> int:
    options = [word for setting in settings for word in ("--set", setting)]
    return main(["train", "--recipe", str(recipe), "--run-dir", str(run_dir), *options])


_WILD = (
    "optimizer.learning_rate=100",
    "optimizer.max_grad_norm=0.0",
    "schedule.shape=constant",
    "schedule.warmup_steps=0",
)


def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, often = tmp_path / "run", "evaluation.every_steps=1"
    assert _train(recipe, run_dir, *_WILD, "optimizer.name=lamb", often) == 3
    assert "error: the held-out loss is nan after " in capsys.readouterr().err
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/mlm_loss"] is None
    assert None not in [line["eval/mlm_loss"] for line in lines[:-1]]
    records = (run_dir / "attempts.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["outcome"] == "not_finite"
    assert main(["report", str(run_dir)]) == 0
    assert "state: diverged: held-out MLM loss is not finite" in capsys.readouterr().out


def test_a_checkpoint_whose_loss_is_not_finite_is_null_in_json(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = HeldOut(math.inf, 0.0, math.nan, 0.5, 235)
    for place in (
        "commands.results.read_config",
        "commands.results.require_shards",
        "train.plan.open_plan",
    ):
        monkeypatch.setattr(f"stacking_ds.{place}", lambda *_: None)
    monkeypatch.setattr("stacking_ds.commands.results.choose", lambda *_: Path("step_00000004"))
    monkeypatch.setattr("stacking_ds.train.from_checkpoint.run_heldout", lambda *_: found)
    assert main(["evaluate", "run"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out, parse_constant=pytest.fail) == {
        "checkpoint": "step_00000004",
        "mlm_loss": None,
        "mlm_accuracy": 0.0,
        "nsp_loss": None,
        "nsp_accuracy": 0.5,
        "mlm_targets": 235,
    }
    assert "error: the held-out loss of step_00000004 is nan" in said.err


def test_a_run_that_has_diverged_says_so_at_every_turn(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    one_stage = "stages=[{num_hidden_layers: 1, steps: 3}]"
    longer_at_last = "phases=[{from_step: 2, sequence_length: 32}]"
    settings = (one_stage, "data.sequence_length=24", longer_at_last, "checkpoint.every_steps=1")
    assert _train(recipe, run_dir, *_WILD, *settings) == 0
    said = capsys.readouterr().err
    assert said.count("the run has diverged: ") == 2, "while it trains, and at its end"
    assert said.rindex("the run has diverged: held-out") < said.index("exported for Hugging Face")
    records = (run_dir / "attempts.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["outcome"] == "complete"
    assert main(["report", str(run_dir)]) == 0
    assert "state: diverged: held-out MLM loss is " in capsys.readouterr().out
    for name, longest in (("step_00000002", 24), ("step_00000003", 32)):
        target = tmp_path / name
        assert main(["export", str(run_dir), "--checkpoint", name, "--out", str(target)]) == 0
        assert "stacking-ds: warning: the run has diverged: " in capsys.readouterr().err
        tokenizer = json.loads((target / "tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == longest


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, target = tmp_path / "run", tmp_path / "out"
    one_stage = ["--set", "stages=[{num_hidden_layers: 1, steps: 2}]"]
    assert main(["train", "--recipe", str(recipe), "--run-dir", str(run_dir), *one_stage]) == 0
    capsys.readouterr()
    path = run_dir / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    said = _refused(capsys, "export", run_dir, "--out", target)
    assert "rank_00000.safetensors is damaged" in said
    assert not target.exists()
    assert list(tmp_path.glob(".out*")) == []


def test_another_vocabulary_is_not_the_runs(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    small_recipe(tmp_path, shards, name="mine")
    stages = [
        "--set",
        "stages=[{num_hidden_layers: 1, steps: 2}]",
        "--set",
        "schedule.warmup_steps=1",
    ]
    train = ["train", "--recipe", str(tmp_path / "mine.yaml"), "--run-dir", str(run_dir), *stages]
    assert main(train) == 0
    (tmp_path / "other").mkdir()
    other = tiny_shards(tmp_path / "other", vocab_size=300)
    capsys.readouterr()
    assert "vocabulary" in _refused(capsys, "evaluate", run_dir, "--data", other)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("prepare", "train", "checkpoint", "evaluate", "export", "report"):
        assert command in text


def test_the_written_recipe_is_yaml(recipe: Path) -> None:
    assert yaml.safe_load(recipe.read_text())["name"] == "small"

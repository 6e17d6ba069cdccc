"""Real books with BERT's own vocabulary, through all three stages, at every ZeRO stage."""

from pathlib import Path

import pytest

from stacking_ds.config.recipe import load_run_config
from tests.prose import prepare
from tests.ranks import run_ranks
from tests.runs import losses, metrics, train_small

SHARED = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = SHARED / "vocab" / "bert-base-uncased-vocab.txt"
TRAIN = SHARED / "corpus"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not TRAIN.is_dir(), reason="the real corpus is not beside this checkout"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "shards"
    prepared = prepare(
        [str(path) for path in sorted(TRAIN.glob("train-*.jsonl.gz"))],
        folder,
        vocabulary=VOCABULARY,
        heldout_sources=[str(TRAIN / "heldout.jsonl.gz")],
    )
    assert prepared.manifest.vocab_size == 30522
    assert prepared.manifest.train.tokens > 8_000_000
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_sixty_steps_through_three_stages(shards: Path, tmp_path: Path, zero_stage: int) -> None:
    """The demo's recipe, shortened; 30,522 words are too many to learn much in 60 steps, but the
    loss must leave the uniform distribution's log(30522) = 10.3 far behind."""
    config = load_run_config(
        "demo",
        [
            f"data.path={shards}",
            "data.loader_workers=0",
            # as `make demo` without a GPU: few CPUs are fast in bf16
            "engine.precision=fp32",
            "stages=[{num_hidden_layers: 2, steps: 30}, {num_hidden_layers: 4, steps: 15}, "
            "{num_hidden_layers: 8, steps: 15}]",
            "schedule={warmup_steps: 10, shape: linear}",
            "batch.global_batch_size=32",
            "evaluation.every_steps=0",
            "evaluation.max_samples=128",
            "logging.every_steps=1",
            f"engine.deepspeed=zero{zero_stage}",
        ],
    )
    run_dir = tmp_path / "run"
    assert run_ranks(train_small, 2, config, run_dir, timeout_seconds=600) == [60, 60]
    evaluations = [line["eval/mlm_loss"] for line in metrics(run_dir) if "eval/mlm_loss" in line]
    assert len(evaluations) == 3
    assert evaluations[-1] < 8.2
    assert sum(losses(run_dir)[-5:]) < sum(losses(run_dir)[:5]) * 0.85
    assert (run_dir / "export" / "model.safetensors").is_file()

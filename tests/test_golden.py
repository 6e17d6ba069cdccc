"""Golden losses: the same computation gives the same numbers, change after change, at any number
of ranks.

`python -m tests.test_golden` writes them anew; do that only with a change that means to compute
something else, and say so in the changelog.
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import metrics, small_recipe, train_small

GOLDEN = Path(__file__).parent / "golden"
# processors, and numbers of ranks, order additions differently; ten steps make little of it
TOLERANCE = 5e-5

RECIPES = {
    # AdamW, ZeRO 1, layers stacked, moments carried, post-LN, next-sentence prediction
    "small": ("engine.deepspeed=zero1",),
    # LAMB, ZeRO 2, layers interleaved, moments reset, pre-LN, packed rows that get longer
    "lamb": (
        "optimizer={name: lamb, learning_rate: 1e-2, eps: 1e-6, betas: [0.9, 0.98]}",
        "engine.deepspeed=zero2",
        "growth={operator: interleave, moments: reset}",
        "model.layer_norm_position=pre",
        "data.packing=true",
        "data.variants=2",
        "data.masking=whole_words",
        "data.sequence_length=16",
        "phases=[{from_step: 5, sequence_length: 32, global_batch_size: 6, micro_batch_size: 2}]",
        "schedule={shape: cosine, warmup_steps: 2, at_boundary: rewarm, rewarm_steps: 2}",
        "evaluation.every_steps=5",
    ),
    # AdamW, ZeRO 3, one row at a time, documents without sentence pairs, masked spans
    "zero3": (
        "engine.deepspeed=zero3",
        "batch={global_batch_size: 6, micro_batch_size: 1}",
        "data.examples=documents",
        "data.masking=spans",
        "growth={operator: stack, moments: carry}",
        "schedule={shape: wsd, warmup_steps: 1, decay_steps: 4, final_ratio: 0.1}",
        "optimizer={learning_rate: 2e-3, weight_decay: 0.1, max_grad_norm: 0.5, "
        "learning_rate_batch_size: 24}",
        "engine.activation_checkpointing=full",
    ),
}
KEYS = (
    "train/mlm_loss",
    "train/nsp_loss",
    "eval/mlm_loss",
    "eval/nsp_loss",
    "optim/grad_norm",
    "optim/learning_rate",
    "tokens_seen",
    "num_hidden_layers",
)


def _numbers(
    folder: Path, shards: Path, recipe: str, world_size: int = 1
) -> dict[str, list[float]]:
    """What each step of a recipe gives, fp32, one thread a rank; what it does not have is left
    out."""
    nothing_left_behind = "checkpoint={every_steps: 1000, export_at_end: false}"  # it takes time
    config = small_recipe(folder, shards, *RECIPES[recipe], nothing_left_behind)
    run_ranks(train_small, world_size, config, folder / "run", timeout_seconds=240)
    lines = metrics(folder / "run")
    found = {key: [line[key] for line in lines if key in line] for key in KEYS}
    return {key: values for key, values in found.items() if values}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [
        ("small", 1),
        ("small", 2),
        ("small", 4),
        ("lamb", 1),
        ("lamb", 2),
        pytest.param("lamb", 4, marks=pytest.mark.slow),
        ("zero3", 1),
        ("zero3", 2),
        pytest.param("zero3", 4, marks=pytest.mark.slow),
    ],
)
def test_every_number_of_ranks_gives_the_golden_numbers(
    recipe: str, world_size: int, shards: Path, tmp_path: Path
) -> None:
    golden = json.loads((GOLDEN / f"{recipe}.json").read_text())
    now = _numbers(tmp_path, shards, recipe, world_size)
    assert now.keys() == golden.keys()
    for key, values in golden.items():
        assert now[key] == pytest.approx(values, rel=TOLERANCE), key


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as place:
            numbers = _numbers(Path(place), tiny_shards(Path(place)), name)
        (GOLDEN / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")

"""Golden losses: the same computation gives the same numbers, change after change.

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

GOLDEN = Path(__file__).parent / "golden" / "small.json"
# processors order the additions of a matrix product differently; ten steps make little of it
TOLERANCE = 5e-5


def _losses(folder: Path) -> dict[str, list[float]]:
    """Per-step training losses and the held-out losses of the small recipe, fp32, one thread."""
    config = small_recipe(folder, tiny_shards(folder), "engine.deepspeed=zero1")
    run_ranks(train_small, 1, config, folder / "run")
    lines = metrics(folder / "run")
    return {
        "train/mlm_loss": [line["train/mlm_loss"] for line in lines],
        "train/nsp_loss": [line["train/nsp_loss"] for line in lines],
        "eval/mlm_loss": [line["eval/mlm_loss"] for line in lines if "eval/mlm_loss" in line],
    }


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    now = _losses(tmp_path)
    assert now.keys() == golden.keys()
    for key, values in golden.items():
        assert now[key] == pytest.approx(values, rel=TOLERANCE), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(_losses(Path(folder)), indent=1) + "\n")

"""Recipes: strict, overridable, round trip; every mistake gets a sentence with its remedy."""

from pathlib import Path

import pytest
import yaml

from stacking_ds.config import RunConfig, changed_keys
from stacking_ds.errors import ConfigError, StageError
from stacking_ds.recipe import load_run_config

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "ds_configs" / "recipes").glob("*.yaml"))

RECIPE = """
name: small
data: {path: shards, sequence_length: 32}
model: {hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}
stages:
  - {num_hidden_layers: 2, steps: 10}
  - {num_hidden_layers: 4, tokens: 1000}
optimizer: {learning_rate: 1e-3}
batch: {global_batch_size: 8, micro_batch_size: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_a_recipe_and_its_defaults(recipe: str) -> None:
    config = load_run_config(recipe)
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.max_grad_norm == 1.0
    assert config.growth.moments == "reset"
    assert config.stages[1].tokens == 1000


def test_tokens_become_whole_steps(recipe: str) -> None:
    schedule = load_run_config(recipe).stage_schedule()
    # 8 rows of 32 slots are 256 tokens a step: 1000 tokens need 4 steps
    assert [(stage.num_hidden_layers, stage.steps) for stage in schedule.stages] == [
        (2, 10),
        (4, 4),
    ]


def test_overrides_reach_sections_and_stages(recipe: str) -> None:
    config = load_run_config(
        recipe,
        [
            "optimizer.learning_rate=2e-4",
            "stages.0.steps=7",
            "engine.precision=fp32",
            "schedule.shape=wsd",
            "optimizer.betas=[0.8, 0.9]",
        ],
    )
    assert config.optimizer.learning_rate == 2e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.stages[0].steps == 7
    assert (config.engine.precision, config.schedule.shape) == ("fp32", "wsd")


def test_a_run_config_is_frozen(recipe: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run_config(recipe).seed = 3  # type: ignore[misc]


def test_the_resolved_recipe_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    config = load_run_config(recipe, ["seed=5"])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_run_config(str(resolved)) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learning_rat=1", "did you mean learning_rate"),
        ("optimiser.name=adamw", "did you mean optimizer"),
        ("stages.0.step=3", "did you mean steps"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: .*'fast'"),
        ("optimizer.learning_rate=-1", "greater than 0 .got -1"),
        ("batch.global_batch_size=8.5", "batch.global_batch_size"),
        ("engine.precision=fp64", "'fp64'"),
        ("stages.0.tokens=5", "exactly one of steps and tokens"),
        ("stages=[]", "at least 1 item"),
        ("seed=[1", "is not a YAML value"),
        ("stages.7.steps=1", "positions 0 to 1"),
        ("name.deeper=1", "inside a plain value"),
        ("seed", "section.key=value"),
        ("optimizer.eps=.nan", "optimizer.eps"),
        ("seed=2024-01-01", "'2024-01-01'"),
    ],
)
def test_a_wrong_override_gets_a_sentence(recipe: str, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_run_config(recipe, [override])


def test_all_mistakes_come_in_one_message(recipe: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(
            recipe, ["optimizer.eps=-1", "model.hidden_siz=4", "batch.micro_batch_size=0"]
        )
    message = str(caught.value)
    assert "optimizer.eps" in message
    assert "hidden_size" in message
    assert "micro_batch_size" in message


def test_depths_that_shrink_are_refused(recipe: str) -> None:
    config = load_run_config(recipe, ["stages.1.num_hidden_layers=1"])
    with pytest.raises(StageError, match="grow"):
        config.stage_schedule()


def test_an_unknown_recipe_lists_what_exists() -> None:
    with pytest.raises(ConfigError, match="demo"):
        load_run_config("dmeo")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "mapping"),
        ("", "mapping"),
        ("seed: 1\nseed: 2\n", "seed is written twice"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_run_config(str(path))


def test_what_makes_it_another_run(recipe: str) -> None:
    before = load_run_config(recipe)
    same = load_run_config(recipe, ["engine.deepspeed=zero3", "batch.micro_batch_size=1"])
    other = load_run_config(recipe, ["optimizer.learning_rate=2e-3", "stages.0.steps=11"])
    assert changed_keys(before, same) == []
    assert changed_keys(before, other) == [
        "optimizer.learning_rate: 0.001 -> 0.002",
        "stages.0.steps: 10 -> 11",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_bundled_recipes_are_whole(path: Path) -> None:
    config = load_run_config(path.stem)
    assert isinstance(config, RunConfig)
    assert config.name == path.stem
    assert config.stage_schedule().total_steps > 0
    assert yaml.safe_load(config.to_yaml())["name"] == path.stem
    header = path.read_text().splitlines()[0]
    assert header.startswith("# "), "a recipe starts by saying what it is"


def test_bundled_recipes_exist() -> None:
    assert RECIPES

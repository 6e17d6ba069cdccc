"""Recipes: strict, overridable, round trip; every mistake gets a sentence with its remedy."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig, changed_keys
from stacking_ds.errors import ConfigError, StageError
from tests.config.test_yaml_text import ODD_YAML

REPOSITORY = Path(__file__).parents[2]
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

# nine lists of nine lists of nine lists ... of ones
BOMB = b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh")


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
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "learning_rate is not a key; did you mean optimizer.learning_rate?"),
        ("optimiser.name=adamw", "optimiser is not a key; did you mean optimizer?"),
        ("every_steps=3", "mean checkpoint.every_steps or evaluation.every_steps or logging."),
        ("stages.0.step=3", "did you mean stages.0.steps?"),
        ("optimizer.lr=1", "optimizer.lr is not a key; did you mean optimizer.learning_rate?"),
        ("batch.batch_size=8", "did you mean batch.global_batch_size or phases"),
        ("max_seq_length=8", "did you mean data.sequence_length or phases"),
        ("seed.deeper=1", "seed has no keys of its own"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, not 'fast'"),
        ("optimizer.learning_rate=-1", "must be above 0, not -1"),
        ("optimizer.learning_rate=1e999", "must be a finite number, not 1e999"),
        ("batch.global_batch_size=8.5", "batch.global_batch_size must be a whole number, not 8.5"),
        ("stages.0.steps=1e4", "must be a whole number, not 1e4: write 10000"),
        ("engine.precision=fp64", "must be 'fp32', 'bf16' or 'fp16', not 'fp64'"),
        ("engine.precision=on", "not on, which YAML reads as true"),
        ("data.packing=1", "data.packing must be true or false, not 1"),
        ("stages.0.tokens=5", "stages.0: give exactly one of steps and tokens"),
        ("stages=[]", "stages needs at least 1 of its parts"),
        ("optimizer.lamb={}", "optimizer: lamb=... does not go with name=adamw"),
        ("model.max_position_embeddings=16", "data.sequence_length=32 does not fit"),
        ("model.num_attention_heads=3", "model: hidden_size=32 is not divisible by num_att"),
        ("stages=3", "stages must be a list, in brackets, not 3"),
        ("optimizer.betas=[0.9, 0.99, 0.999]", "optimizer.betas can have at most 2 parts"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
        ("growth=", "growth has no value"),
        ("data=x", "data must be a section of keys, not 'x'"),
        ("seed=[1", "[1 is not a YAML value (expected ',' or ']'"),
        ("seed=[1]", "seed must be a whole number, not a list"),
        ("seed={a: 1}", "seed must be a whole number, not a section"),
        ("seed=~", "seed must be a whole number, not ~, which YAML reads as null"),
        ("stages.7.steps=1", "7 is not one of the list's positions 0 to 1"),
        ("stages.²=1", "² is not a position in the list stages"),
        ("stages.-1.steps=1", "-1 is not a position in the list stages"),
        ("phases.0.from_step=1", "the recipe writes no such list; give the whole list"),
        ("name.deeper=1", "name has no keys of its own"),
        ("seed", "it has no =; write section.key=value"),
        ("=3", "its key is not complete"),
        ("data..path=x", "its key is not complete"),
        ("optimizer.eps=.nan", "optimizer.eps must be a finite number, not .nan"),
        ("seed=2024-01-01", "seed must be a whole number, not '2024-01-01'"),
        ("seed=1:00", "seed: YAML reads 1:00 as 60, a number in base 60; write it in decimal"),
        ("cluster.timeout_seconds=12:30.5", "reads 12:30.5 as 750.5, a number in base 60"),
        ("seed=0123", "seed: YAML reads 0123 as 83, an octal number; write it in decimal"),
        ("seed=0b_", "seed must be a whole number, not '0b_'"),
        ("seed=" + "9" * 5000, "seed must be a whole number, not '9999"),
        ("seed=!!bool foo", "the tag !!bool is not for recipes"),
        ("seed=&a [*a]", "*a repeats no value that ends before it"),
        ("data.path=", "it is empty or holds a NUL character"),
        ("data.path=" + "x" * 5000, "it is longer than the 4,095 bytes of a path"),
        ("name=a/b", "it names a folder, so write at most 200 letters"),
    ],
)
def test_a_wrong_override_gets_a_sentence_and_the_blame(
    recipe: str, override: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, [override])
    message = str(caught.value)
    assert sentence in message
    assert message.count(f"--set {override[:30]}") == 1
    assert len(message) < 500
    assert recipe not in message


@pytest.mark.parametrize("override", ["steps=0", "num_hidden_layers=x", "tokens=5", "step=3"])
def test_of_a_wrong_only_stage_no_more_is_told(tmp_path: Path, override: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("  - {num_hidden_layers: 4, tokens: 1000}\n", ""))
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path), [f"stages.0.{override}"])
    assert "of its parts" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("seed", "at most 9,223,372,036,854,775,807"),
        ("batch.micro_batch_size", "at most 4,194,304"),
        ("data.loader_workers", "at most 256"),
        ("data.sequence_length", "at most 1,048,576"),
        ("stages.0.num_hidden_layers", "at most 10,000"),
        ("stages.1.tokens", "at most 1,000,000,000,000,000,000"),
        ("cluster.timeout_seconds", "at most 2,592,000"),
        ("optimizer.eps", "at most 1,"),
    ],
)
def test_sizes_have_upper_bounds(recipe: str, key: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_run_config(recipe, [f"{key}={10**21}"])
    assert str(caught.value).endswith(f"not {10**21}")


def test_every_number_has_an_upper_bound() -> None:
    unbounded = []
    for key, field in _leaves(RunConfig):
        kinds = get_args(field.annotation) or (field.annotation,)
        if int in kinds or float in kinds or any(get_origin(kind) is Annotated for kind in kinds):
            inner = [part for kind in kinds for part in getattr(kind, "__metadata__", ())]
            bounds = [*field.metadata, *(m for part in inner for m in part.metadata)]
            if not any(hasattr(bound, "le") or hasattr(bound, "lt") for bound in bounds):
                unbounded.append(key)
    assert unbounded == []


@pytest.mark.parametrize(
    "text",
    ["data #1", "2024", "on", "~", "1e5", "0123", "a: b", "[x", "*x", "'q'", " x ", "&", "é"],
)
def test_keys_that_take_text_take_it_as_it_is(recipe: str, tmp_path: Path, text: str) -> None:
    config = load_run_config(recipe, [f"data.path={text}"])
    assert config.data.path == text
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_run_config(str(resolved)) == config


def test_a_home_is_found_that_no_shell_has_found(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/of/me")
    config = load_run_config(recipe, ["data.path=~/shards", "engine.deepspeed=~/z.json"])
    assert (config.data.path, config.engine.deepspeed) == ("/of/me/shards", "/of/me/z.json")
    assert load_run_config(recipe, ["data.path=~x"]).data.path == "~x"


def test_blanks_around_the_sign_are_not_the_value(recipe: str) -> None:
    config = load_run_config(recipe, ["data.path = my data ", "seed = 4"])
    assert (config.data.path, config.seed) == ("my data", 4)


@pytest.mark.parametrize("text", ["2024", "on", "1e5", "~", "0123", "1:00"])
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("path: shards", f"path: {text}"))
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path))
    assert f"recipe {path}: line 3: data.path must be text, and YAML reads {text}" in str(
        caught.value
    )
    assert str(caught.value).endswith(f'write "{text}" in quotes')
    path.write_text(RECIPE.replace("path: shards", f'path: "{text}"'))
    assert load_run_config(str(path)).data.path == text


def test_of_two_overrides_for_a_key_the_last_wins(recipe: str) -> None:
    whole = "stages=[{num_hidden_layers: 1, steps: 3}]"
    config = load_run_config(recipe, ["seed=1", "seed=2", "stages.0.steps=5", whole])
    assert config.seed == 2
    assert [stage.steps for stage in config.stages] == [3]


def test_a_section_that_is_null_can_be_written_into(recipe: str, tmp_path: Path) -> None:
    resolved = tmp_path / "config.yaml"
    resolved.write_text(load_run_config(recipe).to_yaml())
    assert "lamb: null" in resolved.read_text()
    config = load_run_config(str(resolved), ["optimizer.name=lamb", "optimizer.lamb.max_coeff=2"])
    assert config.optimizer.lamb is not None
    assert config.optimizer.lamb.max_coeff == 2


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE + "seed: 1.5\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(
            str(path),
            ["optimizer.eps=-1", "model.hidden_siz=4", "batch.micro_batch_size=0", "data.path"],
        )
    assert str(caught.value) == (
        f"recipe {path}: line 10: seed must be a whole number, not 1.5; "
        "--set optimizer.eps=-1: optimizer.eps must be above 0, not -1; "
        "--set batch.micro_batch_size=0: batch.micro_batch_size must be at least 1, not 0; "
        "--set model.hidden_siz=4: model.hidden_siz is not a key; did you mean model.hidden_size?; "
        "--set data.path: it has no =; write section.key=value"
    )


def test_thousands_of_mistakes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE + "".join(f"key{n}: {n}\n" for n in range(3000)))
    with pytest.raises(ConfigError, match=r"; and 2,980 more$") as caught:
        load_run_config(str(path))
    assert len(str(caught.value)) < 6000


WRONG = ("x", "-1.5", "1e999", "~", "[1, x]", "{a: 1}", "on", "0123", "")


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        yield f"{prefix}{name}", field
        if inner is not None:
            step = "0." if get_origin(field.annotation) is tuple else ""
            yield from _leaves(inner, f"{prefix}{name}.{step}")


def test_no_message_speaks_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    phases = "phases: [{from_step: 3, micro_batch_size: 2}]\n"
    path.write_text(RECIPE.replace("1e-3}", "1e-3, name: lamb, lamb: {}}") + phases)
    refused = 0
    for key, _ in _leaves(RunConfig):
        for value in WRONG:
            try:
                load_run_config(str(path), [f"{key}={value}"])
            except ConfigError as error:
                said, refused = str(error), refused + 1
                words = ("Input should", "Pydantic", "pydantic", "type=", "valid", "None")
                assert not [word for word in words if word in said]
                assert f"--set {key}={value}"[:40] in said
    assert refused > 300


_ODD = st.lists(st.sampled_from(ODD_YAML) | st.text(max_size=4), max_size=8).map("".join)
_KEYS = st.sampled_from([key for key, _ in _leaves(RunConfig)]) | _ODD


@settings(max_examples=100, deadline=3000, suppress_health_check=list(HealthCheck))
@given(
    file=st.binary(max_size=200) | _ODD.map(lambda odd: (RECIPE + odd).encode("utf-8", "replace")),
    overrides=st.lists(st.tuples(_KEYS, _ODD).map("=".join), max_size=3),
)
def test_whatever_is_given_only_a_sentence_comes_of_it(
    tmp_path: Path, file: bytes, overrides: list[str]
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(file)
    for given_overrides in (overrides, []):
        with contextlib.suppress(ConfigError):
            config = load_run_config(str(path), given_overrides)
            path.write_text(config.to_yaml())
            assert load_run_config(str(path)) == config


def test_depths_that_shrink_are_refused(recipe: str) -> None:
    config = load_run_config(recipe, ["stages.1.num_hidden_layers=1"])
    with pytest.raises(StageError, match="grow"):
        config.stage_schedule()


@pytest.mark.parametrize("name", ["dmeo", "x" * 5000 + ".yaml", "a\0.yaml", "~nobody/x.yaml"])
def test_an_unknown_recipe_lists_what_exists(name: str) -> None:
    with pytest.raises(ConfigError, match=r"one of .*demo") as caught:
        load_run_config(name)
    assert len(str(caught.value)) < 1000


def test_what_is_no_regular_file_is_no_recipe(tmp_path: Path) -> None:
    fifo, folder, circle = (tmp_path / f"{name}.yaml" for name in ("fifo", "folder", "circle"))
    os.mkfifo(fifo)
    folder.mkdir()
    circle.symlink_to(circle)
    for path, reason in ((fifo, "regular file"), (folder, "director|regular"), (circle, "links")):
        with pytest.raises(ConfigError, match=f"cannot read recipe {path}: .*{reason}"):
            load_run_config(str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"a: [1", "not valid YAML: line 1: expected ',' or ']'"),
        (b"- 1", "must be a mapping of sections, not a list"),
        (b"", "must be a mapping of sections, not nothing"),
        (b"seed: 1\nseed: 2\n", "line 2: seed is written twice"),
        (b"seed: 1\n---\nseed: 2\n", "line 2: a second document begins"),
        (b"name: sch\xe4", "cannot read recipe .*: byte 9 is not UTF-8"),
        (b"name: a\0b", "character 8 is not for text files"),
        (b'name: "\\UFFFFFFFF"', "is not valid YAML"),
        (b"&a {b: *a}", "line 1: .a repeats no value that ends before it"),
        (b"[" * 100_000, "nested deeper than 32 levels"),
        (b"? [a]\n: 1\n", "a key has to be plain text"),
        (b"#" * 300_000, "it has more than 262,144 bytes"),
        (b"a: &a [1,1,1,1,1,1,1,1,1]\n" + BOMB, "more than 10,000 values, aliases counted"),
        (b"name: !!python/object:os.system x", "the tag !!python/object:os.system is not for"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: bytes, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
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


def test_reading_a_recipe_needs_nothing_heavy() -> None:
    heavy = ("torch", "deepspeed", "pandas", "pyarrow", "transformers")
    code = (
        "import sys, stacking_ds.config.recipe, stacking_ds.engine.ds_json\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("kind", [list, tuple])
def test_python_may_give_lists(kind: Any) -> None:
    given = yaml.safe_load(RECIPE)
    given["optimizer"] = {"learning_rate": 1e-3, "betas": kind([0.9, 0.98])}
    given["stages"] = kind(given["stages"])
    given["phases"] = kind([{"from_step": 5, "sequence_length": 64}])
    config = RunConfig(**given)
    assert config.optimizer.betas == (0.9, 0.98)
    assert (len(config.stages), len(config.phases)) == (2, 1)
    assert RunConfig(**{**given, "stages": config.stages}) == config


@pytest.mark.parametrize("betas", [{0.9, 0.98}, "ab", [0.9, "0.98"], {0.9: 0.98}])
def test_nothing_else_becomes_a_list(betas: Any) -> None:
    given = {**yaml.safe_load(RECIPE), "optimizer": {"learning_rate": 1e-3, "betas": betas}}
    with pytest.raises(ValidationError, match=r"optimizer\.betas"):
        RunConfig(**given)

"""Growth is exact: masters, moments and logits equal those stacked by plain torch, bit for bit."""

import itertools
from typing import Any

import pytest
import torch

from stacking_ds import zero
from stacking_ds.distributed import World
from stacking_ds.engine import release_engine
from stacking_ds.errors import StageError
from stacking_ds.fragments import MASTER, MOMENTS, Cut, Fragment
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.state import Moments, capture, install
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import tiny_batch, tiny_model

DEPTHS = (2, 4, 8)
Cases = list[tuple[int, str, str]]


# ------------------------------------------------------------------ on one process


class _Alone:
    rank, size = 0, 1

    def sum(self, values: Any) -> list[float]:
        return list(values)


def _fragment(name: str, values: list[float], start: int = 0, numel: int | None = None) -> Fragment:
    views = {MASTER: torch.tensor(values), "exp_avg": torch.tensor(values) * 10}
    numel = numel or len(values)
    return Fragment(name, (numel,), start, start + len(values), views, Cut(numel, numel))


def _layer(index: int) -> str:
    return f"bert.encoder.layer.{index}.weight"


def test_captured_values_are_the_hosts_own() -> None:
    live = _fragment("w", [1.0, 2.0])
    captured = capture([live])
    live.views[MASTER].zero_()
    assert captured.fragments[0].views[MASTER].tolist() == [1.0, 2.0]


def test_copies_are_written_by_name_and_are_not_aliases() -> None:
    captured = capture([_fragment(_layer(0), [1.0, 2.0]), _fragment(_layer(1), [3.0, 4.0])])
    targets = [_fragment(_layer(index), [0.0, 0.0]) for index in range(4)]
    install(targets, captured, layer_map("stack", 2, 4), "carry", _Alone())
    assert [target.views[MASTER].tolist() for target in targets] == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert targets[3].views["exp_avg"].tolist() == [30, 40]
    targets[0].views[MASTER].fill_(9.0)
    assert targets[2].views[MASTER].tolist() == [1, 2]
    assert captured.fragments[0].views[MASTER].tolist() == [1, 2]


def test_reset_moments_become_zero() -> None:
    captured = capture([_fragment("w", [1.0, 2.0])])
    target = _fragment("w", [7.0, 7.0])
    install([target], captured, None, "reset", _Alone())
    assert target.views[MASTER].tolist() == [1, 2]
    assert target.views["exp_avg"].tolist() == [0, 0]


def test_a_part_of_what_was_held_is_enough() -> None:
    captured = capture([_fragment("w", [1.0, 2.0, 3.0, 4.0])])
    target = _fragment("w", [0.0, 0.0], start=1, numel=4)
    with pytest.raises(StageError, match="did not arrive whole"):  # the others' part is missing
        install([target], captured, None, "carry", _Alone())
    assert target.views[MASTER].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (_fragment("w", [1.0, 2.0], start=1, numel=4), r"needs elements \[0, 2\), but \[1, 3\)"),
        (_fragment("w", [1.0, 2.0]), r"of \(2,\) were held"),
        (_fragment("v", [1.0, 2.0], numel=4), "does not have"),
    ],
)
def test_elements_that_are_not_here_are_an_error(held: Fragment, what: str) -> None:
    with pytest.raises(StageError, match=what):
        install([_fragment("w", [0.0, 0.0], numel=4)], capture([held]), None, "carry", _Alone())


class _Elsewhere(_Alone):
    """Another rank whose contribution differs, as after a copy gone wrong there."""

    def __init__(self, place: int) -> None:
        self.place = place

    def sum(self, values: Any) -> list[float]:
        return [value + (index == self.place) for index, value in enumerate(values)]


def test_what_goes_wrong_on_another_rank_is_an_error_here() -> None:
    captured = capture([_fragment("w", [1.0, 2.0])])
    with pytest.raises(StageError, match=r"1 pieces .* not on the rank"):
        install([_fragment("w", [0.0, 0.0])], captured, None, "carry", _Elsewhere(0))
    for statistic in (1, 2, 3):
        with pytest.raises(StageError, match="exp_avg of w did not arrive whole"):
            install([_fragment("w", [0.0, 0.0])], captured, None, "carry", _Elsewhere(statistic))


# ------------------------------------------------------------------ on engines


def _grow_through(world: World, cases: Cases) -> dict[tuple[int, str, str], Any]:
    return {case: _grow(world, *case) for case in cases}


def _grow(world: World, zero_stage: int, precision: str, moments: Moments) -> Any:
    """At every depth what arrived; before every growth one step, so that all moments differ."""
    engine = start_engine(world, zero_stage, precision, depth=DEPTHS[0])
    arrived = []
    for old, new in itertools.pairwise(DEPTHS):
        train_engine(world, engine, range(1))
        before = whole_state(world, engine)
        step = zero.optimizer_step(engine)
        captured = capture(zero.fragments(engine))
        release_engine(engine)
        engine = start_engine(world, zero_stage, precision, depth=new, seed=99)
        if moments == "carry":
            zero.seed_moments(engine, step)
        layers = layer_map("stack", old, new)
        install(zero.fragments(engine), captured, layers, moments, world)
        zero.refresh(engine)
        tied = engine.module.cls.predictions.decoder.weight
        assert tied is engine.module.bert.embeddings.word_embeddings.weight
        after = whole_state(world, engine)
        arrived.append((new, before, after, _logits(engine), zero.optimizer_step(engine)))
    train_engine(world, engine, range(1))
    release_engine(engine)
    return arrived if world.is_first else None


def _logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tiny_batch(7)
    with torch.no_grad():
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
        )
    return mlm_logits.clone(), nsp_logits.clone()


def _check(arrived: Any, precision: str, moments: Moments) -> None:
    for steps, (new, before, after, logits, step) in enumerate(arrived, 1):
        old = new // 2
        layers = {_prefix(index): _prefix(index % old) for index in range(new)}
        reference = tiny_model(new, seed=1)
        assert after.keys() == dict(reference.named_parameters()).keys()
        for name, views in after.items():
            source = before[_stacked(name, layers)]
            assert torch.equal(views[MASTER], source[MASTER]), name
            expected = {key: source[key] for key in MOMENTS} if moments == "carry" else {}
            assert {MASTER, *expected} == set(views)
            assert all(torch.equal(views[key], expected[key]) for key in expected), name
        reference.load_state_dict(
            {name: views[MASTER] for name, views in after.items()}, strict=False
        )
        if precision == "bf16":
            reference = reference.bfloat16()
        for found, wanted in zip(logits, _logits(reference), strict=True):
            assert torch.equal(found, wanted)
        assert step == (steps if moments == "carry" else 0)
        # the test would prove nothing if layers, or their moments, were alike
        query = [before[f"{_prefix(index)}attention.self.query.weight"] for index in range(old)]
        assert not torch.equal(query[0][MASTER], query[1][MASTER])
        assert not torch.equal(query[0]["exp_avg"], query[1]["exp_avg"])


def _prefix(index: int) -> str:
    return f"bert.encoder.layer.{index}."


def _stacked(name: str, layers: dict[str, str]) -> str:
    for new, old in layers.items():
        if name.startswith(new):
            return name.replace(new, old)
    return name


COVERING: list[tuple[int, Cases]] = [
    (1, [(1, "bf16", "carry"), (3, "fp32", "reset")]),
    (2, [(0, "bf16", "carry"), (1, "fp32", "carry"), (3, "bf16", "carry")]),
    (3, [(0, "fp32", "carry"), (2, "bf16", "reset"), (2, "fp32", "carry")]),
    (3, [(3, "fp32", "carry"), (1, "bf16", "reset")]),
]
WHOLE: list[tuple[int, Cases]] = [
    (ranks, [(stage, precision, moments) for precision in ("fp32", "bf16")
             for moments in ("carry", "reset")])
    for ranks in (1, 2, 3, 4) for stage in (0, 1, 2, 3)
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "cases"), COVERING)
def test_growth_is_exact(ranks: int, cases: Cases) -> None:
    results = run_ranks(_grow_through, ranks, cases)
    for case in cases:
        _check(results[0][case], case[1], case[2])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), WHOLE)
def test_growth_is_exact_everywhere(ranks: int, cases: Cases) -> None:
    test_growth_is_exact(ranks, cases)


def _grow_into_another_layout(world: World) -> str:
    engine = start_engine(world, 1, depth=2)
    captured = capture(zero.fragments(engine))
    release_engine(engine)
    engine = start_engine(world, 3, depth=4)
    layers = layer_map("stack", 2, 4)
    try:
        install(zero.fragments(engine), captured, layers, "reset", world)
    except StageError as error:
        return str(error)
    return "no error"


def test_another_layout_is_refused_on_every_rank() -> None:
    for message in run_ranks(_grow_into_another_layout, 2):
        assert "keep world size, ZeRO stage and parameter groups" in message

"""Growth is exact: masters, moments and logits equal those stacked by plain torch, bit for bit."""

import itertools
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import StageError
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import Moments, capture, fill, install
from stacking_ds.sharding import reshard
from stacking_ds.sharding.fragments import MASTER, MOMENTS, Cut, Fragment
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import tiny_batch, tiny_inputs, tiny_model

DEPTHS = (2, 4, 8)
Cases = list[tuple[int, str, str]]


# ------------------------------------------------------------------ on one process


class _Alone:
    rank, size = 0, 1

    def sum(self, values: Any) -> list[float]:
        return list(values)

    def all_to_all(self, outgoing: Any, incoming_sizes: Any) -> Any:
        raise AssertionError("nothing has to move")


def _fragment(name: str, values: list[float]) -> Fragment:
    views = {MASTER: torch.tensor(values), "exp_avg": torch.tensor(values) * 10}
    numel = len(values)
    return Fragment(name, (numel,), 0, numel, views, Cut(numel, numel))


def _layer(index: int) -> str:
    return f"bert.encoder.layer.{index}.weight"


def test_captured_values_are_the_hosts_own() -> None:
    live = _fragment("w", [1.0, 2.0])
    captured = live.on_host()
    live.views[MASTER].zero_()
    assert captured.views[MASTER].tolist() == [1.0, 2.0]


def test_copies_are_written_by_name_and_are_not_aliases() -> None:
    held = [_fragment(_layer(0), [1.0, 2.0]), _fragment(_layer(1), [3.0, 4.0])]
    targets = [_fragment(_layer(index), [0.0, 0.0]) for index in range(4)]
    fill(targets, held, layer_map("stack", 2, 4), "carry", _Alone())
    assert [target.views[MASTER].tolist() for target in targets] == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert targets[3].views["exp_avg"].tolist() == [30, 40]
    targets[0].views[MASTER].fill_(9.0)
    assert targets[2].views[MASTER].tolist() == [1, 2]
    assert held[0].views[MASTER].tolist() == [1, 2]


def test_reset_moments_become_zero() -> None:
    held = [_fragment("w", [1.0, 2.0])]
    target = _fragment("w", [7.0, 7.0])
    fill([target], held, None, "reset", _Alone())
    assert target.views[MASTER].tolist() == [1, 2]
    assert target.views["exp_avg"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (_fragment("w", [1.0, 2.0]), r"w \(4,\) cannot be grown: the old model has w as \(2,\)"),
        (_fragment("v", [1.0, 2.0, 3.0, 4.0]), "the old model has no w; stages may differ in"),
    ],
)
def test_another_model_cannot_be_grown(held: Fragment, what: str) -> None:
    with pytest.raises(StageError, match=what):
        fill([_fragment("w", [0.0] * 4)], [held], None, "carry", _Alone())


class _Elsewhere(_Alone):
    """Another rank whose contribution differs, as after a copy gone wrong there."""

    def __init__(self, place: int) -> None:
        self.place = place

    def sum(self, values: Any) -> list[float]:
        return [value + (index == self.place) for index, value in enumerate(values)]


def test_what_goes_wrong_on_another_rank_is_an_error_here() -> None:
    held = [_fragment("w", [1.0, 2.0])]
    for statistic in (0, 1, 2):
        with pytest.raises(StageError, match="exp_avg of w did not arrive whole"):
            fill([_fragment("w", [0.0, 0.0])], held, None, "carry", _Elsewhere(statistic))


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
        state = capture(engine)
        release_engine(engine)
        engine = start_engine(world, zero_stage, precision, depth=new, seed=99)
        install(state, engine, layer_map("stack", old, new), moments, world)
        tied = engine.module.cls.predictions.decoder.weight
        assert tied is engine.module.bert.embeddings.word_embeddings.weight
        after = whole_state(world, engine)
        arrived.append((new, before, after, _logits(engine), sharded_state.optimizer_step(engine)))
    train_engine(world, engine, range(1))
    release_engine(engine)
    return arrived if world.is_first else None


def _logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tiny_batch(7)
    with torch.no_grad():
        mlm_logits, nsp_logits = model(*tiny_inputs(batch))
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
    (2, [(1, "fp32", "carry"), (3, "bf16", "reset")]),
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


# ---------------------------------------------------------- between different layouts


def _move(world: World, old: tuple[int, str], new: tuple[int, str], bucket_elements: int) -> Any:
    """From one ZeRO stage to another at a boundary; what the ranks sent, and what arrived."""
    reshard._BUCKET_ELEMENTS = bucket_elements
    engine = start_engine(world, *old, depth=2)
    train_engine(world, engine, range(1))
    before = whole_state(world, engine)
    state = capture(engine)
    release_engine(engine)
    engine = start_engine(world, *new, depth=4, seed=99)
    counted = _Counting(world)
    install(state, engine, layer_map("stack", 2, 4), "carry", counted)
    after = whole_state(world, engine)
    logits = _logits(engine)
    train_engine(world, engine, range(1))
    release_engine(engine)
    return before, after, logits, counted.rounds


class _Counting(World):
    """A world that remembers how many elements this rank sent in each round."""

    def __init__(self, world: World) -> None:
        super().__init__(**vars(world))
        object.__setattr__(self, "rounds", [])

    def all_to_all(self, outgoing: Any, incoming_sizes: Any) -> Any:
        self.rounds.append((sum(part.numel() for part in outgoing), sum(incoming_sizes)))
        return super().all_to_all(outgoing, incoming_sizes)


MOVES = [
    pytest.param(1, 3, marks=pytest.mark.slow),
    (3, 1),
    pytest.param(3, 0, marks=pytest.mark.slow),
    (0, 2),
    pytest.param(2, 3, marks=pytest.mark.slow),
    pytest.param(1, 2, marks=pytest.mark.slow),
    (0, 0),
]


@pytest.mark.parametrize(("old", "new"), MOVES)
def test_state_moves_to_another_zero_stage(old: int, new: int) -> None:
    ranks, bucket = 2 + old % 2, 700
    results = run_ranks(_move, ranks, (old, "fp32"), (new, "bf16"), bucket)
    before, after, logits, _ = results[0]
    layers = {_prefix(index): _prefix(index % 2) for index in range(4)}
    for name, views in after.items():
        source = before[_stacked(name, layers)]
        assert views.keys() == {MASTER, *MOMENTS}
        assert all(torch.equal(views[key], source[key]) for key in views), name
    reference = tiny_model(4, seed=1)
    reference.load_state_dict({n: views[MASTER] for n, views in after.items()}, strict=False)
    for found, wanted in zip(logits, _logits(reference.bfloat16()), strict=True):
        assert torch.equal(found, wanted)
    rounds = [result[3] for result in results]
    if old == 0 or {old, new} <= {1, 2}:
        assert rounds == [[]] * ranks  # every rank has what it needs already
    else:
        sent, received = (sum(r[i] for rank in rounds for r in rank) for i in (0, 1))
        assert sent == received > 0
        assert all(got <= bucket for rank in rounds for _, got in rank)
        needed = 3 * sum(views[MASTER].numel() for views in after.values())
        if new != 0:
            assert sent < needed  # what a rank has, it does not get again

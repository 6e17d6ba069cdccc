"""The Triton form of the LAMB step is the reference, and compiles for every GPU we know.

Whether Triton interprets is settled when it is imported. So where there is no GPU one half of this
module runs here, and the other in a process of its own.
"""

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stacking_ds.optim.lamb.contract import Hyper, Item, LambKernel, ReferenceLamb, trust_ratio
from stacking_ds.sharding.fragments import Shard, Span

pytest.importorskip("triton", reason="Triton is not installed")
from triton import language as tl

from stacking_ds.optim.lamb import triton_lamb
from tests.cubins import (
    INTERPRETED,
    IS_OTHER_HALF,
    NoWaiting,
    believe_in_a_device,
    compiled,
    run_other_half,
    spills,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # then `make gpu-check` runs them
HYPER = Hyper(1e-2, 0.9, 0.999, 1e-6, 0.01, True, 0.0, float("inf"), step=1)
TOLERANCE = 1e-6


# --------------------------------------------------------------------------- steps to compare


@dataclass(frozen=True)
class Flat:
    """A flat tensor: places (parameter, offset, numel) between padding that is not a number."""

    places: tuple[tuple[int, int, int], ...]
    hyper: Hyper = HYPER
    low: torch.dtype | None = torch.float32
    misaligned: int = 0  # elements after an address that a vector could start at
    low_misaligned: int = 0
    weights: float = 1.0
    gradients: float = 1.0

    def item(self, seed: int) -> Item:
        """The item, filled by the seed."""
        generator = torch.Generator().manual_seed(seed)
        size = max((offset + numel for _, offset, numel in self.places), default=0) + 7

        def filled(factor: float, misaligned: int, dtype: torch.dtype | None) -> torch.Tensor:
            flat = torch.full((size + misaligned,), float("nan"), dtype=dtype, device=DEVICE)
            for _, offset, numel in self.places:
                # all far from 0, so that no sum loses the digits that are compared
                values = (torch.rand(numel, generator=generator) + 0.5) * factor
                flat[misaligned + offset :][:numel] = values.to(DEVICE, dtype)
            return flat[misaligned:]

        spans = tuple(Span(f"p{i}", i, offset, numel) for i, offset, numel in self.places)
        low = filled(1.0, self.low_misaligned, self.low) if self.low else None
        weights, exp_avg, exp_avg_sq, gradient = (
            filled(factor, self.misaligned, torch.float32)
            for factor in (self.weights, self.gradients, self.gradients, self.gradients)
        )
        shard = Shard(weights, spans, low)
        return Item(shard, exp_avg, exp_avg_sq.square_(), self.hyper, gradient)


def step(
    kernel: LambKernel,
    flats: Sequence[Flat],
    *,
    steps: int = 1,
    scale: float | None = None,
) -> tuple[list[Item], torch.Tensor]:
    """Take steps; flat tensors with the same numbers share one `Hyper`."""
    items = [flat.item(seed) for seed, flat in enumerate(flats)]
    before = [padding_and_gradient(item) for item in items]
    parameters = 1 + max((i for flat in flats for i, _, _ in flat.places), default=0)
    factor = None if scale is None else torch.tensor([scale], device=DEVICE)
    for number in range(1, steps + 1):
        hypers = {item.hyper: replace(item.hyper, step=number) for item in items}
        items = [item._replace(hyper=hypers[item.hyper]) for item in items]
        squares_2P = torch.zeros(2, parameters, dtype=torch.float64, device=DEVICE)
        if items:
            kernel.accumulate(items, squares_2P, factor)
        kernel.apply(items, squares_2P)
    for item, old in zip(items, before, strict=True):
        assert all(same_bits(a, b) for a, b in zip(padding_and_gradient(item), old, strict=True))
    return items, squares_2P


def stepped(kernel: LambKernel, items: list[Item], squares_2P: torch.Tensor) -> None:
    kernel.accumulate(items, squares_2P.zero_(), None)
    kernel.apply(items, squares_2P)


def padding_and_gradient(item: Item) -> list[torch.Tensor]:
    """What no step may change."""
    padding = torch.ones(item.gradient.numel(), dtype=torch.bool, device=DEVICE)
    for span in item.shard.spans:
        padding[span.offset : span.offset + span.numel] = False
    tensors = (item.shard.flat, item.exp_avg, item.exp_avg_sq, item.shard.low)
    return [item.gradient.clone(), *(tensor[padding] for tensor in tensors if tensor is not None)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    apart = float((found.double() - expected.double()).norm())
    return apart and apart / float(expected.double().norm())


def compare(flats: Sequence[Flat], **how: Any) -> None:
    """Every parameter's state after the Triton form's steps is that of the reference."""
    expected, expected_2P = step(ReferenceLamb(), flats, **how)
    found, found_2P = step(triton_lamb.TritonLamb(), flats, **how)
    for item, wanted in zip(found, expected, strict=True):
        for span in item.shard.spans:
            part = slice(span.offset, span.offset + span.numel)
            weights, low = item.shard.flat[part], item.shard.low
            assert distance(weights, wanted.shard.flat[part]) <= TOLERANCE
            assert distance(item.exp_avg[part], wanted.exp_avg[part]) <= TOLERANCE
            assert distance(item.exp_avg_sq[part], wanted.exp_avg_sq[part]) <= TOLERANCE
            if low is not None:
                # the interpreter truncates to bfloat16
                rounding = 5e-3 if INTERPRETED and low.dtype is torch.bfloat16 else 0.0
                assert distance(low[part], weights.to(low.dtype)) <= rounding
    for one, other in zip(found_2P.flatten(), expected_2P.flatten(), strict=True):
        assert distance(one, other) <= 2 * TOLERANCE  # being squares


@pytest.mark.parametrize(
    ("squares", "ratio"),
    [((4.0, 1.0), 1.5), ((1.0, 4.0), 1.2), ((0.0, 4.0), 1.0), ((4.0, 0.0), 1.0), ((0.0, 0.0), 1.0)],
)
def test_bounds_are_for_a_ratio_of_two_norms(squares: tuple[float, float], ratio: float) -> None:
    assert trust_ratio(*squares, replace(HYPER, min_coeff=1.2, max_coeff=1.5)) == ratio


class TestAgainstTheReference:
    __test__ = INTERPRETED or DEVICE.type == "cuda"

    @pytest.mark.parametrize("numel", [1, 2, 3, 31, 1023, 1025])
    @pytest.mark.parametrize("offset", [0, 5, 32])
    def test_odd_sizes(self, numel: int, offset: int) -> None:
        compare([Flat(((0, offset, numel),))])

    @pytest.mark.parametrize("offset", [0, 37, 2048])
    def test_several_chunks(self, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_lamb, "CHUNK_ELEMENTS", 2048)
        compare([Flat(((0, offset, 5000),))])

    def test_chunks_as_on_a_gpu(self) -> None:
        compare([Flat(((0, 3, triton_lamb.CHUNK_ELEMENTS + 1000), (1, 18000, 5)))])

    def test_several_spans_between_padding(self) -> None:
        compare([Flat(((2, 3, 1030), (0, 1040, 2100), (1, 3140, 1), (3, 3150, 900)))])

    @pytest.mark.parametrize(("flat", "low"), [(1, 0), (2, 0), (3, 1), (4, 4), (0, 1)])
    def test_addresses_that_no_vector_starts_at(self, flat: int, low: int) -> None:
        compare([Flat(((0, 0, 2080),), low=torch.float16, misaligned=flat, low_misaligned=low)])

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, None])
    def test_dtypes_of_the_copy(self, low: torch.dtype | None) -> None:
        compare([Flat(((0, 0, 1024), (1, 1030, 50)), low=low)])

    def test_each_item_has_its_own_numbers_and_perhaps_a_copy(self) -> None:
        first = replace(HYPER, learning_rate=0.5, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.0)
        second = replace(HYPER, weight_decay=0.3, layer_adaptation=False)
        one = Flat(((0, 0, 1500), (4, 1600, 70)), first, low=None, gradients=-1.0)
        two = Flat(((1, 9, 70),), second, torch.float16, weights=-1.0)
        three = Flat(((2, 0, 300), (3, 300, 40)), replace(HYPER, max_coeff=0.5), torch.float16)
        compare([one, two, three], steps=3)

    def test_gradients_are_scaled_and_left_as_they_are(self) -> None:
        compare([Flat(((0, 1, 1100),))], scale=0.37, steps=2)

    @pytest.mark.parametrize(
        "flat",
        [
            Flat(((0, 0, 40),), replace(HYPER, layer_adaptation=False, max_coeff=0.1)),
            Flat(((0, 0, 40),), replace(HYPER, min_coeff=9.0)),
            Flat(((0, 0, 40),), replace(HYPER, max_coeff=0.01)),
            Flat(((0, 0, 40),), replace(HYPER, min_coeff=9.0), weights=0.0),
            Flat(((0, 0, 40),), replace(HYPER, max_coeff=0.1, weight_decay=0.0), gradients=0.0),
            Flat(((0, 0, 40),), weights=1e-25),
            Flat(((0, 0, 40),), gradients=1e-25),
            Flat(((0, 0, 40),), replace(HYPER, weight_decay=0.0), gradients=1e-30),
            Flat(((0, 0, 40),), replace(HYPER, eps=0.0, weight_decay=0.0), weights=1e15),
        ],
        ids=["adamw", "min", "max", "w=0", "u=0", "w tiny", "g tiny", "u tiny", "w huge"],
    )
    def test_extremes(self, flat: Flat) -> None:
        compare([flat], steps=2)

    @pytest.mark.parametrize("square", [0.0, 1e-60, 4.0, 1e60, float("inf"), float("nan")])
    def test_the_ratio_is_the_contract_s(self, square: float) -> None:
        sums = torch.tensor([[square, 4.0], [4.0, square]], dtype=torch.float64, device=DEVICE)
        weights = []
        for kernel in (triton_lamb.TritonLamb(), ReferenceLamb()):
            items = [Flat(((0, 0, 9), (1, 9, 9)), replace(HYPER, min_coeff=1.5)).item(0)]
            kernel.accumulate(items, torch.zeros_like(sums), None)
            kernel.apply(items, sums)
            weights.append(items[0].shard.flat)
        torch.testing.assert_close(*weights, rtol=1e-5, atol=0, equal_nan=True)

    def test_sums_meet_from_flat_tensors(self) -> None:
        # parameter 1 lies in two of them
        flats = [Flat(((0, 0, 50), (1, 50, 1200))), Flat(((1, 4, 33),)), Flat(((2, 0, 7),))]
        compare(flats, steps=3)

    def test_one_kernel_may_step_on_other_tensors(self) -> None:
        kernel = triton_lamb.TritonLamb()
        for place in ((0, 0, 40), (0, 2, 40), (0, 0, 41), (0, 0, 40)):
            _, found_2P = step(kernel, [Flat((place,))])
            _, expected_2P = step(ReferenceLamb(), [Flat((place,))])
            assert distance(found_2P, expected_2P) <= TOLERANCE

    @pytest.mark.parametrize("what", ["shard", "exp_avg", "exp_avg_sq", "address", "order", "all"])
    def test_what_changes_between_steps_is_followed(self, what: str) -> None:
        kernels, results = (triton_lamb.TritonLamb(), ReferenceLamb()), []
        for kernel in kernels:
            old = [Flat(((i, 0, 40),)).item(i) for i in range(2)]
            new = [Flat(((i, 0, 40),)).item(i + 2) for i in range(2)]
            sums_2P = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
            stepped(kernel, old, sums_2P)
            changed = {
                "order": old[::-1],
                "all": new,
                "address": old,
            }.get(what) or [
                o._replace(**{what: getattr(n, what)}) for o, n in zip(old, new, strict=True)
            ]
            if what == "address":
                for item in old:
                    item.shard.flat.data = item.shard.flat.clone()
            changed = [item._replace(gradient=item.gradient + 0.5) for item in changed]
            stepped(kernel, changed, sums_2P)
            results.append([*old, *new])
        for one, other in zip(*results, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert distance(getattr(one, name)[:40], getattr(other, name)[:40]) <= TOLERANCE
            assert distance(one.shard.flat[:40], other.shard.flat[:40]) <= TOLERANCE

    def test_pass_2_is_of_the_items_of_pass_1_and_lets_go_of_the_gradients(self) -> None:
        kernel, items = triton_lamb.TritonLamb(), [Flat(((0, 0, 40),)).item(0)]
        sums_2P = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
        kernel.accumulate(items, sums_2P, None)
        with pytest.raises(AssertionError):
            kernel.apply(list(items), sums_2P)
        stepped(kernel, items, sums_2P)
        gone = weakref.ref(items[0].gradient)
        del items
        assert gone() is None

    def test_a_gradient_that_does_not_fit_is_refused(self) -> None:
        kernel, item = triton_lamb.TritonLamb(), Flat(((0, 0, 40),)).item(0)
        gradient = item.gradient
        sums_2P = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
        for wrong in (gradient[1:], gradient.half(), gradient.repeat_interleave(2)[::2]):
            with pytest.raises(AssertionError):
                stepped(kernel, [item._replace(gradient=wrong)], sums_2P)

    def test_a_rank_may_hold_nothing(self) -> None:
        compare([Flat(((0, 0, 0),))])
        compare([Flat(((0, 5, 0), (1, 5, 9), (2, 14, 0)))])
        compare([])

    def test_the_same_bits_every_time(self) -> None:
        flats = [Flat(((0, 3, 2500), (1, 2503, 40)))]
        (one, sums), (other, other_sums) = (step(triton_lamb.TritonLamb(), flats) for _ in range(2))
        assert same_bits(sums, other_sums)
        assert same_bits(one[0].shard.flat, other[0].shard.flat)

    @given(data=st.data())
    @settings(max_examples=30, deadline=None, phases=[Phase.generate])
    def test_any_layout(self, data: st.DataObject) -> None:
        numbers = st.integers(0, 60) | st.sampled_from([0, 1, 1023, 1024, 1025, 1500])
        flats, index = [], 0
        low = data.draw(st.sampled_from([None, torch.float16, torch.float32]))
        for _ in range(data.draw(st.integers(1, 3))):
            places, end = [], 0
            for gap, numel in data.draw(st.lists(st.tuples(numbers, numbers), max_size=3)):
                places.append((index, end + gap, numel))
                index, end = index + 1, end + gap + numel
            hyper = replace(HYPER, layer_adaptation=data.draw(st.booleans()))
            own_low = low if data.draw(st.booleans()) else None
            flats.append(Flat(tuple(places), hyper, own_low, data.draw(st.integers(0, 3))))
        compare(flats, steps=data.draw(st.integers(1, 2)))


# --------------------------------------------------------------------------- without a device

TYPES = {"table_IK": "*i64", "chunks_4C": "*i64", "segments_3S": "*i64", "gradient_scale": "*fp32"}
TYPES |= {"partial_2C": "*fp64", "squares_2P": "*fp64", "chunks": "i32", "parameters": "i32"}
FORMS: list[tuple[Any, dict[str, Any]]] = [
    *((triton_lamb.accumulate_kernel, constants) for constants in ({}, {"gradient_scale": None})),
    (triton_lamb.reduce_kernel, {}),
    *(
        (triton_lamb.apply_kernel, {"LOW_DTYPE": copy})
        for copy in (None, tl.bfloat16, tl.float16, tl.float32)
    ),
]


def compiled_form(form: tuple[Any, dict[str, Any]], capability: int, **options: Any) -> Any:
    constants = {**triton_lamb.OPTIONS, **form[1]}
    return compiled(form[0], TYPES, constants, capability, **options)


def name_of(form: tuple[Any, dict[str, Any]]) -> str:
    return "-".join([form[0].__name__, *map(str, form[1].values())])


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(
        "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
    )
    @pytest.mark.parametrize("form", FORMS, ids=name_of)
    def test_nothing_spills(self, form: Any, capability: int, tmp_path: Path) -> None:
        assert spills(compiled_form(form, capability).asm["cubin"], tmp_path) == (0, 0)

    def test_a_spill_would_be_seen(self, tmp_path: Path) -> None:
        stack, instructions = spills(compiled_form(FORMS[0], 90, maxnreg=24).asm["cubin"], tmp_path)
        assert stack > 0
        assert instructions > 0

    @pytest.mark.parametrize(("form", "loads", "stores"), [(0, 4, 2), (3, 3, 1)])
    def test_only_whole_blocks_move_as_vectors(self, form: int, loads: int, stores: int) -> None:
        ptx = compiled_form(FORMS[form], 90).asm["ptx"]
        assert len(re.findall(r"^\s*ld\.global\.v4\.b32", ptx, re.M)) == loads
        assert len(re.findall(r"^\s*st\.global\.v4\.b32", ptx, re.M)) == stores
        assert not re.findall(r"@%p\d+ (?:ld|st)\.global\.v", ptx)
        assert len(re.findall(r"@%p\d+ ld\.global\.b32", ptx)) == 4 * loads

    def test_launches_do_not_grow_with_tensors_and_are_of_the_forms_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A device is only made believe: what would be launched is compiled."""
        launched = believe_in_a_device(monkeypatch)
        expected = [compiled_form(FORMS[form], 90).asm["cubin"] for form in (1, 2, 4)]
        kernel = triton_lamb.TritonLamb()
        for count in (1, 3, 16, 40):  # Triton would make special cases of 1 and of multiples of 16
            items = [Flat(((i, 0, 9),), low=torch.bfloat16).item(i) for i in range(count)]
            squares_2P = torch.zeros(2, count, dtype=torch.float64)
            launched.clear()
            with NoWaiting():
                kernel.accumulate(items, squares_2P, None)
                kernel.apply(items, squares_2P)
            assert launched == expected


@pytest.mark.slow
class TestTheOtherHalf:
    __test__ = DEVICE.type == "cpu" and not IS_OTHER_HALF

    def test_in_a_process_of_its_own(self) -> None:
        run_other_half(__file__)

"""The counter of bytes: known collectives, one by one, against arithmetic."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from stacking_ds.bench.bytes_sent import BytesSent, written_bytes
from stacking_ds.distributed.world import World
from tests.ranks import run_ranks

N = 1200  # fp32 elements; 2 and 3 ranks divide them
BYTES = 4 * N


def _collectives(world: World) -> dict[str, Callable[[], object]]:
    w, r = world.size, world.rank
    whole = torch.ones(N)
    parts = list(torch.ones(w, N).unbind())
    splits = [100 * (peer + 1) for peer in range(w)]  # to rank 0 least, to the last one most
    mine = splits[r] * w
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "broadcast": lambda: dist.broadcast(whole, src=1),
        "reduce": lambda: dist.reduce(whole, dst=1),
        "all_gather": lambda: dist.all_gather(list(torch.empty(w, N)), whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(w * N), whole),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.empty(N), parts),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(N // w), whole),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(N), whole),
        "uneven": lambda: dist.all_to_all_single(
            torch.empty(mine), torch.ones(sum(splits)), [splits[r]] * w, splits
        ),
        "gather": lambda: dist.gather(whole, parts if r == 1 else None, dst=1),
        "scatter": lambda: dist.scatter(torch.empty(N), parts if r == 1 else None, src=1),
        "send": lambda: dist.send(whole, dst=1) if r == 0 else None,
        "recv": lambda: dist.recv(torch.empty(N), src=0) if r == 1 else None,
        "barrier": dist.barrier,
        "bf16": lambda: dist.all_gather(
            list(torch.empty(w, N, dtype=torch.bfloat16)), whole.bfloat16()
        ),
        "asynchronous": lambda: dist.all_reduce(whole, async_op=True).wait(),
    }


def _count_each(world: World) -> dict[str, int]:
    counter = BytesSent()
    for name, call in _collectives(world).items():
        with counter, counter.labelled(name):
            call()
    return dict(counter.by_label)


@pytest.mark.parametrize("world_size", [2, 3])
def test_known_collectives(world_size: int) -> None:
    w, others = world_size, world_size - 1
    all_ranks = range(w)
    expected: dict[str, list[int]] = {
        "all_reduce": [2 * BYTES * others // w] * w,
        # the ring starts at rank 1, so rank 0 is its end
        "broadcast": [0 if rank == 0 else BYTES for rank in all_ranks],
        "reduce": [0 if rank == 1 else BYTES for rank in all_ranks],
        "all_gather": [BYTES * others] * w,
        "all_gather_into_tensor": [BYTES * others] * w,
        "reduce_scatter": [BYTES * others] * w,
        "reduce_scatter_tensor": [BYTES * others // w] * w,
        "all_to_all_single": [BYTES * others // w] * w,
        "uneven": [4 * sum(100 * (peer + 1) for peer in all_ranks if peer != r) for r in all_ranks],
        "gather": [0 if rank == 1 else BYTES for rank in all_ranks],
        "scatter": [BYTES * others if rank == 1 else 0 for rank in all_ranks],
        "send": [BYTES if rank == 0 else 0 for rank in all_ranks],
        "recv": [0] * w,
        "barrier": [0] * w,
        "bf16": [BYTES // 2 * others] * w,
        "asynchronous": [2 * BYTES * others // w] * w,
    }
    counted = run_ranks(_count_each, world_size)
    found = {name: [rank.get(name, 0) for rank in counted] for name in expected}
    assert found == expected


def _count_hidden(world: World) -> tuple[int, int, int]:
    """Where a collective hides: in an object, in a backward pass, and outside of any label."""
    with BytesSent() as counter:
        with counter.labelled("object"):
            world.gather("x" * 10_000)
        weight = torch.ones(N, requires_grad=True)
        weight.register_hook(dist.all_reduce)
        with counter.labelled("outer"):
            with counter.labelled("backward"):
                (weight * 2).sum().backward()
            dist.all_reduce(torch.ones(10))
    dist.all_reduce(torch.ones(10))  # nobody counts any more
    return (
        counter.by_label["object"],
        counter.by_label["backward"],
        counter.by_label["outer"],
    )


def test_nothing_hides() -> None:
    for in_object, in_backward, outside in run_ranks(_count_hidden, 2):
        assert 10_000 < in_object < 10_500  # its length and pickle's frame
        assert (in_backward, outside) == (BYTES, 40)


def _count_unknown(world: World) -> None:
    with BytesSent():
        functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD)


def test_a_collective_that_is_not_known_is_an_error_not_a_zero() -> None:
    with pytest.raises(AssertionError, match="whose bytes this does not know"):
        run_ranks(_count_unknown, 2)


def _compare_with_kernel(world: World) -> tuple[int, int]:
    values = [torch.ones(100_000) for _ in range(world.size)]
    dist.all_gather(values, torch.ones(100_000))  # connects
    before = written_bytes()
    with BytesSent() as counter:
        dist.all_gather(values, torch.ones(100_000))
        dist.all_to_all_single(torch.empty(6000), torch.ones(6000))
        world.sum([1.0] * 1000)
    after = written_bytes()
    assert before is not None
    assert after is not None
    return counter.by_label[""], after - before


def test_the_kernel_counts_the_same() -> None:
    for counted, written in run_ranks(_compare_with_kernel, 2):
        assert counted <= written < 1.01 * counted + 2000  # headers

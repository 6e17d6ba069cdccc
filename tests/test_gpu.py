"""What only a GPU can show: nccl, CUDA memory, fp16, and the CPU's numbers again.

The tests marked `gpu` run in this process, a world of one on nccl. The last tests call the same
checks on a gloo rank, so that a mistake in a check shows on any machine; there DeepSpeed is told
that the CPU can do fp16, which it can, slowly.
"""

# ruff: noqa: E402 -- what fails in the checks is shown in full only if this is said before

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.gpu_checks", "tests.gpu_kernel_checks")

import torch

from stacking_ds.distributed import process_group
from stacking_ds.distributed.world import World
from tests.gpu_checks import (
    check_checkpoint,
    check_growth,
    check_lamb,
    check_losses,
    check_memory,
    check_overflow,
    check_padding,
    check_run,
)
from tests.gpu_kernel_checks import check_activation_checkpointing, check_kernels
from tests.prose import tiny_shards
from tests.ranks import run_ranks

LAMB = ("optimizer.name=lamb", "optimizer.learning_rate=1e-2")
gpu = pytest.mark.gpu
zero_stages = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
PACKED = ("data.packing=true",)
NAMED = ("engine.kernels=triton", "optimizer.lamb.kernel=triton")
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as a world of one on the GPU."""
    before = dict(os.environ)
    started = process_group.start()
    assert started.device.type == "cuda"
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is on"
    yield started
    process_group.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@gpu
@zero_stages
@precisions
def test_losses_are_those_of_the_cpu(world: World, zero_stage: int, precision: str) -> None:
    check_losses(world, zero_stage, precision)


@gpu
@zero_stages
@precisions
def test_growth_is_exact(world: World, zero_stage: int, precision: str) -> None:
    check_growth(world, zero_stage, precision)


@gpu
@zero_stages
@precisions
def test_lamb_is_that_of_the_cpu(world: World, zero_stage: int, precision: str) -> None:
    check_lamb(world, zero_stage, precision)


@gpu
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_lamb_offloaded_to_the_host_is_that_of_the_cpu(world: World, zero_stage: int) -> None:
    check_lamb(world, f"{zero_stage}_offload", "bf16")


@gpu
@zero_stages
def test_fp16_skips_a_step_that_overflows(world: World, zero_stage: int) -> None:
    check_overflow(world, zero_stage)


@gpu
@zero_stages
def test_a_released_engine_gives_its_memory_back(world: World, zero_stage: int) -> None:
    check_memory(world, zero_stage)


@gpu
@precisions
def test_padding_does_as_on_the_cpu(world: World, precision: str) -> None:
    check_padding(world, precision)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kernels_have_the_gradients_of_the_cpu(world: World, precision: str) -> None:
    check_kernels(world, precision)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_the_same(world: World, precision: str) -> None:
    check_activation_checkpointing(world, precision)


@gpu
@zero_stages
def test_a_checkpoint_moves_between_devices(world: World, tmp_path: Path, zero_stage: int) -> None:
    check_checkpoint(world, tmp_path, zero_stage, "bf16")


@gpu
@pytest.mark.parametrize(
    ("zero_stage", "precision", "overrides"),
    [
        (1, "fp32", ()),
        (0, "fp16", ()),
        (3, "bf16", ()),
        (0, "fp16", LAMB),
        (1, "bf16", LAMB),
        (2, "bf16", LAMB),
        (3, "bf16", LAMB),
        (0, "fp32", PACKED),
        (3, "bf16", (*LAMB, *PACKED, *NAMED)),
    ],
)
def test_a_whole_run(
    world: World,
    tmp_path: Path,
    shards: Path,
    zero_stage: int,
    precision: str,
    overrides: tuple[str, ...],
) -> None:
    check_run(world, tmp_path, shards, zero_stage, precision, *overrides)


# ------------------------------------------------------------------ on any machine


def _call(world: World, check: Callable[..., None], *arguments: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    check(world, *arguments)


@pytest.mark.parametrize(
    ("check", "cases"),
    [
        (check_losses, [(0, "fp16"), (2, "fp16")]),
        pytest.param(check_growth, [(1, "fp16"), (3, "fp16")], marks=pytest.mark.slow),
        pytest.param(check_overflow, [(0,), (1,), (2,), (3,)], marks=pytest.mark.slow),
        pytest.param(
            check_lamb, [(0, "fp16"), (3, "fp16"), ("2_offload", "bf16")], marks=pytest.mark.slow
        ),
        pytest.param(check_memory, [(0,), (3,)], marks=pytest.mark.slow),
        (check_padding, [("fp32",), ("bf16",), ("fp16",)]),
        pytest.param(check_kernels, [("fp32",), ("bf16",)], marks=pytest.mark.slow),
        pytest.param(
            check_activation_checkpointing, [("fp32",), ("bf16",)], marks=pytest.mark.slow
        ),
    ],
)
def test_the_checks_hold_on_the_cpu(check: Callable[..., None], cases: list[Any]) -> None:
    for case in cases:
        run_ranks(_call, 1, check, *case)


@pytest.mark.slow
def test_the_checks_of_runs_hold_on_the_cpu(tmp_path: Path, shards: Path) -> None:
    run_ranks(_call, 1, check_checkpoint, tmp_path / "state", 2, "bf16")
    for name, overrides in (("adamw", ()), ("lamb", LAMB), ("packed", PACKED)):
        (tmp_path / name).mkdir()
        run_ranks(_call, 1, check_run, tmp_path / name, shards, 0, "fp16", *overrides)

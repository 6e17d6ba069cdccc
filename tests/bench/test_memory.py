"""Memory gauges see what is used, and nothing else."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.bench import memory
from stacking_ds.bench.memory import (
    HostPeak,
    TreePeak,
    live_tensor_bytes,
    resident_bytes,
    touched_bytes,
)

MIB = 2**20
SIZE = 96 * MIB


def _rise(hold_seconds: float = 0.0) -> int:
    """What the gauge shows for a block that is freed again before the end."""
    with HostPeak() as peak:
        start = resident_bytes()
        block = torch.ones(SIZE // 4)
        time.sleep(hold_seconds)
        del block
    return peak.bytes - start


def test_a_block_that_is_gone_again_was_the_peak() -> None:
    assert SIZE - MIB <= _rise() < SIZE + 16 * MIB


def test_each_peak_starts_anew() -> None:
    _rise()
    with HostPeak() as peak:
        start = resident_bytes()
    assert peak.bytes - start < 16 * MIB


def test_without_the_kernels_mark_a_thread_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert SIZE - MIB <= _rise(hold_seconds=0.1) < SIZE + 16 * MIB


def test_pages_that_were_never_written_are_not_in_use() -> None:
    block = torch.empty(SIZE // 4)
    assert touched_bytes([block]) == pytest.approx(0, abs=MIB)
    block[: len(block) // 2] = 1.0
    assert touched_bytes([block]) == pytest.approx(SIZE // 2, abs=MIB)
    block.fill_(1.0)
    assert touched_bytes([block, block[5:], block.view(2, -1)]) == SIZE


def test_live_tensors_come_and_go() -> None:
    before = live_tensor_bytes()
    block = torch.ones(SIZE // 4)
    during = live_tensor_bytes()
    del block
    after = live_tensor_bytes()
    assert before is not None
    assert during is not None
    assert after is not None
    assert during - before == pytest.approx(SIZE, abs=MIB)
    assert after - before == pytest.approx(0, abs=MIB)


def test_a_kernel_that_keeps_its_page_tables_to_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_SELF", tmp_path)
    assert touched_bytes([torch.ones(MIB)]) is None


def test_the_peak_of_a_tree_is_that_of_its_largest_process() -> None:
    grow = "import time; held = bytearray({mib} << 20); time.sleep(0.5)"
    child = grow.format(mib=200)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ballast = bytearray(400 << 20)  # what this process has is not counted
    process = subprocess.Popen([sys.executable, "-c", parent])
    with TreePeak(process.pid) as peak:
        assert process.wait(timeout=60) == 0
    del ballast
    assert 200 << 20 < peak.bytes < 300 << 20

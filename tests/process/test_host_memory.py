"""What is freed is kept when asked for, and given back when asked for."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stacking_ds.cli import main
from stacking_ds.commands import train
from stacking_ds.distributed import process_group
from stacking_ds.train import loop
from tests.prose import tiny_shards
from tests.runs import small_recipe

_CODE = """
import resource, sys
from stacking_ds.process.runtime import keep_freed_memory, return_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

assert sys.argv[1] == "give back" or keep_freed_memory()
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    del block
new_pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = resident()
return_freed_memory()
print(new_pages, kept - resident())
"""


def _measured(mode: str) -> tuple[int, int]:
    """New pages of the third time that the same memory is asked for, and bytes given back."""
    # a process of its own: what is kept is kept until it ends
    command = [sys.executable, "-c", _CODE, mode]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    new_pages, given_back = done.stdout.split()
    return int(new_pages), int(given_back)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_memory_is_kept_and_given_back() -> None:
    new_pages, given_back = _measured("keep")
    assert new_pages < 100
    assert given_back > 50 << 20
    new_pages, given_back = _measured("give back")
    assert new_pages > 100
    assert given_back < 50 << 20


@pytest.mark.parametrize(("device", "keeps"), [("cpu", 1), ("cuda", 0)])
def test_training_on_a_cpu_keeps_it(
    device: str, keeps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_recipe(tmp_path, tiny_shards(tmp_path))
    start = process_group.start
    called: list[str] = []
    monkeypatch.setattr(
        process_group, "start", lambda timeout: replace(start(timeout), device=torch.device(device))
    )
    monkeypatch.setattr(train, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(loop, "train", lambda *given, **options: called.append("trained"))
    recipe = ["--recipe", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main(["train", *recipe]) == 0
    assert called == ["kept"] * keeps + ["trained"]

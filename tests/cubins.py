"""Triton kernels compiled where there is no GPU, and what their machine code tells.

Whether Triton interprets or compiles is settled when it is imported. So where there is no GPU one
half of a module's tests runs here, and the other in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "INTERPRETED",
    "IS_OTHER_HALF",
    "NoWaiting",
    "believe_in_a_device",
    "compiled",
    "run_other_half",
    "spills",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_OTHER_HALF = "STACKING_DS_OTHER_HALF" in os.environ


def run_other_half(file: str) -> None:
    """The tests of this file, interpreted where they are compiled here, and the other way round."""
    other = {"STACKING_DS_OTHER_HALF": "1", "TRITON_INTERPRET": str(int(not INTERPRETED))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | other,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    aligned: Sequence[str] = (),
    **options: Any,
) -> Any:
    """The kernel for a GPU of this compute capability.

    Args:
        types: of the arguments, by name.
        constants: arguments that are settled when compiling, and options of the compiler.
        aligned: numbers that are multiples of 16, as is every address that torch allocates.
        options: of the compiler too.
    """
    settled = {name: constants[name] for name in kernel.arg_names if name in constants}
    options |= {name: value for name, value in constants.items() if name not in settled}
    told = ["constexpr" if n in settled else types[n] for n in kernel.arg_names]
    pairs = list(zip(kernel.arg_names, told, strict=True))
    hints = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, type_) in enumerate(pairs)
        if type_.startswith("*") or (name in aligned and type_ != "constexpr")
    }
    source = ASTSource(kernel, dict(pairs), settled, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Bytes of stack, and how many instructions go to memory because registers ran out."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", "-sass", folder / "kernel.cubin"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "EXIT" in told
    [stack] = re.findall(r"STACK:(\d+)", told)
    return int(stack), len(re.findall(r"\b(?:LDL|STL)\b", told))


class NoWaiting(TorchDispatchMode):
    """Fails where a number would have to come from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def believe_in_a_device(monkeypatch: pytest.MonkeyPatch, capability: int = 90) -> list[bytes]:
    """From now on kernels are compiled for a GPU where they would be launched, and do not run.

    Returns:
        The machine code of every launch, as they happen.
    """
    launched: list[bytes] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: launched.append(
            kernel.run(*args, grid=grid, warmup=True, **kwargs).asm["cubin"]
        )

    device = SimpleNamespace(
        get_current_device=lambda: 77,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    monkeypatch.setattr(triton.JITFunction, "__getitem__", launcher)
    return launched

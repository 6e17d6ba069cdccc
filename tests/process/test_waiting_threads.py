"""Waiting threads of OpenMP sleep, as the library itself sees it, unless somebody has chosen."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

_PROGRAM = """
from stacking_ds.cli import main
main(["train", "--recipe", "nonsense"])
import torch
"""


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [
        ({}, "GOMP_SPINCOUNT = '0'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_the_library_is_told_before_it_is_loaded(chosen: Mapping[str, str], spins: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**kept, **chosen, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert spins in done.stderr

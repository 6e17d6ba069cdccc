"""Every collection finds the same tests under the same names, in the same order.

Tests that are shared out among processes (pytest-xdist) are known by their names alone, so what
changes from process to process, such as the time or a set's order, must not be in a parameter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _collected(hash_seed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[1],
        check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_two_collections_find_the_same() -> None:
    first = _collected("1")  # takes seconds: the next one is at another time
    assert _collected("2") == first
    assert f"tests/{Path(__file__).name}::test_two_collections_find_the_same" in first

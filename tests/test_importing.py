"""Importing the package starts no compiler, and needs no Triton; what is wrong is told at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import importlib, pkgutil, sys
started = []
sys.addaudithook(
    lambda event, arguments: started.append((event, str(arguments[:2])))
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
    # the list of libraries, which ctypes reads where nobody has read it before
    and "ldconfig" not in str(arguments[:1])
    else None
)
import stacking_ds
for module in pkgutil.walk_packages(stacking_ds.__path__, "stacking_ds."):
    name = module.name.removeprefix("stacking_ds.")
    # what is imported where Triton is, what compares with other packages, and what runs at once
    if "triton" in name or name in ("__main__",):
        continue
    importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("triton", "apex")), started)
"""


def test_nothing_is_compiled_or_started() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        check=True,
        cwd=Path(__file__).parents[1],
        env={"PATH": "", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[] []\n", "results alone: DeepSpeed's warnings are on stderr"


_TOLD = """
import sys
from stacking_ds.cli import main
code = main(sys.argv[1:])
print(code, sorted({"torch", "deepspeed", "pandas", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train --recipe nonsense", "no recipe 'nonsense'"),
        ("train --recipe demo --dry-run --set seed=one", "seed must be a whole number"),
        ("train --recipe demo --set data.nothing=1", "data.nothing is not a key"),
        ("evaluate nowhere", "nowhere holds no run"),
        ("export nowhere", "nowhere holds no run"),
        ("report nowhere", "nowhere holds no run"),
        ("data inspect nowhere", "nowhere holds no prepared data"),
        ("data layout nowhere --recipe nonsense", "no recipe 'nonsense'"),
        ("launch --ranks 1 train --recipe nonsense", "no recipe 'nonsense'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(
    command: str, sentence: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TOLD, *command.split()],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2 []\n"
    assert sentence in done.stderr


def test_a_checkpoint_is_read_and_exported_without_deepspeed() -> None:
    code = "import sys, stacking_ds.train.from_checkpoint; print('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n"

"""Importing the package starts no compiler, and needs no Triton."""

import subprocess
import sys
from pathlib import Path

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
    if "triton" in name or name.endswith("lamb.fused") or name in ("__main__",):
        continue
    importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("triton", "apex")), started)
"""


def test_nothing_is_compiled_or_started() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        check=True,
        cwd=Path(__file__).parents[1],
        env={"PATH": "", "DS_ACCELERATOR": "cpu", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[] []"

"""An installed wheel has what a checkout has."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_has_its_recipes_jsons_and_batch_scripts(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves files behind
    source.mkdir()
    for name in ("setup.py", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("stacking_ds", "ds_configs", "slurm"):
        shutil.copytree(REPOSITORY / name, source / name)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)),
        ],
        check=True,
        cwd=tmp_path,
    )
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        assert not [name for name in archive.namelist() if name.startswith("tests")]
    program = (
        "from stacking_ds.config.recipe import load_run_config\n"
        "from stacking_ds.config.recipe import ds_config_path\n"
        "print(load_run_config('demo').name)\n"
        "[print(ds_config_path(f'zero{stage}')) for stage in range(4)]\n"
        "from stacking_ds.cli import main\n"
        "main(['slurm', 'copy', 'site'])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert found[0] == "demo"
    assert all(line.startswith(str(installed)) for line in found[1:5])
    copied = {path.name: path.read_bytes() for path in (tmp_path / "site" / "slurm").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (REPOSITORY / "slurm").iterdir()}

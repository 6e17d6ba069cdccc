"""`stacking-ds slurm copy`: scripts that can be submitted, and nobody's changes lost."""

import os
import sys
from pathlib import Path

import pytest

from stacking_ds.cli import main

SLURM = Path(__file__).parents[2] / "slurm"


def test_scripts_are_copied_and_can_be_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["slurm", "copy", str(tmp_path / "new")]) == 0
    # in a checkout the scripts are there, and it is they that would be copied
    assert main(["slurm", "copy", str(SLURM.parent)]) == 0
    target = tmp_path / "new" / "slurm"
    assert {path.name for path in target.iterdir()} == {path.name for path in SLURM.iterdir()}
    assert os.access(target / "submit.sh", os.X_OK)
    command = Path(sys.executable).with_name("stacking-ds")
    assert f"cd {tmp_path / 'new'} && STACKING_DS={command} sbatch" in capsys.readouterr().out


def test_what_a_person_has_changed_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "slurm"
    target.mkdir()
    (target / "site.sh").write_text("module load cuda/13\n")
    assert main(["slurm", "copy", str(tmp_path)]) == 2
    assert "has site.sh with other contents" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["site.sh"]
    assert (target / "site.sh").read_text() == "module load cuda/13\n"

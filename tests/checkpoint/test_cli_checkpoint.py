"""`stacking-ds checkpoint` as a person meets it: what is there, is it whole, what is in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stacking_ds.checkpoint import load
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.checkpoint.manifest import CHUNK_BYTES
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from stacking_ds.sharding.fragments import MASTER, Cut, Fragment
from tests.checkpoints import plain_fragments, save_state
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import small_recipe, train_small
from tests.tables import same_as_golden

Capture = pytest.CaptureFixture[str]
SIZE, WRITTEN = r"\d+\.\d+(?= KiB)", r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?"


def _run(capsys: Capture, *arguments: str | Path, code: int = 0) -> str:
    """What `stacking-ds checkpoint` prints when it ends with the exit code `code`."""
    assert main(["checkpoint", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def _refused(capsys: Capture, *arguments: str | Path) -> str:
    """The one sentence with which a command is refused."""
    assert main(["checkpoint", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("stacking-ds: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def _cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(name)]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def _fact(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with checkpoints at 4 and 7, the boundaries, 9 and 10."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_recipe(folder, tiny_shards(folder))
    run_ranks(train_small, 2, config, folder / "run")
    return folder / "run"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with whole checkpoints at steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_state(tmp_path, step, plain_fragments(value=step))
    return tmp_path


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def _flip(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _truncate(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _lose_file(folder: Path) -> None:
    (folder / "rank_00000.safetensors").unlink()


def _lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": ', '"step": 1'))


# ---------------------------------------------------------------------------- list


def test_list_shows_a_row_for_each_checkpoint(trained: Path, capsys: Capture) -> None:
    table = _run(capsys, "list", trained)
    same_as_golden(table, trained, "checkpoint_list.txt", SIZE, WRITTEN)


def test_list_for_programs(trained: Path, capsys: Capture) -> None:
    records = json.loads(_run(capsys, "list", trained, "--json"))
    assert [record["step"] for record in records] == [4, 7, 9, 10]
    size = sum(path.stat().st_size for path in _folder(trained, 7).iterdir())
    wanted = {
        "name": "step_00000007", "stage": 1, "num_hidden_layers": 2, "world_size": 2,
        "zero_stage": 1, "precision": "fp32", "size_bytes": size, "is_latest": False,
        "is_boundary": True, "is_end": False, "is_unfinished": False, "problem": None,
    }  # fmt: skip
    assert wanted.items() <= records[1].items()


def test_list_separates_thousands(tmp_path: Path, capsys: Capture) -> None:
    save_state(tmp_path, 1_234_567, plain_fragments(numel=2**19))
    cells = _cells(_run(capsys, "list", tmp_path), "step_01234567")
    assert cells[1] == "1,234,567"
    assert cells[-3] == "12.00 MiB"  # 2 parameters, 3 keys, 4 bytes


def test_list_survives_damage_and_shows_what_killed_saves_left(
    run_dir: Path, capsys: Capture
) -> None:
    _lose_manifest(_folder(run_dir, 1))
    _break_manifest(_folder(run_dir, 2))
    (run_dir / "checkpoints" / ".step_00000004.partial").mkdir()
    (run_dir / "checkpoints" / ".step_00000004.partial" / "rank_00000.safetensors").write_text("x")
    table = _run(capsys, "list", run_dir)
    assert _cells(table, "step_00000001")[1:7] == ["-"] * 6
    for step in (1, 2):
        assert _cells(table, f"step_0000000{step}")[-1] == "damaged manifest"
    assert _cells(table, "step_00000003")[-1] == "latest"
    left = _cells(table, ".step_00000004.partial")
    assert left[-3] == "1 bytes"
    assert left[-1].startswith("unfinished")
    lost, broken = table.splitlines()[-2:]
    assert "step_00000001/manifest.json cannot be read" in lost
    assert "step_00000002/manifest.json is damaged" in broken


def test_list_says_where_latest_leads_nowhere(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "checkpoints" / "latest").write_text("step_00000009\n")
    table = _run(capsys, "list", run_dir)
    assert "names 'step_00000009', which is not there" in table.splitlines()[-1]
    assert len(table.splitlines()) == 5


def test_list_before_the_first_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.yaml").touch()
    assert _run(capsys, "list", tmp_path) == f"{tmp_path} has no checkpoint yet\n"
    assert json.loads(_run(capsys, "list", tmp_path, "--json")) == []


# -------------------------------------------------------------------------- verify


def test_verify_counts_what_is_whole(trained: Path, capsys: Capture) -> None:
    numel = sum(tensor.numel() for _, tensor in load.read_parameters(_folder(trained, 10)))
    said = _run(capsys, "verify", trained)
    assert said.startswith(f"whole: {_folder(trained, 10)}: 2 files, ")
    assert said.endswith(f" KiB, {numel:,} parameters in 78 tensors\n")
    every = _run(capsys, "verify", trained, "--all").splitlines()
    assert [line.split(":")[1].strip() for line in every] == [
        str(_folder(trained, step)) for step in (4, 7, 9, 10)
    ]
    one = _run(capsys, "verify", trained, "--checkpoint", "step_00000007")
    assert one == _run(capsys, "verify", _folder(trained, 7)) == every[1] + "\n"


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_flip, "rank_00000.safetensors is damaged"),
        (_truncate, "rank_00000.safetensors is damaged: it has "),
        (_lose_file, "rank_00000.safetensors cannot be read (No such file or directory)"),
        (_lose_manifest, "manifest.json cannot be read (No such file or directory)"),
        (_break_manifest, "manifest.json is damaged"),
    ],
)
def test_verify_names_damage_and_the_newest_whole_checkpoint(
    run_dir: Path, capsys: Capture, damage: Callable[[Path], None], what: str
) -> None:
    damage(_folder(run_dir, 3))
    damage(_folder(run_dir, 2))
    found, tried, whole, remedy = _run(capsys, "verify", run_dir, code=2).splitlines()
    assert found.startswith(f"damaged: {_folder(run_dir, 3)}/{what}")
    assert tried.startswith(f"damaged: {_folder(run_dir, 2)}/{what}")
    assert "go on from" not in found  # that is what the last line is for
    assert whole.startswith(f"whole: {_folder(run_dir, 1)}: 1 file, ")
    assert remedy.startswith(f"`stacking-ds checkpoint use {run_dir} step_00000001`, and then")
    # what is said to help helps
    assert _run(capsys, "use", run_dir, "step_00000001").startswith("whole: ")
    assert _run(capsys, "verify", run_dir).startswith("whole: ")


def test_verify_reads_every_chunk_of_every_file(tmp_path: Path, capsys: Capture) -> None:
    numel = 2 * CHUNK_BYTES // 4
    save_state(tmp_path, 1, plain_fragments("a", numel=numel))
    path = _folder(tmp_path, 1) / "rank_00000.safetensors"
    whole = path.read_bytes()
    assert len(whole) > 5 * CHUNK_BYTES
    for place in range(CHUNK_BYTES // 2, len(whole), CHUNK_BYTES):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "is damaged" in _run(capsys, "verify", tmp_path, code=2)
    path.write_bytes(whole)
    _run(capsys, "verify", tmp_path)


def test_verify_names_the_rank_of_a_missing_file(
    trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (_folder(copy, 10) / "rank_00001.safetensors").unlink()
    found, whole, remedy = _run(capsys, "verify", copy, code=2).splitlines()
    assert "rank_00001.safetensors cannot be read" in found
    assert whole.startswith(f"whole: {_folder(copy, 9)}: 2 files")
    assert f"checkpoint use {copy} step_00000009`" in remedy


def test_verify_of_an_old_checkpoint_says_that_the_latest_is_whole(
    run_dir: Path, capsys: Capture
) -> None:
    _flip(_folder(run_dir, 1))
    remedy = _run(capsys, "verify", run_dir, "--all", code=2).splitlines()[-1]
    assert remedy.startswith("`latest` names step_00000003, so --resume goes on from it")
    assert "step_00000001 may be deleted" in remedy
    one = _run(capsys, "verify", run_dir, "--checkpoint", "step_00000001", code=2)
    assert one.splitlines()[-2].startswith(f"whole: {_folder(run_dir, 3)}")
    assert one.splitlines()[-1] == remedy


def test_verify_does_not_send_anybody_to_what_was_given_up(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    _flip(_folder(run_dir, 2))
    remedy = _run(capsys, "verify", run_dir, code=2).splitlines()[-1]
    assert f"use {run_dir} step_00000001`" in remedy


def test_verify_when_nothing_is_whole(run_dir: Path, capsys: Capture) -> None:
    for step in (1, 2, 3):
        _flip(_folder(run_dir, step))
    said = _run(capsys, "verify", run_dir, code=2).splitlines()
    assert len(said) == 4
    assert said[-1].startswith("no checkpoint is whole")


def test_verify_of_a_copy_outside_a_run(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "best"
    shutil.copytree(_folder(run_dir, 3), copy)
    assert _run(capsys, "verify", copy).startswith(f"whole: {copy}: ")
    _truncate(copy)
    assert "from a copy" in _run(capsys, "verify", copy, code=2).splitlines()[-1]


# ------------------------------------------------------------------------- inspect


def test_inspect_says_what_is_in_a_checkpoint(trained: Path, capsys: Capture) -> None:
    text = _run(capsys, "inspect", trained, "--checkpoint", "step_00000007")
    manifest = checkpoint_manifest.read_manifest(_folder(trained, 7))
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    metrics = {line["step"]: line for line in map(json.loads, lines)}
    assert _fact(text, "tokens seen") == f"{metrics[7]['tokens_seen']:,}"
    rate = metrics[8]["optim/learning_rate"]
    assert _fact(text, "learning rate").startswith(f"{rate:.4g} in the next step")
    assert manifest.package_versions["deepspeed"] in _fact(text, "written with")
    same_as_golden(
        text, trained, "checkpoint_inspect.txt", SIZE, r"(?<=trained for    ).*", r"(?<=with   ).*"
    )


def test_inspect_of_a_finished_run(trained: Path, capsys: Capture) -> None:
    text = _run(capsys, "inspect", trained)
    assert _fact(text, "step") == "10 of 10, the end of the run"
    assert "data position" not in text
    assert text == _run(capsys, "inspect", _folder(trained, 10))


def test_inspect_measures_every_parameter(trained: Path, capsys: Capture) -> None:
    text = _run(capsys, "inspect", trained, "--parameters")
    rows = text.partition("\n\n")[2].splitlines()[1:]
    masters = dict(load.read_parameters(_folder(trained, 10)))
    assert [row.split()[0] for row in rows] == list(masters)
    for row, master in zip(rows, masters.values(), strict=True):
        mean, std, norm = map(float, row.split()[-3:])
        double = master.double()
        assert mean == pytest.approx(float(double.mean()), rel=1e-3, abs=1e-12)
        assert std == pytest.approx(float(double.std(correction=0)), rel=1e-3, abs=1e-12)
        assert norm == pytest.approx(float(double.norm()), rel=1e-3)


def test_inspect_says_how_parameters_are_cut(tmp_path: Path, capsys: Capture) -> None:
    numels = {"one": 4, "two": 1_500, "three": 3_000}
    cuts = {"one": Cut(4, 1000), "two": Cut(1_500, 1000, 10), "three": Cut(3_000, 1000, 100)}
    shapes = {"one": (4,), "two": (3, 500), "three": (3_000,)}

    def fragments(rank: int) -> list[Fragment]:
        return [
            Fragment(
                name,
                shapes[name],
                *cut.interval(rank),
                {MASTER: torch.arange(float(numels[name]))[slice(*cut.interval(rank))]},
                cut,
            )
            for name, cut in cuts.items()
        ]

    run_ranks(_save_on_ranks, 4, tmp_path, [fragments(rank) for rank in range(4)])
    text = _run(capsys, "inspect", tmp_path, "--parameters")
    assert _cells(text, "one")[1:3] == ["4", "whole on rank 0"]
    assert _cells(text, "two")[1:3] == ["3 x 500", "990 on rank 0, 510 on rank 1"]
    assert _cells(text, "three")[1:4] == [
        *("3,000", "900 on rank 0, 1,000 on each next, 100 on rank 3", "1500"),
    ]


def _save_on_ranks(world: World, run_dir: Path, fragments: list[list[Fragment]]) -> None:
    save_state(run_dir, 1, fragments[world.rank], world)


def test_inspect_verifies_what_it_reads(run_dir: Path, capsys: Capture) -> None:
    _flip(_folder(run_dir, 3))
    assert _fact(_run(capsys, "inspect", run_dir), "step") == "3"  # the manifest is whole
    assert main(["checkpoint", "inspect", str(run_dir), "--parameters"]) == 2
    assert "rank_00000.safetensors is damaged" in capsys.readouterr().err


# --------------------------------------------------------------------- wrong input


def test_places_without_checkpoints(tmp_path: Path, capsys: Capture) -> None:
    for action in ("list", "verify", "inspect"):
        assert "holds no run" in _refused(capsys, action, tmp_path)
        assert "holds no run" in _refused(capsys, action, tmp_path / "nowhere")
    (tmp_path / "config.yaml").touch()
    for arguments in (["verify"], ["verify", "--all"], ["inspect"]):
        assert "has no checkpoint yet" in _refused(capsys, *arguments, tmp_path)


def test_names_that_are_not_there(run_dir: Path, capsys: Capture) -> None:
    for action in ("verify", "inspect"):
        said = _refused(capsys, action, run_dir, "--checkpoint", "step_9")
        assert "no checkpoint 'step_9'; there is: step_00000001, step_00000002, step_0" in said
        said = _refused(capsys, action, _folder(run_dir, 1), "--checkpoint", "step_00000002")
        assert "is a checkpoint already" in said
    assert "give the directory of its run" in _refused(capsys, "list", _folder(run_dir, 1))
    (run_dir / "checkpoints" / "latest").write_text("step_00000009\n")
    assert "names 'step_00000009'" in _refused(capsys, "verify", run_dir)


def test_inspecting_without_a_manifest(run_dir: Path, capsys: Capture) -> None:
    _lose_manifest(_folder(run_dir, 3))
    assert "manifest.json cannot be read" in _refused(capsys, "inspect", run_dir)

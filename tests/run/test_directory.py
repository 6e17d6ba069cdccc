"""A run directory belongs to one run, and to one job at a time."""

import errno
import fcntl
import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, ConfigError
from stacking_ds.launch import restart_policy
from stacking_ds.run import attempts, directory
from stacking_ds.train import resume
from stacking_ds.train.plan import open_plan
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import small_recipe


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_recipe(tmp_path, tmp_path / "shards")


def test_what_is_written_is_read_back(config: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    directory.check(run_dir, config, resume=False)
    assert not run_dir.exists(), "checking writes nothing"
    with directory.lock(run_dir):
        directory.write_config(run_dir, config)
    assert directory.read_config(run_dir) == config
    directory.check(run_dir, config, resume=False)  # nothing was saved yet
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    directory.check(run_dir, config, resume=True)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"):
        directory.check(run_dir, config, resume=False)


def test_a_second_job_is_kept_out_while_the_first_works(tmp_path: Path) -> None:
    first = directory.lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another job is training in"):
        directory.lock(tmp_path / "run")
    first.close()
    directory.lock(tmp_path / "run").close()


def test_what_a_killed_job_leaves_running_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    first = directory.lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another job is training in"):
        directory.lock(tmp_path / "run", patience_seconds=0.2)
    threading.Timer(0.5, first.close).start()
    directory.lock(tmp_path / "run", patience_seconds=30.0).close()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(directory.logger, "propagate", True)
    directory.lock(tmp_path / "run").close()
    assert "has no locks (Operation not supported): see that no other job" in caplog.text


def test_what_a_killed_start_left_behind_is_no_obstacle(config: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    directory.lock(run_dir).close()
    restart_policy.judge(run_dir, 1)
    assert (run_dir / attempts.ATTEMPTS_FILE).exists()
    (run_dir / "config.tmp").write_text("name: sm")
    directory.check(run_dir, config, resume=True)
    directory.check(run_dir, config, resume=False)


def test_the_tokenizer_is_that_of_the_last_start(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first, second = (tmp_path / name for name in "ab")
    plans = []
    for folder, size in ((first, 200), (second, 300)):
        folder.mkdir()
        shards = tiny_shards(folder, vocab_size=size)
        plans.append(open_plan(small_recipe(folder, shards)))
        directory.keep_tokenizer(run_dir, plans[-1].data.shards)
    plan = plans[-1]
    sha256 = plan.data.shards.manifest.vocabulary_sha256
    kept = directory.choose_tokenizer(run_dir, plan.config, sha256, None)
    assert kept == run_dir / "tokenizer"
    before = (kept / "vocab.txt").stat()
    directory.keep_tokenizer(run_dir, plan.data.shards)
    assert (kept / "vocab.txt").stat() == before, "what is there is not written again"
    (kept / "SHA256SUMS").unlink()
    directory.keep_tokenizer(run_dir, plan.data.shards)
    assert directory.choose_tokenizer(run_dir, plan.config, sha256, None) == kept


@pytest.mark.parametrize("name", ["config.tmp", "vocab.txt", "SHA256SUMS"])
def test_a_start_that_finds_the_disk_full_leaves_a_directory_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan = open_plan(small_recipe(tmp_path, tiny_shards(tmp_path)))
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises((OSError, ConfigError), match="No space left"):
            resume._claim_on_first(plan, run_dir, 0)
    assert {path.name for path in run_dir.iterdir()} <= {"config.yaml", "config.tmp"}
    directory.check(run_dir, plan.config, resume=True)
    resume._claim_on_first(plan, run_dir, 0)
    directory.check(run_dir, plan.config, resume=True)


def test_somebody_elses_folder_or_file_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.tex").write_text("")
    with pytest.raises(CheckpointError, match="not empty and holds no run"):
        directory.check(tmp_path / "thesis", config, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        directory.check(tmp_path / "file", config, resume=False)


def test_what_cannot_be_written_is_named(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        directory.lock(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        directory.write_config(tmp_path / "nowhere", config)


def test_paths_in_the_config_do_not_depend_on_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = small_recipe(tmp_path, Path("shards"), "engine.deepspeed=mine.json")
    absolute = config.with_absolute_paths()
    assert absolute.data.path == str(tmp_path / "shards")
    assert absolute.engine.deepspeed == str(tmp_path / "mine.json")
    bundled = small_recipe(tmp_path, Path("shards")).with_absolute_paths()
    assert bundled.engine.deepspeed == "zero1"


def test_a_job_that_waited_does_not_take_over_the_run_of_the_one_before(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path)
    run_dir = tmp_path / "run"
    first = directory.lock(run_dir)
    other = open_plan(small_recipe(tmp_path, shards, "seed=77"))

    def leave_a_run() -> None:
        directory.write_config(run_dir, small_recipe(tmp_path, shards))
        (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
        first.close()

    threading.Timer(0.5, leave_a_run).start()
    with ExitStack() as held, pytest.raises(CheckpointError, match=r"holds another run \(seed"):
        resume._lock_on_first(other, run_dir, True, held)
    assert directory.read_config(run_dir).seed == 3
    directory.lock(run_dir).close()  # who is refused keeps nobody out


def test_the_lock_says_who_holds_it(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        with directory.lock(tmp_path):
            said.append((tmp_path / ".lock").read_text())
    assert said[0] != said[1], "of no two attempts it is the same"
    assert all(text.startswith(f"{socket.gethostname()} {os.getpid()} ") for text in said)


def _look_for_the_run(world: World, folder: Path, shared: bool, wait: float) -> str:
    run_dir = folder / "shared" if shared else folder / str(world.rank)
    # of an older attempt, as where somebody has copied the run to each node
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("name: x")
    (run_dir / ".lock").write_text("node1 123 0123456789abcdef\n")
    world.barrier()
    directory._PATIENCE_SECONDS = wait
    held = directory.lock(run_dir) if world.is_first else None
    world.barrier()
    try:
        directory.require_shared(run_dir, world)
    except ConfigError as error:
        return str(error)
    finally:
        if held:
            held.close()
    return "shared"


def test_nodes_that_do_not_share_the_run_directory_are_told_before_training(
    tmp_path: Path,
) -> None:
    for message in run_ranks(_look_for_the_run, 3, tmp_path, False, 0.3):
        assert "2 of 3 ranks (first: rank 1 on " in message
        assert "give a --run-dir on a file system that all nodes share" in message
    assert run_ranks(_look_for_the_run, 3, tmp_path, True, 10.0) == ["shared"] * 3

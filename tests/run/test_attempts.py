"""Which attempts at a run are followed by another one."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.checkpoint.folders import latest
from stacking_ds.commands.launch import add_again
from stacking_ds.errors import CheckpointError, UserError
from stacking_ds.launch.restart_policy import judge
from stacking_ds.run import attempts
from stacking_ds.run.attempts import ATTEMPTS_FILE, begun, ended

HOSTS = ["node1", "node2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: run\n")
    return run


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")


def metrics(run: Path, *steps: int, rest: str = "") -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in steps]
    (run / "metrics.jsonl").write_text("".join(lines) + rest)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / ATTEMPTS_FILE).read_text().splitlines()]


def attempt(run: Path, outcome: Any, step: int, message: str = "why", start: int = 0) -> None:
    begun(run, start, 2, HOSTS)
    ended(run, outcome, step, message)


# ------------------------------------------------------------------ the records


def test_records_say_who_what_and_when(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    begun(run, 3, 4, HOSTS)
    ended(run, "lost", 7, 'rank 2 on "node2" said\nnothing')
    judge(run, 4)
    first, second, third = lines(run)
    assert first.pop("time").endswith("+00:00")
    assert first == {"event": "begun", "step": 3, "world_size": 4, "hosts": HOSTS, "job": "77"}
    assert second.pop("time").endswith("+00:00")
    message = 'rank 2 on "node2" said\nnothing'
    assert second == {"event": "ended", "outcome": "lost", "step": 7, "message": message}
    assert (third["event"], third["again"], third["step"]) == ("judged", True, 7)
    assert message in third["why"]


def test_a_line_that_was_cut_off_is_ignored_and_not_grown_together_with(run: Path) -> None:
    attempt(run, "stopped", 5)
    with (run / ATTEMPTS_FILE).open("a") as file:
        file.write('{"event": "ended", "outcome": "comp')
    assert attempts.outcome_since(run, 0) == "stopped"
    ended(run, "failed", 6, "no memory")
    assert attempts.outcome_since(run, 0) == "failed"
    assert len(attempts.read_records(run)) == 3


def test_a_line_cut_in_a_letter_or_of_something_else_is_ignored(run: Path) -> None:
    attempt(run, "stopped", 5)
    with (run / ATTEMPTS_FILE).open("ab") as file:
        file.write(b'[1]\n{"event": "ended"}\n"text"\n{"event": "begun", "step": 3, "x": "\xc3')
    assert attempts.outcome_since(run, 0) == "stopped"


def test_two_writers_do_not_cut_each_others_lines(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stacking_ds.run import attempts\n"
        "for step in range(100): attempts.ended(Path(sys.argv[1]), 'failed', step, 'x' * 500)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)])

    def write() -> None:
        for step in range(50):
            begun(run, step, 2, HOSTS)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    found = lines(run)
    assert len(found) == 200
    assert [line["step"] for line in found if line["event"] == "ended"] == list(range(100))


def test_long_messages_are_cut(run: Path) -> None:
    ended(run, "failed", 1, "x" * 100_000)
    assert len((run / ATTEMPTS_FILE).read_text()) < 3000


def test_a_run_directory_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot read .*file/attempts.jsonl .*; "):
        judge(file, 1)
    with pytest.raises(UserError, match=r"cannot write .*file/attempts.jsonl .*; "):
        begun(file, 0, 1, [])


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\x00",
        b"[" * 100_000,
        b"7",
        b'{"event": ["ended"]}',
        b'{"event": "ended", "outcome": 1, "step": 2, "message": ""}',
        b'{"event": "ended", "outcome": "lost", "step": -2, "message": ""}',
        b'{"event": "begun", "step": true}',
        b'{"event": "begun", "step": ' + b"9" * 5000 + b"}",
        b'{"event": "begun", "step": 1e999}',
        b'{"event": "judged", "again": 1, "why": "", "outcome": "lost", "step": null}',
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
def test_what_is_no_record_is_passed_over_and_told(
    run: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(run, "lost", 7)
    path = run / ATTEMPTS_FILE
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")
    parser = argparse.ArgumentParser()
    add_again(parser)
    options = parser.parse_args([str(run), "--exit-status", "4"])
    assert options.command(options) == 0
    printed = capsys.readouterr()
    assert "the run failed at step 7 for: why" in printed.out
    assert printed.err == (
        f"{path}: passed over 2 lines, which are no record (the first is line 1)\n"
    )


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "circle"])
def test_records_that_are_no_file_are_refused_and_not_waited_for(run: Path, kind: str) -> None:
    path = run / ATTEMPTS_FILE
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(UserError, match=r"attempts.jsonl is damaged: .*; move it aside"):
        judge(run, 1)
    with pytest.raises(UserError, match=r"cannot write .*attempts.jsonl .*move aside"):
        begun(run, 0, 1, HOSTS)


def test_steps_are_known_without_what_is_damaged(run: Path) -> None:
    checkpoint(run, 3)
    begun(run, 3, 2, HOSTS)
    metrics(run, 4, 5, rest='{"step": -1}\n{"step": "6"}\n' + "[" * 100_000 + "\n\0\n")
    assert "failed at step 5" in judge(run, 1).why
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    begun(run, 3, 2, HOSTS)
    assert "failed at step 3" in judge(run, 1).why


@pytest.mark.parametrize("pointer", [b"\xff\xfe", b"step_00000004\n", b"", b"x" * 300])
def test_what_resume_would_refuse_is_not_started_again(run: Path, pointer: bytes) -> None:
    checkpoint(run, 3)
    attempt(run, "lost", 5)
    (run / "checkpoints" / "latest").write_bytes(pointer)
    with pytest.raises(CheckpointError) as refused:
        latest(run)
    verdict = judge(run, 4)
    assert not verdict.again
    assert verdict.why == f"a person has to mend what stopped the run: {refused.value}"
    attempt(run, "complete", 9)
    assert judge(run, 0).outcome == "complete"


def test_a_checkpoint_that_is_known_by_its_folder_alone_is_gone_on_from(run: Path) -> None:
    checkpoint(run, 3)
    checkpoint(run, 6)
    root = run / "checkpoints"
    attempt(run, "lost", 7)
    # a save of the same step was killed between two renames
    (root / "step_00000006").rename(root / ".step_00000006.removed")
    assert judge(run, 4).why.endswith("it goes on from step 6")
    (root / "latest").unlink()
    attempt(run, "lost", 8)
    assert judge(run, 4).why.endswith("it goes on from step 3")


def test_nothing_slow_is_imported() -> None:
    code = (
        "import sys, stacking_ds.run.attempts\n"
        "heavy = {'torch', 'numpy', 'yaml', 'pydantic', 'psutil'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ------------------------------------------------------------------ the policy


@pytest.mark.parametrize(
    ("outcome", "exit_status", "again", "says"),
    [
        ("complete", 0, False, "complete at step 9"),
        ("complete", 1, False, "complete at step 9"),  # its end may have failed, its work has not
        ("stopped", 0, True, "asked to stop at step 9"),
        ("stopped", 143, True, "asked to stop at step 9"),
        ("user_error", 2, False, "has to mend .*: because"),
        ("user_error", 0, False, "has to mend .*: because"),
        ("not_finite", 3, True, "failed at step 9 for: because"),
        ("lost", 4, True, "failed at step 9 for: because"),
        ("lost", 0, True, "failed at step 9 for: because"),  # 0 of a launcher proves nothing
        ("lost", 2, True, "failed at step 9 for: because"),
        ("failed", 1, True, "failed at step 9 for: because"),
    ],
)
def test_one_attempt(run: Path, outcome: Any, exit_status: int, again: bool, says: str) -> None:
    attempt(run, outcome, 9, "because")
    verdict = judge(run, exit_status)
    assert verdict.again is again
    assert verdict.outcome == outcome
    assert re.search(says, verdict.why), verdict.why
    assert lines(run)[-1]["why"] == verdict.why


def test_where_it_goes_on_from_is_said(run: Path) -> None:
    attempt(run, "lost", 9)
    assert judge(run, 1).why.endswith("it starts anew")
    checkpoint(run, 8)
    attempt(run, "lost", 10)
    assert judge(run, 1).why.endswith("it goes on from step 8")


def test_a_killed_attempt_failed_at_the_step_of_its_last_metrics(run: Path) -> None:
    begun(run, 3, 2, HOSTS)
    metrics(run, 1, 2, 40, 41, rest='{"step": 42, "tr')
    verdict = judge(run, 137)
    assert verdict.again
    assert verdict.outcome == "killed"
    assert "at step 41 for: it was killed outright" in verdict.why


def test_an_attempt_killed_before_its_first_metrics_failed_where_it_began(run: Path) -> None:
    metrics(run, 1, 2)
    begun(run, 30, 2, HOSTS)
    assert "at step 30" in judge(run, 137).why


def test_exit_status_2_without_a_record_is_for_a_person(run: Path) -> None:
    attempt(run, "lost", 3)
    assert judge(run, 4).again
    verdict = judge(run, 2)
    assert not verdict.again
    assert verdict.why.endswith("it ended with exit status 2 before it entered the run")
    assert verdict.outcome == "user_error"


def test_exit_status_2_of_an_attempt_that_only_began_is_for_a_person(run: Path) -> None:
    begun(run, 0, 2, HOSTS)
    verdict = judge(run, 2)
    assert not verdict.again
    assert verdict.why.endswith("it ended with exit status 2 without a record of why")


@pytest.mark.parametrize("exit_status", [143, 138, 130, 129, -15, -10, -2, -1])
@pytest.mark.parametrize(("began", "at"), [(True, "at step 8"), (False, "before it began")])
def test_signals_before_a_run_can_save_do_not_give_it_up(
    run: Path, exit_status: int, began: bool, at: str
) -> None:
    """As of preemptions, while it is imported, checked, restored and built."""
    checkpoint(run, 8)
    for _ in range(4):
        if began:
            begun(run, 8, 2, HOSTS)
        verdict = judge(run, exit_status)
        assert verdict.again
        assert verdict.outcome == "stopped_unsaved"
        assert verdict.why == (
            f"the run was asked to stop {at}, before it could save (exit status {exit_status}); "
            "it goes on from step 8"
        )


def test_a_failure_before_an_early_signal_still_counts(run: Path) -> None:
    attempt(run, "failed", 41)
    assert judge(run, 1).again
    assert judge(run, 143).again
    attempt(run, "failed", 41)
    assert not judge(run, 1).again


@pytest.mark.parametrize("exit_status", [1, 137, 139])
def test_other_deaths_count(run: Path, exit_status: int) -> None:
    assert judge(run, exit_status).again
    assert not judge(run, exit_status).again


def test_what_an_attempt_says_of_its_end_outweighs_a_signal(run: Path) -> None:
    attempt(run, "failed", 41)
    assert judge(run, 143).outcome == "failed"


def test_death_before_it_began_is_tried_once_more(tmp_path: Path) -> None:
    run = tmp_path / "new"
    first, second = judge(run, 1), judge(run, 1)
    assert first.again
    assert not second.again
    assert "before it began twice, for: exit status 1 before it entered the run" in second.why


def test_exit_status_0_without_a_record_is_a_failure_too(run: Path) -> None:
    assert judge(run, 0).outcome == "not_begun"


def test_the_same_step_twice_is_enough(run: Path) -> None:
    attempt(run, "failed", 41, "out of memory")
    assert judge(run, 1).again
    attempt(run, "not_finite", 41, "the loss is nan")
    verdict = judge(run, 3)
    assert not verdict.again
    assert "failed at step 41 twice, for: the loss is nan" in verdict.why


@pytest.mark.parametrize(("saves", "again"), [(True, True), (False, False)])
def test_attempts_killed_at_one_logged_step_are_at_different_ones_if_one_saved_since(
    run: Path, saves: bool, again: bool
) -> None:
    """Steps are logged every so often: the last of them tells where it was only roughly."""
    checkpoint(run, 40)
    metrics(run, 50)
    begun(run, 40, 2, HOSTS)
    assert judge(run, 137).again
    if saves:
        checkpoint(run, 55)
    begun(run, 40, 2, HOSTS)
    verdict = judge(run, 137)
    assert "at step 50" in verdict.why
    assert verdict.again is again


@pytest.mark.parametrize("between", ["stopped", "complete"])
def test_failures_before_a_good_end_do_not_count(run: Path, between: Any) -> None:
    attempt(run, "failed", 41)
    assert judge(run, 1).again
    attempt(run, between, 41)  # nobody judged it: a person started it by hand
    attempt(run, "failed", 41)
    assert judge(run, 1).again


def test_failures_before_a_judged_stop_do_not_count(run: Path) -> None:
    for outcome in ("failed", "stopped", "failed"):
        attempt(run, outcome, 41)
        assert judge(run, 1).again


def test_after_no_a_person_has_taken_over(run: Path) -> None:
    answers = []
    for _ in range(4):
        attempt(run, "failed", 41)
        answers.append(judge(run, 1).again)
    assert answers == [True, False, True, False]


def test_three_failures_without_a_newer_checkpoint_are_enough(run: Path) -> None:
    checkpoint(run, 40)
    for step, again in [(41, True), (45, True), (43, False)]:
        attempt(run, "lost", step, start=40)
        verdict = judge(run, 4)
        assert verdict.again is again, verdict.why
    assert "without a newer checkpoint than that of step 40, the last time at step 43" in (
        verdict.why
    )


def test_a_newer_checkpoint_gives_three_more(run: Path) -> None:
    for step, saved, again in [
        (41, 40, True),
        (45, None, True),
        (55, 50, True),
        (57, None, True),
        (56, None, False),
    ]:
        if saved:
            checkpoint(run, saved)
        attempt(run, "lost", step)
        assert judge(run, 4).again is again, step


def test_going_back_to_an_earlier_checkpoint_counts_as_another_place(run: Path) -> None:
    checkpoint(run, 20)
    checkpoint(run, 40)
    for step in (41, 45):
        attempt(run, "lost", step)
        assert judge(run, 4).again
    (run / "checkpoints" / "latest").write_text("step_00000020\n")
    attempt(run, "lost", 21)
    assert judge(run, 4).again


def test_what_was_recorded_before_the_attempt_is_not_its_own(run: Path) -> None:
    attempt(run, "complete", 9)  # by hand, so nobody judged it
    since = len(attempts.read_records(run))
    verdict = judge(run, 1, since=since)
    assert (verdict.outcome, verdict.again) == ("not_begun", True)


def test_a_folder_that_is_no_run_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert not judge(tmp_path, 2).again
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


FAILURES = st.sampled_from(["not_finite", "lost", "failed", "killed", "not_begun"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FAILURES, st.integers(1, 9), st.booleans()), min_size=3, max_size=30))
def test_no_run_is_restarted_for_ever(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int, bool]]
) -> None:
    """However it fails: of three attempts that are all restarted, one has saved something new."""
    run = tmp_path_factory.mktemp("run")
    saved = 0
    steps: list[int | None] = []
    gains: list[bool] = []
    for outcome, more, saves in plan:
        if saves:
            saved += 10
            checkpoint(run, saved)
        step = saved + more
        if outcome == "killed":
            begun(run, step, 2, HOSTS)
        elif outcome != "not_begun":
            attempt(run, outcome, step)
        again = judge(run, 1).again
        steps.append(None if outcome == "not_begun" else step)
        gains.append(saves)
        if not again:
            same_step = len(steps) > 1 and steps[-1] == steps[-2]
            no_gain = len(gains) > 2 and not any(gains[-2:])
            assert same_step or no_gain
            return
        assert len(steps) < 2 or steps[-1] != steps[-2]
        assert len(gains) < 3 or any(gains[-2:])


# ------------------------------------------------------------------ the command


def again(run: Path, exit_status: int) -> int:
    parser = argparse.ArgumentParser()
    add_again(parser)
    options = parser.parse_args([str(run), "--exit-status", str(exit_status)])
    code: int = options.command(options)
    return code


def test_the_command_says_why_and_its_exit_code_whether(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(run, "stopped", 5)
    assert again(run, 0) == 0
    assert capsys.readouterr().out == "the run was asked to stop at step 5; it starts anew\n"
    attempt(run, "failed", 9)
    assert again(run, 1) == 0
    attempt(run, "failed", 9)
    assert again(run, 1) == 1
    assert "failed at step 9 twice" in capsys.readouterr().out
    attempt(run, "complete", 9)
    assert again(run, 143) == 3
    assert capsys.readouterr().out == "the run is complete at step 9\n"


def test_a_job_whose_launcher_has_judged_is_not_judged_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for outcome in ("failed", "failed"):
        attempt(run, outcome, 41)
        given = judge(run, 1)
    assert not given.again
    assert [again(run, 1), again(run, 1)] == [1, 1]
    assert lines(run)[-1]["why"] == given.why
    attempt(run, "complete", 50)  # by hand
    judge(run, 0)
    assert [again(run, 1), again(run, 1)] == [3, 3]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a person has requeued it
    assert again(run, 1) == 0
    assert lines(run)[-1]["outcome"] == "not_begun"


def test_a_run_that_never_gets_the_time_to_save_is_given_up_in_the_end(run: Path) -> None:
    for _ in range(9):
        begun(run, 0, 2, ["node1"])
        assert judge(run, 143).again
    begun(run, 0, 2, ["node1"])
    verdict = judge(run, 143)
    assert not verdict.again
    assert "asked to stop 10 times in a row before it could save" in verdict.why

"""`stacking-ds bench step`: all do the same work, and the figures are what they say."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.bench import step_clock, step_rivals
from stacking_ds.bench.step import built
from stacking_ds.bench.step_batch import (
    StepBatch,
    case_batches,
    dense_batches,
    make_batch,
    row_lengths,
)
from stacking_ds.bench.step_case import TINY, StepCase, chosen_cases, cpu_cases, gpu_cases
from stacking_ds.bench.step_clock import interleaved, matmul_peak, timed_on, timing, timing_of_parts
from stacking_ds.bench.step_rivals import (
    OurStep,
    PlainStep,
    TheirStep,
    ds_settings,
    our_compute,
    their_loss,
    their_model,
)
from stacking_ds.bench.step_table import step_table, step_targets
from stacking_ds.bench.targets import Target
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError
from stacking_ds.model.bert import BertForPreTraining, forward_loss
from stacking_ds.model.bert_config import BertConfig
from tests.hugging_face_names import to_hugging_face
from tests.ranks import run_ranks

CPU = torch.device("cpu")
FULL, FILLED = cpu_cases(TINY, sequence_length=32, rows=6)
WITHOUT_DROPOUT = FULL.config.model_copy(
    update={
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
)

# ----------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("fill", [0.3, 0.5, 0.65, 0.68, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "length"), [(1, 32), (16, 128), (256, 128), (64, 512)])
def test_rows_are_filled_as_asked(rows: int, length: int, fill: float) -> None:
    lengths = row_lengths(rows, length, fill, seed=0)
    assert lengths.sum() == round(fill * rows * length)
    assert lengths.min() >= 1
    assert lengths.max() <= length
    assert (lengths == row_lengths(rows, length, fill, seed=0)).all()
    if rows > 1 and fill < 1.0:
        assert len(set(lengths)) > rows // 8, "real rows have many lengths"
        assert (lengths != row_lengths(rows, length, fill, seed=1)).any()


def test_rows_too_short_for_a_fill_are_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be filled to 10%"):
        row_lengths(4, 8, 0.1, seed=0)


def test_all_get_the_same_rows() -> None:
    lengths = row_lengths(12, 64, 0.68, seed=3)
    batch = make_batch(lengths, 64, vocab_size=1000, seed=3)
    ours, theirs = batch.ours, batch.theirs
    assert batch.tokens == lengths.sum() == theirs["attention_mask"].sum()
    mask = theirs["attention_mask"].bool()
    assert ours.sequences.starts_E1.diff().tolist() == mask.sum(dim=1).tolist() == lengths.tolist()
    assert ours.input_ids_T.equal(theirs["input_ids"][mask])
    assert ours.token_type_ids_T.equal(theirs["token_type_ids"][mask])
    assert ours.next_sentence_label_E.equal(theirs["next_sentence_label"])
    assert (theirs["labels"] != -100).sum() == batch.mlm_targets
    labels = theirs["labels"][mask]
    assert (labels != -100).nonzero().flatten().equal(ours.mlm_positions_M)
    assert labels[ours.mlm_positions_M].equal(ours.mlm_labels_M)
    assert batch.mlm_targets == round(0.15 * batch.tokens)
    assert (theirs["input_ids"] > 0).equal(mask), "0 is [PAD], and stands for nothing else"
    assert set(ours.token_type_ids_T.tolist()) == {0, 1}
    mean = sum(length * length for length in lengths) / lengths.sum()
    assert batch.attended_tokens == pytest.approx(float(mean))


def test_words_are_as_unequal_as_those_of_text() -> None:
    batch = make_batch(row_lengths(64, 128, 1.0, 0), 128, vocab_size=30522, seed=0)
    counts = torch.bincount(batch.ours.input_ids_T, minlength=30522)
    assert counts[counts > 0].numel() < 0.5 * batch.tokens
    assert int(batch.ours.input_ids_T.max()) > 15_000


@pytest.mark.parametrize("case", [FILLED, replace(FILLED, rows=3), replace(FILLED, micro_steps=3)])
def test_full_rows_have_as_many_tokens_to_half_a_row(case: StepCase) -> None:
    batches, dense = case_batches(case, CPU), dense_batches(case, CPU)
    assert len(batches) == len(dense) == case.micro_steps
    for one, full in zip(batches, dense, strict=True):
        assert abs(one.tokens - full.tokens) <= case.sequence_length // 2 + 1
        assert full.tokens == full.ours.sequences.slots
        assert full.attended_tokens == case.sequence_length
    if case.micro_steps > 1:
        assert not batches[0].ours.input_ids_T.equal(batches[1].ours.input_ids_T)


# ----------------------------------------------------------------------- the same work


def _their_twin(config: BertConfig, model: BertForPreTraining) -> torch.nn.Module:
    theirs = their_model(config)
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    theirs.load_state_dict(to_hugging_face(values))
    return theirs


def _loss_of(model: torch.nn.Module, batch: StepBatch) -> torch.Tensor:
    ours = batch.ours
    mlm_sum, nsp_sum = forward_loss(
        model, ours.model_inputs, ours.mlm_labels_M, ours.next_sentence_label_E
    ).sums
    return mlm_sum / batch.mlm_targets + nsp_sum / batch.nsp_targets


@pytest.mark.parametrize("case", [FULL, FILLED])
def test_ours_and_theirs_compute_the_same(case: StepCase) -> None:
    batch = case_batches(case, CPU)[0]
    ours = BertForPreTraining(WITHOUT_DROPOUT, seed=0)
    theirs = _their_twin(WITHOUT_DROPOUT, ours)
    assert theirs.config._attn_implementation == "sdpa"
    assert theirs.training
    our, their = _loss_of(ours, batch), their_loss(theirs, batch)
    assert our.item() == pytest.approx(their.item(), rel=1e-4)
    our.backward()
    their.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_both_have_the_dropout_of_the_case() -> None:
    theirs = their_model(FULL.config)
    dropouts = [one.p for one in theirs.modules() if isinstance(one, torch.nn.Dropout)]
    assert set(dropouts) == {0.1}
    assert FULL.config.hidden_dropout_prob == FULL.config.attention_probs_dropout_prob == 0.1


def _three_steps_of_each(world: World, zero_stage: int) -> dict[str, list[float]]:
    case, config = replace(FILLED, micro_steps=2, precision="fp32"), WITHOUT_DROPOUT
    batches = case_batches(case, CPU)
    settings = ds_settings(zero_stage, case.rows, case.micro_steps, case.precision)
    compute = our_compute("auto", case.precision, CPU, config)
    step_rivals.their_model = lambda config: _their_twin(config, BertForPreTraining(config, 0))
    steps = {
        "ours": OurStep(config, batches, compute, settings, world),
        "transformers": TheirStep(config, batches, settings),
        "plain": PlainStep(config, batches, compute, CPU),
    }
    losses = {name: [step() for _ in range(2)] for name, step in steps.items()}
    for name, step in steps.items():
        for part in step.parts():
            part()
        losses[name].append(step())
    for step in steps.values():
        step.release()
    return losses


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_all_take_the_same_steps(zero_stage: int) -> None:
    (losses,) = run_ranks(_three_steps_of_each, 1, zero_stage)
    assert losses["ours"][0] > losses["ours"][-1], "it learns"
    for name in ("transformers", "plain"):
        assert losses[name] == pytest.approx(losses["ours"], rel=1e-4)


# ---------------------------------------------------------------------- what is measured


def test_the_cases_of_a_gpu() -> None:
    cases = gpu_cases(None, None)
    assert len({case.name for case in cases}) == len(cases) == 4 * 2 * 2
    for case in cases:
        assert case.rows * case.micro_steps * case.sequence_length == 1 << 17
        assert case.precision == "bf16"
        assert case.config.vocab_size == 30522
    engines = [[case.is_full for case in of] for _, of in groupby(cases, lambda case: case.engine)]
    assert engines == 8 * [[True, False]], "the same engine takes full and filled rows"
    large = [case for case in cases if case.model.name == "large-24L"]
    assert {case.config.num_attention_heads for case in large} == {16}
    assert {case.rows for case in large} == {32, 128}
    assert [case.name for case in gpu_cases(TINY, 64)] == [
        "tiny-64-bf16-full",
        "tiny-64-bf16-filled",
    ]


def test_cases_are_chosen_by_the_beginning_of_their_names() -> None:
    cases = gpu_cases(None, None)
    chosen, accumulates = chosen_cases(cases, "base-3L,large-24L-512", with_accumulation=False)
    assert len(chosen) == 4 + 2
    assert not accumulates
    both = [FULL, FILLED]
    assert chosen_cases(both, None, with_accumulation=True) == (both, True)
    assert chosen_cases(both, "accumulation", with_accumulation=True) == ([], True)
    assert chosen_cases(both, "tiny-32-fp32", with_accumulation=True) == ([FULL], False)
    for wrong in ("base-4L", "base-3L,", ""):
        with pytest.raises(ConfigError, match="no case begins with"):
            chosen_cases(cases, wrong, with_accumulation=False)


def test_everybody_has_a_turn_in_each_round() -> None:
    order: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def take() -> None:
            if name == "b" and len(order) > 2:
                raise torch.OutOfMemoryError
            order.append(name)

        return take

    steps = {name: step(name) for name in "abc"}
    times, given_up = interleaved(steps, 3, timed_on(CPU))
    assert "".join(order) == "abc" + "ca" + "ac"
    assert {name: len(of) for name, of in times.items()} == {"a": 3, "c": 3}
    assert given_up == {"b": "out of memory"}
    assert set(timing(times["a"])) == {"seconds", "system_seconds"}


def test_a_rival_that_fails_costs_nobody_else_a_figure() -> None:
    def fail() -> None:
        raise RuntimeError("not on this card")

    steps = {"ours": lambda: None, "rival": fail}
    times, given_up = interleaved(steps, 2, timed_on(CPU), must_run=("ours",))
    assert len(times["ours"]) == 2
    assert "not on this card" in given_up["rival"]
    with pytest.raises(RuntimeError, match="not on this card"):
        interleaved(steps, 2, timed_on(CPU), must_run=("rival",))


def test_parts_have_each_their_own_least() -> None:
    rounds = [[{"seconds": 1.0}, {"seconds": 6.0}], [{"seconds": 3.0}, {"seconds": 4.0}]]
    assert timing_of_parts(rounds) == {"seconds": {"minimum": 5.0, "median": 7.0}}


def test_cpu_time_is_time_at_work() -> None:
    assert timed_on(CPU)(lambda: time.sleep(0.2))["seconds"] < 0.1
    assert 1e8 < matmul_peak(CPU, torch.float32) < 1e13


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    found = timed_on(torch.device("cuda"))(lambda: calls.append("step"))
    assert calls == ["synchronize", "step", "synchronize"]
    assert found["device_seconds"] == 2e-3
    assert 0 < found["seconds"] < 1
    assert step_clock.statistic_of(torch.device("cuda")) == "median"
    assert step_clock.statistic_of(CPU) == "minimum"


class _Failing:
    released = 0

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __call__(self) -> float:
        if self.error is not None:
            raise self.error
        return 0.0

    def parts(self) -> list[Any]:
        return [self]

    def release(self) -> None:
        _Failing.released += 1


def test_who_cannot_step_says_why() -> None:
    makers: dict[str, Any] = {
        "ours": lambda: _Failing(None),
        "large": lambda: _Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to ...")),
        "compile": lambda: _Failing(RuntimeError("no compiler\nand more")),
    }
    steps, absent = built(makers, CPU, must_run=("ours", "large"))
    assert list(steps) == ["ours"]
    assert _Failing.released == 2, "what a step had is given back before the next is built"
    assert absent == {"large": "out of memory", "compile": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        built(makers, CPU, must_run=("compile",))


# ------------------------------------------------------------------------- the targets


def _case(model: str, length: int, is_full: bool, **speeds: float) -> dict[str, Any]:
    steps = {
        name: {
            "tokens": 1000,
            "step_seconds": 1000 / speed,
            "tokens_per_second": speed,
            "model_flops_utilization": speed / 10_000,
        }
        for name, speed in speeds.items()
    }
    precision = "fp32" if model == "small" and is_full else "bf16"
    return {
        "name": f"{model}-{length}-{precision}-{'full' if is_full else 'filled'}",
        "model": model,
        "layers": 4,
        "hidden_size": 256,
        "vocab_size": 30522,
        "sequence_length": length,
        "rows": 16,
        "micro_steps": 1,
        "is_full": is_full,
        "fill": 1.0 if is_full else 0.68,
        "precision": precision,
        "peak_flops_per_second": 2e11,
        "steps": steps,
    }


def _figures(device: str, cases: list[dict[str, Any]], **accumulation: Any) -> dict[str, Any]:
    return {
        "machine": {"commit": "abc"},
        "device": device,
        "keeps_memory": True,
        "zero_stage": 1,
        "rounds": 5,
        "cases": cases,
        "accumulation": accumulation or {"not_measured": "left out"},
    }


def _by_name(figures: dict[str, Any]) -> dict[str, Target]:
    return {target.name: target for target in step_targets(figures)}


def test_targets_of_a_cpu() -> None:
    full = _case("small", 128, True, ours=2400.0, transformers=1000.0, plain=2500.0, zero0=2450.0)
    filled = _case("small", 128, False, ours=3000.0, transformers=1000.0, dense=3100.0)
    sums = {
        "micro_steps": 4,
        "micro_step_seconds": 1.0,
        "step_of_one_seconds": 1.5,
        "step_seconds": 4.5,
        "expected_seconds": 4.5,
    }
    met = _figures("cpu", [full, filled], **sums)
    rows = [one for one in step_targets(met) if one.name.startswith("CPU")]
    assert [(one.value, one.verdict) for one in rows] == [
        (pytest.approx(2.4), "met"),
        (pytest.approx(3.0), "met"),
        (pytest.approx(31 / 30), "met"),
        (pytest.approx(250 / 245), "met"),
        (pytest.approx(25 / 24), "met"),
        (pytest.approx(1.0), "met"),
    ]
    slow_full = _case(
        "small", 128, True, ours=2000.0, transformers=1000.0, plain=2500.0, zero0=2000.0
    )
    slow_filled = _case("small", 128, False, ours=2000.0, transformers=1000.0, dense=3100.0)
    missed = _figures("cpu", [slow_full, slow_filled], **{**sums, "step_seconds": 5.0})
    verdicts = {one.name: one.verdict for one in step_targets(missed) if one.name.startswith("CPU")}
    assert set(verdicts.values()) == {"MISSED"}
    assert len(verdicts) == 6
    for other in (
        {**met, "zero_stage": 2},
        _figures("cpu", [_case("256-2L", 128, True, ours=9.0, transformers=1.0, plain=9.0)]),
        _figures("cpu", [_case("small", 512, True, ours=9.0, transformers=1.0, plain=9.0)]),
    ):
        rows = [one for one in step_targets(other) if one.name.startswith("CPU")][:5]
        assert {one.verdict for one in rows} == {"not measured"}
        assert "promised of 4 layers" in rows[0].note
    gpu_rows = [one for one in step_targets(met) if one.name.startswith("GPU")]
    assert len(gpu_rows) == 3 + 4 + 2
    assert {(one.verdict, one.note) for one in gpu_rows} == {("not measured", "no GPU")}


def _gpu_cases(**changes: float) -> list[dict[str, Any]]:
    speeds = {"ours": 6000.0, "transformers": 3000.0, "compile": 5000.0}
    cases = []
    for model in ("base-3L", "base-6L", "base-12L", "large-24L"):
        for length in (128, 512):
            cases.append(_case(model, length, True, **{**speeds, **changes}))
            cases.append(_case(model, length, False, **{**speeds, "transformers": 2000.0}))
    return cases


def test_targets_of_a_gpu_are_for_the_worst_case() -> None:
    met = [one for one in step_targets(_figures("cuda", _gpu_cases())) if "GPU: " in one.name]
    assert {one.verdict for one in met} == {"met"}
    cases = _gpu_cases()
    worst = next(case for case in cases if case["name"] == "base-3L-512-bf16-full")
    worst["steps"]["ours"] |= {"tokens_per_second": 4000.0, "model_flops_utilization": 0.4}
    last = cases[-1]
    last["steps"]["transformers"] = {"not_measured": "out of memory"}
    targets = _by_name(_figures("cuda", cases))
    share = targets["GPU: base-3L: share of the measured matmul peak"]
    assert (share.value, share.verdict, share.note) == (0.4, "MISSED", "base-3L-512-bf16-full")
    ratio = targets["GPU: base-3L: full rows: ours / transformers, tokens/s"]
    assert (ratio.value, ratio.verdict) == (pytest.approx(4 / 3), "MISSED")
    compiled = targets["GPU: ours / ours with layers compiled by torch, tokens/s"]
    assert (compiled.value, compiled.verdict) == (pytest.approx(0.8), "MISSED")
    further = targets["GPU: ours / transformers at filled rows / the same at full rows"]
    assert further.value == pytest.approx(1.5)
    assert "without large-24L-512-bf16-filled" in further.note
    cpu = targets["CPU: fp32, full rows: ours / transformers, tokens/s"]
    assert (cpu.value, cpu.note) == (None, "hide the GPUs for it")


def test_why_a_target_was_not_measured() -> None:
    case = _case("base-3L", 128, True)
    case["steps"] = {"ours": {"not_measured": "out of memory"}}
    targets = _by_name(_figures("cuda", [case]))
    assert targets["GPU: base-3L: share of the measured matmul peak"].line() == (
        "GPU: base-3L: share of the measured matmul peak: target >= 0.42: not measured "
        "(ours: out of memory)"
    )
    assert targets["GPU: base-6L: full rows: ours / transformers, tokens/s"].note == "left out"


def test_the_table() -> None:
    full = _case("small", 128, True, ours=2400.0, transformers=1000.0)
    full["steps"]["compile"] = {"not_measured": "ConfigError: no compiler"}
    text = step_table(_figures("cpu", [full]))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["ours"] == ["1,000", "416.7", "2,400", "24.0", "2.40"]
    assert rows["transformers, SDPA, same engine"] == ["1,000", "1,000.0", "1,000", "10.0", "1.00"]
    assert "ours, layers compiled by torch: not measured: ConfigError: no compiler" in text
    assert "process CPU time of one thread, what it frees stays its own, least of 5 rounds" in text
    assert "matmul peak 0.2 TFLOP/s" in text
    assert "Gradient accumulation: not measured: left out" in text


# --------------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPU prints")
def test_the_command_measures_all_that_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert (
        main(["bench", "step", "--quick", "--rounds=1", "--no-keep-memory", f"--json={path}"]) == 0
    )
    found, printed = json.loads(path.read_text()), capsys.readouterr()
    assert not found["keeps_memory"]
    assert {"command", "commit", "processor", "torch", "deepspeed"} <= set(found["machine"])
    full, filled = found["cases"]
    assert (full["fill"], full["precision"]) == (1.0, "fp32")
    assert (round(filled["fill"], 2), filled["precision"]) == (0.68, "bf16")
    assert set(full["steps"]) == {"ours", "transformers", "plain", "zero0"}
    assert set(filled["steps"]) == {"ours", "transformers", "dense"}
    for case in found["cases"]:
        ours, theirs = case["steps"]["ours"], case["steps"]["transformers"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["flops_per_token"] == theirs["flops_per_token"]
        for step in case["steps"].values():
            assert 0 < step["seconds"]["minimum"] <= step["seconds"]["median"] < 10
            assert step["model_flops_utilization"] > 0  # its peak is of another moment
    sums = found["accumulation"]
    assert sums["expected_seconds"] == pytest.approx(
        3 * sums["micro_step_seconds"] + sums["step_of_one_seconds"]
    )
    verdicts = {target["name"]: target["verdict"] for target in found["targets"]}
    assert {verdicts[name] for name in verdicts if name.startswith("GPU")} == {"not measured"}
    on_cpu = [verdict for name, verdict in verdicts.items() if name.startswith("CPU")]
    assert on_cpu[:-1] == ["not measured"] * 5, "nothing is promised of this size"
    assert on_cpu[-1] in ("met", "MISSED")
    assert "tiny-32-fp32-full: 2 layers, hidden size 64" in printed.out
    assert "tiny-32-bf16-filled: building, then 1 rounds" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "--rounds=0 must be at least 1"),
        (["--only=nothing"], "no case begins with 'nothing'"),
        (["--sequence-length=4"], "--sequence-length=4 must be at least 8"),
        (["--layers=0"], "num_hidden_layers must be at least 1, not 0"),
        (["--hidden-size=0"], "hidden_size must be at least 1, not 0"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", "--quick", *options]) != 0
    assert message in capsys.readouterr().err


def test_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["bench", "step", "--quick"]) != 0
    assert "start it without a launcher" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "step", "--quick", "--no-compile", f"--json={path}"]) == 0
    for case in json.loads(path.read_text())["cases"]:
        assert set(case["steps"]) == {"ours", "transformers"}
        for step in case["steps"].values():
            assert 0 < step["device_seconds"]["median"] < 1
            assert 0 < step["seconds"]["median"] < 1

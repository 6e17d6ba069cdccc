"""Lists, verifies and describes a run's checkpoints for people."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from stacking_ds.checkpoint.folders import (
    fall_back,
    is_checkpoint,
    latest,
    newest_first,
    require_run,
    saved,
    use_command,
)
from stacking_ds.checkpoint.load import problems as problems_of
from stacking_ds.checkpoint.load import read_parameters
from stacking_ds.checkpoint.manifest import Manifest, Parameter, read_manifest
from stacking_ds.config.run import RunConfig
from stacking_ds.console import aligned, first_of, plural, readable_size
from stacking_ds.errors import CheckpointError, UnreadableError, UserError

_COUNTS = ("step", "stage", "num_hidden_layers", "world_size", "zero_stage")

Say = Callable[[str], None]
State = Literal["whole", "damaged", "unreadable"]


# ---------------------------------------------------------------------------- list


def listed(run_dir: Path) -> list[dict[str, Any]]:
    """A record of each checkpoint of a run, by step, and after them of what is unfinished: plain
    JSON, None where a manifest would have to say it and cannot. Raises `CheckpointError`: `run_dir`
    is not the directory of a run."""
    if is_checkpoint(run_dir):
        raise CheckpointError(f"{run_dir} is one checkpoint; give the directory of its run")
    require_run(run_dir)
    newest = None
    with suppress(CheckpointError):  # `latest` names what is not there, so none of these
        newest = latest(run_dir)
    records = []
    for folder in [*saved(run_dir), *sorted(run_dir.glob("checkpoints/.step_*"))]:
        with suppress(FileNotFoundError):  # a job at work has just published or removed it
            records.append({**_on_disk(folder), "is_latest": folder == newest, **_says(folder)})
    return records


def _on_disk(folder: Path) -> dict[str, Any]:
    written = datetime.fromtimestamp(folder.stat().st_mtime).astimezone()
    size_bytes = None
    with suppress(PermissionError):
        size_bytes = sum(path.lstat().st_size for path in folder.iterdir())
    return {
        "name": folder.name,
        "is_unfinished": folder.name.startswith("."),
        "size_bytes": size_bytes,
        "written": written.isoformat(timespec="seconds"),
    }


def _says(folder: Path) -> dict[str, Any]:
    """Record of what the manifest says, or the `problem` with it."""
    known: dict[str, Any] = dict.fromkeys(
        (*_COUNTS, "precision", "is_boundary", "is_end", "problem", "is_damaged")
    )
    if folder.name.startswith("."):
        return known
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        damaged = not isinstance(error, UnreadableError)
        return {**known, "problem": str(error), "is_damaged": damaged}
    known |= {key: getattr(manifest, key, None) for key in _COUNTS}
    known["stage"] = manifest.train_state.get("stage_index")
    if config := config_of(manifest):
        schedule = config.stage_schedule()
        known["precision"] = config.engine.precision
        known["is_boundary"] = manifest.step in schedule.boundaries
        known["is_end"] = manifest.step == schedule.total_steps
    return known


def config_of(manifest: Manifest) -> RunConfig | None:
    """The run's recipe; None if another version wrote it, whose recipes are not ours."""
    try:
        config = RunConfig.model_validate_json(json.dumps(manifest.config))
        if manifest.step > config.stage_schedule().total_steps:
            return None
    except (ValidationError, UserError):
        return None
    return config


def listing(run_dir: Path) -> str:
    """A run's checkpoints as a table, and what is wrong with those whose manifest cannot be used.
    Raises `CheckpointError`: `run_dir` is not the directory of a run."""
    records = listed(run_dir)
    remarks = [record["problem"] for record in records if record["problem"]]
    try:
        if latest(run_dir) is None:
            remarks.append(f"{run_dir} has no checkpoint yet")
    except CheckpointError as error:
        remarks.append(str(error))
    head = ("checkpoint", "step", "stage", "layers", "ranks", "ZeRO", "precision", "size",
            "written", "")  # fmt: skip
    table = aligned([head, *map(_row, records)], left=(0, 9)) if records else []
    return "\n".join([*table, *remarks])


def _row(record: dict[str, Any]) -> list[str]:
    remarks = {
        "latest": record["is_latest"],
        "boundary": record["is_boundary"],
        "end of the run": record["is_end"],
        "damaged manifest": record["is_damaged"],
        "cannot be read": record["problem"] and not record["is_damaged"],
        "unfinished: being saved, or left by a killed save": record["is_unfinished"],
    }
    return [
        record["name"],
        *(_number(record[key]) for key in _COUNTS),
        record["precision"] or "-",
        "-" if record["size_bytes"] is None else readable_size(record["size_bytes"]),
        record["written"][:16].replace("T", " "),
        ", ".join(remark for remark, applies in remarks.items() if applies),
    ]


# -------------------------------------------------------------------------- verify


def verify(folders: Sequence[Path], say: Say) -> bool:
    """Read every byte of the checkpoints and `say` what is found; True if all of it is whole.

    If some is damaged, the newest whole checkpoint of the run is looked for, and what to do is
    said. What cannot be read is not taken for damaged.
    """
    states = {folder: _verify(folder, say) for folder in folders}
    damaged = [folder for folder in folders if states[folder] == "damaged"]
    if damaged:
        say(_way_out(damaged, states, say))
    if "unreadable" in states.values():
        say(
            "what cannot be read may be whole: mend access to it (permissions, or the file "
            "system), and verify again"
        )
    return all(states[folder] == "whole" for folder in folders)


def _verify(folder: Path, say: Say) -> State:
    state: State = "whole"
    for problem in problems_of(folder):
        if isinstance(problem, UnreadableError):
            say(f"not verified: {problem}")
            state = "unreadable" if state == "whole" else state
        else:
            say(f"damaged: {str(problem).removesuffix(f'; {fall_back(folder)}')}")
            state = "damaged"
    if state == "whole":
        manifest = read_manifest(folder)
        say(f"whole: {folder}: {_files(manifest)}, {_count(manifest)}")
    return state


def _files(manifest: Manifest) -> str:
    size = readable_size(sum(file.size_bytes for file in manifest.files))
    return f"{plural(manifest.world_size, 'file')}, {size}"


def _count(manifest: Manifest) -> str:
    parameters = manifest.parameters.values()
    numel = sum(parameter.cut.numel for parameter in parameters)
    return f"{numel:,} parameters in {len(parameters):,} tensors"


def _way_out(damaged: Sequence[Path], states: dict[Path, State], say: Say) -> str:
    root = damaged[0].parent
    if root.name != "checkpoints":
        return fall_back(damaged[0])
    for folder in newest_first(root.parent):
        if folder not in states:
            states[folder] = _verify(folder, say)
        if states[folder] == "whole":
            break
    else:
        if "unreadable" in states.values():
            return "no checkpoint that can be read is whole"
        return "no checkpoint is whole: start the run again with another --run-dir"
    with suppress(CheckpointError):
        if folder == latest(root.parent):
            names = first_of([path.name for path in damaged])
            return (
                f"`latest` names {folder.name}, so --resume goes on from it; {names} may be deleted"
            )
    return f"`{use_command(folder)}`, and then --resume goes on from there"


# ------------------------------------------------------------------------- inspect


def contents(folder: Path) -> str:
    """Describe what is in a checkpoint, from its manifest. Raises `CheckpointError`: the manifest
    is missing, damaged or of another format."""
    manifest = read_manifest(folder)
    state, config = manifest.train_state, config_of(manifest)
    facts = {
        "checkpoint": str(folder),
        "step": f"{manifest.step:,}",
        "stage": f"{state.get('stage_index', '-')}, {manifest.num_hidden_layers:,} layers",
        "model": _count(manifest),
        "samples seen": _number(state.get("samples_seen")),
        "tokens seen": _number(state.get("tokens_seen")),
        "trained for": f"{_number(state.get('wall_seconds'))} s",
        "optimizer": f"{manifest.optimizer_step:,} updates; saved: {', '.join(manifest.keys)}",
        "learning rate": "-",
        "loss scale": f"{manifest.loss_scale:,g}",
        "precision": "-",
        "ZeRO stage": f"{manifest.zero_stage}",
        "world size": f"{manifest.world_size:,}",
        "on disk": _files(manifest),
        "data": f"shards {manifest.data_sha256[:16]}, vocabulary {manifest.vocabulary_sha256[:16]}",
        "written with": ", ".join(" ".join(each) for each in manifest.package_versions.items()),
    }
    if config:
        facts |= _plans(manifest, config)
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _plans(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """Facts that the recipe gives of the checkpoint's step and of the next one."""
    schedule, step, precision = config.stage_schedule(), manifest.step, config.engine.precision
    facts = {"step": f"{step:,} of {schedule.total_steps:,}", "precision": precision}
    if precision != "fp16":
        facts["loss scale"] = f"none in {precision}"
    if step == schedule.total_steps:
        facts["step"] += ", the end of the run"
        return facts
    if step in schedule.boundaries:
        facts["step"] += f", a boundary: {schedule.at(step).num_hidden_layers:,} layers come next"
    rate, phase = config.learning_rates().at(step), config.phase_schedule().at(step)
    first, last = phase.first_row(step), phase.first_row(step + 1) - 1
    return facts | {
        "learning rate": f"{rate:.4g} in the next step, a function of the step",
        "data position": f"rows {first:,} to {last:,} of {phase.sequence_length:,} tokens come "
        f"next; their order and masks are functions of seed {config.seed} and the step",
        "random state": f"none is saved: dropout is a function of seed {config.seed}, step and "
        f"rank",
    }


def parameter_lines(folder: Path) -> Iterator[str]:
    """A table of all parameters, a line at a time: each is read, and verified, for its line. Raises
    `CheckpointError`: the manifest, or a file where it is read, is missing or damaged."""
    manifest = read_manifest(folder)
    rows = [(name, *_shape_and_cut(each)) for name, each in manifest.parameters.items()]
    title, *lines = aligned([("parameter", "shape", "cut"), *rows], left=(0, 1, 2))
    width = max(map(len, [title, *lines]))
    yield f"{title:<{width}}  {'mean':>12}  {'std':>12}  {'norm':>12}"
    for line, (_, master) in zip(lines, read_parameters(folder), strict=True):
        mean = float(master.mean(dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(master, dtype=torch.float64))
        std = math.sqrt(max(norm**2 / master.numel() - mean**2, 0.0))  # rounding may undercut 0
        yield f"{line:<{width}}  {mean:>12.4g}  {std:>12.4g}  {norm:>12.4g}"


def _shape_and_cut(parameter: Parameter) -> tuple[str, str]:
    cut = parameter.cut
    ranks = cut.holders(0, cut.numel)
    shape = " x ".join(f"{size:,}" for size in parameter.shape)
    if len(ranks) == 1:
        return shape, f"whole on rank {ranks[0]:,}"
    (_, first), (last, _) = cut.interval(ranks[0]), cut.interval(ranks[-1])
    between = f"{cut.size:,} on each next, " if len(ranks) > 2 else ""
    return shape, (
        f"{first:,} on rank {ranks[0]:,}, {between}{cut.numel - last:,} on rank {ranks[-1]:,}"
    )

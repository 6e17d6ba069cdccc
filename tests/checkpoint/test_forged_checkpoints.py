"""Checkpoints of a stranger, whose sums are right: what is not true of a checkpoint is damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stacking_ds.checkpoint import load
from stacking_ds.errors import CheckpointError
from stacking_ds.sharding.fragments import MASTER
from tests.checkpoints import plain_fragments, save_state
from tests.forging import ODD_VALUES, Change, forge_header, forge_manifest, places, put

FILE = "rank_00000.safetensors"


def _set(*path: Any, to: Any) -> Change:
    return lambda record: put(record, path, to)


def _refused(folder: Path) -> str:
    """The sentence with which it is neither loaded nor looked through."""
    with pytest.raises(CheckpointError) as caught:
        load.load(folder, plain_fragments())
    with pytest.raises(CheckpointError):
        dict(load.read_parameters(folder))
    [problem] = load.problems(folder)
    assert str(folder) in str(problem)
    message = str(caught.value)
    assert message.isprintable()
    return message


_MANIFESTS: dict[str, tuple[Change, str]] = {
    "no keys": (_set("keys", to=[]), "keys are neither the masters alone nor"),
    "other keys": (_set("keys", to=["exp_avg"]), "keys are neither"),
    "a key twice": (_set("keys", to=["master", "master"]), "keys are neither"),
    "no moments": (_set("keys", to=["master"]), "there are no moments after 7 updates"),
    "a file elsewhere": (_set("files", 0, "name", to="../../../x"), f"rank 0 is not {FILE}"),
    "an absolute file": (_set("files", 0, "name", to="/etc/passwd"), f"rank 0 is not {FILE}"),
    "a file of NUL": (_set("files", 0, "name", to="\0"), f"rank 0 is not {FILE}"),
    "another step": (_set("step", to=8), "train_state is not that of step 8"),
    "other steps": (
        lambda record: record.update(step=8, train_state={"step": 8}),
        "it is that of step 8",
    ),
    "a negative step": (_set("step", to=-7), "step: Input should be greater than or equal to 0"),
    "a step too large": (_set("step", to=10**30), "step: Input should be"),
    "a huge world": (_set("world_size", to=10**12), "1 files of 1000000000000 ranks"),
    "two ranks": (_set("world_size", to=2), "1 files of 2 ranks"),
    "chunks of nothing": (_set("chunk_bytes", to=0), "chunk_bytes: Input should be"),
    "odd chunks": (_set("chunk_bytes", to=3), "checksums of rank_00000"),
    "huge chunks": (_set("chunk_bytes", to=2**40), "chunk_bytes: Input should be"),
    "a checksum too many": (
        lambda record: record["files"][0]["checksums"].append("0" * 32),
        "2 of 1 checksums",
    ),
    "an empty file": (_set("files", 0, "size_bytes", to=0), "size_bytes: Input should be"),
    "a huge shape": (
        _set("parameters", "a", to={"shape": [2**40], "size": 2**40, "offset": 0}),
        "parameters do not fit into the files",
    ),
    "a product too large": (
        _set("parameters", "a", to={"shape": [2**50] * 9, "size": 2**53, "offset": 0}),
        "not all elements of a are in a file",
    ),
    "a negative shape": (_set("parameters", "a", "shape", to=[-2, -3]), "shape.0: Input should"),
    "an offset outside": (_set("parameters", "a", "offset", to=99), "not all elements of a"),
    "a cut too small": (_set("parameters", "a", "size", to=5), "not all elements of a are in"),
    "a name with a line": (_set("parameters", to={"a\nb": {}}), "parameters.a\\nb"),
    "no parameters": (_set("parameters", to={}), "parameters: "),
    "a state of words": (
        _set("train_state", "samples_seen", to="many"),
        "train_state.samples_seen",
    ),
    "a state of nothing": (_set("train_state", to=None), "train_state: Input should be"),
    "an infinite state": (
        _set("train_state", "wall_seconds", to=1e999),
        "train_state.wall_seconds",
    ),
    "a scale of 0": (_set("loss_scale", to=0.0), "loss_scale: Input should be"),
    "a scale of nothing": (_set("loss_scale", to=float("nan")), "loss_scale: "),
    "a version in colours": (_set("package_versions", "torch", to="\x1b[31m"), "package_versions"),
}


@pytest.mark.parametrize("kind", _MANIFESTS)
def test_a_manifest_that_cannot_be_true_is_damage(tmp_path: Path, kind: str) -> None:
    change, what = _MANIFESTS[kind]
    folder = save_state(tmp_path, 7, plain_fragments())
    forge_manifest(folder, change)
    message = _refused(folder)
    assert message.startswith(f"{folder / 'manifest.json'} is damaged: ")
    assert what in message


_HEADERS: dict[str, tuple[Change, int | None, str]] = {
    "half floats": (_set("master/a", "dtype", to="F16"), None, "says of master/a what is not"),
    "two dimensions": (_set("master/a", "shape", to=[2, 3]), None, "says of master/a what is not"),
    "another shape": (_set("master/a", "shape", to=[7]), None, "says of master/a what is not true"),
    "negative offsets": (_set("master/a", "data_offsets", to=[-24, 0]), None, "says of master/a"),
    "offsets outside": (
        _set("master/a", "data_offsets", to=[2**40, 2**40 + 24]),
        None,
        "says of master/a what is not true of it",
    ),
    "overlapping offsets": (
        lambda header: header["master/a"].update(data_offsets=header["master/b"]["data_offsets"]),
        None,
        "says of master/a what is not true of it",
    ),
    "offsets of words": (_set("master/a", "data_offsets", to=["0", "24"]), None, "of master/a"),
    "a shape that is none": (_set("master/a", "shape", to=[1e999]), None, "says of master/a"),
    "a tensor less": (lambda header: header.pop("master/b"), None, "says of exp_avg/b what is not"),
    "the last tensor less": (
        lambda header: header.popitem(),
        None,
        "its 5 tensors are not the 6 that the manifest gives it",
    ),
    "a tensor of another name": (
        lambda header: header.update({"master/z": header.pop("master/a")}),
        None,
        "says of exp_avg/a what is not true of it",
    ),
    "no entry": (_set("master/a", to=None), None, "says of master/a"),
    "nested too deeply": (
        _set("master/a", to=json.loads("[" * 300 + "]" * 300)),
        None,
        "its header cannot be read: it is nested too deeply",
    ),
    "a huge header": (lambda header: None, 2**63, "its header would end at byte 92233720368547758"),
    "a header to the end": (lambda header: None, 10**6, "its header would end at byte 1000008"),
    "a short header": (lambda header: None, 3, "its header cannot be read: "),
    "no header": (lambda header: None, 0, "its header cannot be read: "),
}


@pytest.mark.parametrize("kind", _HEADERS)
def test_a_header_that_cannot_be_true_is_damage(tmp_path: Path, kind: str) -> None:
    change, length, what = _HEADERS[kind]
    folder = save_state(tmp_path, 7, plain_fragments())
    forge_header(folder, change, length)
    message = _refused(folder)
    assert f"{folder / FILE} is damaged: " in message
    assert what in message


def test_tensors_that_no_manifest_knows_are_told(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 7, plain_fragments("abc"))
    forge_manifest(folder, lambda record: record["parameters"].pop("c"))
    [problem] = load.problems(folder)
    assert "its header says of master/c what is not true of it" in str(problem)


def _try(action: Callable[[], object]) -> bool:
    said = ""
    try:
        action()
    except CheckpointError as error:
        said = str(error)
    assert not said or said.isprintable()
    return not said


@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_is_exchanged_it_is_whole_or_damaged(tmp_path: Path, data: Any) -> None:
    folder = save_state(tmp_path, 7, plain_fragments())
    path = folder / (FILE if data.draw(st.booleans()) else "manifest.json")
    if path.name == FILE:
        content = path.read_bytes()
        record = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    else:
        record = json.loads(path.read_text())
    place = data.draw(st.sampled_from(places(record)))
    value = data.draw(st.sampled_from(ODD_VALUES))
    if place == ("checksum",):
        return
    forge = forge_header if path.name == FILE else forge_manifest
    forge(folder, _set(*place, to=value))
    targets = plain_fragments(value=100.0)
    if _try(lambda: load.load(folder, targets)):
        expected = plain_fragments()
        for target, right in zip(targets, expected, strict=True):
            assert torch.equal(target.views[MASTER], right.views[MASTER])
    _try(lambda: dict(load.read_parameters(folder)))
    load.problems(folder)

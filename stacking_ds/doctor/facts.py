"""Facts that a node gathers of itself: versions, code, recipe, data, disks, devices. No collective.

Nothing here raises: what cannot be found out is a problem that the node reports, so that one bad
node keeps no other waiting.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch.cuda import nccl

import stacking_ds
from stacking_ds.config.recipe import ds_config_path, load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import DataError
from stacking_ds.records import Record
from stacking_ds.run.directory import default_run_dir
from stacking_ds.train.plan import TrainingPlan, open_plan

_PACKAGES = ("deepspeed", "numpy", "transformers", "tokenizers", "safetensors")
# a master and two moments of fp32
_BYTES_PER_PARAMETER = 12


class WireRecord(Record, strict=False, extra="ignore"):
    """A message between nodes, sent as plain JSON: a node with another version of this package,
    which may tell more or less, is one of the things to be found."""

    @classmethod
    def read(cls, sent: Iterable[Mapping[str, Any] | None]) -> list[Self]:
        """Those of the ranks that have sent one."""
        return [cls.model_validate(each) for each in sent if each]


class NodeFacts(WireRecord):
    """One node, as the first rank on it sees it. Empty is what was not asked or not found."""

    host: str
    rank: int
    local_size: int = 1
    versions: dict[str, str] = Field(default={})
    code_sha256: str = ""
    code_files: dict[str, str] = Field(default={}, repr=False)  # how each file's sha256 begins
    recipe: dict[str, str] = Field(default={})  # sha256 of the recipe and of the DeepSpeed JSON
    data: dict[str, str] = Field(default={})  # sha256 of the training data and of the vocabulary
    checkpoint_bytes: int = 0  # one checkpoint of the last stage
    run_bytes: int = 0  # the most that the run's checkpoints take at once
    kept_bytes: int = 0  # what those take that are there already; rank 0's node looks
    free_bytes: int | None = None  # at the run directory
    scratch_bytes: dict[str, int] = Field(default={})  # free in TMPDIR and shared memory, by path
    gpus: str = ""
    gpu_count: int = 0
    address: str = ""  # what the node's own name resolves to
    interface: str = ""  # what GLOO_SOCKET_IFNAME says
    open_files: int | None = None  # how many a process may have open; None is without limit
    problems: dict[str, str] = Field(default={})  # why something is not known, by its check


class RankFacts(WireRecord):
    """One rank."""

    host: str
    rank: int
    threads: int
    core_mask: str  # the cores that it may run on, as the bits of a hexadecimal number


@dataclass
class Examinee:
    """The examined: a recipe, its data and a run directory, as far as they could be opened."""

    run_dir: Path | None = None
    config: RunConfig | None = None
    ds_json: Mapping[str, Any] | None = None
    plan: TrainingPlan | None = None
    problems: dict[str, str] = field(default_factory=dict)


def open_examinee(
    recipe: str | None, overrides: Sequence[str], run_dir: Path | None, world_size: int
) -> Examinee:
    """As `train` would open it, but errors become problems of the checks "recipe" and "data"."""
    found = Examinee(run_dir)
    if recipe is None:
        return found
    try:
        found.config = load_run_config(recipe, overrides)
        found.run_dir = run_dir or default_run_dir(found.config)
        plan = open_plan(found.config, with_data=False)
        found.ds_json = plan.ds_json
        plan.data.require()
        found.plan = plan
        open_plan(found.config, world_size, with_data=False)
    except Exception as error:  # noqa: BLE001 - the node reports it; the others must not wait
        is_data = isinstance(error, DataError | OSError)
        found.problems["data" if is_data else "recipe"] = _sentence(error)
    return found


def rank_facts(world: World) -> RankFacts:
    """The facts that each rank has to itself."""
    return RankFacts(
        host=socket.gethostname(),
        rank=world.rank,
        threads=torch.get_num_threads(),
        core_mask=f"{sum(1 << core for core in os.sched_getaffinity(0)):x}",
    )


def node_facts(world: World, examinee: Examinee, *, only_alike: bool = False) -> NodeFacts:
    """Gather what has to be the same on all nodes and the room at the run directory; unless
    `only_alike`, also what has to be sufficient on each node."""
    run_dir, host = examinee.run_dir, socket.gethostname()
    looks: list[tuple[str, Callable[[], Mapping[str, Any]]]] = [
        ("versions", lambda: {"versions": _versions()}),
        ("code", lambda: _fingerprint(_code())),
        ("recipe", lambda: {"recipe": _recipe(examinee)}),
        ("data", lambda: _of_plan(examinee.plan)),
        ("disk space", lambda: {"free_bytes": run_dir and _free_bytes(nearest_existing(run_dir))}),
    ]
    if not only_alike:
        looks += [
            ("disk space", lambda: {"kept_bytes": _kept_bytes(run_dir) if world.is_first else 0}),
            ("temporary space", lambda: {"scratch_bytes": _scratch_bytes()}),
            ("devices", lambda: _counted(_gpus())),
            ("network", lambda: {"address": _address_of(host)}),
            ("open files", lambda: {"open_files": _open_files()}),
        ]
    found: dict[str, Any] = {"host": host, "rank": world.rank, "local_size": world.local_size}
    problems = dict(examinee.problems)
    for check, look in looks:
        try:
            found |= look()
        except Exception as error:  # noqa: BLE001 - the node reports it; the others must not wait
            problems.setdefault(check, _sentence(error))
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return NodeFacts(**found, interface=interface, problems=problems)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))  # type: ignore[no-untyped-call]
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"stacking_ds": stacking_ds.__version__}


def _code() -> dict[str, str]:
    """sha256 of each source of the package and of what it bundles, by its name in a checkout."""
    package, bundled = Path(stacking_ds.__file__).parent, ds_config_path("zero1").parent
    files = {f"stacking_ds/{path.relative_to(package)}": path for path in package.rglob("*.py")}
    for pattern in ("*.json", "recipes/*.yaml"):
        files |= {f"ds_configs/{path.relative_to(bundled)}": path for path in bundled.glob(pattern)}
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)}


def _fingerprint(code: Mapping[str, str]) -> dict[str, Any]:
    files = {name: digest[:12] for name, digest in code.items()}
    return {"code_sha256": _sha256(json.dumps(code)), "code_files": files}


def _recipe(examinee: Examinee) -> dict[str, str]:
    found = {}
    if examinee.config is not None:
        found["recipe"] = _sha256(examinee.config.to_yaml())
    if examinee.ds_json is not None:
        found["DeepSpeed JSON"] = _sha256(json.dumps(examinee.ds_json, sort_keys=True))
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _of_plan(plan: TrainingPlan | None) -> dict[str, Any]:
    """Its data, and its checkpoints' bytes. The most at once: the newest of the last stage, one
    more that is being written, and one of each boundary, which has the depth before it."""
    if plan is None:
        return {}
    depths = [stage.num_hidden_layers for stage in plan.schedule.stages.stages]
    *before, last = (_BYTES_PER_PARAMETER * plan.model_config(n).num_parameters for n in depths)
    return {
        "data": {"data": plan.data.sha256, "vocabulary": plan.data.vocabulary_sha256},
        "checkpoint_bytes": last,
        "run_bytes": (plan.config.checkpoint.keep_last + 1) * last + sum(before),
    }


def _kept_bytes(run_dir: Path | None) -> int:
    files = run_dir.glob("checkpoints/step_*/*") if run_dir else ()
    return sum(file.stat().st_size for file in files)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def _free_bytes(folder: Path) -> int:
    # quotas of a user or a project do not show here
    return shutil.disk_usage(folder).free


def _scratch_bytes() -> dict[str, int]:
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    return {str(place): _free_bytes(place) for place in places if place.is_dir()}


def _gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = map(torch.cuda.get_device_properties, range(count))
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]


def _counted(gpus: Sequence[str]) -> dict[str, Any]:
    counts = ", ".join(f"{count} x {gpu}" for gpu, count in Counter(gpus).items())
    return {"gpus": counts, "gpu_count": len(gpus)}


def _address_of(host: str) -> str:
    return str(socket.getaddrinfo(host, None)[0][4][0])


def _open_files() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit

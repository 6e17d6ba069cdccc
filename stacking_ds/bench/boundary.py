"""Measure a boundary between two stages, beside what people do today.

In every round, one after the other: our boundary, gathering the whole state on every rank, and
DeepSpeed's checkpoint. One more round before them warms up, counts bytes and checks that each way
really carried the state.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stacking_ds.bench.crossing import Crossing, LabelledWorld, Record
from stacking_ds.bench.memory import settle, touched_bytes
from stacking_ds.bench.rivals import gather_whole, load_stock, save_stock, set_from_whole
from stacking_ds.bench.workload import Workload
from stacking_ds.distributed.world import World
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.transfer import capture, install
from stacking_ds.sharding.fragments import MASTER

# --------------------------------------------------------------------- the three ways


def _ours(crossing: Crossing, step_too: bool) -> None:
    workload, world = crossing.workload, crossing.world
    ranks = LabelledWorld(world, crossing.sent)
    with crossing.measured():
        with crossing.phase("capture"):
            state = capture(crossing.engine)
        with crossing.phase("release"):
            crossing.release()
        with crossing.phase("build"):
            crossing.engine = workload.new_engine(world)
        with crossing.phase("install"):
            install(state, crossing.engine, workload.layer_map, "carry", ranks)
    captured = [view for part in state.fragments for view in part.views.values()]
    crossing.record.captured_bytes = touched_bytes([*captured, *state.weights.values()])
    del captured, state
    settle()
    crossing.record.engine_bytes = crossing.engine_tensor_bytes()
    crossing.check(workload.layer_map)
    if step_too:
        world.barrier()
        with crossing.phase("step"):
            workload.train_step(crossing.engine, world)
    crossing.release()


def _gathering(crossing: Crossing) -> None:
    workload = crossing.workload
    step = sharded_state.optimizer_step(crossing.engine)
    with crossing.measured():
        with crossing.phase("gather"):
            whole = gather_whole(crossing.engine)
        with crossing.phase("release"):
            crossing.release()
        with crossing.phase("model"):
            model = workload.stock_model()
        with crossing.phase("initialize"):
            crossing.engine = workload.stock_engine(model, crossing.world)
            del model
        with crossing.phase("set"):
            set_from_whole(crossing.engine, whole, workload.layer_map, step)
    del whole
    crossing.check(workload.layer_map)
    crossing.release()


def _through_disk(crossing: Crossing, folder: Path) -> None:
    workload, world = crossing.workload, crossing.world
    with crossing.measured():
        with crossing.phase("save"):
            save_stock(crossing.engine, folder)
        if crossing.counting:
            _forget_masters(crossing.engine)
        with crossing.phase("load"):
            load_stock(crossing.engine, folder)
        crossing.check(None)
        with crossing.phase("release"):
            crossing.release()
        with crossing.phase("model"):
            model = workload.stock_model()
        with crossing.phase("initialize"):
            crossing.engine = workload.stock_engine(model, world)
            del model
    # what somebody would have to make of the old checkpoint, whose making is not timed
    sharded_state.seed_moments(crossing.engine, 1)
    save_stock(crossing.engine, folder / "grown")
    world.barrier()
    with crossing.phase("load grown"):
        load_stock(crossing.engine, folder / "grown")
    crossing.release()


def _forget_masters(engine: Any) -> None:
    for fragment in sharded_state.fragments(engine):
        fragment.views[MASTER].zero_()


_SUMS: Mapping[str, dict[str, tuple[str, ...]]] = {
    "ours": {
        "capture + install": ("capture", "install"),
        "boundary": ("capture", "release", "build", "install"),
    },
    "gathering": {"boundary": ("gather", "release", "model", "initialize", "set")},
    "through_disk": {
        "save + load": ("save", "load"),
        "save + load grown": ("save", "load grown"),
        "boundary": ("save", "release", "model", "initialize", "load"),
    },
}
"""Of each way, the phases that are given as one time as well."""


# ------------------------------------------------------------------------- the rounds


def measure_boundary(workload: Workload, world: World, rounds: int) -> dict[str, Any]:
    """Cross the boundary `rounds` times in each way; the figures, plain enough for JSON.

    Every rank calls it, and gets the same. Of times and peaks there are minimum and median over
    the rounds, in each round of the slowest or largest rank; of bytes sent the most of any rank.
    At ZeRO 0 nothing is gathered: every rank has the whole state.

    Raises:
        ConfigError: sizes that make no model, or a precision that this device lacks.
        StageError: a depth that does not grow.
    """
    records: dict[str, list[list[Record]]] = {}
    with _shared_folder(world) as folder:
        for number in range(rounds + 1):
            ways = _ways(workload, folder / str(number), step_too=number == rounds)
            for name, cross in ways.items():
                crossing = Crossing(workload, world, counting=number == 0)
                cross(crossing)
                records.setdefault(name, []).append(world.gather(crossing.record))
                del crossing
    parameters = [
        workload.config(depth).num_parameters for depth in (workload.layers, workload.new_layers)
    ]
    return {
        "ranks": world.size,
        **asdict(workload),
        "parameters": parameters,
        **{name: _figures(name, found[0], found[1:]) for name, found in records.items()},
    }


def _ways(
    workload: Workload, folder: Path, *, step_too: bool
) -> Mapping[str, Callable[[Crossing], None]]:
    ways: dict[str, Callable[[Crossing], None]] = {
        "ours": lambda crossing: _ours(crossing, step_too),
        "gathering": _gathering,
        "through_disk": lambda crossing: _through_disk(crossing, folder),
    }
    if workload.zero_stage == 0:
        del ways["gathering"]
    return ways


@contextmanager
def _shared_folder(world: World) -> Iterator[Path]:
    """A folder that is gone afterwards. Ranks on several nodes need a TMPDIR they share."""
    with tempfile.TemporaryDirectory(prefix="stacking-ds-bench-") as own:
        yield Path(world.broadcast(own))
        world.barrier()


def _figures(
    way: str, counted: Sequence[Record], rounds: Sequence[Sequence[Record]]
) -> dict[str, Any]:
    """Of one way: `counted` by rank, `rounds` by round and rank."""
    labels = sorted({label for record in counted for label in record.sent})
    times = {name: (name,) for name in rounds[-1][0].seconds} | _SUMS[way]
    figures: dict[str, Any] = {
        "sent_bytes": {
            label: max(record.sent.get(label, 0) for record in counted) for label in labels
        },
        "written_bytes": _most(record.written_bytes for record in counted),
        "peak_bytes": _spread(max(record.peak_bytes for record in ranks) for ranks in rounds),
        "seconds": {
            name: _spread(
                max(sum(record.seconds[part] for part in parts) for record in ranks)
                for ranks in rounds
                if parts[0] in ranks[0].seconds
            )
            for name, parts in times.items()
        },
    }
    if way == "ours":
        figures["captured_bytes"] = _most(record.captured_bytes for record in rounds[-1])
        figures["engine_bytes"] = _most(record.engine_bytes for record in rounds[-1])
        ratios = [[record.peak_ratio() for record in ranks] for ranks in rounds]
        known = [[ratio for ratio in ranks if ratio is not None] for ranks in ratios]
        figures["peak_ratio"] = _spread(map(max, known)) if all(known) else None
    return figures


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _spread(of_rounds: Iterable[float]) -> dict[str, float]:
    values = list(of_rounds)
    return {"minimum": min(values), "median": statistics.median(values)}

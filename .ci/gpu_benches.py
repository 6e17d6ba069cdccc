"""The benches of `make gpu-check`. A speed that was missed is a figure, not a failure; a bench that
measured nothing is one."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from gpu_ground import Ground, PartError, tail

__all__ = [
    "BASE_STEPS",
    "LARGE_STEPS",
    "begin_fused_lamb",
    "bench_growth",
    "bench_kernels",
    "bench_kernels_compiled",
    "bench_lamb",
    "bench_step",
    "even_rows",
    "kernel_figures",
    "lamb_figures",
    "step_figures",
    "tables",
]

Figures = dict[str, Any]

MOST_KERNELS = 12  # of a LAMB step, however many tensors
FUSED_LAMB = "DeepSpeed's FusedLamb"
BUILD = "from deepspeed.ops.op_builder import FusedLambBuilder; FusedLambBuilder().load()"
# What fits, of 16. The large one is by itself: the others are known where it has no time left.
BASE_STEPS = "base-3L-128-bf16-full,base-6L-128-bf16-full,base-12L-128"
LARGE_STEPS = "large-24L-128-bf16-full"
_ABOUT = ("machine", "sizes", "targets")
# Of one who took a step; the figures as they were measured have them too.
_DETAILS = ("seconds_minimum", "seconds_median", "flops_per_token")


def begin_fused_lamb(ground: Ground) -> None:
    """Compiling it takes a minute, of the processor only."""
    ground.begin(FUSED_LAMB, lambda: _build(ground))


def _build(ground: Ground) -> dict[str, str]:
    """The environment in which it is there."""
    environment = {"TORCH_EXTENSIONS_DIR": str(ground.work / "fused_lamb")}
    ground.python("-c", BUILD, limit_seconds=300, environment=environment)
    return environment


def bench_lamb(ground: Ground) -> Figures:
    options, environment, figures = ["--only=communication,gpu"], {}, {}
    try:
        environment = ground.outcome(FUSED_LAMB)
        options.append("--deepspeed-fused-lamb")
    except PartError as error:
        last = error.output.splitlines()[-1:]
        figures["fused_lamb_not_built"] = "; ".join([str(error), *last])
    found = _bench(ground, "lamb", *options, limit_seconds=120, environment=environment)
    return {**lamb_figures(found), **figures}


def bench_kernels(ground: Ground) -> Figures:
    return kernel_figures(_bench(ground, "kernels", limit_seconds=100))


def bench_kernels_compiled(ground: Ground) -> Figures:
    options = ("--only=operations", "--hidden-size=768", "--compile")
    found = _bench(ground, "kernels", *options, limit_seconds=120)
    return kernel_figures(found, {"triton", "compile"})


def bench_growth(ground: Ground) -> Figures:
    return tables(_bench(ground, "growth", limit_seconds=100))


def bench_step(ground: Ground, cases: str, rounds: int) -> Figures:
    options = (f"--only={cases}", f"--rounds={rounds}")
    return step_figures(_bench(ground, "step", *options, limit_seconds=130))


def step_figures(found: Mapping[str, Any]) -> Figures:
    """As `tables`.

    Raises:
        PartError: a case lacks our step, or that of transformers.
    """
    for case in found["cases"]:
        for who in ("ours", "transformers"):
            step = case["steps"].get(who, {"not_measured": "nobody says why"})
            if "not_measured" in step:
                raise PartError(f"{case['name']}: {who}: not measured: {step['not_measured']}")
    return tables(found)


def _bench(ground: Ground, name: str, *options: str, **limits: Any) -> Figures:
    path = ground.work / f"bench-{name}.json"
    path.unlink(missing_ok=True)
    command = ("-m", "stacking_ds", "bench", name, *options, "--json", path)
    output = ground.python(*command, **limits)
    if not path.is_file():
        raise PartError(f"bench {name} wrote no figures", tail(output))
    found: Figures = json.loads(path.read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------ figures of any bench


def tables(found: Mapping[str, Any]) -> Figures:
    """Each list of rows in a bench's figures, as a table whose rows have the same columns, each
    single number, and each reason why something was not measured.

    Raises:
        PartError: nothing was measured.
    """
    figures: Figures = {}
    measured = {key: value for key, value in found.items() if key not in _ABOUT}
    for key, value in measured.items():
        figures |= _readable(key, value)
    if not any(map(_has_a_measurement, measured.values())):
        reasons = [f"{key}: {text}" for key, text in figures.items() if isinstance(text, str)]
        raise PartError(f"nothing was measured; {'; '.join(reasons)}".rstrip("; "))
    return {**figures, **_ending(found)}


def _ending(found: Mapping[str, Any]) -> Figures:
    """The report gathers the targets of all parts, and leaves out what only machines read."""
    targets = [target_row(target) for target in found.get("targets", ())]
    return {"targets": targets, "as_measured": dict(found)}


def _readable(key: str, value: Any) -> Figures:
    if isinstance(value, Mapping):
        if "not_measured" in value:
            return {key: f"not measured: {value['not_measured']}"}
        return {
            name: shown
            for inner, part in value.items()
            for name, shown in _readable(f"{key}_{inner}", part).items()
        }
    if isinstance(value, list):
        if value and all(isinstance(row, Mapping) for row in value):
            return {key.removesuffix("_rows"): even_rows(value)}
        return {key: value} if value else {}
    return {} if value is None else {key: value}


def even_rows(rows: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """With the columns of all of them, "-" where a row has none. What is nested has its path for
    a name; a row that holds several of a kind becomes a row for each. Why something was not
    measured is the last column."""
    flat = [dict(_flat(part)) for row in rows for part in _one_of_a_kind(row)]
    columns = list(dict.fromkeys(name for row in flat for name in row if name != "not_measured"))
    if any(name.endswith("step_seconds") for name in columns):
        columns = [name for name in columns if not name.endswith(_DETAILS)]
    if any("not_measured" in row for row in flat):
        columns.append("not_measured")
    return [{name: "-" if row.get(name) is None else row[name] for name in columns} for row in flat]


def _one_of_a_kind(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    kinds = [
        (key, value)
        for key, value in row.items()
        if isinstance(value, Mapping)
        and value
        and all(isinstance(v, Mapping) for v in value.values())
    ]
    if not kinds:
        yield row
    names = {key: value for key, value in row.items() if isinstance(value, str)}
    for key, value in kinds:
        for name, part in value.items():
            yield {**names, key: name, **part}


def _flat(row: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}_")
        elif isinstance(value, list):
            yield f"{path}{name}", ", ".join(map(str, value))
        else:
            yield f"{path}{name}", value


def _has_a_measurement(value: Any) -> bool:
    """Whether there is a time, a speed or a ratio in it."""
    if isinstance(value, Mapping):
        return "not_measured" not in value and any(map(_has_a_measurement, value.values()))
    if isinstance(value, list):
        return any(map(_has_a_measurement, value))
    return isinstance(value, float)


def target_row(target: Mapping[str, Any]) -> Figures:
    value = target.get("value")
    verdict = f"{target.get('verdict', '')} {target.get('note', '')}".strip()
    return {
        "target": target.get("name", "?"),
        "should_be": f"{target.get('relation', '')} {target.get('limit', '-')}".strip(),
        "is": "-" if value is None else value,
        "verdict": verdict,
    }


# ------------------------------------------------------------------ the kernels'


def kernel_figures(found: Mapping[str, Any], forms: Collection[str] = ("triton",)) -> Figures:
    """A row for each operation and pass, and for each shape of attention, with a column for each
    form; and the products.

    Raises:
        PartError: an operation was not measured in one of the `forms`, or no attention.
    """
    operations = found["operations"]
    if "not_measured" in operations:
        raise PartError(f"no operation was measured: {operations['not_measured']}")
    _require_forms(operations["rows"], "operation", set(forms))
    figures: Figures = {
        "times_the_host_was_behind": found["times_the_host_was_behind"],
        "copy_gb_per_second": operations["copy_gb_per_second"],
        "operations": _by_form(
            operations["rows"],
            ("operation", "hidden_size", "pass", "bytes", "floor_seconds"),
            lambda row: row["seconds"],
        ),
    }
    attention = found["attention"]
    if "not_measured" not in attention:
        _require_forms(attention["rows"], "longest", {"flash", "padded"})
        key = ("longest", "dropout")
        rows = _by_form(attention["rows"], key, lambda row: row["tflop_per_second"])
        figures["attention_tflop_per_second"] = rows
    for part in ("attention", "products"):
        if "not_measured" in found[part]:
            figures[part] = f"not measured: {found[part]['not_measured']}"
        elif part == "products":
            figures[part] = even_rows(found[part]["rows"])
    every = [row for part in ("operations", "attention") for row in found[part].get("rows", ())]
    reasons = {f"{row['form']}: {row['not_measured']}" for row in every if "not_measured" in row}
    return {**figures, "forms_not_measured": sorted(reasons), **_ending(found)}


def _require_forms(rows: Sequence[Mapping[str, Any]], key: str, forms: set[str]) -> None:
    """Raises PartError where one of them was not measured."""
    for row in rows:
        if row["form"] in forms and "not_measured" in row:
            raise PartError(f"{row['form']} was not measured at {row[key]}: {row['not_measured']}")
    missing = forms - {row["form"] for row in rows}
    if missing:
        raise PartError(f"{', '.join(sorted(missing))} was not measured")


def _by_form(
    rows: Sequence[Mapping[str, Any]], key: Sequence[str], value: Callable[[Any], float]
) -> list[Figures]:
    """A row for each key, with a column for each form; seconds in microseconds."""
    found: dict[tuple[Any, ...], Figures] = {}
    for row in rows:
        cells = found.setdefault(
            tuple(row[name] for name in key), {name: row[name] for name in key}
        )
        cells[row["form"]] = None if "not_measured" in row else value(row)
    if "floor_seconds" in key:
        for cells in found.values():
            floor = cells["floor_seconds"]
            cells["floor_over_triton"] = None if floor is None else floor / cells["triton"]
    return even_rows([_in_microseconds(cells) for cells in found.values()])


def _in_microseconds(cells: Figures) -> Figures:
    if "floor_seconds" not in cells:
        return cells
    about = ("operation", "hidden_size", "pass")
    rest = {name: value for name, value in cells.items() if name not in about}
    nbytes, ratio = rest.pop("bytes"), rest.pop("floor_over_triton")
    times = {
        f"{name.removesuffix('_seconds')}_us": None if value is None else 1e6 * value
        for name, value in rest.items()
    }
    megabytes = None if nbytes is None else nbytes / 1e6
    shown = {name: cells[name] for name in about}
    return {**shown, "mb": megabytes, **times, "floor_over_triton": ratio}


# ------------------------------------------------------------------ LAMB's


def lamb_figures(found: Mapping[str, Any]) -> Figures:
    """A row for each form of the step and for each target, from the bench's JSON.

    Raises:
        PartError: our form launches too many kernels, makes the host wait, or was not measured.
    """
    gpu = found["gpu"]
    if "not_measured" in gpu:
        raise PartError(f"the step on the GPU was not measured: {gpu['not_measured']}")
    for name in ("triton", "triton_by_group"):
        kernels = gpu["steps"][name]["kernels"]
        if kernels is None:
            raise PartError("the kernels of a step were not counted: torch.profiler saw none")
        if kernels > MOST_KERNELS:
            raise PartError(f"{name} launches {kernels} kernels, {MOST_KERNELS} are allowed")
    if gpu["synchronisation"] is not None:
        raise PartError(f"a step makes the host wait for the device: {gpu['synchronisation']}")
    return {
        "copy_gb_per_second": gpu["copy_gb_per_second"],
        "floor_ms": 1e3 * gpu["floor_seconds"],
        "steps": [
            _step_row(name, step, gpu["floor_seconds"]) for name, step in gpu["steps"].items()
        ],
        **_ending(found),
    }


def _step_row(name: str, step: Figures, floor_seconds: float) -> Figures:
    if "not_measured" in step:
        columns = ("host_ms", "wall_ms", "times_the_floor", "kernels", "copies")
        reason = f"not measured: {step['not_measured']}"
        return {"step": name, "device_ms": reason, **dict.fromkeys(columns, "-")}
    device_seconds = step["device_seconds"]["median"]
    return {
        "step": name,
        "device_ms": 1e3 * device_seconds,
        "host_ms": 1e3 * step["host_seconds"]["median"],
        "wall_ms": 1e3 * step["wall_seconds"]["median"],
        "times_the_floor": device_seconds / floor_seconds,
        "kernels": "-" if step["kernels"] is None else step["kernels"],
        "copies": "-" if step["copies"] is None else step["copies"],
    }

"""The figures of `stacking-ds bench lamb` for people: a table a part, and the targets."""

from collections.abc import Mapping, Sequence
from typing import Any

from stacking_ds.bench.lamb import BYTES_PER_PARAMETER
from stacking_ds.bench.lamb_traffic import BYTES_PER_TENSOR
from stacking_ds.bench.targets import Target, grid

Figures = Mapping[str, Any]
"""By part, what its `measure_…` returns, or {"not_measured": why}."""

_STEPS = {
    "triton": "ours in Triton, one call",
    "triton_by_group": "the same, a flat tensor and a call for each group",
    "apex": "apex amp_C.multi_tensor_lamb, bf16 copies",
    "deepspeed": "DeepSpeed FusedLamb, bf16 copies",
}


def lamb_targets(figures: Figures) -> list[Target]:
    """What was promised of the step, one row each, measured or not."""
    return [*_communication_targets(figures), _cpu_target(figures), *_gpu_targets(figures)]


def _communication_targets(figures: Figures) -> list[Target]:
    found = figures["communication"]
    cases = found.get("cases", ())
    unsharded = [len(case["collectives"]) for case in cases if case["zero_stage"] == 0]
    sharded = [case["collectives"] for case in cases if case["zero_stage"] > 0]
    reduces = [sum(_is_all_reduce(one) for one in collectives) for collectives in sharded]
    others = [sum(not _is_all_reduce(one) for one in collectives) for collectives in sharded]
    sizes = [
        sum(one["bytes"] for one in collectives) / found["parameter_tensors"]
        for collectives in sharded
    ]
    rows: list[tuple[str, float, Sequence[float]]] = [
        ("collectives of a step at ZeRO 0", 0, unsharded),
        ("all-reduces of a step at ZeRO 1, 2, 3", 1, reduces),
        ("other collectives there", 0, others),
        ("bytes of them for each parameter tensor", BYTES_PER_TENSOR, sizes),
    ]
    why = found.get("not_measured", "")
    return [Target(name, "=", limit, _furthest(values, limit), why) for name, limit, values in rows]


def _is_all_reduce(collective: Mapping[str, Any]) -> bool:
    return str(collective["operation"]).startswith("allreduce")


def _furthest(values: Sequence[float], limit: float) -> float | None:
    return max(values, key=lambda value: abs(value - limit), default=None)


def _cpu_target(figures: Figures) -> Target:
    found = figures["cpu"]
    value = None
    if "seconds" in found:
        value = _least(found, "blocked") / _least(found, "loop")
    why = found.get("not_measured", "one thread, process CPU time")
    return Target("CPU: blocked / plain loop", "<=", 0.75, value, why)


def _gpu_targets(figures: Figures) -> list[Target]:
    found = figures["gpu"]
    why = found.get("not_measured", "")
    steps = found.get("steps", {})
    ours, by_group = steps.get("triton"), steps.get("triton_by_group")
    waits = found.get("synchronisation")
    counts = [steps[name]["kernels"] for name in ("triton", "triton_by_group") if name in steps]
    unseen = "torch.profiler saw no kernel" if None in counts else why
    ratio = None if ours is None else _device(ours) / found["floor_seconds"]
    return [
        Target(f"GPU: ours / time of {BYTES_PER_PARAMETER} B a parameter", "<=", 1.5, ratio, why),
        Target(
            "GPU: wall time from an idle device / floor",
            "<=",
            1.5,
            None if by_group is None else _wall(by_group) / found["floor_seconds"],
            why or "a flat tensor for each group, as at ZeRO 1, 2, 3",
        ),
        Target(
            "GPU: kernels of a step, however many calls",
            "<=",
            12,
            None if None in counts else max(counts, default=None),
            unseen,
        ),
        Target(
            "GPU: waits of the host for the device",
            "=",
            0,
            None if ours is None else float(waits is not None),
            why or waits or "",
        ),
        _rival_target("apex", 1.3, steps, why),
        _rival_target("deepspeed", 2.0, steps, why),
    ]


def _rival_target(name: str, limit: float, steps: Figures, why: str) -> Target:
    label = _STEPS[name].partition(",")[0]
    theirs = steps.get(name, {"not_measured": why})
    if "not_measured" in theirs:
        return Target(f"GPU: {label} / ours", ">=", limit, None, theirs["not_measured"])
    value = _device(theirs) / _device(steps["triton"])
    return Target(f"GPU: {label} / ours", ">=", limit, value, "")


def _least(found: Figures, name: str) -> float:
    return float(found["seconds"][name]["minimum"])


def _device(step: Figures) -> float:
    return float(step["device_seconds"]["median"])


def _wall(step: Figures) -> float:
    return float(step["wall_seconds"]["median"])


# ------------------------------------------------------------------------------- text


def lamb_table(figures: Figures, sizes: Mapping[str, int], machine: Mapping[str, str]) -> str:
    """All of it, as text."""
    parts = (
        ("Communication", figures["communication"], _communication),
        ("CPU", figures["cpu"], _cpu),
        ("GPU", figures["gpu"], _gpu),
    )
    return "\n\n".join(
        [
            f"One LAMB step of a BERT: {sizes['layers']} layers, hidden size "
            f"{sizes['hidden_size']}, vocabulary {sizes['vocab_size']:,}; fp32 masters, moments "
            f"and gradients, bf16 copies.",
            "\n".join(f"{key}: {value}" for key, value in machine.items()),
            *(f"{title}: {_not_measured(found) or text(found)}" for title, found, text in parts),
            "\n".join(target.line() for target in lamb_targets(figures)),
        ]
    )


def _not_measured(found: Figures) -> str:
    return f"not measured: {found['not_measured']}" if "not_measured" in found else ""


def _communication(found: Figures) -> str:
    rows = [
        [
            str(case["zero_stage"]),
            str(case["parameter_groups"]),
            str(case["calls"]),
            str(len(case["collectives"])),
            ", ".join(f"{one['operation']} {one['bytes']:,}" for one in case["collectives"]) or "-",
        ]
        for case in found["cases"]
    ]
    tensors = found["parameter_tensors"]
    return (
        f"what optimizer.step asks torch.distributed for in one training step, on "
        f"{found['ranks']} ranks,\nof a tiny BERT of {found['layers']} layers with {tensors} "
        f"parameter tensors (2 fp64 sums of each: {tensors * BYTES_PER_TENSOR:,} bytes)\n"
        + grid(["ZeRO", "parameter groups", "calls", "collectives", "bytes of each"], rows)
    )


def _cpu(found: Figures) -> str:
    floor, loop = found["floor_seconds"], _least(found, "loop")
    steps = {"plain loop (reference)": "loop", "blocked": "blocked"}
    rows = [
        [
            label,
            f"{1e3 * _least(found, name):.1f}",
            f"{1e3 * found['seconds'][name]['system_of_minimum']:.1f}",
            f"{_least(found, name) / loop:.2f}",
            f"{_least(found, name) / floor:.2f}",
        ]
        for label, name in steps.items()
    ]
    label = f"{BYTES_PER_PARAMETER} B a parameter"
    rows.append([label, f"{1e3 * floor:.1f}", "-", f"{floor / loop:.2f}", "1.00"])
    return (
        f"{_stepped_on(found)}: CPU time of one thread, least of {found['rounds']} rounds in which "
        f"all take turns,\nand how much of it the operating system took, for new pages; copies at "
        f"{found['copy_gb_per_second']:.1f} GB/s, read and written\n"
        + grid(["", "ms", "system ms", "/ loop", "/ floor"], rows)
    )


def _gpu(found: Figures) -> str:
    floor, ours = found["floor_seconds"], _device(found["steps"]["triton"])
    rows, reasons, behind = [], [], False
    for name, label in _STEPS.items():
        step = found["steps"][name]
        if "not_measured" in step:
            reasons.append(f"{label.partition(',')[0]}: {_not_measured(step)}")
            continue
        device, host = _device(step), step["host_seconds"]["median"]
        ahead = step["host_is_ahead"]
        behind = behind or not ahead
        rows.append(
            [
                label,
                f"{1e3 * device:.3f}{'' if ahead else '*'}",
                f"{1e3 * host:.2f}",
                f"{1e3 * _wall(step):.3f}",
                f"{device / floor:.2f}",
                f"{device / ours:.2f}",
                *("-" if step[key] is None else str(step[key]) for key in ("kernels", "copies")),
            ]
        )
    label = f"{BYTES_PER_PARAMETER} B a parameter"
    rows.append([label, f"{1e3 * floor:.3f}", "-", "-", "1.00", f"{floor / ours:.2f}", "-", "-"])
    head = ["", "device ms", "host ms", "wall ms", "/ floor", "/ ours", "kernels", "copies"]
    star = (
        ["* the host cannot get ahead: the step waits for the device, or fills its queue"]
        if behind
        else []
    )
    return (
        f"{found['device']}, {_stepped_on(found)}: median of {found['rounds']} rounds in which all "
        f"take turns;\n"
        f"device: by CUDA events, the host having gone through the step before; / floor and / ours "
        f"are of this;\n"
        f"host: its time to go through the step;\n"
        f"wall: from an idle device to the end of its work, as in training;\n"
        f"copies at {found['copy_gb_per_second']:,.0f} GB/s, read and written\n"
        + "\n".join([grid(head, rows), *star, *reasons])
    )


def _stepped_on(found: Figures) -> str:
    count = found["parameters"] / 1e6
    return f"{count:.1f} M parameters in {found['parameter_tensors']} tensors"

"""The figures of `stacking-ds bench kernels` for people: a table a part, and the targets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stacking_ds.bench.targets import Target, grid

Figures = Mapping[str, Any]

# otherwise hand-written kernels are not worth keeping
_SHARE_OF_COPY = 0.75
_AGAINST_COMPILE = 1.0
_PASSES = ("forward", "backward")
_LABELS = {
    "gelu": "bias + GELU",
    "add_norm": "bias + dropout + residual + LayerNorm",
    "norm": "LayerNorm",
    "embedding": "embeddings + LayerNorm + dropout",
    "cross_entropy": "cross-entropy in place",
}
_FORMS = {"plain": "plain torch", "torch": "torch", "triton": "triton", "compile": "compile"}


def kernel_targets(found: Figures) -> list[Target]:
    """What was promised of the Triton kernels on a GPU, one row each, measured or not."""
    operations = found["operations"]
    rows = operations.get("rows", ())
    on_gpu = found["device"] == "cuda"
    why = operations.get("not_measured", "" if on_gpu else "no GPU")
    targets = []
    for name, label in _LABELS.items():
        for way in _PASSES:
            if (name, way) == ("embedding", "backward"):
                continue  # most of it is torch's scattering into the tables, which nobody fuses
            of_pass = [row for row in rows if row["operation"] == name and row["pass"] == way]
            shares = [
                row["floor_seconds"] / row["seconds"]
                for row in _measured(of_pass, "triton")
                if row["floor_seconds"]
            ]
            name_of = f"GPU: {label}, {way}: share of the copy's speed"
            value, note = _least(shares, why or _reason(of_pass, "triton"))
            targets.append(Target(name_of, ">=", _SHARE_OF_COPY, value, note))
    for name, label in _LABELS.items():
        of_name = [row for row in rows if row["operation"] == name]
        times = {form: _by_width(_measured(of_name, form)) for form in ("compile", "triton")}
        if not on_gpu:
            times = {"compile": {}, "triton": {}}
        ratios = [
            seconds / times["triton"][width]
            for width, seconds in times["compile"].items()
            if width in times["triton"]
        ]
        missing = "compile" if times["triton"] else "triton"
        value, note = _least(ratios, why or _reason(of_name, missing))
        targets.append(
            Target(f"GPU: {label}: compile / triton", ">=", _AGAINST_COMPILE, value, note)
        )
    return targets


def _measured(rows: Iterable[Figures], form: str) -> list[Figures]:
    return [row for row in rows if row["form"] == form and "seconds" in row]


def _reason(rows: Iterable[Figures], form: str) -> str:
    reasons = (row["not_measured"] for row in rows if row["form"] == form and "not_measured" in row)
    return str(next(reasons, "not asked for"))


def _least(values: Sequence[float], why: str) -> tuple[float | None, str]:
    return (min(values), "") if values else (None, why)


def _by_width(rows: Iterable[Figures]) -> dict[int, float]:
    """Of both passes together."""
    seconds: dict[int, float] = {}
    for row in rows:
        seconds[row["hidden_size"]] = seconds.get(row["hidden_size"], 0.0) + row["seconds"]
    return seconds


# ------------------------------------------------------------------------------- text


def kernels_table(found: Figures) -> str:
    """All of it, as text."""
    sizes = found["sizes"]
    where = "one GPU" if found["device"] == "cuda" else "one CPU thread, its process's own time"
    summary = {"minimum": "least", "median": "median"}[found["summary"]]
    parts = {"operations": _operations, "attention": _attention, "products": _products}
    texts = [
        f"{part.capitalize()}: "
        + (_not_measured(found[part]) or text(found[part], found["device"]))
        for part, text in parts.items()
    ]
    behind = found["times_the_host_was_behind"]
    return "\n\n".join(
        [
            f"Kernels in {found['precision']} on {where}: {sizes['tokens']:,} tokens, vocabulary "
            f"{sizes['vocab_size']:,}; {summary} of {sizes['rounds']} rounds in which all take "
            f"turns.",
            "\n".join(f"{key}: {value}" for key, value in found["machine"].items()),
            *texts,
            *([f"{behind} times the GPU waited for the host: these were too long"] * bool(behind)),
            _target_lines(kernel_targets(found)),
        ]
    )


def _target_lines(targets: Sequence[Target]) -> str:
    notes = {target.note for target in targets}
    if len(notes) == 1 and all(target.value is None for target in targets):
        return f"{len(targets)} targets, all of a GPU: not measured ({notes.pop()})"
    return "\n".join(target.line() for target in targets)


def _not_measured(found: Figures) -> str:
    return f"not measured: {found['not_measured']}" if "not_measured" in found else ""


def _operations(found: Figures, device: str) -> str:
    unit, scale = ("us", 1e6) if device == "cuda" else ("ms", 1e3)
    ours = "triton" if device == "cuda" else "torch"
    forms = [form for form in _FORMS if _measured(found["rows"], form)]
    keys = dict.fromkeys((r["operation"], r["hidden_size"], r["pass"]) for r in found["rows"])
    lines = []
    for key in keys:
        rows = {
            row["form"]: row
            for row in found["rows"]
            if (row["operation"], row["hidden_size"], row["pass"]) == key and "seconds" in row
        }
        if not rows:
            continue
        any_row = next(iter(rows.values()))
        floor, nbytes = any_row["floor_seconds"], any_row["bytes"]
        own = rows.get(ours, {}).get("seconds")
        lines.append(
            [
                _LABELS[key[0]],
                str(key[1]),
                key[2],
                *(_number(nbytes, 1e-6), _number(floor, scale)),
                *(_number(rows.get(form, {}).get("seconds"), scale) for form in forms),
                "-" if None in (floor, own) else f"{floor / own:.2f}",
                *(
                    "-" if own is None or form not in rows else f"{rows[form]['seconds'] / own:.2f}"
                    for form in forms
                    if form != ours
                ),
            ]
        )
    head = ["", "H", "pass", "MB", f"floor {unit}", *(f"{_FORMS[form]} {unit}" for form in forms)]
    head += [f"floor / {ours}", *(f"{_FORMS[f]} / {ours}" for f in forms if f != ours)]
    reasons = _reasons(found["rows"])
    return (
        f"copies at {found['copy_gb_per_second']:,.1f} GB/s, read and written; MB are what the "
        f"fused form must move,\nfloor is the time of that at the copy's speed\n"
        + "\n".join([grid(head, lines), *reasons])
    )


def _reasons(rows: Iterable[Figures]) -> list[str]:
    """Each once."""
    reasons = {
        f"{_FORMS.get(row['form'], row['form'])}: not measured: {row['not_measured']}": None
        for row in rows
        if "not_measured" in row
    }
    return list(reasons)


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return "-"
    return f"{scale * value:,.1f}" if scale * value >= 10 else f"{scale * value:.3f}"


def _attention(found: Figures, device: str) -> str:
    unit, scale = ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1e3)
    rows = [
        [
            row["form"],
            str(row["longest"]),
            f"{row['dropout']:g}",
            *(f"{1e3 * row['seconds'][way]:.3f}" for way in _PASSES),
            f"{scale * row['tflop_per_second']:,.1f}",
        ]
        for row in found["rows"]
        if "seconds" in row
    ]
    filled = {row["longest"]: f"{row['filled']:.0%} at {row['longest']}" for row in found["rows"]}
    return (
        f"{found['tokens']:,} tokens in sequences of unequal length, {found['heads']} heads of "
        f"{found['head_size']}; rows of the longest would be full to "
        f"{', '.join(filled.values())};\n{unit} of both passes, by the real tokens' model FLOPs\n"
        + "\n".join(
            [
                grid(["", "longest", "dropout", "forward ms", "backward ms", unit], rows),
                *_reasons(found["rows"]),
            ]
        )
    )


def _products(found: Figures, device: str) -> str:
    keys = dict.fromkeys((row["inputs"], row["outputs"]) for row in found["rows"])
    lines = []
    for inputs, outputs in keys:
        rows = {
            row["form"]: row
            for row in found["rows"]
            if (row["inputs"], row["outputs"]) == (inputs, outputs) and "seconds" in row
        }
        whole = {form: sum(row["seconds"].values()) for form, row in rows.items()}
        gain = f"{whole['bf16'] / whole['fp8']:.2f}" if {"bf16", "fp8"} <= whole.keys() else "-"
        lines += [
            [
                f"{inputs} -> {outputs}",
                form,
                *(f"{1e6 * row['seconds'][way]:,.1f}" for way in _PASSES),
                *(f"{row[f'{way}_tflop_per_second']:,.0f}" for way in _PASSES),
                gain if form == "fp8" else "-",
            ]
            for form, row in rows.items()
        ]
    head = ["", "form", "forward us", "backward us", "forward TFLOP/s", "backward TFLOP/s"]
    return f"linear maps of {found['tokens']:,} tokens, scaling and all\n" + "\n".join(
        [grid([*head, "bf16 / fp8"], lines), *_reasons(found["rows"])]
    )

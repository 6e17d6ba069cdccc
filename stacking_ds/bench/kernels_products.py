"""A layer's linear maps in FP8 beside bf16, forward and backward, with the scaling that FP8 needs.

Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from stacking_ds.bench.kernels_clock import Clock, Entrant, race
from stacking_ds.kernels.fp8 import linear_fp8, require_fp8
from stacking_ds.kernels.operations import LinearForm


def measure_products(
    tokens: int, hidden_size: int, device: torch.device, clock: Clock, rounds: int
) -> dict[str, Any]:
    """A row for each of a layer's four maps and each form.

    Raises:
        ConfigError: there is no FP8 on this device, or not in these sizes.
    """
    require_fp8(device, hidden_size, 4 * hidden_size)
    forms: dict[str, LinearForm] = {"bf16": functional.linear, "fp8": linear_fp8}
    H = hidden_size
    rows = []
    for inputs, outputs in ((H, 3 * H), (H, H), (H, 4 * H), (4 * H, H)):
        entrants = _entrants(tokens, inputs, outputs, device, forms)
        found = race(entrants, clock, rounds, 2 * tokens * (inputs + outputs))
        flops = 2 * tokens * inputs * outputs
        shared = {"inputs": inputs, "outputs": outputs}
        rows += [
            {
                **shared,
                "form": form,
                "seconds": seconds,
                "forward_tflop_per_second": flops / seconds["forward"] / 1e12,
                "backward_tflop_per_second": 2 * flops / seconds["backward"] / 1e12,
            }
            for form, seconds in found.seconds.items()
        ]
        rows += [
            {**shared, "form": form, "not_measured": why}
            for form, why in found.not_measured.items()
        ]
    return {"tokens": tokens, "rows": rows}


def _entrants(
    tokens: int,
    inputs: int,
    outputs: int,
    device: torch.device,
    forms: dict[str, LinearForm],
) -> dict[str, Entrant]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        # zeros, or small whole numbers, would heat the card less and let it run faster
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(0.0, 1.0, generator=generator)

    x_TI, weight_OI = normal(tokens, inputs), normal(outputs, inputs).mul_(inputs**-0.5)
    bias_O, gradient_TO = normal(outputs), normal(tokens, outputs)
    given = tuple(tensor.requires_grad_() for tensor in (x_TI, weight_OI, bias_O))
    works: dict[str, Callable[[], torch.Tensor]]
    works = {name: partial(form, *given) for name, form in forms.items()}
    return {name: Entrant(forward, given, gradient_TO) for name, forward in works.items()}

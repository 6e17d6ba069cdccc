"""What the Triton kernels are compiled from: for machines that have no GPU to launch them on.

The types of their arguments, "x" standing for the dtype of activations and parameters; and by
module the kernels, each with the constants of every form that is launched. The rest of the
constants is told by the module's `options`.
"""

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from stacking_ds.kernels import (
    triton_cross_entropy,
    triton_embedding,
    triton_norm,
    triton_operations,
    triton_parts,
)
from stacking_ds.kernels.triton_cross_entropy import (
    cross_entropy_backward_kernel,
    cross_entropy_kernel,
)
from stacking_ds.kernels.triton_embedding import embed_backward_kernel, embed_kernel
from stacking_ds.kernels.triton_norm import add_norm_backward_kernel, add_norm_kernel
from stacking_ds.kernels.triton_operations import gelu_backward_kernel, gelu_kernel
from stacking_ds.kernels.triton_parts import WALKING, column_sums_kernel

__all__ = ["FORMS", "TYPES"]

_NAMES_BY_TYPE = {
    "*x": "inner_TF bias_F out_TF d_out_TF d_inner_TF out_KH inner_TH bias_H residual_TH weight_H "
    "norm_bias_H sum_TH out_TH d_out_TH d_sum_TH d_inner_TH word_VH type_KH position_PH logits_MV",
    "*fp32": "partial_1PF partial_2PH partial_KPH mean_T rstd_T highest_M rest_M loss_M d_loss",
    "*i64": "seed labels_M input_ids_T token_type_ids_T position_ids_T",
    "i32": "tokens programs words types positions stride",
    "fp32": "eps dropout_prob",
}
TYPES = {name: type_ for type_, names in _NAMES_BY_TYPE.items() for name in names.split()}


def _forms_of_norm() -> list[tuple[Any, dict[str, Any]]]:
    """With and without a norm, dropout, and what it is added to; forward also without what a
    backward pass would need."""
    plain, dry = {"bias_H": None, "residual_TH": None}, {"seed": None}
    unnormed = dict.fromkeys(["weight_H", "norm_bias_H", "mean_T", "rstd_T", "out_TH"])
    unrecorded: dict[str, Any] = dict.fromkeys(["sum_TH", "mean_T", "rstd_T"])
    forward: list[dict[str, Any]] = [{}, dry, plain | dry | {"sum_TH": None}]
    forward += [dry | unrecorded, plain | dry | unrecorded, unnormed, unnormed | dry]
    unread = dict.fromkeys(["sum_TH", "mean_T", "rstd_T", "weight_H", "d_sum_TH"])
    shared: dict[str, Any] = {"d_inner_TH": None, **dry}
    backward: list[dict[str, Any]] = [{"BIAS": True}, {"BIAS": True, **shared}]
    backward += [{"BIAS": False, **shared}, {"BIAS": True, **unread}]
    backward += [{"BIAS": True, **unread, **shared}]
    return [(add_norm_kernel, constants) for constants in forward] + [
        (add_norm_backward_kernel, {**constants, **WALKING}) for constants in backward
    ]


FORMS: dict[Any, list[tuple[Any, dict[str, Any]]]] = {
    triton_parts: [(column_sums_kernel, {})],
    triton_cross_entropy: [(cross_entropy_kernel, {}), (cross_entropy_backward_kernel, {})],
    triton_embedding: [
        (embed_kernel, {}),
        (embed_kernel, {"seed": None}),
        (embed_kernel, dict.fromkeys(["seed", "mean_T", "rstd_T"])),
        (embed_backward_kernel, WALKING),
        (embed_backward_kernel, {"seed": None, **WALKING}),
    ],
    triton_operations: [(gelu_kernel, {}), (gelu_backward_kernel, {})],
    triton_norm: _forms_of_norm(),
}

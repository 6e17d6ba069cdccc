"""The LAMB step of NVIDIA's apex, where its compiled part is there; whole tensors on a GPU only.

The package called `apex` on PyPI is another project, and NVIDIA's can be installed without its
compiled part; both can be imported, and neither can step. So it is that part, `amp_C`, that is
looked for.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stacking_ds.errors import ConfigError
from stacking_ds.optim.lamb.contract import Item

_CHUNK_ELEMENTS = 2048 * 32  # apex's own choice for all its multi-tensor functions
_NEEDED = ("multi_tensor_lamb", "multi_tensor_l2norm")
_REMEDY = (
    "build NVIDIA's apex from its repository with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or leave "
    "optimizer.lamb.kernel to auto"
)


def find_amp_C() -> ModuleType:  # noqa: N802 - the module's own name
    """The compiled part of NVIDIA's apex.

    Raises:
        ConfigError: it is not there, cannot be loaded, or is not what it should be; the message
            says what is there instead.
    """
    try:
        found = importlib.import_module("amp_C")
    except ImportError as error:
        raise ConfigError(f"{_what_is_there(error)}: {_REMEDY}") from None
    missing = [name for name in _NEEDED if not callable(getattr(found, name, None))]
    if missing:
        raise ConfigError(
            f"the module amp_C at {getattr(found, '__file__', None)} has no {', '.join(missing)}: "
            f"it is not that of NVIDIA's apex, or an old one; {_REMEDY}"
        )
    return found


def _what_is_there(error: ImportError) -> str:
    if importlib.util.find_spec("amp_C") is not None:
        return f"apex's compiled part amp_C cannot be loaded ({error}); it fits another torch"
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return "NVIDIA's apex is not installed"
    # a look at its folder, since importing the other project would run it
    places = [Path(place) for place in apex.submodule_search_locations or []]
    if any((place / "multi_tensor_apply").is_dir() for place in places):
        return f"NVIDIA's apex in {places[0]} was installed without its compiled part amp_C"
    where = places[0] if places else apex.origin
    return f"the package apex in {where} is not NVIDIA's (PyPI's is another project)"


class ApexLamb:
    """`LambKernel` by `amp_C.multi_tensor_lamb`, for shards that are whole tensors.

    It overwrites the gradients with the updates, and bounds no ratio.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises:
        ConfigError: apex's compiled part is absent or wrong.
        """
        self._amp_C: Any = find_amp_C()
        self._gradients: list[torch.Tensor] = []
        self._no_overflow = torch.zeros(1, dtype=torch.int, device=device)
        self._no_norm = torch.zeros(1, device=device)

    def accumulate(
        self,
        items: Sequence[Item],
        gradients: Sequence[torch.Tensor],
        squares_2P: torch.Tensor,
        gradient_scale: torch.Tensor | None,
    ) -> None:
        """Keep the gradients: apex takes both passes at once."""
        if gradient_scale is not None:
            torch._foreach_mul_(list(gradients), gradient_scale)
        self._gradients = list(gradients)
        self._add_squares(items, [item.shard.flat for item in items], squares_2P[0])

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        if not items:
            return
        gradients, self._gradients = self._gradients, []
        by_hyper: dict[object, list[tuple[Item, torch.Tensor]]] = {}
        for item, gradient in zip(items, gradients, strict=True):
            by_hyper.setdefault(item.hyper, []).append((item, gradient))
        for group in by_hyper.values():
            self._step(group)
        self._add_squares(items, gradients, squares_2P[1])
        for item in items:
            if item.shard.low is not None:
                item.shard.low.copy_(item.shard.flat.detach().view_as(item.shard.low))

    def _step(self, group: Sequence[tuple[Item, torch.Tensor]]) -> None:
        hyper = group[0][0].hyper
        assert hyper.layer_adaptation or hyper.weight_decay == 0.0, "apex adapts all that decays"
        lists = [
            [gradient for _, gradient in group],
            [item.shard.flat.detach() for item, _ in group],
            [item.exp_avg for item, _ in group],
            [item.exp_avg_sq for item, _ in group],
        ]
        self._amp_C.multi_tensor_lamb(
            _CHUNK_ELEMENTS,
            self._no_overflow,
            lists,
            hyper.learning_rate,
            hyper.beta1,
            hyper.beta2,
            hyper.eps,
            hyper.step,
            1,  # bias correction
            hyper.weight_decay,
            1,  # gradient averaging: the gradient enters with 1 - beta1
            1,  # decoupled weight decay
            self._no_norm,  # of the gradient: none, so nothing is clipped
            1.0,  # the norm to clip to
            hyper.layer_adaptation,  # also where nothing decays
        )

    def _add_squares(
        self, items: Sequence[Item], tensors: Sequence[torch.Tensor], squares_P: torch.Tensor
    ) -> None:
        places = torch.tensor([item.shard.spans[0].index for item in items])
        norms = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors]))
        squares_P[places.to(squares_P.device, non_blocking=True)] = norms.double().square()

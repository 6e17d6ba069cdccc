"""Count the bytes that leave a rank, at the one door all of torch's collectives go through.

n bytes a rank, w ranks      has to leave the rank (ring, or pairwise)
all_reduce                   2 n (w - 1) / w
reduce_scatter               n (w - 1) / w
all_gather                   n (w - 1)
broadcast                    n, but for the last of the ring that starts at the root
reduce                       n, but for the root
gather, all_to_all, send     what is addressed to others
scatter                      at the root, what is addressed to others
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = Mapping[str, Any]


class BytesSent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every collective this thread starts (and what autograd does for it) is
    counted in `by_label`: bytes by the label of the moment, "" outside any `labelled`.

    Object collectives are tensors underneath and are counted as such. Opening connections and a
    barrier's few bytes are not counted. It slows Python down: count and time apart.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_label: Counter[str] = Counter()
        self._label = ""

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is sent meanwhile under `label`; the innermost label counts."""
        outer, self._label = self._label, label
        try:
            yield
        finally:
            self._label = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            names = [argument.name for argument in func._schema.arguments]
            self.by_label[self._label] += _sent(func, dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


def written_bytes() -> int | None:
    """What this process has written to sockets and files since it began, as the kernel counts;
    None where it does not. With gloo over TCP a second opinion on everything sent."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def _sent(func: Any, arguments: Arguments) -> int:
    operation = func._schema.name.removeprefix("c10d::").strip("_")
    if operation in _WITHOUT_PAYLOAD:
        return 0
    assert operation in _RULES, f"{func} is a collective whose bytes this does not know"
    group: Any = dist.ProcessGroup.unbox(arguments["process_group"])
    return _RULES[operation](arguments, group.rank(), group.size())


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them however nested."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _to_others(parts: Iterable[Any], rank: int) -> int:
    return sum(_bytes(part) for place, part in enumerate(parts) if place != rank)


def _share(whole: int, ranks: int) -> int:
    """What of `whole` bytes belongs to the other ranks, rounded up."""
    return -(-whole * (ranks - 1) // ranks)


def _all_gather(of: str) -> Callable[[Arguments, int, int], int]:
    return lambda arguments, rank, ranks: _bytes(arguments[of]) * (ranks - 1)


def _all_reduce(arguments: Arguments, rank: int, ranks: int) -> int:
    return _share(2 * _bytes(arguments["tensors"]), ranks)


def _broadcast(arguments: Arguments, rank: int, ranks: int) -> int:
    is_last = (rank - arguments["root_rank"]) % ranks == ranks - 1
    return 0 if is_last else _bytes(arguments["tensors"])


def _reduce(arguments: Arguments, rank: int, ranks: int) -> int:
    return 0 if rank == arguments["root_rank"] else _bytes(arguments["tensors"])


def _reduce_scatter(arguments: Arguments, rank: int, ranks: int) -> int:
    return sum(_to_others(parts, rank) for parts in arguments["input_tensors"])


def _reduce_scatter_whole(of: str) -> Callable[[Arguments, int, int], int]:
    return lambda arguments, rank, ranks: _share(_bytes(arguments[of]), ranks)


def _gather(arguments: Arguments, rank: int, ranks: int) -> int:
    return 0 if rank == arguments["root_rank"] else _bytes(arguments["input_tensors"])


def _scatter(arguments: Arguments, rank: int, ranks: int) -> int:
    return sum(_to_others(parts, rank) for parts in arguments["input_tensors"])


def _all_to_all(arguments: Arguments, rank: int, ranks: int) -> int:
    return _to_others(arguments["input_tensors"], rank)


def _all_to_all_single(arguments: Arguments, rank: int, ranks: int) -> int:
    whole: torch.Tensor = arguments["input"]
    splits: Sequence[int] = arguments["input_split_sizes"]
    if not splits:
        return _share(_bytes(whole), ranks)
    return _to_others(torch.split(whole, list(splits)), rank)


def _send(arguments: Arguments, rank: int, ranks: int) -> int:
    return _bytes(arguments["tensors"])


_RULES: Mapping[str, Callable[[Arguments, int, int], int]] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "allgather": _all_gather("input_tensors"),
    "allgather_base": _all_gather("input_tensor"),
    "allgather_coalesced": _all_gather("input_list"),
    "allgather_into_tensor_coalesced": _all_gather("inputs"),
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_base": _reduce_scatter_whole("input_tensor"),
    "reduce_scatter_tensor_coalesced": _reduce_scatter_whole("inputs"),
    "gather": _gather,
    "scatter": _scatter,
    "alltoall": _all_to_all,
    "alltoall_base": _all_to_all_single,
    "send": _send,
}
_WITHOUT_PAYLOAD = {"recv", "recv_any_source", "barrier", "monitored_barrier", "check_for_nan"}

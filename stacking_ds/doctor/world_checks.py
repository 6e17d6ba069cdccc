"""What to make of what the ranks have tried together: a verdict, a line, a remedy. Pure."""

import ipaddress
from collections.abc import Mapping, Sequence

from stacking_ds.console import readable_size
from stacking_ds.doctor.comparing import Finding, few, join_names, plural, told_problems
from stacking_ds.doctor.facts import NodeFacts
from stacking_ds.doctor.shared_folder import KEPT, Probing
from stacking_ds.doctor.speed import AllReduce, Matmul

__all__ = ["all_reduce", "clocks", "locks", "matrix_products", "network", "run_directory"]

_LARGEST_OFFSET_SECONDS = 1.0
_SLOW = 0.8


def run_directory(probing: Probing, names: Mapping[int, str]) -> Finding:
    """Every node sees what rank 0 writes, and the other way round. `names`: by rank."""
    check, place = "run directory", probing.place
    if probing.problem:
        return Finding(
            check,
            "FAILED",
            f"{names[0]} cannot write into {place} ({probing.problem})",
            "choose another --run-dir, or mend its permissions or file system",
            (names[0],),
        )
    problems = {names[answer.rank]: answer.problem for answer in probing.answers if answer.problem}
    if problems:
        return Finding(
            check,
            "FAILED",
            few(told_problems(problems, len(names)), "problem"),
            "give a --run-dir on a file system that all nodes share and may write",
            tuple(problems),
        )
    if probing.left:
        return Finding(
            check,
            "warning",
            f"{probing.left} cannot be removed",
            "remove it yourself: `train` takes no directory that holds what is not its own",
        )
    where = place if probing.exists else f"{place}, where it will be made"
    who = f"all {len(names):,} nodes see and write" if len(names) > 1 else "can be written"
    return Finding(check, "ok", f"{who}: {where}")


def locks(probing: Probing, names: Mapping[int, str]) -> Finding:
    """The lock that keeps a second job out of a run."""
    check = "file locks"
    if probing.lock_problem:
        return Finding(
            check,
            "warning",
            f"not to be had in {probing.place} ({probing.lock_problem})",
            "let no two jobs train in one run directory: nothing keeps the second out (NFS: its "
            "lock service, Lustre: mount with -o flock)",
        )
    unkept = {
        names[answer.rank]: answer.lock for answer in probing.answers if answer.lock not in KEPT
    }
    if not unkept:
        return Finding(check, "ok", "kept between nodes" if len(names) > 1 else "kept")
    return Finding(
        check,
        "warning",
        few(told_problems(unkept, len(names)), "problem"),
        "let no two jobs train in one run directory: nothing keeps the second out (Lustre: mount "
        "with -o flock)",
        tuple(unkept),
    )


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """`offsets`: by node its clock minus rank 0's, and how wrong that may be, in seconds."""
    off = {
        node: offset
        for node, (offset, doubt) in offsets.items()
        if abs(offset) - doubt > _LARGEST_OFFSET_SECONDS
    }
    if off:
        worst = max(off, key=lambda node: abs(off[node]))
        by = f"{abs(off[worst]):.1f} s {'ahead of' if off[worst] > 0 else 'behind'} rank 0's"
        whose = f" on {worst}" if len(off) > 1 else ""
        return Finding(
            "clocks",
            "warning",
            f"{join_names(list(off))}: {by}{whose}",
            "keep the clocks of all nodes by NTP (`chronyc tracking`): times in logs and of files "
            "cannot be compared",
            tuple(off),
        )
    if len(offsets) == 1:
        return Finding("clocks", "ok", "one clock")
    most = max(abs(offset) for offset, _ in offsets.values())
    doubt = max(doubt for _, doubt in offsets.values())
    return Finding("clocks", "ok", f"within {most:.3f} s of rank 0's (known to {doubt:.3f} s)")


def network(nodes: Mapping[str, NodeFacts], backend: str, meeting_place: str) -> Finding:
    """How the ranks reach one another; they have met, if this can be asked."""
    name, first = next(iter(nodes.items()))
    told = f"{backend}, met at {meeting_place}"
    if first.interface:
        told += f", GLOO_SOCKET_IFNAME={first.interface}"
    if len(nodes) == 1:
        return Finding("network", "ok", told)
    reasons = {node: _why_hidden(facts) for node, facts in nodes.items() if not facts.interface}
    hidden = {node: reason for node, reason in reasons.items() if reason}
    if not hidden:
        address = f", {name} is {first.address}" if first.address else ""
        return Finding("network", "ok", f"{told}{address}")
    return Finding(
        "network",
        "warning",
        f"{told}; {few(told_problems(hidden, len(nodes)), 'problem')}",
        "set GLOO_SOCKET_IFNAME to the interface that joins the nodes (`ip -br address`; in "
        ".deepspeed_env for the deepspeed launcher), or mend /etc/hosts",
        tuple(hidden),
    )


def _why_hidden(node: NodeFacts) -> str:
    if "network" in node.problems:
        return f"its own name does not resolve ({node.problems['network']})"
    if node.address and ipaddress.ip_address(node.address).is_loopback:
        return f"its own name resolves to {node.address}, where no other node can reach it"
    return ""


def all_reduce(measured: AllReduce | None, backend: str) -> Finding:
    """Figures to compare with other days and other clusters; none of them is wrong by itself."""
    if measured is None:
        return Finding("all-reduce", "ok", "one rank has nobody to send to")
    bandwidth = measured.bus_bytes_per_second
    shown = f"{bandwidth / 1e9:,.1f} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:,.0f} MB/s"
    return Finding(
        "all-reduce",
        "ok",
        f"{backend} over {plural(measured.ranks, 'rank')}: "
        f"{measured.latency_seconds * 1e6:,.0f} µs for 4 bytes, bus bandwidth {shown} for "
        f"{readable_size(measured.large_bytes)}",
    )


def matrix_products(measured: Sequence[Matmul], num_nodes: int) -> Finding:
    """No node is much slower than the rest, and all can compute."""
    check = "matrix products"
    problems = {each.host: each.problem for each in measured if each.problem}
    if problems:
        return Finding(
            check,
            "FAILED",
            few(told_problems(problems, num_nodes), "problem"),
            "see what else is at work there, and whether the device is sound (nvidia-smi)",
            tuple(problems),
        )
    ordered = sorted(each.flops_per_second for each in measured)
    median = ordered[len(ordered) // 2]
    slow: dict[str, Matmul] = {}
    for each in sorted(measured, key=lambda one: one.flops_per_second):
        if each.flops_per_second < _SLOW * median:
            slow.setdefault(each.host, each)
    if not slow:
        least = f"{_flops(ordered[0])} to " if len(ordered) > 1 else ""
        return Finding(check, "ok", f"{least}{_flops(ordered[-1])} a rank in {measured[0].dtype}")
    slowest = next(iter(slow.values()))
    return Finding(
        check,
        "warning",
        f"{join_names(list(slow))}: {_flops(slowest.flops_per_second)} on rank {slowest.rank:,}, "
        f"the median is {_flops(median)}",
        "every step waits for the slowest: see what else is at work there, and the clock rates and "
        "temperature of its GPUs (nvidia-smi -q -d PERFORMANCE)",
        tuple(slow),
    )


def _flops(value: float) -> str:
    return f"{value / 1e12:,.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:,.0f} GFLOP/s"

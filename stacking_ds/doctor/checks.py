"""What to make of what the ranks have tried together: a verdict, a line, a remedy. Pure."""

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence

from stacking_ds.console import readable_size
from stacking_ds.doctor.comparing import (
    Finding,
    Verdict,
    agreement,
    few,
    in_order,
    join_names,
    odd_ones,
    plural,
    the_others,
    told_problems,
)
from stacking_ds.doctor.facts import NodeFacts, RankFacts
from stacking_ds.doctor.shared_folder import KEPT, Probing
from stacking_ds.doctor.speed import AllReduce, Matmul

# ---- What to make of what the nodes know of themselves: a verdict, a line, a remedy. Pure.


Nodes = Mapping[str, NodeFacts]

_HASH_CHARACTERS = 12
_LEAST_SCRATCH_BYTES = {"/dev/shm": 64 << 20}
_LEAST_TEMPORARY_BYTES = 1 << 30
_LEAST_OPEN_FILES = 4096


def by_name(facts: Sequence[NodeFacts]) -> dict[str, NodeFacts]:
    """The nodes under their host names; where two have the same, a rank tells them apart."""
    hosts = Counter(node.host for node in facts)
    return {
        node.host if hosts[node.host] == 1 else f"{node.host} (rank {node.rank})": node
        for node in facts
    }


def alike(nodes: Nodes) -> list[Finding]:
    """What has to be the same on all nodes, and the room at the run directory."""
    checks = (_versions, _code, _recipe, _data, _disk_space)
    return [finding for check in checks if (finding := check(nodes)) is not None]


def own_way(nodes: Nodes, ranks: Sequence[RankFacts]) -> list[Finding]:
    """What a node may have in its own way, as long as it is enough."""
    found = [_scratch_space(nodes), _devices(nodes), _cores(nodes, ranks), _open_files(nodes)]
    return [finding for finding in found if finding is not None]


# ------------------------------------------------------------- the same everywhere


def _versions(nodes: Nodes) -> Finding:
    return agreement(
        "versions",
        {name: node.versions for name, node in nodes.items()},
        _problems(nodes, "versions"),
        remedy="install the same packages on every node (pip install -c constraints.txt), or start "
        "from one environment on a shared file system",
    )


def _code(nodes: Nodes) -> Finding:
    problems = _problems(nodes, "code")
    digests = {name: node.code_sha256 for name, node in nodes.items() if name not in problems}
    usual, odd = odd_ones(digests) if digests else ("", {})
    if not odd and not problems:
        count = len(next(iter(nodes.values())).code_files)
        counted = f" ({plural(count, 'file')})" if count else ""
        return Finding("code", "ok", f"{usual[:_HASH_CHARACTERS]}{counted}")
    agreeing = [name for name, digest in digests.items() if digest == usual]
    clauses = told_problems(problems, len(nodes))
    for digest, names in odd.items():
        here, there = nodes[names[0]].code_files, nodes[agreeing[0]].code_files
        files = sorted(
            file for file in here.keys() | there.keys() if here.get(file) != there.get(file)
        )
        what = join_names(files) if files else f"stacking_ds {digest[:_HASH_CHARACTERS]}"
        clauses.append(f"{join_names(names)}: {what}, other than on {the_others(agreeing)}")
    blamed = {*problems, *(name for names in odd.values() for name in names)}
    return Finding(
        "code",
        "FAILED",
        few(clauses, "difference"),
        "install the same commit of stacking_ds on every node, or start from one folder on a "
        "shared file system",
        in_order(nodes, blamed),
    )


def _recipe(nodes: Nodes) -> Finding | None:
    told, problems = {n: node.recipe for n, node in nodes.items()}, _problems(nodes, "recipe")
    if not problems and not any(told.values()):
        return None
    return agreement(
        "recipe",
        told,
        problems,
        remedy="give every node the same recipe and DeepSpeed JSON: files on a shared file system, "
        "or bundled ones; and the same --set",
        shown_characters=_HASH_CHARACTERS,
    )


def _data(nodes: Nodes) -> Finding | None:
    # without its recipe a node knows nothing of the data either
    known = {name: node for name, node in nodes.items() if "recipe" not in node.problems}
    told, problems = {n: node.data for n, node in known.items()}, _problems(known, "data")
    if not problems and not any(told.values()):
        return None
    return agreement(
        "data",
        told,
        problems,
        remedy="data.path has to lead to the same prepared folder on every node: on a file system "
        "that they share, or copied to each",
        shown_characters=_HASH_CHARACTERS,
    )


def _problems(nodes: Nodes, check: str) -> dict[str, str]:
    return {n: node.problems[check] for n, node in nodes.items() if check in node.problems}


# --------------------------------------------------------------------------- disks


def _disk_space(nodes: Nodes) -> Finding | None:
    free = {n: node.free_bytes for n, node in nodes.items() if node.free_bytes is not None}
    problems = _problems(nodes, "disk space")
    # a node that cannot open the data does not know the size of the model
    one = max(node.checkpoint_bytes for node in nodes.values())
    all_at_once = max(node.run_bytes for node in nodes.values())
    to_come = all_at_once - max(node.kept_bytes for node in nodes.values())
    if not free and not problems:
        return None
    least = min(free.values(), default=0)
    if problems:
        return Finding(
            "disk space",
            "FAILED",
            few(told_problems(problems, len(nodes)), "problem"),
            "make the run directory's file system available, or choose another --run-dir",
            tuple(problems),
        )
    if least < one:
        verdict: Verdict = "FAILED"
        need, what = one, "one checkpoint takes"
        remedy = "make room, or choose another --run-dir"
    elif least < to_come:
        verdict, need, what = "warning", to_come, "the run's checkpoints will take up to"
        remedy = "make room, choose another --run-dir, or lower checkpoint.keep_last"
    else:
        takes = f", checkpoints take up to {readable_size(all_at_once)}" if one else ""
        return Finding("disk space", "ok", f"{readable_size(least)} free{takes}")
    short = [name for name, size in free.items() if size < need]
    text = (
        f"{_whose(short, nodes)}{readable_size(least)} free at the run directory, {what} "
        f"{readable_size(need)}"
    )
    return Finding("disk space", verdict, text, remedy, tuple(short))


def _scratch_space(nodes: Nodes) -> Finding:
    clauses = told_problems(_problems(nodes, "temporary space"), len(nodes))
    blamed = set(_problems(nodes, "temporary space"))
    least: dict[str, int] = {}
    for node in nodes.values():
        for place, free in node.scratch_bytes.items():
            least[place] = min(free, least.get(place, free))
    for place, free in least.items():
        needed = _LEAST_SCRATCH_BYTES.get(place, _LEAST_TEMPORARY_BYTES)
        if free < needed:
            short = [
                name
                for name, node in nodes.items()
                if node.scratch_bytes.get(place, needed) < needed
            ]
            clauses.append(f"{_whose(short, nodes)}{readable_size(free)} free in {place}")
            blamed.update(short)
    if not clauses:
        shown = ", ".join(f"{readable_size(free)} free in {place}" for place, free in least.items())
        return Finding("temporary space", "ok", shown)
    return Finding(
        "temporary space",
        "warning",
        few(clauses, "shortage"),
        "make room, or set TMPDIR to a larger folder; a container's shared memory grows with "
        "--shm-size",
        in_order(nodes, blamed),
    )


def _whose(names: Sequence[str], nodes: Nodes) -> str:
    """The beginning of a clause: nobody has to be named who is alone."""
    return f"{join_names(names)}: " if len(nodes) > 1 else ""


# --------------------------------------------------------------- devices and limits


def _devices(nodes: Nodes) -> Finding:
    problems = _problems(nodes, "devices")
    over = [name for name, node in nodes.items() if 0 < node.gpu_count < node.local_size]
    if problems or over:
        clauses = told_problems(problems, len(nodes))
        for name in over[:1]:
            clauses.append(
                f"{join_names(over)}: {plural(nodes[name].local_size, 'rank')} on "
                f"{plural(nodes[name].gpu_count, 'GPU')}"
            )
        return Finding(
            "devices",
            "FAILED",
            few(clauses, "problem"),
            "start at most as many ranks on a node as it has GPUs (slots=, --num_gpus); "
            "nvidia-smi tells whether all its GPUs work",
            in_order(nodes, {*problems, *over}),
        )
    shown = {name: {"": node.gpus or "no GPU"} for name, node in nodes.items()}
    found = agreement(
        "devices",
        shown,
        {},
        remedy="every step waits for the slowest: use nodes with the same GPUs, or find out why "
        "one shows fewer (nvidia-smi)",
        shown_characters=200,
    )
    text = found.text.replace("  ", " ").strip()
    verdict: Verdict = "ok" if found.verdict == "ok" else "warning"
    return Finding("devices", verdict, text, found.remedy, found.nodes)


def _cores(nodes: Nodes, ranks: Sequence[RankFacts]) -> Finding | None:
    if any(node.gpu_count for node in nodes.values()):
        return None
    threads: dict[str, int] = {}
    masks: dict[str, int] = {}
    for rank in ranks:
        threads[rank.host] = threads.get(rank.host, 0) + rank.threads
        masks[rank.host] = masks.get(rank.host, 0) | int(rank.core_mask, 16)
    busy = [host for host in threads if threads[host] > masks[host].bit_count()]
    shown = busy[0] if busy else next(iter(threads))
    cores = plural(masks[shown].bit_count(), "core")
    count = f"{plural(threads[shown], 'thread')} of all ranks on {cores}"
    if not busy:
        return Finding("cores", "ok", count)
    return Finding(
        "cores",
        "warning",
        f"{_whose(busy, nodes)}{count}",
        "lower OMP_NUM_THREADS or the ranks of a node, so that threads do not wait for one another",
        tuple(busy),
    )


def _open_files(nodes: Nodes) -> Finding:
    limits = {n: node.open_files for n, node in nodes.items() if node.open_files is not None}
    low = {name: limit for name, limit in limits.items() if limit < _LEAST_OPEN_FILES}
    if not low:
        least = min(limits.values(), default=None)
        return Finding("open files", "ok", "no limit" if least is None else f"limit {least:,}")
    return Finding(
        "open files",
        "warning",
        f"{_whose(list(low), nodes)}a process may open {min(low.values()):,}",
        f"raise it to {_LEAST_OPEN_FILES:,} or more: ulimit -n, or LimitNOFILE of sshd and slurmd",
        tuple(low),
    )


# ---- What to make of what the ranks have tried together: a verdict, a line, a remedy.
# Pure.


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

"""Checks of a cluster: what of each node is compared, by which rule, and the remedy. Pure.

Tables hold the checks of what nodes know of themselves; functions below them judge what the ranks
have tried together. Of values that are equally frequent the first one met, that of rank 0's node,
counts as usual.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from stacking_ds.console import first_of, join_names, plural, readable_size
from stacking_ds.doctor.facts import NodeFacts, RankFacts
from stacking_ds.doctor.trials import AllReduce, Matmul, Probing

Verdict = Literal["ok", "warning", "FAILED"]
Nodes = Mapping[str, NodeFacts]
Clause = tuple[Sequence[str], str]
"""All nodes that break a rule, perhaps none, and how; who they are is written before it."""
Fault = tuple[Verdict, Sequence[Clause], str]
"""A verdict, the clauses that lead to it if any node is blamed, and the remedy."""

_NAMED = 3
_SHOWN_CHARACTERS = 400
_HASH_CHARACTERS = 12
_LEAST_SCRATCH_BYTES = {"/dev/shm": 64 << 20}
_LEAST_TEMPORARY_BYTES = 1 << 30
_LEAST_OPEN_FILES = 4096
_LARGEST_OFFSET_SECONDS = 1.0
_SLOW = 0.8


@dataclass(frozen=True)
class Finding:
    """A finding of a check; `nodes` are all that it blames, of which the text names a few."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()


def conclude(check: str, ok: str, nodes: Collection[str], *faults: Fault) -> Finding:
    """The first of the faults for which one of the `nodes` is to blame; `ok` if there is none."""
    all_of_them = f"all {len(nodes):,} nodes: " if len(nodes) > 1 else ""
    for verdict, clauses, remedy in faults:
        blamed = dict.fromkeys(node for names, _ in clauses for node in names)
        if blamed:
            texts = []
            for names, text in clauses:
                if names:
                    who = all_of_them if len(names) == len(nodes) else f"{join_names(names)}: "
                    texts.append(who + text[:_SHOWN_CHARACTERS])
            return Finding(check, verdict, first_of(texts, _NAMED, "; "), remedy, tuple(blamed))
    return Finding(check, "ok", ok)


# ------------------------------------------------------------------ nodes in few words


def by_name(facts: Sequence[NodeFacts]) -> dict[str, NodeFacts]:
    """The nodes under their host names; where two have the same, a rank tells them apart."""
    hosts = Counter(node.host for node in facts)
    return {
        node.host if hosts[node.host] == 1 else f"{node.host} (rank {node.rank})": node
        for node in facts
    }


def _grouped(values: Mapping[str, str]) -> list[Clause]:
    """The nodes of each value, or problem; the most frequent one, which is usual, first."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    grouped = [(names, value) for value, names in nodes.items()]
    return sorted(grouped, key=lambda clause: -len(clause[0]))


def _the_others(nodes: Sequence[str]) -> str:
    """Those that agree, after the odd ones: a single one by its name."""
    return nodes[0] if len(nodes) == 1 else f"the other {len(nodes):,} nodes"


# ----------------------------------------------------------- what nodes know of themselves

Judged = tuple[str | None, list[Clause]]
"""What is said where no node breaks the rule, None where it asks for nothing; and who breaks it."""
Rule = Callable[[Nodes, Sequence[RankFacts]], Judged]


@dataclass(frozen=True)
class Check:
    """A row of the tables. Rows of one name are one check: the first that is broken counts."""

    name: str
    rule: Rule
    remedy: str
    verdict: Verdict = "FAILED"
    needs: str = ""  # the check without which a node knows nothing of this


def _alike(what: Callable[[NodeFacts], Mapping[str, str]], shown: int = 60) -> Rule:
    """All nodes have the same under every name; `shown` characters identify it for people."""

    def rule(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
        known = {node: what(facts) for node, facts in nodes.items()}
        told: list[str] = []
        clauses: list[Clause] = []
        for name in dict.fromkeys(name for values in known.values() for name in values):
            found = _grouped({node: values.get(name, "missing") for node, values in known.items()})
            (agreeing, usual), *odd = [(who, value[:shown]) for who, value in found]
            told.append(f"{name} {usual}".strip())
            than = f"{_the_others(agreeing)} {usual}"
            clauses += [(who, f"{name} {value}, {than}".strip()) for who, value in odd]
        return ", ".join(told) or None, clauses

    return rule


def _code(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    if not nodes:
        return None, []
    (agreeing, usual), *odd = _grouped({name: node.code_sha256 for name, node in nodes.items()})
    there = nodes[agreeing[0]].code_files
    clauses: list[Clause] = []
    for who, digest in odd:
        here = nodes[who[0]].code_files
        files = sorted({name for name, _ in here.items() ^ there.items()})
        what = join_names(files) if files else f"stacking_ds {digest[:_HASH_CHARACTERS]}"
        clauses.append((who, f"{what}, other than on {_the_others(agreeing)}"))
    counted = f" ({plural(len(there), 'file')})" if there else ""
    return f"{usual[:_HASH_CHARACTERS]}{counted}", clauses


def _room_for(what: str, need: Callable[[Collection[NodeFacts]], int]) -> Rule:
    """The run directory has room for `need` bytes, as those nodes say that could open the data."""

    def rule(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
        free = {n: node.free_bytes for n, node in nodes.items() if node.free_bytes is not None}
        if not free:
            return None, []
        least, needed = readable_size(min(free.values())), need(nodes.values())
        text = f"{least} free at the run directory, {what} {readable_size(needed)}"
        most = max(node.run_bytes for node in nodes.values())
        takes = f", checkpoints take up to {readable_size(most)}" if most else ""
        return f"{least} free{takes}", [_below(free, needed, text)]

    return rule


def _below(values: Mapping[str, int], least: int, text: str) -> Clause:
    return [node for node, value in values.items() if value < least], text


def _scratch_space(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    clauses: list[Clause] = []
    for place in dict.fromkeys(place for node in nodes.values() for place in node.scratch_bytes):
        free = {n: f.scratch_bytes[place] for n, f in nodes.items() if place in f.scratch_bytes}
        needed = _LEAST_SCRATCH_BYTES.get(place, _LEAST_TEMPORARY_BYTES)
        text = f"{readable_size(min(free.values()))} free in {place}"
        clauses.append(_below(free, needed, text))
    return ", ".join(text for _, text in clauses), clauses


def _ranks_for_gpus(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    over = {n: node for n, node in nodes.items() if 0 < node.gpu_count < node.local_size}
    texts = [
        f"{plural(node.local_size, 'rank')} on {plural(node.gpu_count, 'GPU')}"
        for node in over.values()
    ]
    return "", [(list(over), text) for text in texts[:1]]


def _cores(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    if any(node.gpu_count for node in nodes.values()):
        return None, []
    threads: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    for rank in ranks:
        threads[rank.host] += rank.threads
        masks[rank.host] |= int(rank.core_mask, 16)
    cores = {host: mask.bit_count() for host, mask in masks.items()}
    busy = [host for host in threads if threads[host] > cores[host]]
    host = (busy or list(threads))[0]
    text = f"{plural(threads[host], 'thread')} of all ranks on {plural(cores[host], 'core')}"
    return text, [(busy, text)]


def _open_files(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    limits = {n: node.open_files for n, node in nodes.items() if node.open_files is not None}
    if not limits:
        return "no limit", []
    least = f"{min(limits.values()):,}"
    return f"limit {least}", [_below(limits, _LEAST_OPEN_FILES, f"a process may open {least}")]


_ALIKE = (
    Check(
        "versions",
        _alike(lambda node: node.versions),
        "install the same packages on every node (pip install -c constraints.txt), or start from "
        "one environment on a shared file system",
    ),
    Check(
        "code",
        _code,
        "install the same commit of stacking_ds on every node, or start from one folder on a "
        "shared file system",
    ),
    Check(
        "recipe",
        _alike(lambda node: node.recipe, _HASH_CHARACTERS),
        "give every node the same recipe and DeepSpeed JSON: files on a shared file system, or "
        "bundled ones; and the same --set",
    ),
    Check(
        "data",
        _alike(lambda node: node.data, _HASH_CHARACTERS),
        "data.path has to lead to the same prepared folder on every node: on a file system that "
        "they share, or copied to each",
        needs="recipe",
    ),
    Check(
        "disk space",
        _room_for("one checkpoint takes", lambda nodes: max(n.checkpoint_bytes for n in nodes)),
        "make room or make the file system available, or choose another --run-dir",
    ),
    Check(
        "disk space",
        _room_for(
            "the run's checkpoints will take up to",
            lambda nodes: max(n.run_bytes for n in nodes) - max(n.kept_bytes for n in nodes),
        ),
        "make room, choose another --run-dir, or lower checkpoint.keep_last",
        verdict="warning",
    ),
)
_SUFFICIENT = (
    Check(
        "temporary space",
        _scratch_space,
        "make room, or set TMPDIR to a larger folder; a container's shared memory grows with "
        "--shm-size",
        verdict="warning",
    ),
    Check(
        "devices",
        _ranks_for_gpus,
        "start at most as many ranks on a node as it has GPUs (slots=, --num_gpus); nvidia-smi "
        "tells whether all its GPUs work",
    ),
    Check(
        "devices",
        _alike(lambda node: {"": node.gpus or "no GPU"}, _SHOWN_CHARACTERS),
        "every step waits for the slowest: use nodes with the same GPUs, or find out why one shows "
        "fewer (nvidia-smi)",
        verdict="warning",
    ),
    Check(
        "cores",
        _cores,
        "lower OMP_NUM_THREADS or the ranks of a node, so that threads do not wait for one another",
        verdict="warning",
    ),
    Check(
        "open files",
        _open_files,
        f"raise it to {_LEAST_OPEN_FILES:,} or more: ulimit -n, or LimitNOFILE of sshd and slurmd",
        verdict="warning",
    ),
)


def alike(nodes: Nodes) -> list[Finding]:
    """All that has to be the same on all nodes, and the room at the run directory."""
    return _findings(_ALIKE, nodes, [])


def sufficient_on_each_node(nodes: Nodes, ranks: Sequence[RankFacts]) -> list[Finding]:
    """Findings of what may differ between nodes, but not fall below a minimum."""
    return _findings(_SUFFICIENT, nodes, ranks)


def _findings(checks: Sequence[Check], nodes: Nodes, ranks: Sequence[RankFacts]) -> list[Finding]:
    found = []
    for name, rows in groupby(checks, key=lambda check: check.name):
        ok, faults = None, []
        ill = _grouped({n: f.problems[name] for n, f in nodes.items() if name in f.problems})
        for check in rows:
            unknown = {name, check.needs}
            well = {n: node for n, node in nodes.items() if not unknown & node.problems.keys()}
            ok, clauses = check.rule(well, ranks)
            faults.append((check.verdict, [*ill, *clauses], check.remedy))
        if ok is not None or any(clauses for _, clauses, _ in faults):
            found.append(conclude(name, ok or "", nodes, *faults))
    return found


# ------------------------------------------------------- what the ranks have tried together


def run_directory(probing: Probing, names: Mapping[int, str]) -> Finding:
    """Every node sees what rank 0 writes, and the other way round. `names`: by rank."""
    place, first = probing.place, [names[0]]
    where = f"{place}, where it will be made" if probing.levels_up else place
    who = f"all {len(names):,} nodes see and write" if len(names) > 1 else "can be written"
    return conclude(
        "run directory",
        f"{who}: {where}",
        names.values(),
        (
            "FAILED",
            [(first if probing.problem else [], f"cannot write into {place} ({probing.problem})")],
            "choose another --run-dir, or mend its permissions or file system",
        ),
        (
            "FAILED",
            _grouped({names[each.rank]: each.problem for each in probing.answers if each.problem}),
            "give a --run-dir on a file system that all nodes share and may write",
        ),
        (
            "warning",
            [(first if probing.left else [], f"{probing.left} cannot be removed")],
            "remove it yourself: `train` takes no directory that holds what is not its own",
        ),
    )


def locks(probing: Probing, names: Mapping[int, str]) -> Finding:
    """The lock that keeps a second job out of a run."""
    clauses = _grouped({names[each.rank]: each.lock for each in probing.answers if each.lock})
    if probing.lock_problem:
        clauses = [([names[0]], f"not to be had in {probing.place} ({probing.lock_problem})")]
    return conclude(
        "file locks",
        "kept between nodes" if len(names) > 1 else "kept",
        names.values(),
        (
            "warning",
            clauses,
            "let no two jobs train in one run directory: nothing keeps the second out (NFS: its "
            "lock service, Lustre: mount with -o flock)",
        ),
    )


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """`offsets`: by node its clock minus rank 0's, and how wrong that may be, in seconds."""
    off = [n for n, (by, doubt) in offsets.items() if abs(by) - doubt > _LARGEST_OFFSET_SECONDS]
    worst = max(off or offsets, key=lambda node: abs(offsets[node][0]))
    offset, most = offsets[worst][0], abs(offsets[worst][0])
    whose = f" on {worst}" if len(off) > 1 else ""
    text = f"{most:.1f} s {'ahead of' if offset > 0 else 'behind'} rank 0's{whose}"
    doubt = max(doubt for _, doubt in offsets.values())
    within = f"within {most:.3f} s of rank 0's (known to {doubt:.3f} s)"
    return conclude(
        "clocks",
        within if len(offsets) > 1 else "one clock",
        offsets,
        (
            "warning",
            [(off, text)],
            "keep the clocks of all nodes by NTP (`chronyc tracking`): times in logs and of files "
            "cannot be compared",
        ),
    )


def network(nodes: Nodes, backend: str, meeting_place: str) -> Finding:
    """A finding of how the ranks reach one another; they have met, if this can be asked."""
    name, first = next(iter(nodes.items()))
    told = f"{backend}, met at {meeting_place}"
    if first.interface:
        told += f", GLOO_SOCKET_IFNAME={first.interface}"
    hidden: dict[str, str] = {}
    for node, facts in nodes.items() if len(nodes) > 1 else ():
        if facts.interface:
            continue
        if "network" in facts.problems:
            hidden[node] = f"its own name does not resolve ({facts.problems['network']})"
        elif facts.address and ipaddress.ip_address(facts.address).is_loopback:
            hidden[node] = (
                f"its own name resolves to {facts.address}, where no other node can reach it"
            )
    if not hidden:
        address = f", {name} is {first.address}" if first.address and len(nodes) > 1 else ""
        return Finding("network", "ok", f"{told}{address}")
    remedy = (
        "set GLOO_SOCKET_IFNAME to the interface that joins the nodes (`ip -br address`; in "
        ".deepspeed_env for the deepspeed launcher), or mend /etc/hosts"
    )
    found = conclude("network", told, nodes, ("warning", _grouped(hidden), remedy))
    return replace(found, text=f"{told}; {found.text}")


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


def matrix_products(measured: Sequence[Matmul]) -> Finding:
    """No node is much slower than the rest, and all can compute."""
    by_speed = sorted(measured, key=lambda each: each.flops_per_second)
    slowest, middle, fastest = (by_speed[i] for i in (0, len(by_speed) // 2, -1))
    bound = _SLOW * middle.flops_per_second
    slow = dict.fromkeys(each.host for each in by_speed if each.flops_per_second < bound)
    text = f"{slowest.flops} on rank {slowest.rank:,}, the median is {middle.flops}"
    to = f"{slowest.flops} to " if len(measured) > 1 else ""
    return conclude(
        "matrix products",
        f"{to}{fastest.flops} a rank in {fastest.dtype}",
        dict.fromkeys(each.host for each in measured),
        (
            "FAILED",
            _grouped({each.host: each.problem for each in measured if each.problem}),
            "see what else is at work there, and whether the device is sound (nvidia-smi)",
        ),
        (
            "warning",
            [(list(slow), text)],
            "every step waits for the slowest: see what else is at work there, and the clock rates "
            "and temperature of its GPUs (nvidia-smi -q -d PERFORMANCE)",
        ),
    )

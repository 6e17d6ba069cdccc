"""Checks of a cluster: what of each node is compared, by which rule, and the remedy. Pure.

`TABLE` holds the checks of what nodes know of themselves. The functions below it judge what the
ranks have tried together. Of values that are equally frequent the first one met, that of rank 0's
node, counts as usual.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from stacking_ds.console import join_names, plural, readable_size
from stacking_ds.doctor.facts import NodeFacts, RankFacts
from stacking_ds.doctor.shared_folder import KEPT, Probing
from stacking_ds.doctor.speed import AllReduce, Matmul

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
    for verdict, clauses, remedy in faults:
        blamed = {node for names, _ in clauses for node in names}
        if blamed:
            texts = [_said_of(names, text, len(nodes)) for names, text in clauses if names]
            in_order = dict.fromkeys([*filter(blamed.__contains__, nodes), *sorted(blamed)])
            more = len(texts) - _NAMED
            rest = [f"and {more:,} more"] if more > 0 else []
            text = "; ".join([*texts[:_NAMED], *rest])
            return Finding(check, verdict, text, remedy, tuple(in_order))
    return Finding(check, "ok", ok)


# ------------------------------------------------------------------ nodes in few words


def by_name(facts: Sequence[NodeFacts]) -> dict[str, NodeFacts]:
    """The nodes under their host names; where two have the same, a rank tells them apart."""
    hosts = Counter(node.host for node in facts)
    return {
        node.host if hosts[node.host] == 1 else f"{node.host} (rank {node.rank})": node
        for node in facts
    }


def _said_of(nodes: Sequence[str], text: str, num_nodes: int) -> str:
    """The text with the nodes before it; none is named that is alone or where it is all of them."""
    if len(nodes) == num_nodes:
        return f"all {num_nodes:,} nodes: {text}" if num_nodes > 1 else text
    return f"{join_names(nodes)}: {text}"


def _problems(problems: Mapping[str, str]) -> list[Clause]:
    """A clause for each problem and the nodes that have it."""
    by_text: dict[str, list[str]] = {}
    for node, problem in problems.items():
        by_text.setdefault(problem[:_SHOWN_CHARACTERS], []).append(node)
    return [(nodes, problem) for problem, nodes in by_text.items()]


def _by_value(values: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Each value with its nodes, the most frequent one, which is usual, first."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    usual = Counter(values.values()).most_common(1)
    return sorted(nodes.items(), key=lambda each: each[0] != usual[0][0])


def _the_others(nodes: Sequence[str]) -> str:
    """Those that agree, after the odd ones: a single one by its name."""
    return nodes[0] if len(nodes) == 1 else f"the other {len(nodes):,} nodes"


# ----------------------------------------------------------- what nodes know of themselves

Judged = tuple[str | None, list[Clause]]
"""What is said where no node breaks the rule, None where it asks for nothing; and who breaks it."""
Rule = Callable[[Nodes, Sequence[RankFacts]], Judged]


@dataclass(frozen=True)
class Check:
    """A row of the table. Rows of one name are one check: the first that is broken counts."""

    name: str
    rule: Rule
    remedy: str
    verdict: Verdict = "FAILED"
    sufficient: bool = False
    """Whether nodes may differ in it, as long as each has enough; else every run compares it."""
    needs: str = ""
    """The check without which a node knows nothing of this."""


def _alike(what: Callable[[NodeFacts], Mapping[str, str]], shown: int = 60) -> Rule:
    """All nodes have the same under every name; `shown` characters identify it for people."""

    def rule(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
        known = {node: what(facts) for node, facts in nodes.items()}
        usual_values: list[str] = []
        clauses: list[Clause] = []
        for name in dict.fromkeys(name for values in known.values() for name in values):
            (usual, agreeing), *odd = _by_value(
                {node: values.get(name, "missing") for node, values in known.items()}
            )
            usual_values.append(f"{name} {usual[:shown]}".strip())
            than = f"{_the_others(agreeing)} {usual[:shown]}"
            for value, others in odd:
                told = f"{name} {value[:shown]}".strip()
                clauses.append((others, f"{told}, {than}"))
        return ", ".join(usual_values) or None, clauses

    return rule


def _code(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    if not nodes:
        return None, []
    (usual, agreeing), *odd = _by_value({name: node.code_sha256 for name, node in nodes.items()})
    clauses: list[Clause] = []
    for digest, others in odd:
        here, there = nodes[others[0]].code_files, nodes[agreeing[0]].code_files
        files = sorted(
            file for file in here.keys() | there.keys() if here.get(file) != there.get(file)
        )
        what = join_names(files) if files else f"stacking_ds {digest[:_HASH_CHARACTERS]}"
        clauses.append((others, f"{what}, other than on {_the_others(agreeing)}"))
    count = len(nodes[agreeing[0]].code_files)
    counted = f" ({plural(count, 'file')})" if count else ""
    return f"{usual[:_HASH_CHARACTERS]}{counted}", clauses


def _room_for(what: str, need: Callable[[Collection[NodeFacts]], int]) -> Rule:
    """The run directory has room for `need` bytes, as those nodes say that could open the data."""

    def rule(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
        free = {n: node.free_bytes for n, node in nodes.items() if node.free_bytes is not None}
        if not free:
            return None, []
        least, needed = readable_size(min(free.values())), need(nodes.values())
        short = [name for name, size in free.items() if size < needed]
        text = f"{least} free at the run directory, {what} {readable_size(needed)}"
        most = max(node.run_bytes for node in nodes.values())
        takes = f", checkpoints take up to {readable_size(most)}" if most else ""
        return f"{least} free{takes}", [(short, text)]

    return rule


def _scratch_space(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    clauses: list[Clause] = []
    shown: list[str] = []
    for place in dict.fromkeys(place for node in nodes.values() for place in node.scratch_bytes):
        needed = _LEAST_SCRATCH_BYTES.get(place, _LEAST_TEMPORARY_BYTES)
        free = {n: f.scratch_bytes[place] for n, f in nodes.items() if place in f.scratch_bytes}
        shown.append(f"{readable_size(min(free.values()))} free in {place}")
        short = [name for name, size in free.items() if size < needed]
        clauses.append((short, shown[-1]))
    return ", ".join(shown), clauses


def _ranks_for_gpus(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    over = [name for name, node in nodes.items() if 0 < node.gpu_count < node.local_size]
    if not over:
        return "", []
    first = nodes[over[0]]
    text = f"{plural(first.local_size, 'rank')} on {plural(first.gpu_count, 'GPU')}"
    return "", [(over, text)]


def _cores(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    if any(node.gpu_count for node in nodes.values()):
        return None, []
    threads: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    for rank in ranks:
        threads[rank.host] += rank.threads
        masks[rank.host] |= int(rank.core_mask, 16)
    busy = [host for host in threads if threads[host] > masks[host].bit_count()]
    host = (busy or list(threads))[0]
    cores = plural(masks[host].bit_count(), "core")
    text = f"{plural(threads[host], 'thread')} of all ranks on {cores}"
    return text, [(busy, text)]


def _open_files(nodes: Nodes, ranks: Sequence[RankFacts]) -> Judged:
    limits = {n: node.open_files for n, node in nodes.items() if node.open_files is not None}
    if not limits:
        return "no limit", []
    least = min(limits.values())
    low = [name for name, limit in limits.items() if limit < _LEAST_OPEN_FILES]
    return f"limit {least:,}", [(low, f"a process may open {least:,}")]


TABLE = (
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
    Check(
        "temporary space",
        _scratch_space,
        "make room, or set TMPDIR to a larger folder; a container's shared memory grows with "
        "--shm-size",
        verdict="warning",
        sufficient=True,
    ),
    Check(
        "devices",
        _ranks_for_gpus,
        "start at most as many ranks on a node as it has GPUs (slots=, --num_gpus); nvidia-smi "
        "tells whether all its GPUs work",
        sufficient=True,
    ),
    Check(
        "devices",
        _alike(lambda node: {"": node.gpus or "no GPU"}, _SHOWN_CHARACTERS),
        "every step waits for the slowest: use nodes with the same GPUs, or find out why one shows "
        "fewer (nvidia-smi)",
        verdict="warning",
        sufficient=True,
    ),
    Check(
        "cores",
        _cores,
        "lower OMP_NUM_THREADS or the ranks of a node, so that threads do not wait for one another",
        verdict="warning",
        sufficient=True,
    ),
    Check(
        "open files",
        _open_files,
        f"raise it to {_LEAST_OPEN_FILES:,} or more: ulimit -n, or LimitNOFILE of sshd and slurmd",
        verdict="warning",
        sufficient=True,
    ),
)


def alike(nodes: Nodes) -> list[Finding]:
    """All that has to be the same on all nodes, and the room at the run directory."""
    return _findings([check for check in TABLE if not check.sufficient], nodes, [])


def sufficient_on_each_node(nodes: Nodes, ranks: Sequence[RankFacts]) -> list[Finding]:
    """Findings of what may differ between nodes, but not fall below a minimum."""
    return _findings([check for check in TABLE if check.sufficient], nodes, ranks)


def _findings(checks: Sequence[Check], nodes: Nodes, ranks: Sequence[RankFacts]) -> list[Finding]:
    found = []
    for name, rows in groupby(checks, key=lambda check: check.name):
        ok, faults = None, []
        problems = {n: node.problems[name] for n, node in nodes.items() if name in node.problems}
        told = _problems(problems)
        for check in rows:
            unknown = {name, check.needs}
            well = {n: node for n, node in nodes.items() if not unknown & node.problems.keys()}
            ok, clauses = check.rule(well, ranks)
            faults.append((check.verdict, [*told, *clauses], check.remedy))
        if ok is not None or any(clauses for _, clauses, _ in faults):
            found.append(conclude(name, ok or "", nodes, *faults))
    return found


# ------------------------------------------------------- what the ranks have tried together


def run_directory(probing: Probing, names: Mapping[int, str]) -> Finding:
    """Every node sees what rank 0 writes, and the other way round. `names`: by rank."""
    place, first = probing.place, [names[0]]
    problems = {names[answer.rank]: answer.problem for answer in probing.answers if answer.problem}
    where = place if probing.exists else f"{place}, where it will be made"
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
            _problems(problems),
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
    unkept = {
        names[answer.rank]: answer.lock for answer in probing.answers if answer.lock not in KEPT
    }
    clauses: list[Clause] = _problems(unkept)
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
    address = f", {name} is {first.address}" if first.address and len(nodes) > 1 else ""
    reasons = {node: _why_hidden(facts) for node, facts in nodes.items() if not facts.interface}
    hidden = {node: reason for node, reason in reasons.items() if reason and len(nodes) > 1}
    found = conclude(
        "network",
        f"{told}{address}",
        nodes,
        (
            "warning",
            _problems(hidden),
            "set GLOO_SOCKET_IFNAME to the interface that joins the nodes (`ip -br address`; in "
            ".deepspeed_env for the deepspeed launcher), or mend /etc/hosts",
        ),
    )
    return replace(found, text=f"{told}; {found.text}") if hidden else found


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


def matrix_products(measured: Sequence[Matmul]) -> Finding:
    """No node is much slower than the rest, and all can compute."""
    by_speed = sorted(measured, key=lambda each: each.flops_per_second)
    least, median, most = (by_speed[i].flops_per_second for i in (0, len(by_speed) // 2, -1))
    slow: dict[str, Matmul] = {}
    for each in by_speed:
        if each.flops_per_second < _SLOW * median:
            slow.setdefault(each.host, each)
    text = f"{_flops(least)} on rank {by_speed[0].rank:,}, the median is {_flops(median)}"
    to = f"{_flops(least)} to " if len(measured) > 1 else ""
    return conclude(
        "matrix products",
        f"{to}{_flops(most)} a rank in {measured[0].dtype}",
        dict.fromkeys(each.host for each in measured),
        (
            "FAILED",
            _problems({each.host: each.problem for each in measured if each.problem}),
            "see what else is at work there, and whether the device is sound (nvidia-smi)",
        ),
        (
            "warning",
            [(list(slow), text)],
            "every step waits for the slowest: see what else is at work there, and the clock rates "
            "and temperature of its GPUs (nvidia-smi -q -d PERFORMANCE)",
        ),
    )


def _flops(value: float) -> str:
    return f"{value / 1e12:,.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:,.0f} GFLOP/s"

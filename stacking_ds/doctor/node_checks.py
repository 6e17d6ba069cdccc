"""What to make of what the nodes know of themselves: a verdict, a line, a remedy. Pure."""

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

__all__ = ["alike", "by_name", "own_way"]

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

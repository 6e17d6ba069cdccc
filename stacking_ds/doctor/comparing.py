"""Who differs from the rest: the majority against the odd ones, in few words at any size.

Pure. Of values that are equally frequent the first one met, that of rank 0's node, counts as usual.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "FAILED"]
_NAMED = 3
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Finding:
    """What a check has found; `nodes` are all that it blames, of which the text names a few."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def join_names(nodes: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    names, more = list(nodes[:_NAMED]), len(nodes) - _NAMED
    if more > 0:
        return f"{', '.join(names)} and {more:,} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def the_others(nodes: Sequence[str]) -> str:
    """Those that agree, after the odd ones: a single one by its name."""
    return nodes[0] if len(nodes) == 1 else f"the other {len(nodes):,} nodes"


def odd_ones(values: Mapping[str, str]) -> tuple[str, dict[str, list[str]]]:
    """The value of most nodes, and the nodes of each other value; in the order given."""
    usual = Counter(values.values()).most_common(1)[0][0]
    odd: dict[str, list[str]] = {}
    for node, value in values.items():
        if value != usual:
            odd.setdefault(value, []).append(node)
    return usual, odd


def agreement(
    check: str,
    told: Mapping[str, Mapping[str, str]],
    problems: Mapping[str, str],
    *,
    remedy: str,
    shown_characters: int = 60,
) -> Finding:
    """Every node tells the same under every name, and none has a problem.

    Args:
        told: by node and then by name; nodes with a problem may lack what they could not find.
        problems: by node.
        shown_characters: how much of a value identifies it for people.
    """
    named = list(dict.fromkeys(name for values in told.values() for name in values))
    clauses = told_problems(problems, len(told.keys() | problems.keys()))
    blamed = set(problems)
    usual_values = []
    for name in named:
        values = {
            node: values.get(name, "missing")
            for node, values in told.items()
            if name in values or node not in problems
        }
        usual, odd = odd_ones(values)
        usual_values.append(f"{name} {usual[:shown_characters]}")
        if odd:
            agreeing = [node for node, value in values.items() if value == usual]
            clauses.append(_difference(name, usual, odd, agreeing, shown_characters))
            blamed.update(node for nodes in odd.values() for node in nodes)
    if not clauses:
        return Finding(check, "ok", ", ".join(usual_values))
    return Finding(check, "FAILED", few(clauses, "difference"), remedy, in_order(told, blamed))


def _difference(
    name: str,
    usual: str,
    odd: Mapping[str, Sequence[str]],
    agreeing: Sequence[str],
    shown_characters: int,
) -> str:
    groups = [
        f"{join_names(nodes)}: {name} {value[:shown_characters]}"
        for value, nodes in list(odd.items())[:_NAMED]
    ]
    if len(odd) > _NAMED:
        more = sum(len(nodes) for nodes in list(odd.values())[_NAMED:])
        groups.append(f"{plural(more, 'more node')} with other values")
    return f"{', '.join(groups)}, {the_others(agreeing)} {usual[:shown_characters]}"


def told_problems(problems: Mapping[str, str], num_nodes: int) -> list[str]:
    """A clause for each problem and the nodes that have it, none named where all have it."""
    by_text: dict[str, list[str]] = {}
    for node, problem in problems.items():
        by_text.setdefault(problem[:_SHOWN_CHARACTERS], []).append(node)
    clauses = []
    for problem, nodes in by_text.items():
        everywhere = f"all {num_nodes:,} nodes" if num_nodes > 1 else ""
        who = everywhere if len(nodes) == num_nodes else join_names(nodes)
        clauses.append(f"{who}: {problem}" if who else problem)
    return clauses


def few(clauses: Sequence[str], noun: str) -> str:
    """The first few of them, and how many more there are."""
    more = len(clauses) - _NAMED
    rest = [f"and {plural(more, f'more {noun}')}"] if more > 0 else []
    return "; ".join([*clauses[:_NAMED], *rest])


def in_order(told: Mapping[str, object], blamed: Collection[str]) -> tuple[str, ...]:
    """The blamed ones in the order of the nodes, those that told nothing last."""
    return tuple(dict.fromkeys([*filter(blamed.__contains__, told), *sorted(blamed)]))

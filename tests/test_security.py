"""Nothing in the package runs what it reads, or builds shell text."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stacking_ds"
# World's collectives of objects are pickled by torch, between the ranks of one job
REFUSED = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "subprocess.getoutput",
}


def _offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in REFUSED:
            yield f"{node.lineno}: {name}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if options.get("shell", "False") != "False":
            yield f"{node.lineno}: {name} with a shell"
        if name.endswith("np.load") and options.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: {name} with pickle"
        if name == "yaml.load":  # yaml_text.py reads events, which make no objects
            yield f"{node.lineno}: {name}"


def test_the_package_runs_nothing_that_it_reads() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{offence}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for offence in _offences(path.read_text(encoding="utf-8"))
    ]
    # between a process and those it has started, through pipes that nobody else has
    assert {offence.partition(":")[0] for offence in found} == {"data/pool.py", "data/prefetch.py"}
    assert {offence.rpartition(": ")[2] for offence in found} == {"pickle.load", "pickle.loads"}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_offence_is_noticed(source: str) -> None:
    assert len(list(_offences(source))) == 1

"""Emulated hosts and SLURM, started once, and put in order after every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts as emulated
from tests.cluster import slurm as workload
from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_FOLDER):
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(240))


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Three hosts, node1 to node3."""
    _need(emulated.missing())
    with Hosts(3) as three:
        yield three


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    """A SLURM cluster of the three hosts, with 4 CPUs each."""
    _need(workload.missing())
    cluster = Slurm(hosts)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(autouse=True)
def _order(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what the test leaves running, and mend what it broke."""
    if "slurm" in request.fixturenames:
        # tests without SLURM crash hosts too, and its daemons with them
        request.getfixturevalue("slurm").mend()
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").mend()
    elif "hosts" in request.fixturenames:
        request.getfixturevalue("hosts").mend(spare=workload.DAEMONS)


def _need(reason: str | None) -> None:
    if reason is None:
        return
    if os.environ.get("REQUIRE_CLUSTER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)

"""Every launcher's variables become the same six."""

import os
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.errors import ConfigError
from stacking_ds.process import launchers
from stacking_ds.process.launchers import (
    complete_environment,
    first_host,
    rank_from_environment,
    slurm_environment,
    world_size_from_environment,
)

# of `srun` in a batch job of three nodes, the first two with two tasks
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_SIZE",
            "LOCAL_WORLD_SIZE",
        ):
            monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_srun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, STEP)
    assert (rank_from_environment(), world_size_from_environment()) == (4, 5)
    found = complete_environment()
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu07",
    }
    assert 15_000 <= port < 30_000
    again = slurm_environment({**STEP, "SLURM_RESTART_COUNT": "1"})
    another = slurm_environment({**STEP, "SLURM_JOB_ID": "42"})
    assert len({port, int(again["MASTER_PORT"]), int(another["MASTER_PORT"])}) == 3


def test_a_place_to_meet_that_is_given_stays() -> None:
    found = slurm_environment({**STEP, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4444"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.9", "4444")


def test_a_batch_scripts_own_shell_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "41"})
    assert (rank_from_environment(), world_size_from_environment()) == (0, 1)
    assert complete_environment()["WORLD_SIZE"] == "1"


def test_a_launcher_within_srun_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "29500",
    }
    _set(monkeypatch, STEP | torchrun)
    assert complete_environment() == torchrun
    assert (rank_from_environment(), world_size_from_environment()) == (3, 6)


def test_srun_goes_before_the_hydra_variables_of_its_own_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, STEP | {"PMI_SIZE": "5"})
    assert complete_environment()["RANK"] == "4"


@pytest.mark.parametrize("name", ["SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID"])
def test_what_a_container_has_hidden_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        slurm_environment({key: value for key, value in STEP.items() if key != name})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("login,gpu[07-09]", "login"),
        ("rack[1-2]n[4-8]", "rack1n4"),
        ("a[3,5-9]-ib", "a3-ib"),
        ("n001.cluster,n002.cluster", "n001.cluster"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_tasks_per_node_are_read_back(counts: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else f"{tasks}" for tasks, nodes in counts)
    expected = [tasks for tasks, nodes in counts for _ in range(nodes)]
    assert launchers._tasks_per_node(text) == expected


# ------------------------------------------------------------------ addresses


class _Stats:
    isup = True


def _node(monkeypatch: pytest.MonkeyPatch, name_is: str, interfaces: dict[str, str]) -> None:
    def address(text: str) -> Any:
        return type("Address", (), {"family": launchers.socket.AF_INET, "address": text})

    monkeypatch.setattr(launchers.socket, "gethostbyname", lambda name: name_is)
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {name: [address(text)] for name, text in interfaces.items()},
    )
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: _Stats() for name in interfaces})


def test_a_name_that_leads_to_loopback_is_mended_where_the_choice_is_clear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _node(monkeypatch, "127.0.1.1", {"lo": "127.0.0.1", "eth0": "10.0.0.7"})
    assert launchers.interface_for_gloo() == "eth0"
    assert launchers.address_of_this_node(several_nodes=True) == "10.0.0.7"
    assert launchers.address_of_this_node(several_nodes=False) == "127.0.1.1"


def test_a_good_name_needs_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    _node(monkeypatch, "10.0.0.7", {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"})
    assert launchers.interface_for_gloo() is None
    assert launchers.address_of_this_node(several_nodes=True) == "10.0.0.7"


def test_where_the_choice_is_not_clear_a_person_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _node(monkeypatch, "127.0.1.1", {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"})
    with pytest.raises(ConfigError, match=r"eth0 10.0.0.7, ib0 10.1.0.7.*GLOO_SOCKET_IFNAME"):
        launchers.interface_for_gloo()
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launchers.address_of_this_node(several_nodes=True)

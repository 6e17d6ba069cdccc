"""Which hosts a hostfile names, and what in it is refused."""

import os
from pathlib import Path

import pytest

from stacking_ds.errors import ConfigError
from stacking_ds.launch.hosts import Host, draw_hostfile, read_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_keep_their_order(tmp_path: Path) -> None:
    path = hostfile(
        tmp_path,
        "# ours\n\nnode10 slots=8\n  node2\tslots=4  # old\n10.0.0.7 slots=1\nfe80::1 slots=2",
    )
    assert read_hostfile(path) == [
        Host("node10", 8),
        Host("node2", 4),
        Host("10.0.0.7", 1),
        Host("fe80::1", 2),
    ]


def test_what_is_drawn_is_read(tmp_path: Path) -> None:
    hosts = [Host("b.example.org", 2), Host("a_1", 1)]
    assert read_hostfile(hostfile(tmp_path, draw_hostfile(hosts))) == hosts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=1\nb slots=1\n\na slots=2\n", r"hosts:4: host a stands in line 1 already"),
        ("a\n", r"hosts:1: 'a' is not a host; write `name slots=N`"),
        ("a slots=\n", r"hosts:1: .* is not a host"),
        ("a slots=-1\n", r"hosts:1: .* is not a host"),
        ("a slots=2 max_slots=4\n", r"hosts:1: .* is not a host"),
        ("a slots=٣\n", r"hosts:1: .* is not a host"),
        ("\na slots=0\n", r"hosts:2: host a has slots=0"),
        ("-oProxyCommand=id slots=1\n", r"hosts:1: '-oProxyCommand=id' is not a host name"),
        ("a;reboot slots=1\n", r"hosts:1: 'a;reboot' is not a host name"),
        ("$(id) slots=1\n", r"hosts:1: .* is not a host name"),
        ("a,b slots=1\n", r"hosts:1: .* is not a host name"),
        ("node[1-3] slots=1\n", r"hosts:1: .* is not a host name"),
        ("me@a slots=1\n", r"hosts:1: .* user and port in ~/.ssh/config"),
        ("exec:a slots=1\n", r"hosts:1: .* is not a host name"),  # pdsh would run it here
        ("fe80::1%eth0 slots=1\n", r"hosts:1: .* is not a host name"),
        ("ñ slots=1\n", r"hosts:1: .* is not a host name"),
        ("# nobody\n\n", r"hosts names no host; write"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_hostfile(hostfile(tmp_path, text))


def test_a_hostfile_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot read the hostfile .*/hosts .*; give a text file"
    ):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "binary")


def test_a_byte_order_mark_and_blanks_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("\ufeffnode1 slots=2  \u00a0\r\n\tnode2\u00a0 slots=1\t\r\n\u200b\n", "utf-8")
    assert read_hostfile(path) == [Host("node1", 2), Host("node2", 1)]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hosts")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("hosts", "circle"):
        with pytest.raises(ConfigError, match="cannot read the hostfile"):
            read_hostfile(tmp_path / name)

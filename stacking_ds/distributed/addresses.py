"""The network as this node sees it: its own address, an interface that reaches others, a port."""

import ipaddress
import socket

import psutil

from stacking_ds.errors import ConfigError

__all__ = ["address_of_this_node", "free_port", "interface_for_gloo"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def address_of_this_node(several_nodes: bool) -> str:
    """The IPv4 address under which others reach this node.

    Raises:
        ConfigError: it has none, or several and its name does not tell which.
    """
    named = _resolved_name()
    if named is not None and not (several_nodes and ipaddress.ip_address(named).is_loopback):
        return named
    if not several_nodes:
        return "127.0.0.1"
    return _only_address("MASTER_ADDR to the address that the other nodes reach rank 0 under")[1]


def interface_for_gloo() -> str | None:
    """What GLOO_SOCKET_IFNAME has to be on a node of several; None where gloo finds it by itself.

    It binds to what the node's name resolves to. Where /etc/hosts says 127.0.1.1 for that, as
    Debian's installer writes it, no other node could connect.

    Raises:
        ConfigError: the name resolves to nothing useful, and there are several interfaces.
    """
    named = _resolved_name()
    if named is not None and not ipaddress.ip_address(named).is_loopback:
        return None
    return _only_address("GLOO_SOCKET_IFNAME to the interface that joins the nodes")[0]


def _resolved_name() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _only_address(what_to_set: str) -> tuple[str, str]:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        (name, one.address)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for one in addresses
        if one.family == socket.AF_INET and not ipaddress.ip_address(one.address).is_loopback
    ]
    if len(found) == 1:
        return found[0]
    choices = ", ".join(f"{name} {address}" for name, address in found) or "none but loopback"
    raise ConfigError(
        f"the name of this node, {socket.gethostname()}, resolves to {_resolved_name()}, which "
        f"other nodes cannot reach, and its interfaces ({choices}) leave no single choice: set "
        f"{what_to_set}, or mend /etc/hosts"
    )

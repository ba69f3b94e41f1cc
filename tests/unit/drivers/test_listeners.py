"""Who listens on a port: told by the process that holds the socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llmux.drivers.processes.listeners import find_on_port, find_stranger
from llmux.protocol import Address


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_a_listener_that_the_loopback_address_reaches_is_named(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        me = f"process {os.getpid()} "
        assert (find_on_port(port, ()) or "").startswith(me)
        assert (find_on_port(port, [1]) or "").startswith(me)
        assert find_on_port(port, [1, os.getpid()]) is None
    assert find_on_port(port, ()) is None


def test_what_listens_elsewhere_or_not_at_all_is_no_stranger() -> None:
    with socket.socket() as elsewhere, socket.socket() as bound:
        elsewhere.bind(("127.0.0.2", 0))
        elsewhere.listen()
        bound.bind(("127.0.0.1", 0))
        for holder in (elsewhere, bound):
            assert find_on_port(holder.getsockname()[1], ()) is None


def test_a_listener_whose_process_cannot_be_seen_is_a_stranger_too(tmp_path: Path) -> None:
    """A host without IPv6 has no tcp6; a container's processes may be hidden."""
    net = tmp_path / "self" / "net"
    net.mkdir(parents=True)
    row = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 0 4242 1"
    (net / "tcp").write_text(f"sl local_address\n{row}\n")
    (tmp_path / "77" / "fd").mkdir(parents=True)
    (tmp_path / "77" / "fd" / "3").symlink_to("socket:[4242]")
    assert find_on_port(8080, [77], str(tmp_path)) is None
    assert find_on_port(8080, [78], str(tmp_path)) == "a process of another user or container"
    (tmp_path / "77" / "comm").write_text("nc\n")
    assert find_on_port(8080, [78], str(tmp_path)) == "process 77 (nc)"


def test_the_process_that_listens_at_a_unix_socket_is_named(tmp_path: Path) -> None:
    address = Address(uds=str(tmp_path / "api.sock"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address.uds))
        assert find_stranger(address, ()) is None, "nothing listens yet"
        server.listen()
        assert (find_stranger(address, [1]) or "").startswith(f"process {os.getpid()} (")
        assert find_stranger(address, [1, os.getpid()]) is None
    assert find_stranger(address, ()) is None


def test_a_socket_that_was_moved_into_place_is_known_by_its_process(tmp_path: Path) -> None:
    """Not by its name: the kernel goes on listing the one that it was bound with."""
    address = Address(uds=str(tmp_path / "api.sock"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "other.sock"))
        server.listen()
        (tmp_path / "other.sock").rename(tmp_path / "api.sock")
        assert (find_stranger(address, [1]) or "").startswith(f"process {os.getpid()} (")


def test_a_port_is_asked_by_its_number() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = Address(port=server.getsockname()[1])
        assert find_stranger(address, [os.getpid()]) is None
        assert find_stranger(address, [1]) is not None


def test_a_socket_that_no_process_shows_is_held_by_one_that_cannot_be_seen(tmp_path: Path) -> None:
    net = tmp_path / "self" / "net"
    net.mkdir(parents=True)
    row = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 0 4242 1"
    (net / "tcp").write_text(f"sl local_address\n{row}\n")
    (tmp_path / "77" / "fd").mkdir(parents=True)
    (tmp_path / "77" / "fd" / "3").symlink_to("socket:[4243]")
    assert find_on_port(8080, [], str(tmp_path)) == "a process of another user or container"
    assert find_on_port(8081, [], str(tmp_path)) is None

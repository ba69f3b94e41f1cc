"""Sockets for clients: what is bound, what is replaced, and what an address in use says."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.gateway.client.listeners import BACKLOG, Access, bind_all, describe_socket


def in_use(path: Path, what: str) -> socket.socket | None:
    if what in ("a live socket", "a dead socket"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        if what == "a live socket":
            listener.listen()
            return listener
        listener.close()
    elif what == "a file":
        path.write_text("not ours")
    return None


@pytest.mark.parametrize(
    ("there", "bound"),
    [("nothing", True), ("a dead socket", True), ("a live socket", False), ("a file", False)],
)
def test_a_socket_that_nobody_listens_on_is_replaced_and_nothing_else(
    tmp_path: Path, there: str, bound: bool
) -> None:
    path = tmp_path / "s"
    other = in_use(path, there)
    if bound:
        (listener,) = bind_all([f"unix:{path}"], Access(0o600))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert not listener.getblocking()
        listener.close()
        return
    with pytest.raises(OSError, match=f"cannot listen on unix:{path}: ") as raised:
        bind_all([f"unix:{path}"])
    assert raised.value.errno == errno.EADDRINUSE
    if other is None:
        assert path.read_text() == "not ours"
    else:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        other.close()


def may_give(directory: Path, gid: int) -> bool:
    """Whether a file of ours can be this group's: as root or a member of it, where it is mapped."""
    (directory / "given").touch()
    try:
        os.chown(directory / "given", -1, gid)
    except OSError:
        return False
    return True


def test_a_group_may_connect_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    ours = [one.gr_gid for one in grp.getgrall() if may_give(tmp_path, one.gr_gid)]
    for number, gid in enumerate({os.getegid(), *ours[-2:]}):
        access = Access(0o660, grp.getgrgid(gid).gr_name)
        (listener,) = bind_all([f"unix:{tmp_path}/s{number}"], access)
        status = (tmp_path / f"s{number}").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, gid)
        listener.close()
    with pytest.raises(OSError, match="there is no group no-such-group"):
        bind_all([f"unix:{tmp_path}/t"], Access(group="no-such-group"))
    assert not (tmp_path / "t").exists()


def test_what_was_bound_before_one_that_fails_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cause = rf"Address already in use \(who has it: ss -ltnp 'sport = :{port}'\)"
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}: {cause}$"):
            bind_all([f"unix:{tmp_path}/first", f"127.0.0.1:{port}"])
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(f"{tmp_path}/first")
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:x: invalid literal"):
        bind_all(["127.0.0.1:x"])


def test_an_address_without_a_host_is_for_this_machine_alone() -> None:
    (listener,) = bind_all([":0"])
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        ("/run/x", "unix:/run/x"),
        ("", "unix:"),
    ],
)
def test_where_a_socket_listens_is_said(name: object, said: str) -> None:
    listener: Any = SimpleNamespace(getsockname=lambda: name)
    assert describe_socket(listener) == said


def test_tcp_is_of_the_family_that_was_named() -> None:
    (listener,) = bind_all(["127.0.0.1:0"])
    with listener:
        assert listener.family == socket.AF_INET
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not listener.getblocking()
        with socket.create_connection(listener.getsockname()):
            pass
    assert BACKLOG >= 1024
    if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
        (listener,) = bind_all(["[::1]:0"])
        with listener:
            assert listener.family == socket.AF_INET6
            assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

"""sd_notify's datagrams, passed descriptors and the watchdog's interval."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux.drivers.systemd.notify import SdNotifier, watchdog_interval


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = SdNotifier()
    assert not notifier.active
    notifier.ready()
    notifier.close()


def test_messages_arrive_as_utf8(systemd: socket.socket) -> None:
    notifier = SdNotifier()
    notifier.ready()
    notifier.status("serving qwen — 2 waiting\nand more")
    notifier.stopping()
    notifier.watchdog()
    notifier.reloading()
    notifier.close()
    assert systemd.recv(999) == b"READY=1"
    assert systemd.recv(999).decode() == "STATUS=serving qwen — 2 waiting and more"
    assert systemd.recv(999) == b"STOPPING=1"
    assert systemd.recv(999) == b"WATCHDOG=1"
    assert systemd.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


def test_a_manager_that_reads_nothing_does_not_hold_us_up(systemd: socket.socket) -> None:
    notifier = SdNotifier()
    for number in range(20_000):  # more than any socket's buffer takes
        notifier.status(f"line {number}")
    assert systemd.recv(4096) == b"STATUS=line 0"
    notifier.close()


def test_sockets_go_into_the_fd_store(systemd: socket.socket) -> None:
    notifier = SdNotifier()
    with socket.socket() as listener:
        notifier.store_fds("http", [listener])
        inode = os.fstat(listener.fileno()).st_ino
    notifier.drop_fds("http")
    notifier.close()
    data, fds, _, _ = socket.recv_fds(systemd, 999, 4)
    assert data == b"FDSTORE=1\nFDNAME=http"
    assert [os.fstat(fd).st_ino for fd in fds] == [inode]
    os.close(fds[0])
    assert systemd.recv(999) == b"FDSTOREREMOVE=1\nFDNAME=http"


TAKE = """
import os
from llmux.drivers.systemd.notify import listen_fds
os.environ["LISTEN_PID"] = str(os.getpid())
first = int(os.environ["FIRST"])
found = listen_fds(first)
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(*sorted((name, len(socks)) for name, socks in found.items()), left)
print(listen_fds(first))
"""


def test_passed_sockets_are_taken_once_by_name(tmp_path: Path) -> None:
    listeners = [socket.socket() for _ in range(3)]
    with open(tmp_path / "file", "w") as file:
        # Consecutive, and high enough to be unused: two of one name, one other, one no socket.
        numbers = range(200, 204)
        descriptors = [*(sock.fileno() for sock in listeners), file.fileno()]
        for number, have in zip(numbers, descriptors, strict=True):
            os.dup2(have, number)
    try:
        done = subprocess.run(
            [sys.executable, "-c", TAKE],
            pass_fds=list(numbers),
            env={
                "PYTHONPATH": os.pathsep.join(sys.path),
                "LISTEN_FDS": "4",
                "LISTEN_PIDFDID": "7",
                "LISTEN_FDNAMES": "http:metrics:http:junk",
                "FIRST": "200",
            },
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for number in numbers:
            os.close(number)
        for sock in listeners:
            sock.close()
    assert done.stdout.splitlines() == ["('http', 2) ('metrics', 1) []", "{}"]


@pytest.mark.parametrize(
    ("usec", "pid", "want"),
    [("4000000", None, 2.0), ("4000000", "1", None), ("0", None, None), ("x", None, None)],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, want: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_interval() == want

"""The journal's socket, what is kept for it, odd streams, and what systemd leaves unsaid."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.systemd.journal import (
    Journal,
    JournalHandler,
    setup_logging,
    stderr_is_journal,
    stderr_is_lost,
)
from llmux.drivers.systemd.notify import SdNotifier, listen_fds, watchdog_interval


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.settimeout(30)
        yield sock


class Taking(Journal):
    def __init__(self, taking: bool) -> None:
        super().__init__("/no/such")
        self.taking = taking
        self.said: list[str] = []

    def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
        if self.taking:
            self.said.append(dict(fields)["MESSAGE"])
        return self.taking


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("llmux.x", logging.INFO, "f", 1, text, None, None)


def test_what_is_too_big_can_be_changed_by_nobody(receiver: socket.socket, tmp_path: Path) -> None:
    """journald takes no other."""
    to = Journal(str(tmp_path / "s"))
    assert to.send([("MESSAGE", "x" * 20_000_000)])
    to.close()
    _, fds, _, _ = socket.recv_fds(receiver, 16, 4)
    (fd,) = fds
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    wanted = (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL)
    assert all(seals & seal for seal in wanted)
    assert os.fstat(fd).st_size == len("MESSAGE=\n") + 20_000_000
    os.close(fd)


def sockets() -> set[int]:
    numbers = (int(name) for name in os.listdir("/proc/self/fd"))
    places = {number: f"/proc/self/fd/{number}" for number in numbers}
    return {
        number
        for number, place in places.items()
        if os.path.islink(place) and os.readlink(place).startswith("socket:")
    }


def test_its_buffer_is_the_largest_that_we_may_have_up_to_8_mib(
    receiver: socket.socket, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as like:
        try:
            like.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
        except PermissionError:
            like.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        largest = like.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    before = sockets()
    to = Journal(str(tmp_path / "s"))
    assert to.send([("A", "b")])
    (own,) = sockets() - before
    with socket.socket(fileno=os.dup(own)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == largest
    to.close()


def test_a_handler_closes_its_socket(receiver: socket.socket, tmp_path: Path) -> None:
    before = sockets()
    handler = JournalHandler(Journal(str(tmp_path / "s")))
    handler.emit(record("text"))
    assert len(sockets() - before) == 1
    handler.close()
    assert sockets() == before


def test_the_last_thousand_records_are_kept_for_a_journal_that_is_away() -> None:
    to = Taking(False)
    handler = JournalHandler(to)
    for number in range(1001):
        handler.emit(record(str(number)))
    to.taking = True
    handler._retry()
    assert to.said == [str(number) for number in range(1, 1001)]
    handler.close()


def test_what_is_late_is_sent_under_the_handlers_lock() -> None:
    """By the timer's thread, while another logs."""

    class Lock:
        taken = 0

        def __enter__(self) -> None:
            assert to.said == []
            self.taken += 1

        def __exit__(self, *_: object) -> None:
            pass

    to, lock = Taking(False), Lock()
    handler = JournalHandler(to)
    handler.emit(record("late"))
    handler.lock = lock  # type: ignore[assignment]
    to.taking = True
    handler._retry()
    assert (to.said, lock.taken) == (["late"], 1)
    handler.lock = None
    to.taking = False
    handler.emit(record("later"))
    to.taking = True
    handler._retry()
    assert to.said == ["late", "later"]
    handler.close()


def test_a_child_sends_nothing_of_its_parents() -> None:
    to = Taking(False)
    handler = JournalHandler(to)
    handler.emit(record("parent's"))
    timer = handler._timer
    assert timer is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child starts none
        child = os.fork()
    if child == 0:
        to.taking = True
        handler.emit(record("child's"))
        os._exit(0 if to.said == ["child's"] else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    handler.close()
    timer.join(30)
    assert not timer.is_alive()


class Odd:
    """A stream, but for its descriptor."""

    def __init__(self, found: int | Exception) -> None:
        self._found = found

    def fileno(self) -> int:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@pytest.mark.parametrize(
    "stream", [Odd(1_000_000), Odd(ValueError("closed")), object(), Odd(OSError(5, "gone"))]
)
def test_an_odd_stream_is_neither_the_journal_nor_lost(
    monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert stderr_is_journal(stream) is False
    assert stderr_is_lost(stream) is False


def test_debug_is_said_to_who_wants_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    root, own = logging.getLogger(), logging.getLogger("llmux")
    kept, levels = root.handlers[:], (root.level, own.level)
    root.handlers[:] = []
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    try:
        for wanted, level in (((), logging.INFO), ((True,), logging.DEBUG)):
            setup_logging(*wanted)
            assert own.level == level
            (made,) = root.handlers
            assert isinstance(made, logging.StreamHandler) and made.stream is sys.stderr
    finally:
        root.handlers[:] = kept
        root.setLevel(levels[0])
        own.setLevel(levels[1])


def test_the_timer_that_asks_again_keeps_no_process() -> None:
    handler = JournalHandler(Taking(False))
    handler.emit(record("late"))
    timers = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
    assert timers and all(timer.daemon for timer in timers)
    handler.close()


# ---- systemd -------------------------------------------------------------------------------------


def test_where_systemd_is_not_there_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    before = sockets()
    notifier = SdNotifier()
    assert not notifier.active
    with socket.socket() as one:
        notifier.store_fds("n", [one])
    notifier.ready()
    notifier.drop_fds("n")
    notifier.close()
    assert sockets() == before


def test_the_time_of_a_reload_is_in_microseconds(
    receiver: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
    monkeypatch.setattr("time.monotonic_ns", lambda: 1_234_567_899)
    notifier = SdNotifier()
    notifier.reloading()
    notifier.close()
    assert receiver.recv(99) == b"RELOADING=1\nMONOTONIC_USEC=1234567"


def test_sockets_without_names_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    first = 320
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        monkeypatch.delenv(name, raising=False)
    assert listen_fds(first) == {}
    for names, found in ((None, ["unknown"] * 2), ("a", ["a", "unknown"]), ("b:c", ["b", "c"])):
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        if names is not None:
            monkeypatch.setenv("LISTEN_FDNAMES", names)
        with socket.socket() as one:
            for offset in range(2):
                os.dup2(one.fileno(), first + offset)
        taken = listen_fds(first)
        assert [name for name, ones in taken.items() for _ in ones] == found
        for ones in taken.values():
            for sock in ones:
                sock.close()


def test_a_watchdog_without_a_time_or_a_process_is_judged_by_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    assert watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert watchdog_interval() == 1.0

"""Records to journald and messages to systemd: what is sent, kept and dropped."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.systemd import journal
from llmux.drivers.systemd.journal import (
    FIELDS,
    Journal,
    JournalHandler,
    PrefixFormatter,
    TextFormatter,
    encode,
    priority_of,
    setup_logging,
    stderr_is_journal,
    stderr_is_lost,
)
from llmux.drivers.systemd.notify import SdNotifier, listen_fds, watchdog_interval

# ---- the journal ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "priority"),
    [(60, 2), (50, 2), (49, 3), (40, 3), (39, 4), (30, 4), (29, 6), (20, 6), (19, 7), (0, 7)],
)
def test_each_level_has_its_priority(level: int, priority: int) -> None:
    assert priority_of(level) == priority


def test_an_entry_is_lines_or_lengths() -> None:
    fields = [("A", "b=c"), ("M", "x\ny"), ("E", ""), ("U", "ü\udcff")]
    assert encode(iter(fields)) == (
        b"A=b=c\nM\n" + struct.pack("<Q", 3) + b"x\ny\nE=\nU=" + "ü?".encode() + b"\n"
    )


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.settimeout(20)
        yield sock


class Answers:
    """A socket whose sends fail as they are told to."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.sent: list[str] = []

    def _send(self, name: str) -> None:
        self.sent.append(name)
        if number := self.numbers.pop(0) if self.numbers else 0:
            raise OSError(number, os.strerror(number))

    def sendto(self, data: bytes, path: str) -> None:
        self._send("for us")

    def sendmsg(self, parts: list[bytes], rights: list[Any], flags: int, path: str) -> None:
        self._send("memfd" if parts == [b""] else "for another")


@pytest.mark.parametrize(
    ("pid", "numbers", "sent", "taken"),
    [
        (None, (), ["for us"], True),
        (None, (errno.EAGAIN,), ["for us"], False),
        (None, (errno.EMSGSIZE,), ["for us", "memfd"], True),
        (None, (errno.ENOBUFS,), ["for us", "memfd"], True),
        (None, (errno.EMSGSIZE, errno.EAGAIN), ["for us", "memfd"], False),
        (7, (), ["for another"], True),
        (7, (errno.ESRCH,), ["for another", "for us"], True),
        (7, (errno.EPERM,), ["for another", "for us"], True),
        (7, (errno.EINVAL,), ["for another", "for us"], True),
        (7, (errno.EAGAIN,), ["for another"], False),
        (7, (errno.EMSGSIZE,), ["for another", "memfd"], True),
        (7, (errno.EPERM, errno.EAGAIN), ["for another", "for us"], False),
    ],
)
def test_an_entry_that_is_not_taken_is_sent_otherwise_or_dropped(
    pid: int | None, numbers: tuple[int, ...], sent: list[str], taken: bool
) -> None:
    to, answers = Journal("/no/such"), Answers(*numbers)
    to._socket = answers  # type: ignore[assignment]
    before = len(os.listdir("/proc/self/fd"))
    assert to.send([("A", "b")], pid) is taken
    assert answers.sent == sent
    assert to.dropped == (0 if taken else 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_journal_is_there_or_not_and_its_socket_waits_for_nobody(
    receiver: socket.socket, tmp_path: Path
) -> None:
    to = Journal(str(tmp_path / "s"))
    assert to.present
    assert not Journal(str(tmp_path / "t")).present
    assert to.send([("A", "b")])
    assert receiver.recv(99) == b"A=b\n"
    own = to._socket
    assert own is not None and own.getblocking() is False
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 212_992
    assert to.send([("A", "c")]) and to._socket is own
    for _ in range(2):
        to.close()
    assert to.send([("A", "d")]), "opened again"
    to.close()


class Taking(Journal):
    def __init__(self, taking: bool) -> None:
        super().__init__("/no/such")
        self.taking = taking
        self.entries: list[dict[str, str]] = []

    def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
        if self.taking:
            self.entries.append(dict(fields))
        return self.taking


def record(text: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("llmux.x", logging.WARNING, "f", 1, text, None, None)
    made.__dict__.update(extra)
    return made


def test_a_record_has_the_fields_that_may_leave_and_no_other() -> None:
    to = Taking(True)
    handler = JournalHandler(to, "me")
    handler.emit(record("text", model="m", prompt="secret", duration_ms=0, reason=None))
    assert to.entries == [
        {"MESSAGE": "text", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "me", "LOGGER": "llmux.x",
         "LLMUX_MODEL": "m", "LLMUX_DURATION_MS": "0"}
    ]  # fmt: skip
    handler.emit(record("all", **{name: name for name in FIELDS}))
    assert {to.entries[1][key] for key in FIELDS.values()} == set(FIELDS)
    handler.close()


def test_what_was_not_taken_comes_later_in_order_and_the_oldest_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "KEPT_RECORDS", 3)
    to = Taking(False)
    handler = JournalHandler(to)
    timers: list[Any] = []

    class Timer:
        def __init__(self, seconds: float, call: Any) -> None:
            self.seconds, self.call, self.daemon, self.state = seconds, call, False, "made"
            timers.append(self)

        def start(self) -> None:
            self.state = "started"

        def cancel(self) -> None:
            self.state = "cancelled"

    monkeypatch.setattr("llmux.drivers.systemd.journal.threading.Timer", Timer)
    for text in "abcd":
        handler.emit(record(text))
    (timer,) = timers
    assert (timer.seconds, timer.daemon, timer.state) == (journal.RETRY_SECS, True, "started")
    timer.call()
    assert len(timers) == 2, "asked again as long as it takes nothing"
    to.taking = True
    timers[1].call()
    assert [entry["MESSAGE"] for entry in to.entries] == ["b", "c", "d"]
    assert len(timers) == 2
    to.taking = False
    handler.emit(record("e"))
    handler._forked()
    assert (list(handler._late), handler._timer) == ([], None)
    handler.emit(record("f"))
    handler.close()
    assert timers[-1].state == "cancelled"


def test_a_bad_record_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    to = Taking(True)
    handler = JournalHandler(to)
    bad = record("%d")
    bad.args = ("x",)
    handler.emit(bad)
    handler.emit(record("good"))
    assert [entry["MESSAGE"] for entry in to.entries] == ["good"]
    handler.close()


def test_text_for_readers_and_for_collectors() -> None:
    assert PrefixFormatter("%(message)s").format(record("")) == "<4>"
    assert PrefixFormatter("%(message)s").format(record("a\n\nb")) == "<4>a\n<4>\n<4>b"
    assert TextFormatter("%(levelname)s %(message)s").format(record("a")) == "WARNING a"
    assert TextFormatter("%(message)s").format(record("a", request="r")) == "a [request r]"


@pytest.mark.parametrize(
    ("where", "verbose", "kind"),
    [
        ("journal", True, JournalHandler), ("lost", False, JournalHandler),
        ("file", False, PrefixFormatter), ("terminal", True, TextFormatter),
    ],
)  # fmt: skip
def test_logs_go_where_stderr_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, verbose: bool, kind: type
) -> None:
    root, own = logging.getLogger(), logging.getLogger("llmux")
    kept, levels = root.handlers[:], (root.level, own.level)
    closed: list[str] = []

    class Old(logging.Handler):
        def close(self) -> None:
            closed.append("old")
            super().close()

    for handler in kept:
        root.removeHandler(handler)
    root.addHandler(Old())
    target = os.devnull if where == "lost" else str(tmp_path / "err")
    with open(target, "w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        names = {"journal": f"{status.st_dev}:{status.st_ino}"}
        monkeypatch.setenv("JOURNAL_STREAM", names.get(where, ""))
        monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
        if where == "terminal":
            monkeypatch.setattr(sys, "stderr", Terminal(stream))
        assert stderr_is_journal() is (where == "journal")
        assert stderr_is_lost() is (where == "lost")
        try:
            setup_logging(verbose)
            (made,) = root.handlers
            assert isinstance(made if kind is JournalHandler else made.formatter, kind)
            assert isinstance(made.formatter, PrefixFormatter) is (where == "file")
            assert (root.level, own.level) == (20, 10 if verbose else 20)
            assert closed == ["old"]
        finally:
            for handler in root.handlers[:]:
                root.removeHandler(handler)
                handler.close()
            for handler in kept:
                root.addHandler(handler)
            root.setLevel(levels[0])
            own.setLevel(levels[1])


class Terminal:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fileno, self.write, self.flush = stream.fileno, stream.write, stream.flush

    def isatty(self) -> bool:
        return True


def test_a_stderr_without_a_descriptor_is_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setattr(sys, "stderr", None)
    assert not stderr_is_journal()
    assert not stderr_is_lost()


# ---- systemd -------------------------------------------------------------------------------------


def test_each_message_to_systemd(
    receiver: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
    notifier = SdNotifier()
    assert notifier.active
    notifier.ready()
    notifier.status("ü  two\nlines")
    notifier.stopping()
    notifier.watchdog()
    notifier.drop_fds("n")
    notifier.reloading()
    said = [receiver.recv(999).decode() for _ in range(6)]
    assert said[:5] == [
        "READY=1", "STATUS=ü two lines", "STOPPING=1", "WATCHDOG=1", "FDSTOREREMOVE=1\nFDNAME=n",
    ]  # fmt: skip
    assert said[5].startswith("RELOADING=1\nMONOTONIC_USEC=") and len(said[5]) > 30
    notifier.store_fds("n", [])
    with socket.socket() as one, socket.socket() as two:
        notifier.store_fds("n", [one, two])
        data, fds, _, _ = socket.recv_fds(receiver, 999, 4)
        assert (data, len(fds)) == (b"FDSTORE=1\nFDNAME=n", 2)
        for fd in fds:
            os.close(fd)
        receiver.close()
        notifier.store_fds("n", [one])  # nobody hears it
    for _ in range(2):
        notifier.close()
    assert notifier._sd is None
    notifier.ready()
    notifier.store_fds("n", [])
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not SdNotifier().active


def test_sockets_that_systemd_passed_have_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 300
    socks = [socket.socket() for _ in range(3)]
    plain = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
    for offset, have in enumerate((socks[0].fileno(), plain, *(s.fileno() for s in socks[1:]))):
        os.dup2(have, first + offset)
    inodes = [os.fstat(sock.fileno()).st_ino for sock in socks]
    names = {"LISTEN_FDS": "4", "LISTEN_FDNAMES": "a:x:", "LISTEN_PIDFDID": "7"}
    for name, value in {**names, "LISTEN_PID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert listen_fds(first) == {}, "they are another process's"
    assert os.environ["LISTEN_FDS"] == "4"
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    found = listen_fds(first)
    assert {
        name: [os.fstat(sock.fileno()).st_ino for sock in ones] for name, ones in found.items()
    } == {"a": [inodes[0]], "unknown": inodes[1:]}
    assert not any(os.get_inheritable(sock.fileno()) for ones in found.values() for sock in ones)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(first + 1)
    assert not {"LISTEN_PID", "LISTEN_PIDFDID", *names} & set(os.environ)
    for sock in (*socks, *(sock for ones in found.values() for sock in ones)):
        sock.close()
    os.close(plain)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "")
    assert listen_fds(first) == {}


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [("1", "", 5e-7), ("3000000", "own", 1.5), ("-1", "own", None), ("", "own", None),
     (None, "own", None), ("3000000", "1", None)],
)  # fmt: skip
def test_the_watchdog_is_pinged_twice_in_its_time(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str, seconds: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid or None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(os.getpid()) if value == "own" else value)
    assert watchdog_interval() == seconds

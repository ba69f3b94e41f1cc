"""The native protocol on the wire, levels, prefixes, and the choice between journal and stderr."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux.drivers.systemd.journal import (
    Journal,
    JournalHandler,
    PrefixFormatter,
    encode,
    priority_of,
    stderr_is_journal,
    stderr_is_lost,
)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.setblocking(False)
        yield sock


def test_values_with_a_newline_carry_their_length() -> None:
    data = encode([("MESSAGE", "a\nb"), ("PRIORITY", "6")])
    assert data == b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\nPRIORITY=6\n"


@pytest.mark.parametrize(
    ("level", "priority"), [(10, 7), (20, 6), (25, 6), (30, 4), (40, 3), (50, 2), (5, 7)]
)
def test_levels(level: int, priority: int) -> None:
    assert priority_of(level) == priority


def test_a_record_with_allowed_fields_only(receiver: socket.socket, tmp_path: Path) -> None:
    handler = JournalHandler(Journal(str(tmp_path / "socket")))
    record = logging.LogRecord("llmux.x", logging.WARNING, "f", 1, "went %s", ("wrong",), None)
    record.__dict__.update({"model": "alpha", "to": "parked", "prompt": "secret", "reason": None})
    handler.emit(record)
    handler.close()
    assert receiver.recv(4096).decode().splitlines() == [
        "MESSAGE=went wrong",
        "PRIORITY=4",
        "SYSLOG_IDENTIFIER=llmux",
        "LOGGER=llmux.x",
        "LLMUX_MODEL=alpha",
        "LLMUX_TO=parked",
    ]


def test_what_is_too_big_goes_as_a_sealed_memfd(receiver: socket.socket, tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "socket"))
    # Bigger than the biggest send buffer, so that the kernel refuses the datagram.
    assert journal.send([("MESSAGE", "x" * 20_000_000)])
    journal.close()
    data, fds, _, _ = socket.recv_fds(receiver, 16, 1)
    assert data == b""
    assert os.pread(fds[0], 20, 0) == b"MESSAGE=xxxxxxxxxxxx"
    with pytest.raises(PermissionError):
        os.write(fds[0], b"x")
    os.close(fds[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to speak for another process")
def test_an_entry_comes_from_the_process_that_it_is_said_for(
    receiver: socket.socket, tmp_path: Path
) -> None:
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    journal = Journal(str(tmp_path / "socket"))

    def sender(pid: int) -> int:
        assert journal.send([("MESSAGE", "x")], pid)
        data, ancillary, _, _ = receiver.recvmsg(4096, socket.CMSG_SPACE(12))
        assert data == b"MESSAGE=x\n"
        ((_, _, credentials),) = ancillary
        return int(struct.unpack("3i", credentials)[0])

    with subprocess.Popen(["sleep", "60"]) as other:
        assert sender(other.pid) == other.pid
        other.kill()
    assert sender(other.pid) == os.getpid(), "it is gone: better ours than lost"
    journal.close()


def test_a_journal_that_is_away_or_full_costs_nothing_but_the_entry(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "nowhere"))
    assert not journal.present
    assert not journal.send([("MESSAGE", "x")])
    journal.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "socket"))
        journal = Journal(str(tmp_path / "socket"))
        while journal.send([("MESSAGE", "x" * 1000)]):
            pass  # until the receiver's queue is full
        assert journal.dropped == 1
        journal.close()


def test_a_record_that_a_full_journal_did_not_take_comes_later_and_in_order(
    receiver: socket.socket, tmp_path: Path
) -> None:
    flood = Journal(str(tmp_path / "socket"))
    while flood.send([("MESSAGE", "flood")]):
        pass
    flood.close()
    handler = JournalHandler(Journal(str(tmp_path / "socket")))
    for text in ("first", "second"):
        handler.handle(logging.LogRecord("llmux", logging.INFO, "f", 1, text, (), None))
    receiver.settimeout(30)
    heard: list[str] = []
    while len(heard) < 2:
        message = receiver.recv(4096).decode().split("\n")[0]
        heard += [message] if message != "MESSAGE=flood" else []
    assert heard == ["MESSAGE=first", "MESSAGE=second"]
    handler.close()


def test_a_prefix_on_every_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "one\ntwo", None, None)
    assert PrefixFormatter("%(message)s").format(record) == "<3>one\n<3>two"


def test_the_journal_is_chosen_only_when_stderr_is_its_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open(tmp_path / "stderr", "w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert stderr_is_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert not stderr_is_journal(stream)
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not stderr_is_journal(stream)


def test_a_service_whose_start_met_no_journal_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    with open(os.devnull, "w") as nowhere, open(tmp_path / "stderr", "w") as file:
        assert stderr_is_lost(nowhere)
        assert not stderr_is_lost(file)
        assert not stderr_is_lost(nowhere, pid=1), "the variable is another process's"
        monkeypatch.delenv("SYSTEMD_EXEC_PID")
        assert not stderr_is_lost(nowhere)


def test_what_was_said_without_a_journal_comes_when_it_is_there(tmp_path: Path) -> None:
    handler = JournalHandler(Journal(str(tmp_path / "socket")))
    handler.handle(logging.LogRecord("llmux", logging.INFO, "f", 1, "early", (), None))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        receiver.settimeout(30)
        assert receiver.recv(4096).startswith(b"MESSAGE=early\n")
    handler.close()


def test_readers_of_text_see_the_request_too() -> None:
    record = logging.LogRecord("llmux", logging.ERROR, "f", 1, "odd", None, None)
    record.__dict__["request"] = "req-1"
    assert PrefixFormatter("%(message)s").format(record) == "<3>odd [request req-1]"

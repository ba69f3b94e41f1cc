"""The native protocol on the wire, levels, prefixes, and the choice between journal and stderr."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux.drivers.journald import (
    Journal,
    JournalHandler,
    PrefixFormatter,
    encode,
    priority_of,
    stderr_is_journal,
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


def test_readers_of_text_see_the_request_too() -> None:
    record = logging.LogRecord("llmux", logging.ERROR, "f", 1, "odd", None, None)
    record.__dict__["request"] = "req-1"
    assert PrefixFormatter("%(message)s").format(record) == "<3>odd [request req-1]"

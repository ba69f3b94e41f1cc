"""Clients that leave while nothing is read of them are seen all the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.gateway.admission.queue import Stage
from llmux.gateway.client.half_closed import WAITED_SECS, check_half_closed


class Looked:
    """A client's connection whose transport is not read."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.closing = self.reading = False
        self.aborted = self.stopped = 0
        self.transport: Any = self
        self.exchange: Any = None

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self.ours

    def abort(self) -> None:
        self.aborted += 1

    def stop_reading(self) -> None:
        self.stopped += 1

    def look(self, now: float = 100.0) -> tuple[int, int]:
        check_half_closed(self, now)  # type: ignore[arg-type]
        return self.aborted, self.stopped


@pytest.fixture
def client() -> Iterator[Looked]:
    made = Looked()
    yield made
    made.ours.close()
    made.theirs.close()


@pytest.mark.parametrize("how", ["close", "half", "unread"])
def test_who_has_left_is_let_go(client: Looked, how: str) -> None:
    assert client.look() == (0, 0)
    client.theirs.send(b"pipelined")
    if how == "half":
        client.theirs.shutdown(socket.SHUT_WR)
    elif how == "unread":
        client.ours.send(b"never read")
    if how != "half":
        client.theirs.close()
    assert client.look() == (1, 0)


@pytest.mark.parametrize("state", ["closing", "reading", "none"])
def test_who_is_read_or_closed_anyway_is_not_looked_at(client: Looked, state: str) -> None:
    client.theirs.close()
    if state == "none":
        client.transport = None
    else:
        setattr(client, state, True)
    assert client.look() == (0, 0)


@pytest.mark.parametrize(
    ("stage", "waited", "stops"),
    [
        (Stage.WAITING, WAITED_SECS + 0.1, 1),
        (Stage.WAITING, WAITED_SECS, 0),
        (Stage.IN_FLIGHT, 100.0, 0),
        (Stage.NEW, 100.0, 0),
        (None, 100.0, 0),
    ],
)
def test_behind_a_request_that_waits_input_is_dropped_so_that_the_end_is_seen(
    client: Looked, stage: Stage | None, waited: float, stops: int
) -> None:
    if stage is not None:
        client.exchange = SimpleNamespace(stage=stage, arrived=100.0 - waited)
    assert client.look(100.0) == (0, stops)

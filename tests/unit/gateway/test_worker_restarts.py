"""How soon a gateway worker that died is replaced."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from llmux.drivers.systemd.notify import SdNotifier
from llmux.gateway.workers import (
    FIRST_DELAY_SECS,
    MAX_DELAY_SECS,
    READY,
    YOUNG_SECS,
    Parent,
    WorkerNotifier,
    _Worker,
)

DIED = 1 << 8  # as wait() says it: status 1


class NoUnit:
    def is_replaced(self) -> bool:
        return False

    def others(self) -> list[int]:
        return []


def no_work(_notifier: WorkerNotifier) -> None:
    raise AssertionError("no worker is started here")


class Nursery:
    """A parent's workers, which live and die as the test says; no process is behind them."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.parent = Parent(1, no_work, SdNotifier(), NoUnit())
        stack.callback(self.parent._selector.close)

    def born(self, now: float) -> _Worker:
        ours, theirs = socket.socketpair()
        self.stack.callback(theirs.close)
        self.stack.callback(ours.close)
        worker = _Worker(1, 4711, ours, began=now, heard=now)
        self.parent._workers[1] = worker
        self.parent._selector.register(ours, 1, worker)
        self.theirs = theirs
        return worker

    def dies(self, worker: _Worker, now: float) -> float:
        """Seconds until the next one is started."""
        self.parent._ended(worker, DIED, now)
        return self.parent._due.pop(1) - now


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with ExitStack() as stack:
        yield Nursery(stack)


def test_workers_that_die_young_are_replaced_ever_later(nursery: Nursery) -> None:
    waits = [nursery.dies(nursery.born(100.0), 100.0) for _ in range(12)]
    assert waits == pytest.approx(
        [min(FIRST_DELAY_SECS * 2**n, MAX_DELAY_SECS) for n in range(1, 13)]
    )


def test_one_that_got_up_has_paid_for_those_before(nursery: Nursery) -> None:
    for _ in range(12):
        nursery.dies(nursery.born(100.0), 100.0)
    up = nursery.born(100.0)
    nursery.theirs.send(READY)
    nursery.parent._heard(up)
    assert nursery.dies(up, 100.0 + YOUNG_SECS) == pytest.approx(FIRST_DELAY_SECS)
    assert nursery.dies(nursery.born(200.0), 200.0) == pytest.approx(2 * FIRST_DELAY_SECS)


def test_nothing_is_kept_of_one_that_ended(nursery: Nursery) -> None:
    worker = nursery.born(100.0)
    nursery.dies(worker, 200.0)
    assert worker.sock.fileno() == -1
    assert nursery.parent._workers == {}
    assert worker not in [key.data for key in nursery.parent._selector.get_map().values()]


def test_silence_of_one_that_is_not_looked_at_is_no_word(nursery: Nursery) -> None:
    worker = nursery.born(100.0)
    worker.sock.setblocking(False)
    nursery.parent._heard(worker)
    assert (worker.heard, worker.ready) == (100.0, False)
    nursery.theirs.send(b".")
    nursery.parent._heard(worker)
    assert worker.heard != 100.0
    assert not worker.ready
    nursery.theirs.close()
    nursery.parent._heard(worker)
    assert nursery.parent._selector.get_map() == {}


def test_one_whose_socket_is_reset_is_listened_to_no_more(nursery: Nursery) -> None:
    """Else it is readable for ever, and the parent spins."""
    worker = nursery.born(100.0)
    worker.sock.send(b"never read")
    nursery.theirs.close()
    with pytest.raises(ConnectionResetError):
        worker.sock.recv(1)
    nursery.parent._heard(worker)
    assert nursery.parent._selector.get_map() == {}
    worker = nursery.born(100.0)
    worker.sock.send(b"never read")
    nursery.theirs.close()
    nursery.parent._heard(worker)
    assert nursery.parent._selector.get_map() == {}

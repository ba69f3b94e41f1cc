"""The parent of the workers: what it does in a turn, at a signal, and when one stands still."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from llmux.gateway.workers import (
    ALIVE,
    HAND_OVER,
    READY,
    START_SECS,
    STOP_SECS,
    Parent,
    WorkerNotifier,
    _Worker,
)

KILL, TERM, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP


class Unit:
    def __init__(self) -> None:
        self.replaced = False
        self.pids: list[int] = []

    def is_replaced(self) -> bool:
        return self.replaced

    def others(self) -> list[int]:
        return self.pids


class Told:
    def __init__(self) -> None:
        self.words: list[str] = []
        self.pings = 0

    def ready(self) -> None:
        self.words.append("ready")

    def status(self, text: str) -> None:
        self.words.append(text)

    def stopping(self) -> None:
        self.words.append("stopping")

    def reloading(self) -> None:
        self.words.append("reloading")

    def watchdog(self) -> None:
        self.pings += 1


class House:
    """A parent, with workers that are no processes. ``killed``: (pid, signal)."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
        self.unit, self.told = Unit(), Told()
        self.parent = Parent(count, lambda _n: None, self.told, self.unit, hang_secs=20.0)
        stack.callback(self.parent._selector.close)
        self.killed: list[tuple[int, int]] = []
        self.gone: dict[int, int] = {}  # pid → its status
        self.now = 1000.0
        self.theirs: dict[int, socket.socket] = {}
        self.stack = stack
        monkeypatch.setattr(os, "kill", self.kill)
        monkeypatch.setattr(os, "waitpid", self.waitpid)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        for number in range(1, count + 1):
            self.born(number)

    def born(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        for one in (ours, theirs):
            self.stack.callback(one.close)
        worker = _Worker(number, 100 + number, ours, began=self.now, heard=self.now)
        self.parent._workers[number] = worker
        self.parent._selector.register(ours, 1, worker)
        self.theirs[number] = theirs
        return worker

    def kill(self, pid: int, number: int) -> None:
        if pid == 404:
            raise ProcessLookupError
        self.killed.append((pid, number))

    def waitpid(self, pid: int, flags: int) -> tuple[int, int]:
        assert flags == os.WNOHANG
        return (pid, self.gone[pid]) if pid in self.gone else (0, 0)

    def says(self, number: int, word: bytes) -> None:
        self.theirs[number].send(word)
        self.parent._heard(self.parent._workers[number])


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack, monkeypatch)


def test_ready_is_said_once_and_the_former_workers_are_relieved(house: House) -> None:
    house.unit.pids = [7, 404, 8, 101]
    house.says(1, ALIVE)
    house.says(1, READY)
    house.says(1, READY)
    assert (house.told.words, house.killed) == (["1 of 2 workers are up"], [])
    house.says(2, ALIVE + READY)
    assert house.told.words[1:] == ["2 of 2 workers are up", "ready"]
    assert house.killed == [(7, HAND_OVER), (8, HAND_OVER)]
    house.gone[101] = 0
    house.parent._check(house.now)
    house.born(1)
    house.says(1, READY)
    assert house.told.words[3:] == ["2 of 2 workers are up"]
    assert len(house.killed) == 2


def test_a_worker_that_stands_still_is_killed_once_each_time(house: House) -> None:
    house.says(1, ALIVE)
    house.now += 20.0
    house.parent._check(house.now)
    assert house.killed == []
    house.now += 0.1
    house.parent._check(house.now)
    house.parent._check(house.now)
    assert house.killed == [(101, KILL)], "the other one has more time for its first word"
    house.now += START_SECS - 20.1
    house.parent._check(house.now)
    assert house.killed[1:] == [(101, KILL)]
    house.now += 0.1
    house.parent._check(house.now)
    assert house.killed[2:] == [(102, KILL)]


@pytest.mark.parametrize("number", [TERM, signal.SIGINT])
def test_a_stop_ends_all_and_kills_who_does_not_end(house: House, number: int) -> None:
    house.unit.pids = [7, 101]
    house.says(1, ALIVE)  # from here on its silence would be noticed earlier
    house.parent._due[3] = 0.0
    house.parent._signalled(number)
    house.parent._signalled(number)
    assert house.told.words == ["stopping"]
    assert house.killed == [(101, TERM), (102, TERM), (7, TERM)]
    assert house.parent._due == {}
    assert not house.parent._handed_over
    house.killed.clear()
    house.now += STOP_SECS
    house.parent._check(house.now)
    assert house.killed == [], "nobody is killed for standing still now"
    house.now += 0.1
    house.parent._check(house.now)
    assert house.killed == [(101, KILL), (102, KILL), (7, KILL)]
    house.gone[101] = 9
    house.parent._check(house.now)
    assert (list(house.parent._workers), house.parent._due) == ([2], {})


def test_a_parent_that_is_replaced_leaves_its_workers(house: House) -> None:
    house.unit.replaced = True
    house.parent._signalled(TERM)
    assert (house.parent._handed_over, house.parent._stop_by) == (True, None)
    assert (house.killed, house.told.words) == ([], ["stopping"])


def test_a_reload_reaches_the_own_workers_and_a_childs_end_is_looked_at_later(
    house: House,
) -> None:
    house.unit.pids = [7]
    house.parent._signalled(signal.SIGCHLD)
    assert house.killed == []
    house.parent._signalled(HUP)
    assert house.killed == [(101, HUP), (102, HUP)]
    assert house.parent._stop_by is None


@pytest.mark.parametrize(("status", "how"), [(0x300, "status 3"), (9, "SIGKILL"), (0, "status 0")])
def test_how_a_worker_ended_is_said(
    house: House, status: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    house.gone[102] = status
    house.parent._check(house.now)
    assert caplog.messages == [f"gateway worker 102 ended ({how}): replaced"]
    assert list(house.parent._due) == [2]


class Signals:
    def recv(self, _size: int) -> bytes:
        return b""


def test_a_turn_starts_who_is_due_unless_the_package_was_replaced(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(Parent, "_start", lambda _self, number: started.append(number))
    waits: list[float] = []

    def select(timeout: float) -> list[Any]:
        waits.append(timeout)
        return []

    selector = house.parent._selector
    monkeypatch.setattr(
        house.parent, "_selector", type("S", (), {"select": staticmethod(select)})()
    )
    house.parent._due = {3: house.now, 4: house.now + 1.5}
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert (started, waits) == ([3], [1.5])
    house.now += 1.0
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert waits[1:] == [0.5]
    house.parent._due = {}
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert waits[2:] == [4.0]
    house.parent.hang_secs = 5.0
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert waits[3:] == [1.0]
    house.parent._stop_by = house.now + 9.0
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert waits[4:] == [0.5]
    assert house.told.pings == 5, "once a turn"
    house.parent._stop_by = None
    house.parent.outdated = lambda: True
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert not house.parent._handed_over
    house.parent._due = {4: house.now}
    house.parent._turn(Signals())  # type: ignore[arg-type]
    assert (house.parent._handed_over, started, list(house.parent._due)) == (True, [3], [4])
    monkeypatch.setattr(house.parent, "_selector", selector)


def test_what_a_worker_says_reaches_the_parent_and_an_end_does_not_hurt() -> None:
    ours, theirs = socket.socketpair()
    notifier = WorkerNotifier(theirs)
    for say in (notifier.ready, notifier.watchdog, notifier.reloading, notifier.stopping):
        say()
    notifier.status("x")
    assert ours.recv(100) == READY + ALIVE
    ours.close()
    notifier.watchdog()
    theirs.close()


@pytest.mark.parametrize(
    ("number", "ends"),
    [(TERM, -TERM), (signal.SIGINT, -signal.SIGINT), (HUP, 0), (0, 0), (None, 1)],
)
def test_a_worker_has_the_systems_own_signals_until_it_takes_them(
    number: int | None, ends: int
) -> None:
    def work(_notifier: WorkerNotifier) -> None:
        if number is None:
            raise RuntimeError("it fails")
        os.kill(os.getpid(), number)

    parent = Parent(1, work, Told(), Unit())
    former = {one: signal.signal(one, lambda *_: None) for one in (TERM, signal.SIGINT, HUP)}
    ours, theirs = socket.socketpair()
    try:
        pid = os.fork()
        if pid == 0:
            parent._be_worker(theirs)
        _, status = os.waitpid(pid, 0)
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)
        parent._selector.close()
        ours.close()
        theirs.close()
    assert os.waitstatus_to_exitcode(status) == ends

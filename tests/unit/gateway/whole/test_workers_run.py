"""The parent with workers that are processes: from the first start to the end of a stop."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from llmux.gateway.workers import HAND_OVER, READY, Parent, WorkerNotifier
from tests.signal_actions import child_action_as_it_was

TERM, INT, HUP, CHLD = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
TAKEN = (TERM, INT, HUP, CHLD)
NOBODY = 2**22 + 1  # above the highest process id there can be
SECONDS = 60.0  # for what must come


class Told:
    """``when_ready`` is called in the parent's loop."""

    def __init__(self, when_ready: Callable[[], None] = lambda: None) -> None:
        self.words: list[str] = []
        self.when_ready = when_ready
        self.handlers: list[Any] = []

    def ready(self) -> None:
        self.words.append("ready")
        self.handlers = [signal.getsignal(number) for number in TAKEN]
        self.when_ready()

    def status(self, text: str) -> None:
        self.words.append(text)

    def stopping(self) -> None:
        self.words.append("stopping")

    def reloading(self) -> None:
        self.words.append("reloading")

    def watchdog(self) -> None:
        pass


class Unit:
    """``left``: what each look finds; the next look follows at once."""

    def __init__(self, *, replaced: bool = False) -> None:
        self.replaced = replaced
        self.left: list[list[int]] = []

    def is_replaced(self) -> bool:
        return self.replaced

    def others(self) -> list[int]:
        os.kill(os.getpid(), CHLD)
        return self.left.pop() if self.left else []


class Reports:
    """A worker's work is to say what it finds, and to wait for its end."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.parent: Parent | None = None
        self.seen: list[dict[str, Any]] = []

    def work(self, notifier: WorkerNotifier) -> None:
        assert self.parent is not None
        self.say(
            pid=os.getpid(),
            wakeup=signal.set_wakeup_fd(-1),
            hand_over_ignored=signal.getsignal(HAND_OVER) is signal.SIG_IGN,
            selects=self.parent._selector.get_map() is not None,
            blocks=notifier.life.getblocking(),
        )
        notifier.ready()
        ended, _, _ = select.select([notifier.life], [], [], SECONDS)
        self.say(pid=os.getpid(), parent_gone=bool(ended))

    def say(self, **what: Any) -> None:
        os.write(self.write_end, json.dumps(what).encode().ljust(256))

    def hear(self) -> dict[str, Any]:
        assert select.select([self.read_end], [], [], SECONDS)[0], "no worker says anything"
        said: dict[str, Any] = json.loads(os.read(self.read_end, 256))
        return said

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def reports() -> Iterator[Reports]:
    former = {number: signal.getsignal(number) for number in (*TAKEN, HAND_OVER)}
    signal.signal(HAND_OVER, signal.SIG_DFL)
    made = Reports()
    with child_action_as_it_was():
        yield made
    made.close()
    for number, handler in former.items():
        if number != CHLD:
            signal.signal(number, handler)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("stop", [TERM, INT])
def test_a_parent_runs_its_workers_until_it_is_stopped(reports: Reports, stop: int) -> None:
    def end() -> None:
        os.kill(os.getpid(), HUP)
        os.kill(os.getpid(), stop)

    told, unit = Told(end), Unit()
    unit.left = [[NOBODY], [], [NOBODY], [NOBODY], []]  # the last one is looked at first
    before = [signal.getsignal(number) for number in TAKEN]
    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    former_fd = signal.set_wakeup_fd(wakeup.fileno())
    try:
        count = descriptors()
        parent = reports.parent = Parent(2, reports.work, told, unit)
        parent.run()
        assert descriptors() == count
        assert signal.set_wakeup_fd(former_fd) == wakeup.fileno()
    finally:
        signal.set_wakeup_fd(former_fd)
        ours.close()
        wakeup.close()
    assert told.words == ["1 of 2 workers are up", "2 of 2 workers are up", "ready", "stopping"]
    assert all(map(callable, told.handlers))
    assert [signal.getsignal(number) for number in TAKEN] == before
    assert unit.left == [[NOBODY]], "it waits for the former workers, and no longer"
    assert parent._workers == {}
    pids = []
    for _ in range(2):
        said = reports.hear()
        pids.append(said.pop("pid"))
        assert said == {
            "wakeup": -1, "hand_over_ignored": True, "selects": False, "blocks": False,
        }  # fmt: skip
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_parent_that_is_followed_by_another_leaves_at_once(reports: Reports) -> None:
    told = Told(lambda: os.kill(os.getpid(), TERM))
    parent = reports.parent = Parent(1, reports.work, told, Unit(replaced=True))
    parent.run()
    pid = reports.hear()["pid"]
    assert reports.hear() == {"pid": pid, "parent_gone": True}
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "no signal ended it"
    assert list(parent._workers) == [1]


def test_each_end_of_a_workers_line_is_held_by_one_process(reports: Reports) -> None:
    parent = reports.parent = Parent(2, reports.work, Told(), Unit())
    try:
        for number in (1, 2):
            parent._start(number)
            reports.hear()
        first, second = parent._workers[1], parent._workers[2]
        for number, worker in enumerate((first, second), 1):
            assert (worker.number, worker.began) == (number, worker.heard)
            assert not worker.sock.getblocking()
            assert parent._selector.get_key(worker.sock).data is worker
        assert first.pid != second.pid
        first.sock.close()
        assert reports.hear() == {"pid": first.pid, "parent_gone": True}, "the second holds none"
        os.kill(second.pid, signal.SIGKILL)
        os.waitpid(second.pid, 0)
        heard = [second.sock.recv(10), second.sock.recv(10)]
        assert heard in ([READY, b""], [b"", b""]), "nor does the parent hold a worker's end"
        os.waitpid(first.pid, 0)
    finally:
        parent._selector.close()
        for worker in parent._workers.values():
            worker.sock.close()


def test_a_loop_of_this_process_hears_of_its_children_all_the_same() -> None:
    async def body() -> int:
        child = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
        with child_action_as_it_was():
            signal.signal(CHLD, lambda *_: None)
        assert child.stdin is not None
        child.stdin.close()
        return await asyncio.wait_for(child.wait(), SECONDS)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(body()) == 0

"""What goes on beside the supervisor's loop."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import (
    STOP,
    config_of,
    drivers_on,
    in_loop,
    in_virtual_time,
    model,
)

from llmux.core.events import WorkerJoined
from llmux.daemon import duties
from llmux.daemon.duties import announce, gid_of, reload_on_hangup, stop_on_signals, uids_of, until
from llmux.daemon.gateway_worker import _serve
from llmux.daemon.process import RELOAD_SECS, RELOADS_AT_ONCE, on_hangup
from llmux.daemon.supervisor import Supervisor
from llmux.errors import LlmuxError
from llmux.runtime import watchdog
from llmux.runtime.watchdog import GATEWAY_SECS, StatusLine, feed_watchdog
from tests.twins.disk import MemoryStore
from tests.twins.world import World

CONFIG = config_of(model("a"), model("b", eviction=STOP))


class Notifier:
    def __init__(self) -> None:
        self.told: list[str] = []

    def status(self, text: str) -> None:
        self.told.append(text)

    def ready(self) -> None:
        self.told.append("ready")

    def reloading(self) -> None:
        self.told.append("reloading")

    def stopping(self) -> None:
        self.told.append("stopping")

    def watchdog(self) -> None:
        self.told.append("watchdog")


# ---- works ---------------------------------------------------------------------------------------


@in_loop
async def test_works_run_until_the_stop_and_none_outlives_it() -> None:
    stop, ended = asyncio.Event(), list[str]()

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    running = asyncio.create_task(until(stop, work("a"), work("b")))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not running.done() and ended == []
    stop.set()
    await running
    assert sorted(ended) == ["a", "b"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_loop
async def test_a_work_that_fails_ends_the_others_and_is_the_error() -> None:
    async def fails() -> None:
        raise ValueError("a fault")

    async def goes_on() -> None:
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="a fault"):
        await until(asyncio.Event(), goes_on(), fails())
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_loop
async def test_both_signals_stop() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        handlers: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", handlers.__setitem__)
        for number in (signal.SIGTERM, signal.SIGINT):
            stop = asyncio.Event()
            stop_on_signals(stop)
            assert not stop.is_set()
            handlers[number]()
            assert stop.is_set()


@pytest.mark.parametrize("warmup", [True, False])
@in_loop
async def test_readiness_is_announced_before_models_are_warmed_up(
    tmp_path: Path, warmup: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = replace(CONFIG, warmup=warmup)
        drivers = drivers_on(World(), str(tmp_path))
        supervisor = Supervisor(config, drivers, MemoryStore(), lambda _: config)
        await supervisor.start()
        notifier, stop = Notifier(), asyncio.Event()

        async def warm_up(loop: object) -> None:
            assert loop is supervisor.loop
            notifier.told.append("warm")

        monkeypatch.setattr(duties, "warm_up", warm_up)
        running = asyncio.create_task(supervisor.loop.run())
        announcing = asyncio.create_task(announce(supervisor, notifier, stop))
        await asyncio.sleep(0)
        assert notifier.told == []
        supervisor.loop.post(WorkerJoined("w", {}))
        await supervisor.loop.wait_for(lambda state: bool(state.workers), 20)
        for _ in range(10):
            await asyncio.sleep(0)
        assert notifier.told == ["ready"] + ["warm"] * warmup
        assert not announcing.done(), "it is a work: it ends with the stop"
        stop.set()
        await announcing
        running.cancel()
        await asyncio.wait([running])
        await supervisor.close()


@in_virtual_time
async def test_without_a_gateway_it_is_ready_a_little_later_and_says_so() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        warned: list[str] = []
        monkeypatch.setattr(watchdog.log, "warning", lambda text, *args: warned.append(text % args))

        async def wait_for(predicate: Callable[[Any], bool], seconds: float) -> None:
            assert seconds == GATEWAY_SECS
            assert predicate(SimpleNamespace(workers={"w": 1}))
            assert not predicate(SimpleNamespace(workers={}))
            raise TimeoutError

        notifier = Notifier()
        loop: Any = SimpleNamespace(wait_for=wait_for)
        await watchdog.announce_ready(loop, notifier)
        assert (notifier.told, len(warned)) == (["ready"], 1)


@in_virtual_time
async def test_the_watchdog_is_fed_while_the_loop_turns() -> None:
    notifier, posted = Notifier(), list[Any]()
    loop: Any = SimpleNamespace(turned=0, post=posted.append)
    feeding = asyncio.create_task(feed_watchdog(loop, notifier, 9000.0))
    await asyncio.sleep(4000.0)
    assert (len(posted), notifier.told) == (2, []), "it did not turn"
    loop.turned += 1
    await asyncio.sleep(3000.0)
    assert (len(posted), notifier.told) == (3, ["watchdog"])
    await asyncio.sleep(3000.0)
    assert (len(posted), notifier.told) == (4, ["watchdog"])
    feeding.cancel()
    await asyncio.wait([feeding])


def test_the_status_line_is_sent_when_it_changes(tmp_path: Path) -> None:
    notifier = Notifier()
    line = StatusLine(notifier)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(watchdog, "one_line", lambda state: state)
        for state in ("a", "a", "b"):
            line.published(None, state)  # type: ignore[arg-type]
    assert notifier.told == ["a", "b"]


@pytest.mark.parametrize("error", [None, LlmuxError("it is bad"), ValueError("a fault")])
@in_virtual_time
async def test_a_hangup_reloads_every_part_and_ends_ready(error: Exception | None) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        handlers: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", handlers.__setitem__)
        loop.set_exception_handler(lambda *_: None)
        notifier = Notifier()

        async def reload() -> None:
            notifier.told.append("supervisor")
            if error is not None:
                raise error

        parts = [lambda: notifier.told.append("keys"), lambda: notifier.told.append("tls")]
        supervisor: Any = SimpleNamespace(reload=reload)
        reload_on_hangup(supervisor, notifier, parts)
        for _ in range(2):
            handlers[signal.SIGHUP]()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait(tasks)
            said = ["configuration not reloaded: see the journal"]
            once = ["reloading", "keys", "tls", "supervisor"]
            once += said if isinstance(error, LlmuxError) else []
            assert notifier.told == [*once, "ready"]
            notifier.told.clear()
            broke = [task.exception() for task in tasks if isinstance(task, asyncio.Task)]
            assert broke == [error if isinstance(error, ValueError) else None]
            await asyncio.sleep(0.001)


@in_virtual_time
async def test_reloads_now_and_then_never_wait() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        handlers: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", handlers.__setitem__)
        times = list[float]()

        async def reload() -> None:
            times.append(loop.time())

        on_hangup(reload)
        for turn in range(3 * RELOADS_AT_ONCE):
            handlers[signal.SIGHUP]()
            asked = loop.time()
            await asyncio.sleep(1.01 * RELOAD_SECS)
            assert times[turn:] == pytest.approx([asked], abs=0.5 * RELOAD_SECS)


@pytest.mark.parametrize("whose", ["the supervisor's", "a worker's"])
@in_virtual_time
async def test_a_storm_of_hangups_reloads_at_once_and_then_once_for_all(whose: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        handlers: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", handlers.__setitem__)
        number, read, notifier, up = -1, list[int](), Notifier(), asyncio.Event()

        def part() -> None:
            read.append(number)

        async def serving(*, stop: asyncio.Event, reload: Any, **_: Any) -> None:
            reload.append(part)
            up.set()
            await stop.wait()

        async def reload() -> None:
            """The supervisor's configuration."""

        ours, theirs = socket.socketpair()
        worker = asyncio.create_task(_serve(serving, ours, 1.0, 1.0))
        await up.wait()
        if whose == "the supervisor's":
            supervisor: Any = SimpleNamespace(reload=reload)
            reload_on_hangup(supervisor, notifier, [part])
        began = loop.time()
        for number in range(1000):  # noqa: B007  # ``part`` reads it
            handlers[signal.SIGHUP]()
            await asyncio.sleep(0.0009)
        assert read[0] == 0, "the first one does not wait"
        assert read[:RELOADS_AT_ONCE] == [*range(RELOADS_AT_ONCE)], "nor those after it"
        assert len(read) <= RELOADS_AT_ONCE + (loop.time() - began) / RELOAD_SECS
        await asyncio.sleep(2 * RELOAD_SECS)
        assert read[-1] == 999, "the last one counts"
        count = len(read)
        await asyncio.sleep(3 * RELOAD_SECS)
        assert len(read) == count
        number = 1000
        handlers[signal.SIGHUP]()
        await asyncio.sleep(0)
        assert read[count:] == [1000]
        told = ["reloading", "ready"] * len(read)
        assert notifier.told == (told if whose == "the supervisor's" else [])
        handlers[signal.SIGTERM]()
        await worker
        for sock in (ours, theirs):
            sock.close()


@in_virtual_time
async def test_hangups_amid_a_reload_are_followed_by_one_more() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        handlers: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", handlers.__setitem__)
        begun, go_on = list[float](), asyncio.Event()

        async def reload() -> None:
            begun.append(loop.time())
            await go_on.wait()

        reload_on_hangup(SimpleNamespace(reload=reload), Notifier())  # type: ignore[arg-type]
        for _ in range(3):
            handlers[signal.SIGHUP]()
            await asyncio.sleep(2 * RELOAD_SECS)
        assert len(begun) == 1, "one at a time"
        go_on.set()
        await asyncio.sleep(9 * RELOAD_SECS)
        assert len(begun) == 2


def test_users_and_groups_are_looked_up_by_name(caplog: pytest.LogCaptureFixture) -> None:
    me = pwd.getpwuid(os.getuid())
    assert uids_of(me.pw_name) == frozenset({me.pw_uid})
    group = grp.getgrgid(os.getgid())
    assert gid_of(group.gr_name) == group.gr_gid
    assert caplog.messages == []
    assert (uids_of("no such user"), gid_of("no such group")) == (frozenset(), None)
    assert caplog.messages == [
        "there is no user no such user: only root may use the control socket"
    ]
    assert duties.environment() == dict(os.environ)

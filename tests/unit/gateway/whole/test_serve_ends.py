"""A worker's rounds while it runs, what it reports, and what is left when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_harness import (
    ADMIN,
    ADMINS,
    FakeSupervisor,
    a_config,
    in_loop,
    soon,
    stage,
    until,
)
from sanic import Sanic

from llmux.gateway.client.listeners import BACKLOG
from llmux.gateway.server import _sweep, _until, serve_gateway


class EndError(Exception):
    """The round is over."""


class Client:
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.expired = self.looked_at = 0
        self.transport = self
        self.exchange = None

    def expire(self) -> None:
        self.expired += 1

    def is_closing(self) -> bool:
        self.looked_at += 1
        return True


class Told:
    def __init__(self) -> None:
        self.words: list[str] = []

    def __getattr__(self, word: str) -> Any:
        return lambda *more: self.words.append(" ".join([word, *more]))


@pytest.mark.parametrize(
    ("watchdog_secs", "pause"), [(None, 1.0), (0.9, 0.3), (3.0, 1.0), (30.0, 1.0)]
)
@pytest.mark.parametrize("busy", [True, False])
def test_a_round_looks_at_all_deadlines_and_feeds_the_watchdog(
    watchdog_secs: float | None, pause: float, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [Client(deadline) for deadline in (0.0, 99.0, 100.0, 101.0, 5.0)] if busy else []
    halls = [SimpleNamespace(connections=clients[:2]), SimpleNamespace(connections=clients[2:])]
    paused: list[float] = []
    told = Told()

    async def body() -> None:
        worker: Any = SimpleNamespace(clock=lambda: 100.0, client_came=asyncio.Event())
        worker.client_came.set()

        async def sleep(seconds: float) -> None:
            paused.append(seconds)
            raise EndError

        def timeout(seconds: float) -> Any:
            assert not worker.client_came.is_set()
            paused.append(seconds)
            raise EndError

        monkeypatch.setattr(asyncio, "sleep", sleep)
        monkeypatch.setattr(asyncio, "timeout", timeout)
        notifier: Any = told
        with pytest.raises(EndError):
            await _sweep(worker, halls, notifier, watchdog_secs)
        with pytest.raises(EndError):
            await _sweep(worker, halls, None, watchdog_secs)

    asyncio.run(body())
    assert paused == pytest.approx([pause if busy else 4 * pause] * 2)
    assert told.words == ([] if watchdog_secs is None else ["watchdog"])
    assert [one.expired for one in clients] == ([0, 2, 0, 0, 2] if busy else [])
    assert [one.looked_at for one in clients] == ([2, 0, 2, 2, 0] if busy else [])


def test_rounds_go_on_when_nobody_comes_for_long() -> None:
    async def body() -> None:
        told = Told()
        worker: Any = SimpleNamespace(clock=lambda: 100.0, client_came=asyncio.Event())
        notifier: Any = told
        rounds = asyncio.create_task(_sweep(worker, [], notifier, 0.003))
        async with asyncio.timeout(60):
            while len(told.words) < 3:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
        rounds.cancel()

    asyncio.run(body())


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("notified", [True, False])
def test_the_start_and_the_stop_are_reported(at_once: bool, notified: bool) -> None:
    async def body() -> None:
        told, stop, worker = Told(), asyncio.Event(), object()
        started: list[Any] = []
        if at_once:
            stop.set()
        notifier: Any = told if notified else None
        given: Any = worker
        task = asyncio.create_task(_until(stop, given, "here", notifier, started.append))
        await asyncio.sleep(0)
        assert task.done() is at_once
        assert started == ([] if at_once else [worker])
        begun = [] if at_once else ["ready", "status here"]
        stop.set()
        await task
        assert told.words == ([*begun, "stopping"] if notified else [])
        await _until(stop, given, "here", notifier, None)

    asyncio.run(body())


def refused(address: Any) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


@in_loop
async def test_the_numbers_own_port_ends_when_the_stop_begins() -> None:
    numbers = socket.create_server(("127.0.0.1", 0))
    address = numbers.getsockname()
    reload: list[Any] = []
    async with stage(metrics_sockets=[numbers], keys=lambda: ADMINS, reload=reload) as s:
        assert len(reload) == 1, "of the keys"
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"\nllmux_gateway_workers 1.0\n" in await soon(reader.read())
        writer.close()
        client = await s.client()
        client.send(payload={"model": "alpha"}, headers=(ADMIN,))
        await until(lambda: s.waiting() == 1)
        s.stop.set()
        await until(lambda: s.gateway.draining)
        await until(lambda: refused(address))
        await s.granted()
        assert (await client.answer()).status == 200


@in_loop
async def test_nothing_is_left_of_one_that_fails(tmp_path: Path) -> None:
    """As it says that it is ready, with a client that has just connected."""
    apps = len(Sanic._app_registry)
    tasks = asyncio.all_tasks()
    listener, numbers = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    addresses = [listener.getsockname(), numbers.getsockname()]
    backlogs: list[tuple[int, int]] = []
    client = socket.socket()
    client.setblocking(False)

    def connect(listeners: Any) -> None:
        client.connect_ex(addresses[0])
        info = listeners[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        backlogs.append((int.from_bytes(info[28:32], "little"), min(BACKLOG, most)))

    def fail(worker: Any) -> None:
        raise EndError

    supervisor = FakeSupervisor(str(tmp_path / "s"))
    await supervisor.start()
    with pytest.raises(EndError):
        await serve_gateway(
            a_config(),
            link=supervisor.path,
            sockets=[listener],
            metrics_sockets=[numbers],
            stop=asyncio.Event(),
            on_listen=connect,
            on_started=fail,
        )
    assert [found for found, _ in backlogs] == [expected for _, expected in backlogs]
    assert all(map(refused, addresses))
    client.setblocking(True)
    client.settimeout(60)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    client.close()
    assert len(Sanic._app_registry) == apps
    await until(lambda: not supervisor._writers)
    await supervisor.stop()
    await until(lambda: asyncio.all_tasks() == tasks)


@in_loop
async def test_one_without_sockets_listens_where_its_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "gw.sock"
    listening: list[str] = []
    stop = asyncio.Event()
    config = a_config(listen=(f"unix:{path}",), socket_mode="0600")

    def started(_worker: Any) -> None:
        listening.append(oct(path.stat().st_mode & 0o777))
        stop.set()

    await soon(
        serve_gateway(
            config, link=str(tmp_path / "s"), stop=stop, on_started=started, ready_secs=0.0
        )
    )
    assert listening == ["0o600"]

"""Several gateway workers on one socket: all of them up, replaced when they die, stopped together.

The supervisor is the gateway tests' stand-in; parent and workers are real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import (
    MODELS,
    Client,
    EngineRequest,
    FakeSupervisor,
    StubEngine,
    in_loop,
    soon,
    until,
)

from llmux.core.events import DemandChanged, Event, WorkerJoined, WorkerLeft
from llmux.gateway.workers import HANG_SECS
from llmux.protocol import Ask, Catalog, Demand, Grant, ModelInfo
from llmux.runtime.control.socket import ControlSocket

ROOT = Path(__file__).resolve().parents[2]
SERVE = """
import os, pathlib, sys
from llmux.daemon.gateway import gateway
if "TEST_LISTENER" in os.environ:  # as systemd's fd store hands it out
    os.dup2(int(os.environ["TEST_LISTENER"]), 3)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
hang_secs = float(os.environ["TEST_HANG_SECS"])
class Unit:  # former workers are in the file, whose name says whether systemd restarts the unit
    folder = pathlib.Path(sys.argv[1]).parent
    def is_replaced(self):
        return (self.folder / "restarted").exists()
    def others(self):
        files = [self.folder / "restarted", self.folder / "stopped"]
        pids = [pid for file in files if file.exists() for pid in file.read_text().split()]
        return [int(pid) for pid in pids if os.path.exists(f"/proc/{pid}")]
gateway(sys.argv[1], link=sys.argv[2], last_good=sys.argv[3], hang_secs=hang_secs,
        orphan_secs=float(os.environ["TEST_ORPHAN_SECS"]), unit=Unit(),
        code=str(Unit.folder / "code"))
"""


@dataclass
class Front:
    supervisor: FakeSupervisor
    directory: Path
    notified: asyncio.Queue[str]
    link: str
    listener: socket.socket | None = None  # kept for it, as by systemd
    hang_secs: float = HANG_SECS
    orphan_secs: float = 100.0
    clients: list[Client] = field(default_factory=list)
    process: asyncio.subprocess.Process = field(init=False)

    async def start(self) -> None:
        env = dict(os.environ) | {
            "NOTIFY_SOCKET": str(self.directory / "notify.sock"),
            "TEST_HANG_SECS": str(self.hang_secs),
            "TEST_ORPHAN_SECS": str(self.orphan_secs),
        }
        for variable in ("WATCHDOG_USEC", "LISTEN_FDS"):
            env.pop(variable, None)
        kept = []
        if self.listener is not None:
            kept = [self.listener.fileno()]
            name = f"listen-unix_{self.directory}/http.sock".replace("/", "-")
            env |= {"TEST_LISTENER": str(kept[0]), "LISTEN_FDNAMES": name}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVE, str(self.directory / "config.json"), self.link,
            str(self.directory / "last-good"), cwd=ROOT, env=env, pass_fds=kept,
        )  # fmt: skip

    async def client(self) -> Client:
        path = str(self.directory / "http.sock")
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
        self.clients.append(Client(reader, writer))
        return self.clients[-1]

    async def told(self, word: str) -> None:
        while word not in await soon(self.notified.get()):
            pass

    def pids(self) -> dict[int, str]:
        """Worker processes by pid, as they named themselves to the supervisor."""
        return {int(hello.worker.rpartition("-")[2]): hello.worker for hello in self.hellos()}

    def hellos(self) -> list[Any]:
        return [hello for hello in self.supervisor.hellos if hello.role == "gateway"]

    async def waited_by(self, number: int) -> None:
        """Until so many requests wait, over all workers."""
        while sum(demand.waiting for demand in self.supervisor.demands.values()) < number:
            await self.supervisor.hear(Demand)

    async def hello(self, number: int) -> None:
        while len(self.hellos()) < number:
            await self.supervisor.hear(type(self.supervisor.hellos[0]))


@asynccontextmanager
async def front(
    workers: int,
    *,
    link: str | None = None,
    kept: bool = False,
    hang_secs: float = HANG_SECS,
    orphan_secs: float = 100.0,
    **gateway: Any,
) -> AsyncIterator[Front]:
    with tempfile.TemporaryDirectory(prefix="lxw") as name:
        directory = Path(name)
        supervisor = FakeSupervisor(str(directory / "s.sock"))
        await supervisor.start()
        settings = {"listen": [f"unix:{directory}/http.sock"], "workers": workers} | gateway
        models = {model: {"model_path": f"m/{model}"} for model in supervisor.models}
        document = {"gateway": settings, "metrics_port": 0, "models": models}
        (directory / "config.json").write_text(json.dumps(document))
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(directory / "notify.sock"))
        notify.setblocking(False)
        notified: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        loop.add_reader(notify, lambda: notified.put_nowait(notify.recv(4096).decode()))
        listener = None
        if kept:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{directory}/http.sock")
            listener.listen()
        running = Front(
            supervisor, directory, notified, link or supervisor.path, listener, hang_secs,
            orphan_secs,
        )  # fmt: skip
        await running.start()
        try:
            yield running
        finally:
            for client in running.clients:
                client.leave()
            if running.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    running.process.terminate()
                await soon(running.process.wait())
            if listener is not None:
                listener.close()
            loop.remove_reader(notify)
            notify.close()
            await supervisor.stop()


class RealHub:
    """The supervisor's own hub, with a test in place of its decisions."""

    def __init__(self, models: tuple[str, ...] = MODELS) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()
        infos = [ModelInfo(name, "serving") for name in models]
        self.models = models
        self.hub = ControlSocket(
            post=self._posted, ask=self._answer, catalog=lambda: Catalog.of(infos)
        )
        self._grants: list[Grant] = []

    def _posted(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()
        if isinstance(event, WorkerJoined):
            for grant in self._grants:
                self.hub.send(event.worker, grant)

    async def _answer(self, ask: Ask, _tell: object) -> object:
        assert ask.verb == "response"
        return self.hub.responses.answer(ask.args)

    def grant(self, engine: StubEngine, model: str = "alpha") -> None:
        """To every worker there is and will be."""
        self._grants.append(Grant(model, "e1", uds=engine.address.uds))
        self.hub.broadcast(self._grants[-1])

    async def happened(self, number: int, *kinds: type[Event]) -> list[Event]:
        """The first so many events of these kinds, once there are as many."""
        while True:
            found = [event for event in self.events if isinstance(event, kinds)]
            if len(found) >= number:
                return found[:number]
            self._news.clear()
            await soon(self._news.wait())

    async def joined(self, number: int) -> list[str]:
        found = await self.happened(number, WorkerJoined)
        return [event.worker for event in found if isinstance(event, WorkerJoined)]

    async def in_flight(self, number: int) -> dict[str, int]:
        """What every worker has in flight, once it is so many in all."""
        counts: dict[str, int] = {}
        while sum(counts.values()) != number:
            self._news.clear()
            demands = [event for event in self.events if isinstance(event, DemandChanged)]
            counts = {demand.worker: demand.in_flight for demand in demands}
            if sum(counts.values()) != number:
                await soon(self._news.wait())
        return counts

    def pids(self) -> dict[int, str]:
        return {int(worker.rpartition("-")[2]): worker for worker in self.hub.workers()}


@asynccontextmanager
async def hub_and_front(workers: int, **more: Any) -> AsyncIterator[tuple[RealHub, Front]]:
    """As ``front``, with the real hub. It is up."""
    with tempfile.TemporaryDirectory(prefix="lxh") as name:
        hub = RealHub()
        await hub.hub.listen(f"{name}/s.sock", None)
        try:
            async with front(workers, link=f"{name}/s.sock", **more) as gateway:
                await gateway.told("READY=1")
                await hub.joined(workers)
                yield hub, gateway
        finally:
            await hub.hub.close()


async def gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ended.set)
    try:
        await soon(ended.wait())
    finally:
        loop.remove_reader(fd)
        os.close(fd)


@in_loop
async def test_all_workers_are_up_before_ready_and_all_end_with_a_stop() -> None:
    async with front(3) as gateway:
        await gateway.told("READY=1")
        assert len(gateway.pids()) == 3 and gateway.process.pid not in gateway.pids()
        client = await gateway.client()
        client.send("/health", method="GET")
        assert (await client.answer()).status == 200
        gateway.process.terminate()
        await gateway.told("STOPPING=1")
        assert await soon(gateway.process.wait()) == 0
        for pid in gateway.pids():
            await gone(pid)


@in_loop
async def test_a_killed_worker_is_replaced_and_the_others_go_on() -> None:
    async with front(2) as gateway:
        await gateway.told("READY=1")
        victim = next(iter(gateway.pids()))
        os.kill(victim, signal.SIGKILL)
        await gone(victim)
        await gateway.hello(3)
        assert len(gateway.pids()) == 3
        for _ in range(8):
            client = await gateway.client()
            client.send("/health", method="GET")
            assert (await client.answer()).status == 200


@in_loop
async def test_after_an_upgrade_it_is_the_next_gateway_that_replaces_a_worker() -> None:
    """This one's code does not fit what a new worker would import."""
    async with front(2) as gateway:
        await gateway.told("READY=1")
        victim, other = gateway.pids()
        (gateway.directory / "code").touch()
        os.kill(victim, signal.SIGKILL)
        assert await soon(gateway.process.wait()) == 0
        client = await gateway.client()
        client.send("/health", method="GET")
        assert (await client.answer()).status == 200, "the other worker serves on"
        os.kill(other, signal.SIGTERM)
        await gone(other)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_or_hangs_is_replaced_and_its_grants_are_given_up(
    blow: signal.Signals,
) -> None:
    """SIGSTOP looks like a loop that turns no more: the process is there, and says nothing."""

    @in_loop
    async def run() -> None:
        release = asyncio.Event()

        async def slow(request: EngineRequest) -> None:
            request.start_stream()
            request.event("one")
            await release.wait()
            request.end_stream()

        hang_secs = 3.0 if blow is signal.SIGSTOP else HANG_SECS
        async with hub_and_front(2, hang_secs=hang_secs) as (hub, gateway):
            engine = StubEngine(slow, path=str(gateway.directory / "engine.sock"))
            await engine.start()
            hub.grant(engine)
            clients = [await gateway.client() for _ in range(8)]
            for client in clients:
                client.chat(stream=True)
                assert (await client.head()).status == 200
                assert b"one" in await client.chunk()
            streams = await hub.in_flight(8)
            worker = max(streams, key=lambda name: streams[name])
            pid = next(pid for pid, name in hub.pids().items() if name == worker)
            os.kill(pid, blow)
            (left,) = await hub.happened(1, WorkerLeft)
            assert left == WorkerLeft(worker)
            await gone(pid)
            assert (await hub.joined(3))[-1] not in streams
            release.set()
            whole = [await is_whole(client) for client in clients]
            assert whole.count(False) == streams[worker], "the others' streams go on"
            for _ in range(4):
                client = await gateway.client()
                client.chat()
                assert await is_whole(client, headed=False)
            await engine.stop()

    run()


async def is_whole(client: Client, *, headed: bool = True) -> bool:
    """Whether the stream comes to its end."""
    try:
        if not headed:
            await client.head()
        while await client.chunk():
            pass
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        return False
    return True


@in_loop
async def test_workers_whose_parent_is_killed_end_when_no_other_comes() -> None:
    async with front(2, orphan_secs=0.1) as gateway:
        await gateway.told("READY=1")
        gateway.process.kill()
        await soon(gateway.process.wait())
        for pid in gateway.pids():
            await gone(pid)


@pytest.mark.parametrize("how", ["restart", "crash"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_is_noticed_by_no_client(workers: int, how: str) -> None:
    """Between the end of one parent and the next one's start new connections are served too; the
    former workers then accept nothing, finish their streams, and end."""

    @in_loop
    async def run() -> None:
        release = asyncio.Event()

        async def slow(request: EngineRequest) -> None:
            request.start_stream()
            request.event("one")
            await release.wait()
            request.event("two")
            request.end_stream()

        async with hub_and_front(workers, kept=True) as (hub, gateway):
            engine = StubEngine(slow, path=str(gateway.directory / "engine.sock"))
            await engine.start()
            hub.grant(engine)
            clients = [await streaming(gateway) for _ in range(4)]
            idle = await healthy(gateway)
            former = hub.pids()
            restarted = gateway.directory / "restarted"
            restarted.write_text("\n".join(map(str, former)))
            if how == "restart":
                gateway.process.terminate()
            else:
                gateway.process.kill()
            await soon(gateway.process.wait())
            between = await healthy(gateway)

            await gateway.start()
            await gateway.told("READY=1")
            await hub.joined(2 * workers)
            clients.append(await streaming(gateway))
            # a connection that was idle is not closed under the client's next request
            for client in (idle, between):
                await soon(asked_until_it_closes(client))
            release.set()
            for client in clients:
                assert await is_whole(client)
                client.leave()
            for pid in former:
                await gone(pid)
            restarted.unlink()
            await engine.stop()

    run()


async def asked_until_it_closes(client: Client) -> None:
    """The former worker hears of the hand-over a moment after the next parent is ready."""
    connection = ""
    while connection != "close":
        client.send("/health", method="GET")
        answer = await client.answer()
        assert answer.status == 200
        connection = answer.headers["connection"]


async def streaming(gateway: Front) -> Client:
    client = await gateway.client()
    client.chat(stream=True)
    assert (await client.head()).status == 200
    assert b"one" in await client.chunk()
    return client


async def healthy(gateway: Front) -> Client:
    """A client whose connection is idle."""
    client = await gateway.client()
    client.send("/health", method="GET")
    assert (await client.answer()).status == 200
    return client


@in_loop
async def test_a_stop_ends_workers_of_former_parents_too() -> None:
    async with hub_and_front(1, kept=True) as (hub, gateway):
        (former,) = hub.pids()
        await healthy(gateway)  # its connection keeps the former worker
        restarted = gateway.directory / "restarted"
        restarted.write_text(str(former))
        gateway.process.terminate()
        await soon(gateway.process.wait())
        await gateway.start()
        await gateway.told("READY=1")
        await hub.joined(2)
        os.kill(former, 0)
        restarted.rename(gateway.directory / "stopped")
        gateway.process.terminate()
        assert await soon(gateway.process.wait()) == 0
        await gone(former)


@in_loop
async def test_a_stop_lets_every_workers_streams_end() -> None:
    async with front(2) as gateway:
        await gateway.told("READY=1")
        release = asyncio.Event()

        async def slow(request: Any) -> None:
            request.start_stream()
            request.event("one")
            await release.wait()
            request.event("two")
            request.end_stream()

        engine = StubEngine(slow, path=str(gateway.directory / "engine.sock"))
        await engine.start()
        gateway.supervisor.grant(engine)
        clients = [await gateway.client() for _ in range(8)]
        for client in clients:
            client.chat(stream=True)
            assert (await client.head()).status == 200
            assert b"one" in await client.chunk()
        gateway.process.terminate()
        await gateway.told("STOPPING=1")
        release.set()
        for client in clients:
            assert b"two" in await client.chunk()
        for client in clients:
            assert b"[DONE]" in await client.chunk()
        assert await soon(gateway.process.wait()) == 0
        await engine.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_serves_who_waits_and_refuses_nobody(workers: int) -> None:
    @in_loop
    async def run() -> None:
        async with front(workers, kept=True) as gateway:
            await gateway.told("READY=1")
            engine = StubEngine(path=str(gateway.directory / "engine.sock"))
            await engine.start()
            waiting = [await gateway.client() for _ in range(4)]
            for client in waiting:
                client.chat()
            await gateway.waited_by(len(waiting))
            gateway.process.terminate()
            await gateway.told("STOPPING=1")
            late = [await gateway.client() for _ in range(4)]  # held by the socket's backlog
            for client in late:
                client.chat()
            gateway.supervisor.grant(engine)
            for client in waiting:
                assert (await client.answer()).status == 200
            assert await soon(gateway.process.wait()) == 0
            await gateway.start()
            await gateway.told("READY=1")
            gateway.supervisor.grant(engine, epoch="e2")
            for client in late:
                assert (await client.answer()).status == 200
            await engine.stop()

    run()


@in_loop
async def test_every_worker_asks_for_keys() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "keys"
        file.write_text("")
        async with front(2, keys_file=str(file)) as gateway:
            await gateway.told("READY=1")
            for _ in range(6):
                client = await gateway.client()
                client.send("/v1/models", method="GET", headers=("x-api-key: wrong",))
                answer = await client.answer()
                assert answer.status == 401 and answer.code == "invalid_api_key"
            client = await gateway.client()
            client.send("/control/status", method="GET")
            assert (await client.answer()).status == 200, "our own user, seen on a unix socket"


@in_loop
async def test_all_workers_together_keep_a_limit_that_they_divide() -> None:
    async with front(2, max_waiting=4) as gateway:
        await gateway.told("READY=1")
        clients = [await gateway.client() for _ in range(12)]
        for client in clients:
            client.chat()
        answers = [asyncio.create_task(client.answer()) for client in clients]

        def waiting() -> int:
            return sum(demand.waiting for demand in gateway.supervisor.demands.values())

        await until(lambda: waiting() + sum(answer.done() for answer in answers) == 12)
        assert 2 <= waiting() <= 4  # by one worker or by both
        for answer in answers:
            if answer.done():
                assert (answer.result().status, answer.result().code) == (503, "queue_full")
            answer.cancel()


@in_loop
async def test_a_response_is_found_through_every_worker_and_after_a_restart() -> None:
    async def keep(request: EngineRequest) -> None:
        method = request.line.partition(" ")[0]
        request.json({"id": "resp_1"} if method == "POST" else {"line": request.line})

    async with hub_and_front(3) as (hub, gateway):
        engine = StubEngine(keep, path=str(gateway.directory / "engine.sock"))
        await engine.start()
        hub.grant(engine, "beta")
        first = await gateway.client()
        first.send("/v1/responses", {"model": "beta", "input": "x"})
        assert (await first.answer()).json() == {"id": "resp_1"}

        async def read_by(connections: int) -> None:
            for _ in range(connections):
                client = await gateway.client()
                client.send("/v1/responses/resp_1", method="GET")
                answer = await client.answer()
                assert answer.json() == {"line": "GET /v1/responses/resp_1 HTTP/1.1"}

        await read_by(12)
        for pid in hub.pids():
            os.kill(pid, signal.SIGKILL)
            await gone(pid)
        await hub.joined(6)
        await read_by(6)
        await engine.stop()


@in_loop
async def test_a_request_id_is_never_given_twice() -> None:
    async with front(2) as gateway:
        await gateway.told("READY=1")
        seen = set()
        for _ in range(20):
            client = await gateway.client()
            client.send("/health", method="GET")
            seen.add((await client.answer()).headers["x-request-id"])
        assert len(seen) == 20

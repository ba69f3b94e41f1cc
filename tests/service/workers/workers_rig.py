"""Several gateway workers on one socket, under a parent that is a real process as they are.

The supervisor is the gateway tests' stand-in, or the real hub with a test in place of decisions.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
from forked import Forked
from gateway_harness import (
    MODELS,
    Client,
    FakeSupervisor,
    StubEngine,
    soon,
)

from llmux.core.events import DemandChanged, Event, WorkerJoined
from llmux.gateway.workers import HANG_SECS
from llmux.protocol import Ask, Catalog, Demand, Grant, ModelInfo
from llmux.runtime.control.socket import ControlSocket

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
        pids = self.listed("restarted") | self.listed("stopped")
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    def listed(self, name):
        try:  # a test may rename the one to the other at any moment
            return {int(pid) for pid in (self.folder / name).read_text().split()}
        except FileNotFoundError:
            return set()
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
    own_interpreter: bool = False
    clients: list[Client] = field(default_factory=list)
    process: Forked = field(init=False)

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
        files = [str(self.directory / "config.json"), self.link, str(self.directory / "last-good")]
        self.process = forked.start(
            ["-c", SERVE, *files], env=env, pass_fds=kept, own_interpreter=self.own_interpreter
        )

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
    own_interpreter: bool = False,
    **gateway: Any,
) -> AsyncIterator[Front]:
    with tempfile.TemporaryDirectory(prefix="lxw") as name:
        directory = Path(name)
        supervisor = FakeSupervisor(str(directory / "s.sock"))
        await supervisor.start()
        settings = {"listen": [f"unix:{directory}/http.sock"], "workers": workers} | gateway
        models = {model: {"model_path": f"m/{model}"} for model in supervisor.models}
        document: dict[str, Any] = {"gateway": settings, "models": models}
        if "metrics_listen" not in gateway:
            document["metrics_port"] = 0
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
            orphan_secs, own_interpreter,
        )  # fmt: skip
        await running.start()
        try:
            yield running
        finally:
            for client in running.clients:
                client.leave()
            running.process.terminate()
            await soon(running.process.ended())
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

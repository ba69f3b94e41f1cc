"""Supervisor and gateway in a thread, on the in-memory twins, for a browser: checkpoint images
without root, CRIU or a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from page_browser import ROOT as ROOT  # its import sets the path
from runtime_harness import config_of, drivers_on

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole, ModelConfig
from llmux.daemon.supervisor import Supervisor
from llmux.gateway.server import serve_gateway
from tests.twins.disk import MemoryStore
from tests.twins.world import Hold, World

SECONDS = 20.0
KEYS = (Key("admin", hash_key("sk-admin"), KeyRole.ADMIN),)


@dataclass
class Twins:
    """``world`` takes faults to order; the loop runs in the thread."""

    world: World
    port: int
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event

    def release(self, hold: Hold) -> None:
        self.loop.call_soon_threadsafe(hold.release)


@contextlib.contextmanager
def on_twins(*models: ModelConfig) -> Iterator[Twins]:
    started: list[Twins] = []
    ready = threading.Event()

    async def serve(runtime: str) -> None:
        world = World()
        config = config_of(*models)
        drivers = drivers_on(world, runtime)
        supervisor = Supervisor(config, drivers, MemoryStore(), reload=lambda _: config)
        await supervisor.start()
        turning = asyncio.create_task(supervisor.loop.run())
        ours, theirs = socket.socketpair()
        await supervisor.control_socket.join(ours)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        stop = asyncio.Event()
        started.append(Twins(world, port, asyncio.get_running_loop(), stop))
        try:
            await serve_gateway(
                config, link=theirs, sockets=[listener], stop=stop, keys=lambda: KEYS,
                on_started=lambda _: ready.set(),
            )  # fmt: skip
        finally:
            await supervisor.close()
            turning.cancel()
            await asyncio.gather(turning, return_exceptions=True)

    with tempfile.TemporaryDirectory(prefix="lxt") as runtime:
        thread = threading.Thread(target=lambda: asyncio.run(serve(runtime)), daemon=True)
        thread.start()
        assert ready.wait(SECONDS), "the gateway did not start"
        try:
            yield started[0]
            assert started[0].world.violations == []
        finally:
            started[0].loop.call_soon_threadsafe(started[0].stop.set)
            thread.join(SECONDS)

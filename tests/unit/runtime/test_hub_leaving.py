"""What the hub makes of a worker that is gone: its process decides, not its connection."""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
from time import monotonic

from llmux.core.events import Event, WorkerJoined, WorkerLeft
from llmux.protocol import Catalog, Hello
from llmux.runtime.hub import RECONNECT_SECS, Hub

# Says hello, then keeps the connection or closes it, and lives on until it is killed.
PEER = """
import json, signal, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(sys.argv[2].encode())
if sys.argv[3] == "closes":
    peer.close()
signal.pause()
"""
HELLO = Hello(role="gateway", worker="w").encode().decode()


class Events:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self, seconds: float) -> Event:
        async with asyncio.timeout(seconds):
            return await self.queue.get()


async def _with_peer(
    tmp_path: pathlib.Path, manner: str
) -> tuple[Hub, Events, asyncio.subprocess.Process]:
    async def ask(*_: object) -> object:
        return None

    events = Events()
    hub = Hub(post=events.queue.put_nowait, ask=ask, catalog=lambda: Catalog.of([]))
    path = str(tmp_path / "hub.sock")
    await hub.listen(path, None)
    peer = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, path, HELLO, manner)
    assert isinstance(await events.next(10), WorkerJoined)
    return hub, events, peer


def test_a_killed_worker_has_left_at_once(tmp_path: pathlib.Path) -> None:
    async def scenario() -> float:
        hub, events, peer = await _with_peer(tmp_path, "keeps")
        began = monotonic()
        peer.kill()
        assert await events.next(10) == WorkerLeft("w")
        seconds = monotonic() - began
        await peer.wait()
        await hub.close()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2


def test_a_worker_that_only_lost_its_connection_is_gone_when_its_process_is(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> float:
        hub, events, peer = await _with_peer(tmp_path, "closes")
        began = monotonic()
        os.kill(peer.pid, 9)
        assert await events.next(10) == WorkerLeft("w")
        seconds = monotonic() - began
        await peer.wait()
        await hub.close()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2


def test_close_does_not_wait_for_workers_to_come_back(tmp_path: pathlib.Path) -> None:
    async def scenario() -> float:
        hub, _, peer = await _with_peer(tmp_path, "keeps")
        began = monotonic()
        await hub.close()
        seconds = monotonic() - began
        peer.kill()
        await peer.wait()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2

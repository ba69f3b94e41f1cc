"""A worker leaves when its process ends, not when its connection does."""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
from time import monotonic

from llmux.core.events import Event, WorkerJoined, WorkerLeft
from llmux.protocol import Catalog, Hello
from llmux.runtime.control.socket import RECONNECT_SECS, ControlSocket

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
) -> tuple[ControlSocket, Events, asyncio.subprocess.Process]:
    async def ask(*_: object) -> object:
        return None

    events = Events()
    control_socket = ControlSocket(
        post=events.queue.put_nowait, ask=ask, catalog=lambda: Catalog.of([])
    )
    path = str(tmp_path / "control.sock")
    await control_socket.listen(path, None)
    peer = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, path, HELLO, manner)
    assert isinstance(await events.next(30), WorkerJoined)
    return control_socket, events, peer


def test_a_killed_worker_has_left_at_once(tmp_path: pathlib.Path) -> None:
    async def scenario() -> float:
        control_socket, events, peer = await _with_peer(tmp_path, "keeps")
        began = monotonic()
        peer.kill()
        assert await events.next(30) == WorkerLeft("w")
        seconds = monotonic() - began
        await peer.wait()
        await control_socket.close()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2


def test_a_worker_that_only_lost_its_connection_is_gone_when_its_process_is(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> float:
        control_socket, events, peer = await _with_peer(tmp_path, "closes")
        began = monotonic()
        os.kill(peer.pid, 9)
        assert await events.next(30) == WorkerLeft("w")
        seconds = monotonic() - began
        await peer.wait()
        await control_socket.close()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2


def test_close_does_not_wait_for_workers_to_come_back(tmp_path: pathlib.Path) -> None:
    async def scenario() -> float:
        control_socket, _, peer = await _with_peer(tmp_path, "keeps")
        began = monotonic()
        await control_socket.close()
        seconds = monotonic() - began
        peer.kill()
        await peer.wait()
        return seconds

    assert asyncio.run(scenario()) < RECONNECT_SECS / 2


def test_one_process_that_leaves_often_costs_one_descriptor(tmp_path: pathlib.Path) -> None:
    """Each departure was watched by a descriptor of its own: a gateway that connects and leaves in
    turn could take all that the supervisor may have."""

    def pidfds() -> int:
        directory = pathlib.Path("/proc/self/fd")
        return sum("pidfd" in os.readlink(f"{directory}/{fd}") for fd in _there(directory))

    async def scenario() -> list[int]:
        control_socket, events, peer = await _with_peer(tmp_path, "closes")
        before = pidfds()
        leaving = [
            asyncio.create_task(control_socket._see_off(f"w{n}", peer.pid)) for n in range(20)
        ]
        await asyncio.sleep(0)
        during = pidfds()
        peer.kill()
        await asyncio.gather(*leaving)
        assert {(await events.next(30)) for _ in range(21)} == {
            WorkerLeft(name) for name in ["w", *(f"w{n}" for n in range(20))]
        }
        await peer.wait()
        await control_socket.close()
        return [during - before, pidfds() - before]

    added, left = asyncio.run(scenario())
    assert added <= 1
    assert left <= 0


def _there(directory: pathlib.Path) -> list[str]:
    """The descriptors that are still open when they are looked at."""
    return [name for name in os.listdir(directory) if os.path.lexists(f"{directory}/{name}")]

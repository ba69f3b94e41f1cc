"""Several gateway workers stop and are restarted: who is served meanwhile, and by whom."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from gateway_harness import EngineRequest, StubEngine, in_loop, soon
from workers_rig import (
    asked_until_it_closes,
    front,
    gone,
    healthy,
    hub_and_front,
    is_whole,
    streaming,
)

pytestmark = pytest.mark.long


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
            await soon(gateway.process.ended())
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


@in_loop
async def test_a_stop_ends_workers_of_former_parents_too() -> None:
    async with hub_and_front(1, kept=True) as (hub, gateway):
        (former,) = hub.pids()
        await healthy(gateway)  # its connection keeps the former worker
        restarted = gateway.directory / "restarted"
        restarted.write_text(str(former))
        gateway.process.terminate()
        await soon(gateway.process.ended())
        await gateway.start()
        await gateway.told("READY=1")
        await hub.joined(2)
        os.kill(former, 0)
        restarted.rename(gateway.directory / "stopped")
        gateway.process.terminate()
        assert await soon(gateway.process.ended()) == 0
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
        assert await soon(gateway.process.ended()) == 0
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
            assert await soon(gateway.process.ended()) == 0
            await gateway.start()
            await gateway.told("READY=1")
            gateway.supervisor.grant(engine, epoch="e2")
            for client in late:
                assert (await client.answer()).status == 200
            await engine.stop()

    run()

"""Several gateway workers: all of them up, replaced when they die, ended with their parent."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from gateway_harness import EngineRequest, StubEngine, in_loop, soon
from workers_rig import (
    front,
    gone,
    hub_and_front,
    is_whole,
)

from llmux.core.events import WorkerLeft
from llmux.gateway.workers import HANG_SECS

pytestmark = pytest.mark.long


@in_loop
async def test_all_workers_are_up_before_ready_and_all_end_with_a_stop() -> None:
    async with front(3, own_interpreter=True) as gateway:
        await gateway.told("READY=1")
        assert len(gateway.pids()) == 3 and gateway.process.pid not in gateway.pids()
        client = await gateway.client()
        client.send("/health", method="GET")
        assert (await client.answer()).status == 200
        gateway.process.terminate()
        await gateway.told("STOPPING=1")
        assert await soon(gateway.process.ended()) == 0
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
        assert await soon(gateway.process.ended()) == 0
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


@in_loop
async def test_workers_whose_parent_is_killed_end_when_no_other_comes() -> None:
    async with front(2, orphan_secs=0.1) as gateway:
        await gateway.told("READY=1")
        gateway.process.kill()
        await soon(gateway.process.ended())
        for pid in gateway.pids():
            await gone(pid)

"""What a stop means for those who wait: served while there is hope, told when there is none."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from gateway_harness import (
    EngineRequest,
    FakeSupervisor,
    Stage,
    a_config,
    in_loop,
    soon,
    stage,
    until,
)

from llmux.gateway.stopping import DrainLimits
from llmux.protocol import Catalog, Hello, ModelInfo


async def told(running: Stage, **switch_secs: float) -> None:
    """The catalog says how long switches take."""
    infos = [ModelInfo(name, "parked", switch_secs=secs) for name, secs in switch_secs.items()]
    running.supervisor.say(Catalog.of(infos))
    await until(
        lambda: all(
            running.gateway.models[name].switch_secs == secs for name, secs in switch_secs.items()
        )
    )


@in_loop
async def test_who_waits_is_served_when_the_model_comes_before_the_end() -> None:
    async with stage() as s:
        engine = await s.engine()
        waiting, new = await s.client(), await s.client()
        waiting.chat()
        await until(lambda: s.waiting() == 1)
        s.stop.set()
        await until(lambda: s.gateway.draining)
        new.chat()  # connected before the stop, and asks now
        await until(lambda: s.waiting() == 2)
        assert not s.served.done()
        s.supervisor.grant(engine)
        for client in (waiting, new):
            answer = await client.answer()
            assert answer.status == 200 and answer.headers["connection"] == "close"
        await soon(s.served)


@in_loop
async def test_who_just_waits_for_a_place_gets_it() -> None:
    release = asyncio.Event()

    async def hold(request: EngineRequest) -> None:
        await release.wait()
        request.json({"ok": True})

    async with stage(a_config(max_in_flight=1)) as s:
        engine = await s.engine(hold)
        s.supervisor.grant(engine)
        clients = [await s.client() for _ in range(3)]
        for client in clients:
            client.chat()
        await until(lambda: s.in_flight() == 3)
        s.stop.set()
        await until(lambda: s.gateway.draining)
        release.set()
        for client in clients:
            assert (await client.answer()).status == 200
        await soon(s.served)


@in_loop
async def test_who_would_wait_for_too_long_is_told_at_once_and_when_to_come_back() -> None:
    async with stage() as s:
        await told(s, alpha=300.0, beta=1.0)
        far, near = await s.client(), await s.client()
        near.chat("beta")
        await until(lambda: s.waiting("beta") == 1)
        s.supervisor.say(
            Catalog.of(
                [ModelInfo("alpha", "parked", switch_secs=300.0),
                 ModelInfo("beta", "waking", switch_secs=1.0)]
            )
        )  # fmt: skip
        await until(lambda: s.gateway.models["beta"].state == "waking")
        far.chat()
        await until(lambda: s.waiting() == 1)
        s.stop.set()
        answer = await far.answer()
        assert (answer.status, answer.code) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 300
        assert s.waiting("beta") == 1
        s.supervisor.grant(await s.engine(), "beta")
        assert (await near.answer()).status == 200
        await soon(s.served)


@in_loop
async def test_the_end_of_the_patience_is_the_end() -> None:
    async with stage(drain_limits=DrainLimits(1.0)) as s:
        await told(s, alpha=0.1)
        client = await s.client()
        client.chat()
        await until(lambda: s.waiting() == 1)
        s.stop.set()
        answer = await client.answer()
        assert (answer.status, answer.code) == (503, "shutting_down")
        await soon(s.served)


@pytest.mark.parametrize("back", [False, True])
def test_without_a_supervisor_nobody_waits_for_long(back: bool) -> None:
    @in_loop
    async def run() -> None:
        async with stage(drain_limits=DrainLimits(away_secs=5.0 if back else 0.05)) as s:
            engine = await s.engine()
            client = await s.client()
            client.chat()
            await until(lambda: s.waiting() == 1)
            s.stop.set()
            await until(lambda: s.gateway.draining)
            await s.supervisor.stop()
            if not back:
                answer = await client.answer()
                assert (answer.status, answer.code) == (503, "shutting_down")
            else:
                again = FakeSupervisor(s.supervisor.path)
                await again.start()
                await again.hear(Hello)
                again.grant(engine)
                assert (await client.answer()).status == 200
            await soon(s.served)
            if back:
                await again.stop()

    run()


@in_loop
async def test_where_no_model_can_come_nobody_waits() -> None:
    async with stage(drain_limits=DrainLimits(waiters=False)) as s:
        client = await s.client()
        client.chat()
        await until(lambda: s.waiting() == 1)
        s.stop.set()
        answer = await client.answer()
        assert (answer.status, answer.code) == (503, "shutting_down")
        await soon(s.served)


@in_loop
async def test_who_was_accepted_in_the_moment_of_the_stop_is_served() -> None:
    async with stage() as s:
        engine = await s.granted()
        payload = json.dumps({"model": "alpha", "messages": []}).encode()
        with socket.create_connection(("127.0.0.1", s.port)) as late:
            late.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
            )
            # The loop has not turned since: it wakes the worker that stops, then accepts, and tells
            # the protocol of the connection only after that.
            s.stop.set()
            await soon(s.served)
            late.settimeout(5)  # what came of it is there by now
            answer = late.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert len(engine.requests) == 1

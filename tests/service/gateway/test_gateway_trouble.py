"""What clients get when engines die, grants are revoked, or none is given."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_harness import (
    EngineRequest,
    a_config,
    echo,
    eof_watch,
    in_loop,
    soon,
    stage,
    until,
)

from llmux.protocol import Cut, Demand, Drained, EngineLost, Grant, Refuse, Revoke


async def hang(request: EngineRequest) -> None:
    await eof_watch(request)


async def start_and_hang(request: EngineRequest) -> None:
    request.start_stream()
    request.event("one")
    await eof_watch(request)


async def hang_and_stream_if_asked(request: EngineRequest) -> None:
    await (start_and_hang if b'"stream"' in request.body else hang)(request)


async def die(request: EngineRequest) -> None:
    request.die()


# ---- waiting ------------------------------------------------------------------------------------


@in_loop
async def test_waiters_are_admitted_all_at_once_and_counted_before_a_revoke_is_read() -> None:
    async with stage() as s:
        engine = await s.engine(hang)
        clients = [await s.chat() for _ in range(5)]
        demand = await s.supervisor.hear(Demand, lambda d: d.waiting == 5)
        assert demand.in_flight == 0
        assert demand.oldest_age is not None
        # In one write, so that the gateway reads them together.
        s.supervisor.say(Grant("alpha", "e1", uds=engine.address.uds), Revoke("alpha", "e1"))
        await engine.next_request(5)
        demand = await s.supervisor.hear(Demand, lambda d: d.in_flight == 5)
        assert demand.waiting == 0
        for request in engine.requests:
            request.json({})
        for client in clients:
            assert (await client.answer()).status == 200
        await s.supervisor.hear(Drained, lambda d: d.epoch == "e1")
        await until(lambda: not engine.connections)


@in_loop
async def test_a_client_that_leaves_while_waiting_is_out_of_demand() -> None:
    async with stage() as s:
        client = await s.chat()
        await s.supervisor.hear(Demand, lambda d: d.waiting == 1)
        client.leave()
        demand = await s.supervisor.hear(Demand, lambda d: d.waiting == 0)
        assert demand.in_flight == 0
        engine = await s.granted()
        other = await s.chat()
        assert (await other.answer()).status == 200
        assert len(engine.requests) == 1


@in_loop
async def test_a_wait_that_takes_too_long_is_a_504() -> None:
    async with stage(a_config(wait_secs=0.05)) as s:
        client = await s.chat()
        answer = await client.answer()
        assert answer.status == 504
        assert answer.code == "wait_expired"
        assert "alpha" in answer.json()["error"]["message"]
        client.send("/health", method="GET")
        assert (await client.answer()).status == 200
        await s.supervisor.hear(Demand, lambda d: d.waiting == 0)


@in_loop
async def test_refuse_answers_all_who_wait_for_that_model() -> None:
    async with stage() as s:
        clients = [await s.chat(model) for model in ("alpha", "alpha", "beta")]
        await until(lambda: s.waiting("alpha") == 2 and s.waiting("beta") == 1)
        text = "engine of alpha exited with status 1\nCUDA out of memory"
        s.supervisor.say(Refuse("alpha", "model_start_failed", text, retry_after=7.2))
        for client in clients[:2]:
            answer = await client.answer()
            assert answer.status == 503
            assert answer.headers["retry-after"] == "8"
            assert answer.code == "model_start_failed"
            assert answer.json()["error"]["message"] == text
        assert s.waiting("beta") == 1


@in_loop
async def test_the_queue_is_bounded() -> None:
    async with stage(a_config(max_waiting=2)) as s:
        for _ in range(2):
            await s.chat()
        await until(lambda: s.waiting() == 2)
        answer = await (await s.chat()).answer()
        assert (answer.status, answer.code) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1


@in_loop
async def test_two_models_do_not_mix() -> None:
    async with stage() as s:
        first = await s.engine(name="first")
        second = await s.engine(name="second")
        client, other = await s.chat("alpha"), await s.chat("beta")
        await until(lambda: s.waiting("alpha") + s.waiting("beta") == 2)
        s.supervisor.grant(second, "beta", "b1")
        assert (await other.answer()).json()["model"] == "beta"
        assert s.waiting("alpha") == 1
        s.supervisor.grant(first, "alpha", "a1")
        assert (await client.answer()).json()["model"] == "alpha"
        assert [json.loads(r.body)["model"] for r in first.requests] == ["alpha"]
        assert [json.loads(r.body)["model"] for r in second.requests] == ["beta"]


# ---- clients that leave -------------------------------------------------------------------------


@in_loop
async def test_a_client_that_leaves_mid_stream_ends_the_engines_work() -> None:
    async with stage() as s:
        engine = await s.granted(start_and_hang)
        client = await s.streaming()
        client.leave()
        await soon(engine.requests[0].gone.wait())
        await s.supervisor.hear(Demand, lambda d: d.in_flight == 0 and d.progress > 0)


@in_loop
async def test_a_client_that_leaves_before_the_first_byte_ends_the_engines_work() -> None:
    async with stage() as s:
        engine = await s.granted(hang)
        client = await s.chat()
        request = await engine.next_request(1)
        client.leave()
        await soon(request.gone.wait())
        await until(lambda: s.in_flight() == 0)


# ---- engines that die ---------------------------------------------------------------------------


@in_loop
async def test_engine_dies_before_the_first_byte_then_the_request_goes_to_the_next_engine() -> None:
    async with stage() as s:
        engine = await s.granted(die)
        client = await s.chat()
        lost = await s.supervisor.hear(EngineLost)
        assert (lost.model, lost.epoch) == ("alpha", "e1")
        await s.supervisor.hear(Demand, lambda d: d.waiting == 1)
        s.supervisor.say(Revoke("alpha", "e1", dead=True))
        await s.supervisor.hear(Drained)
        again = await s.engine(name="again")
        s.supervisor.grant(again, epoch="e2")
        assert (await client.answer()).status == 200
        assert len(engine.requests) == len(again.requests) == 1
        assert s.gateway.observer.retried == {"alpha": 1}


@in_loop
async def test_a_request_that_kills_two_engines_is_a_502() -> None:
    async with stage() as s:
        engine = await s.granted(die)
        client = await s.chat()
        await s.supervisor.hear(EngineLost)
        s.supervisor.say(Revoke("alpha", "e1", dead=True))
        s.supervisor.grant(engine, epoch="e2")
        answer = await client.answer()
        assert (answer.status, answer.code) == (502, "engine_died")
        assert len(engine.requests) == 2


@in_loop
async def test_engine_dies_mid_stream_then_the_stream_ends_with_an_error_event() -> None:
    async def die_midway(request: EngineRequest) -> None:
        request.start_stream()
        request.event("one")
        await request.writer.drain()
        request.writer.close()

    async with stage() as s:
        await s.granted(die_midway)
        client = await s.chat(stream=True)
        answer = await client.answer()
        one, error = [part for part in answer.body.decode().split("\n\n") if part]
        assert one == "data: one"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_died"
        assert await client.ended() == b""
        await s.supervisor.hear(EngineLost)
        await until(lambda: s.in_flight() == 0)


@pytest.mark.parametrize("cut_short", [b"40\r\ndata: half", b"10\r\n"])
def test_engine_dies_inside_a_chunk_then_the_connection_breaks(cut_short: bytes) -> None:
    async def die_midway(request: EngineRequest) -> None:
        request.start_stream()
        request.writer.write(cut_short)
        await request.writer.drain()
        request.writer.close()

    @in_loop
    async def run() -> None:
        async with stage() as s:
            await s.granted(die_midway)
            client = await s.chat(stream=True)
            await client.head()
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.chunk()

    run()


@in_loop
async def test_engine_dies_inside_a_plain_body_then_the_connection_breaks() -> None:
    async def die_midway(request: EngineRequest) -> None:
        request.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        await request.writer.drain()
        request.writer.close()

    async with stage() as s:
        await s.granted(die_midway)
        client = await s.chat()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.answer()
        await until(lambda: s.in_flight() == 0)


@in_loop
async def test_a_revoke_of_a_dead_engine_sends_back_who_had_no_byte_and_ends_the_rest() -> None:
    async with stage() as s:
        engine = await s.granted(hang_and_stream_if_asked)
        streaming, silent = await s.streaming(), await s.chat()
        await engine.next_request(2)
        s.supervisor.say(Revoke("alpha", "e1", dead=True))
        assert b"engine_died" in await streaming.chunk()
        await s.supervisor.hear(Drained)
        assert (s.waiting(), s.in_flight()) == (1, 0)
        again = await s.engine(echo, name="again")
        s.supervisor.grant(again, epoch="e2")
        assert (await silent.answer()).status == 200


@in_loop
async def test_an_engine_that_refuses_connections_with_the_supervisor_away_is_a_502() -> None:
    async with stage() as s:
        engine = await s.granted()
        await until(lambda: s.gateway.admission.held("alpha") is not None)
        await engine.stop()
        await s.supervisor.stop()
        client = await s.chat()
        answer = await client.answer()
        assert (answer.status, answer.code) == (502, "engine_unreachable")
        await s.supervisor.start()
        s.engines.clear()


@in_loop
async def test_an_idle_connection_that_the_engine_closed_costs_nothing() -> None:
    async def once(request: EngineRequest) -> None:
        if request.number == 2:
            request.die()  # the keep-alive timeout hit just as the second request arrived
        else:
            await echo(request)

    async with stage() as s:
        engine = await s.granted(once)
        client = await s.client()
        for _ in range(2):
            client.chat()
            assert (await client.answer()).status == 200
        assert engine.accepted == 2
        assert not any(isinstance(message, EngineLost) for message in s.supervisor.heard)


# ---- revoke and cut -----------------------------------------------------------------------------


@in_loop
async def test_a_revoke_lets_streams_finish_and_sends_new_requests_to_wait() -> None:
    async with stage() as s:
        engine = await s.granted(start_and_hang)
        streaming = await s.streaming()
        s.supervisor.say(Revoke("alpha", "e1"))
        late = await s.client()
        await until(lambda: s.gateway.admission.held("alpha") is None)
        late.chat()
        await s.supervisor.hear(Demand, lambda d: d.waiting == 1 and d.in_flight == 1)
        assert not any(isinstance(message, Drained) for message in s.supervisor.heard)
        engine.requests[0].end_stream()
        assert await streaming.chunk() == b"data: [DONE]\n\n"
        assert await streaming.chunk() == b""
        drained = await s.supervisor.hear(Drained)
        assert drained.epoch == "e1"
        await until(lambda: not engine.connections)
        assert len(engine.requests) == 1
        assert s.waiting() == 1


@in_loop
async def test_a_revoke_of_nothing_is_drained_at_once() -> None:
    async with stage() as s:
        s.supervisor.say(Revoke("alpha", "never-held"))
        drained = await s.supervisor.hear(Drained)
        assert drained.epoch == "never-held"


@in_loop
async def test_cut_ends_streams_with_an_event_and_unanswered_requests_with_503() -> None:
    async with stage() as s:
        engine = await s.granted(hang_and_stream_if_asked)
        streaming, silent = await s.streaming(), await s.chat()
        await engine.next_request(2)
        s.supervisor.say(
            Revoke("alpha", "e1"), Cut("alpha", "e1", "cut_by_switch", "drain deadline of 1 s")
        )
        assert b"cut_by_switch" in await streaming.chunk()
        assert await streaming.chunk() == b""
        answer = await silent.answer()
        assert (answer.status, answer.code) == (503, "cut_by_switch")
        assert "retry-after" in answer.headers
        await s.supervisor.hear(Drained)
        await until(lambda: not engine.connections)


# ---- the supervisor goes away -------------------------------------------------------------------


@in_loop
async def test_nobody_waits_for_a_model_while_the_supervisor_is_away_for_long() -> None:
    async with stage(away_secs=0.05) as s:
        engine = await s.granted(start_and_hang)
        streaming, waiting = await s.streaming(), await s.chat("beta")
        await until(lambda: s.waiting("beta") == 1)
        await s.supervisor.stop()
        refused = await waiting.answer()
        assert (refused.status, refused.code) == (503, "supervisor_unreachable")
        assert int(refused.headers["retry-after"]) == 10
        late = await s.chat("beta")
        assert (await late.answer()).code == "supervisor_unreachable"
        engine.requests[0].event("two")
        assert await streaming.chunk() == b"data: two\n\n", "what is resident is served"
        engine.handler = echo
        fresh = await s.chat()
        assert (await fresh.answer()).status == 200
        assert s.waiting("beta") == 0
        await s.supervisor.start()
        await until(lambda: not s.gateway.supervisor_lost)
        again = await s.chat("beta")
        await until(lambda: s.waiting("beta") == 1)
        s.supervisor.grant(await s.engine(name="second"), "beta", "b1")
        assert (await again.answer()).status == 200


@in_loop
async def test_grants_waiters_and_streams_outlive_the_supervisor() -> None:
    async with stage() as s:
        engine = await s.granted(start_and_hang)
        streaming, waiting = await s.streaming(), await s.chat("beta")
        await until(lambda: s.waiting("beta") == 1)
        await s.supervisor.stop()
        engine.requests[0].event("two")
        assert await streaming.chunk() == b"data: two\n\n"
        engine.handler = echo
        fresh = await s.chat()
        assert (await fresh.answer()).status == 200
        fresh.send("/health/ready", method="GET")
        assert (await fresh.answer()).json()["supervisor"] == "away"
        s.supervisor.heard.clear()
        s.supervisor._read = 0
        await s.supervisor.start()
        await s.supervisor.hear(Demand, lambda d: d.model == "beta" and d.waiting == 1)
        assert s.supervisor.hellos[-1].holds == {"alpha": "e1"}
        demand = next(m for m in s.supervisor.heard if isinstance(m, Demand) and m.model == "alpha")
        assert demand.in_flight == 1
        second = await s.engine(name="second")
        s.supervisor.grant(second, "beta", "b1")
        assert (await waiting.answer()).json()["model"] == "beta"
        engine.requests[0].end_stream()
        assert await streaming.chunk() == b"data: [DONE]\n\n"

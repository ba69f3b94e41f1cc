"""Bodies of requests: what is kept of them, how much, for how long, and what large ones cost."""

from __future__ import annotations

import asyncio
import gc
import json
import time

import pytest
from gateway_harness import EngineRequest, Stage, a_config, in_loop, stage, until

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.gateway.client import connection
from llmux.gateway.http.request import Incoming

ADMIN = "sk-admin"
KEYS = (Key("admin", hash_key(ADMIN), role=KeyRole.ADMIN),)
MIB = 1 << 20


async def half(running: Stage, start: str, length: int, sent: bytes) -> object:
    """A request whose body never ends."""
    client = await running.client()
    head = f"{start} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    client.writer.write(head.encode() + sent)
    return client


@pytest.mark.parametrize(
    "start",
    ["OPTIONS /v1/chat/completions", "OPTIONS /control/pin", "POST /health", "GET /health",
     "GET /v1/models", "GET /control/status", "POST /nothing", "GET /health/ready"],
)  # fmt: skip
def test_no_body_is_kept_where_none_is_needed(start: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            client = await s.client()
            method, path = start.split()
            client.send(path, method=method, body=b"x" * 1000)
            small = await (client.head() if method == "OPTIONS" else client.answer())
            assert small.status in (200, 204, 404, 405), "a small one is skipped"
            client.send(path, method=method, body=b"x" * 20_000)
            large = await client.answer()
            assert (large.status, large.code) == (413, "body_too_large")
            kept = await half(s, start, 16_000, b"x" * 15_000)
            await until(lambda: s.gateway.clients == 2)
            await s.client()
            await until(lambda: s.gateway.clients == 3)
            assert s.gateway.bodies.used == 0
            del kept

    run()


@pytest.mark.parametrize("wrong", ["no room", "not JSON"])
def test_of_a_refused_body_nothing_is_kept(wrong: str) -> None:
    """The refusal's frames kept its last piece until the garbage collector came."""

    def refused() -> list[Incoming]:
        found = [thing for thing in gc.get_objects() if isinstance(thing, Incoming)]
        return [incoming for incoming in found if incoming.problem is not None]

    @in_loop
    async def run() -> None:
        async with stage(a_config(max_buffered_bytes=2 * MIB)) as s:
            if wrong == "no room":
                await half(s, "POST /v1/completions", 2 * MIB // 8 * 7, b"{" + b" " * MIB)
                await until(lambda: s.gateway.bodies.used > MIB)
            gc.collect()
            gc.disable()
            try:
                client = await s.client()
                body = b"{" + (b" " if wrong == "no room" else b"}{") * MIB
                client.send("/v1/completions", body=body[:MIB])
                assert (await client.answer()).status == {"no room": 503, "not JSON": 400}[wrong]
                await until(lambda: refused() == [])
            finally:
                gc.enable()

    run()


@in_loop
async def test_an_order_is_at_most_a_mebibyte() -> None:
    async with stage(keys=lambda: KEYS) as s:
        key = f"x-api-key: {ADMIN}"
        for size, status in ((MIB // 2, 200), (MIB + 1, 413)):
            client = await s.client()
            body = json.dumps({"model": "x" * (size - 12)}).encode()
            client.send("/control/pin", body=body, headers=(key,))
            assert (await client.answer()).status == status


@in_loop
async def test_all_bodies_together_have_a_budget_and_short_ones_a_part_of_their_own() -> None:
    """Four bodies that never ended filled it: every other request got 503."""
    async with stage(a_config(max_buffered_bytes=(4 * MIB + 1000) * 8 // 7)) as s:
        piece = b'{"model": "alpha", "x": "' + b"y" * (MIB - 25)
        for _ in range(4):
            await half(s, "POST /v1/completions", MIB + 200, piece)
        await until(lambda: s.gateway.bodies.used == 4 * MIB)
        client = await s.chat(padding="x" * 100_000)
        full = await client.answer()
        assert (full.status, full.code) == (503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        client = await s.chat("nobody", padding="x" * 2000)
        assert (await client.answer()).status == 404, "it was received"
        short = b'{"model": "alpha", "x": "' + b"y" * 60_000
        for _ in range(12):  # more than their part
            await half(s, "POST /v1/completions", 61_000, short)
        await until(lambda: s.gateway.bodies.limit - s.gateway.bodies.used < 61_000)
        client = await s.chat("nobody", padding="x" * 61_000)
        assert (await client.answer()).status == 503
        for client in s.clients:
            client.leave()
        await until(lambda: s.gateway.bodies.used == 0)


@in_loop
async def test_what_waits_is_in_the_budget_until_its_answer_begins() -> None:
    release = asyncio.Event()

    async def slow(request: EngineRequest) -> None:
        request.start_stream()
        await release.wait()
        request.end_stream()

    async with stage() as s:
        client = await s.chat(padding="x" * 1000)
        await until(lambda: s.waiting() == 1)
        assert 1000 < s.gateway.bodies.used < 1200
        await s.granted(slow)
        await client.head()
        assert s.gateway.bodies.used == 0
        release.set()


def test_a_body_keeps_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last ten bytes were there at once: no reason to hold it for hours."""
    monkeypatch.setattr("llmux.gateway.server.SWEEP_SECS", 0.01)
    monkeypatch.setattr(connection, "RECEIVE_SECS", 0.1)

    @in_loop
    async def run() -> None:
        async with stage() as s:
            await half(s, "POST /v1/completions", 4 * MIB, b" " * (4 * MIB - 10))
            answer = await s.clients[0].answer()
            assert answer.status == 408
            assert await s.clients[0].ended() == b""
            await until(lambda: s.gateway.bodies.used == 0)

    run()


@in_loop
async def test_connections_are_limited() -> None:
    async with stage(a_config(max_connections=2)) as s:
        first, second, third = [await s.client() for _ in range(3)]
        answer = await third.answer()
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert await third.ended() == b""
        assert s.gateway.observer.requests["", 503] == 1
        second.leave()
        await until(lambda: s.gateway.clients == 1)
        again = await s.client()
        for client in (first, again):
            client.send("/health", method="GET")
            assert (await client.answer()).status == 200


# ---- large ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha", "alef"])
def test_a_large_body_arrives_as_it_was_sent_but_for_an_alias(name: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.granted()
            client = await s.client()
            inner = b'"x": ["' + b"y\\n" * 100_000 + b'", {"model": "beta"}], '
            for text in (b'"model": "%b"', b'"model": "beta", "model"  : "%b", "stream": false'):
                body = b"{ " + inner + text % name.encode() + b" }"
                client.send("/v1/completions", body=body)
                assert (await client.answer()).status == 200
                expected = body.replace(b'"%b"' % name.encode(), b'"alpha"')
                assert engine.requests[-1].body == expected

    run()


@in_loop
async def test_a_large_body_is_repeated_when_its_engine_dies() -> None:
    async def die(request: EngineRequest) -> None:
        request.die()

    async with stage() as s:
        engine = await s.granted(die)
        client = await s.chat(padding="x" * 500_000)
        await engine.next_request(1)
        await until(lambda: s.waiting() == 1)
        other = await s.engine(name="other")
        s.supervisor.grant(other, epoch="e2")
        assert (await client.answer()).status == 200
        assert other.requests[0].body == engine.requests[0].body


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "nobody", "x": [' + b"{}," * 100_000 + b"{}]}", 404, "model_not_found"),
        (b'{"x": [' + b"{}," * 100_000 + b"{}]}", 400, "invalid_request"),
        (b'{"model": 5, "x": [' + b"{}," * 100_000 + b"{}]}", 400, "invalid_request"),
        (b'{"model": "alpha", "x": "' + b"x" * 300_000, 400, "invalid_request"),
        (b"[" * 300_000, 400, "invalid_request"),
    ],
)
def test_a_large_body_is_refused_as_a_small_one_is(body: bytes, status: int, code: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            client = await s.client()
            client.send("/v1/completions", body=body)
            answer = await client.answer()
            assert (answer.status, answer.code) == (status, code)
            assert s.gateway.bodies.used == 0

    run()


@in_loop
async def test_a_large_body_does_not_hold_up_the_others() -> None:
    """The worst turn of the loop, against what parsing the body in one would take."""
    numbers = list(range(1_000_000, 2_000_000))
    body = json.dumps({"model": "alef", "prompt": numbers}).encode()
    began = time.process_time()
    json.loads(body)
    at_once = time.process_time() - began

    async def count(request: EngineRequest) -> None:
        request.json({"size": len(request.body)})

    async with stage(a_config(max_body_bytes=64 * MIB)) as s:
        await s.granted(count)
        client = await s.client()
        loop = asyncio.get_running_loop()
        turns: list[float] = []
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        client.writer.write(b"Content-Length: %d\r\n\r\n" % len(body))
        answered = loop.create_task(client.head())
        for at in range(0, len(body), 1 << 16):
            client.writer.write(body[at : at + (1 << 16)])
            before = time.process_time()
            await asyncio.sleep(0)
            turns.append(time.process_time() - before)
        while not answered.done():
            before = time.process_time()
            await asyncio.sleep(0)
            turns.append(time.process_time() - before)
        assert (await answered).status == 200
        assert max(turns) < at_once / 3

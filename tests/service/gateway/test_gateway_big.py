"""Slow readers and big bodies."""

from __future__ import annotations

import asyncio

from gateway_harness import Client, EngineRequest, in_loop, soon, stage

from llmux.gateway.exchange.exchange import Exchange


@in_loop
async def test_a_slow_reader_stops_the_engine_instead_of_filling_memory() -> None:
    written = 0
    stuck = asyncio.Event()

    async def flood(request: EngineRequest) -> None:
        nonlocal written
        request.start_stream()
        request.writer.transport.set_write_buffer_limits(high=65536)
        for _ in range(64):
            request.event("x" * (1 << 20))
            written += 1
            drain = asyncio.ensure_future(request.writer.drain())
            done, _ = await asyncio.wait([drain], timeout=0.3)
            if not done:
                stuck.set()
                await drain
        request.end_stream()

    async with stage() as s:
        await s.granted(flood)
        client = await s.chat(stream=True)
        await client.head()
        await soon(stuck.wait())
        (exchange,) = s.gateway.admission.in_flight_on("alpha", "e1")
        assert isinstance(exchange, Exchange)
        assert exchange.unsent() < 1 << 20
        assert written < 32
        assert await _count(client) > 64 << 20


async def _count(client: Client) -> int:
    total = 0
    while data := await client.chunk():
        total += len(data)
    return total


@in_loop
async def test_big_bodies_go_both_ways() -> None:
    async def big(request: EngineRequest) -> None:
        request.json({"size": len(request.body), "pad": "y" * (5 << 20)})

    async with stage() as s:
        await s.granted(big)
        client = await s.client()
        for _ in range(2):
            client.chat(pad="x" * (7 << 20))
            answer = await client.answer()
            assert answer.json()["size"] > 7 << 20
            assert len(answer.json()["pad"]) == 5 << 20

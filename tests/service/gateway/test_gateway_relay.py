"""Requests that reach an engine: what the engine gets and what the client gets back."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_harness import EngineRequest, echo, in_loop, stage, until


@in_loop
async def test_a_plain_request_goes_through_byte_for_byte() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        body = b'{"model" :  "alpha",\n "x": "\xc3\xa9\\u00e9", "model":"alpha" }'
        client.send("/v1/completions?a=b", body=body, headers=("X-Request-Id: mine", "X-Two: 2"))
        answer = await client.answer()
        request = engine.requests[0]
        assert request.line == "POST /v1/completions?a=b HTTP/1.1"
        assert request.body == body
        assert request.headers["x-two"] == "2"
        assert request.headers["x-request-id"] == answer.headers["x-request-id"] == "mine"
        assert answer.status == 200
        assert answer.headers["x-llmux-wait-ms"].isdigit()
        assert answer.json() == {"model": "alpha", "echo": len(body)}
        await until(lambda: s.in_flight() == 0)


@in_loop
async def test_keep_alive_on_both_sides() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        for _ in range(5):
            client.chat()
            assert (await client.answer()).status == 200
        assert engine.accepted == 1
        assert [request.number for request in engine.requests] == [1, 2, 3, 4, 5]


async def stream(request: EngineRequest) -> None:
    request.start_stream()
    for number in range(3):
        request.event(json.dumps({"n": number}))
        await request.writer.drain()
    request.end_stream()


@in_loop
async def test_a_stream_comes_as_the_engine_wrote_it() -> None:
    async with stage() as s:
        engine = await s.engine(stream)
        s.supervisor.grant(engine)
        client = await s.client()
        for _ in range(2):
            client.chat(stream=True)
            answer = await client.answer()
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            events = answer.body.decode().split("\n\n")
            assert events == ['data: {"n": 0}', 'data: {"n": 1}', 'data: {"n": 2}',
                              "data: [DONE]", ""]  # fmt: skip
        assert engine.accepted == 1


@in_loop
async def test_sanic_and_inference_share_a_connection() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        for _ in range(3):
            client.send("/v1/models", method="GET")
            listed = (await client.answer()).json()
            assert [entry["id"] for entry in listed["data"]] == ["alpha", "beta"]
            client.chat()
            assert (await client.answer()).json()["model"] == "alpha"
            client.send("/health", method="GET")
            assert (await client.answer()).status == 200


@in_loop
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        for number in range(50):
            client.chat(pad="x" * number)
            client.send("/v1/models/alpha", method="GET")
            client.chat("nobody")
        sizes = []
        for _ in range(50):
            sizes.append((await client.answer()).json()["echo"])
            assert (await client.answer()).json()["id"] == "alpha"
            assert (await client.answer()).status == 404
        assert sizes == list(range(sizes[0], sizes[0] + 50))


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "apart"])
@pytest.mark.parametrize("model", ["alpha", "alef"])
def test_what_an_engine_says_before_its_answer_is_not_the_answer(apart: bool, model: str) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    go_on = asyncio.Event()

    async def hesitate(request: EngineRequest) -> None:
        request.writer.write(early)
        if apart:
            await request.writer.drain()
            await go_on.wait()
        await echo(request)

    @in_loop
    async def body() -> None:
        async with stage() as s:
            engine = await s.granted(hesitate)
            client = await s.client()
            for number in (1, 2):
                client.chat(model)
                await engine.next_request(number)
                go_on.set()
                answer = await client.answer()
                assert (answer.status, answer.json()["echo"]) == (
                    200,
                    len(engine.requests[-1].body),
                )
                go_on.clear()
            assert engine.accepted == 1, "and the connection is used again"

    body()

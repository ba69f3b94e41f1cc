"""How large a request's head may be, however it arrives."""

from __future__ import annotations

import json

import pytest
from gateway_harness import in_loop, soon, stage

START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\n"
PIECE = b"x" * 10_000


@pytest.mark.parametrize("more", [PIECE, PIECE + b"\r\nX-More: "], ids=["one header", "many"])
@in_loop
async def test_a_head_that_does_not_end_is_refused(more: bytes) -> None:
    async with stage() as s:
        client = await s.client()
        client.writer.write(START + b"X-Long: ")
        for _ in range(60):  # more than one read of a socket can bring
            client.writer.write(more)
        answer = await client.answer()
        assert answer.status in (431, 400)  # 400: Debian 12's parser gives up first, at 80 KiB
        assert await client.ended() == b""


@in_loop
async def test_a_head_that_is_too_large_is_refused_when_it_comes_at_once() -> None:
    async with stage() as s:
        client = await s.client()
        client.writer.write(START + b"X-Long: " + PIECE + b"\r\nX-More: " + PIECE + b"\r\n\r\n")
        assert (await client.answer()).status == 431


@in_loop
async def test_a_large_body_does_not_count_as_the_head_that_follows_it() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        payload = json.dumps({"model": "alpha", "padding": "x" * 50_000}).encode()
        whole = START + b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
        client.writer.write(whole + START)
        await soon(engine.next_request(1))
        assert (await client.answer()).status == 200
        client.writer.write(whole.removeprefix(START))
        assert (await client.answer()).status == 200

"""OPTIONS, HEAD and web pages; and clients that stream and hear that they still wait."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_harness import EngineRequest, Stage, a_config, in_loop, stage, until

from llmux.config.schema import GatewayConfig

PAGE = "https://chat.example.org"
PREFLIGHT = (
    f"Origin: {PAGE}",
    "Access-Control-Request-Method: POST",
    "Access-Control-Request-Headers: authorization, content-type",
)


async def allowing(request: EngineRequest) -> None:
    """An engine with vLLM's default: every page may."""
    assert "origin" not in request.headers
    request.writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\naccess-control-allow-origin: *\r\n"
        b"access-control-allow-credentials: true\r\n\r\n{}"
    )


@in_loop
async def test_options_tell_the_methods_and_nothing_to_pages_by_default() -> None:
    async with stage() as s:
        engine = await s.engine(allowing)
        s.supervisor.grant(engine)
        client = await s.client()
        for path, allow in (
            ("/v1/chat/completions", "POST, OPTIONS"),
            ("/v1/responses/resp_1", "GET, OPTIONS"),
            ("/v1/models/alpha", "GET, OPTIONS"),
            ("/control/eviction", "GET, POST, OPTIONS"),
            ("*", "GET, HEAD, POST, OPTIONS"),
        ):
            client.send(path, method="OPTIONS", headers=PREFLIGHT)
            answer = await client.head()
            assert (answer.status, answer.headers["allow"]) == (204, allow)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        client.send("/sleep", method="OPTIONS", headers=PREFLIGHT)
        assert (await client.answer()).status == 404
        client.send(payload={"model": "alpha"}, headers=(f"Origin: {PAGE}",))
        answer = await client.answer()
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("allowed", "told"), [(PAGE, PAGE), ("*", "*")])
def test_a_page_that_may_is_told_so_everywhere(allowed: str, told: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage(a_config(cors_origins=(allowed,))) as s:
            engine = await s.engine(allowing)
            s.supervisor.grant(engine)
            client = await s.client()
            client.send("/v1/completions", method="OPTIONS", headers=PREFLIGHT)
            answer = await client.head()
            assert answer.headers["access-control-allow-origin"] == told
            assert answer.headers["access-control-allow-methods"] == "POST, OPTIONS"
            assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
            page = (f"Origin: {PAGE}",)
            for request in (
                {"payload": {"model": "alpha"}},
                {"payload": {"model": "nobody"}},
                {"body": b"nonsense"},
                {"path": "/v1/models", "method": "GET"},
            ):
                client.send(**request, headers=page)
                answer = await client.answer()
                assert answer.headers["access-control-allow-origin"] == told, request
                assert answer.headers["vary"] == "origin"
            client.send(payload={"model": "alpha"}, headers=("Origin: https://other.example",))
            answer = await client.answer()
            assert ("access-control-allow-origin" in answer.headers) == (allowed == "*")

    run()


@in_loop
async def test_our_own_answers_have_no_empty_headers() -> None:
    async with stage() as s:
        client = await s.client()
        for path in ("/health", "/v1/models", "/nothing"):
            client.send(path, method="GET")
            assert "" not in (await client.answer()).headers.values()
        client.send("/events", method="GET")
        assert "" not in (await client.head()).headers.values()


@in_loop
async def test_head_is_get_without_the_body() -> None:
    async with stage() as s:
        client = await s.client()
        for path in ("/health", "/v1/models", "/v1/models/alpha", "/openapi.json"):
            client.send(path, method="HEAD")
            answer = await client.head()
            assert answer.status == 200
            assert int(answer.headers["content-length"]) > 0
        client.send("/v1/completions", method="HEAD")
        assert (await client.head()).status == 405


# ---- signs of life ------------------------------------------------------------------------------

PATIENT: dict[str, Any] = {"keep_alive_comment_secs": 0.01}


async def first_comment(s: Stage, **more: Any) -> tuple[object, object]:
    client = await s.client()
    client.chat(stream=True, **more)
    head = await client.head()
    assert await client.chunk() == b": waiting for alpha\n\n"
    return client, head


async def answer_of(client: object) -> str:
    body = b""
    while data := await client.chunk():  # type: ignore[attr-defined]
        body += data
    text = body.decode()
    return "\n\n".join(one for one in text.split("\n\n") if one and not one.startswith(":"))


@pytest.mark.long  # the sweep is once a second
@in_loop
async def test_a_stream_that_waits_gets_comments_and_then_the_answer() -> None:
    async def stream(request: EngineRequest) -> None:
        request.start_stream()
        request.event(json.dumps({"model": "alpha"}))
        request.end_stream()

    async with stage(a_config(**PATIENT)) as s:
        for epoch, alias in enumerate(("alpha", "alef")):
            client, head = await first_comment(s, **({"model": alias} if epoch else {}))
            assert head.status == 200  # type: ignore[attr-defined]
            assert head.headers["content-type"].startswith("text/event-stream")  # type: ignore[attr-defined]
            engine = await s.engine(stream, name=alias)
            s.supervisor.grant(engine, epoch=alias)
            said = await answer_of(client)
            assert said == f'data: {{"model": "{alias}"}}\n\ndata: [DONE]'
            client.chat(stream=True)  # type: ignore[attr-defined]
            assert (await client.answer()).status == 200  # type: ignore[attr-defined]
            s.supervisor.revoke(alias)
            await until(lambda: s.gateway.admission.held("alpha") is None)


@pytest.mark.long  # the sweep is once a second
@pytest.mark.parametrize("ends", ["content-length: 35\r\n", "connection: close\r\n"])
def test_after_a_comment_a_stream_without_chunks_is_passed_on_too(ends: str) -> None:
    async def stream(request: EngineRequest) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{ends}\r\n"
        request.writer.write(head.encode() + b'data: {"model": "alpha"}\n')
        await request.writer.drain()
        request.writer.write(b"\ndata: 1\n\n")
        await request.writer.drain()
        if "close" in ends:
            request.writer.close()

    @in_loop
    async def run() -> None:
        async with stage(a_config(**PATIENT)) as s:
            for name in ("alpha", "alef"):
                client, _ = await first_comment(s, model=name)
                s.supervisor.grant(await s.engine(stream, name=name), epoch=name)
                assert await answer_of(client) == f'data: {{"model": "{name}"}}\n\ndata: 1'
                client.send("/health", method="GET")  # type: ignore[attr-defined]
                assert (await client.answer()).status == 200  # type: ignore[attr-defined]
                s.supervisor.revoke(name)
                await until(lambda: s.gateway.admission.held("alpha") is None)

    run()


@pytest.mark.long  # the sweep is once a second
@in_loop
async def test_what_fails_after_a_comment_is_told_in_the_stream() -> None:
    async with stage(a_config(wait_secs=1.5, **PATIENT)) as s:
        client, _ = await first_comment(s)
        assert '"code": "wait_expired"' in await answer_of(client)
        assert await client.ended() == b""  # type: ignore[attr-defined]


@in_loop
async def test_what_an_engine_refuses_after_a_comment_is_told_in_the_stream() -> None:
    async def refuse(request: EngineRequest) -> None:
        request.json({"error": {"message": "too long", "code": 400}}, "400 Bad Request")

    async with stage(a_config(**PATIENT)) as s:
        client, _ = await first_comment(s)
        engine = await s.engine(refuse)
        s.supervisor.grant(engine)
        assert '"message": "too long"' in await answer_of(client)
        await until(lambda: s.in_flight() == 0)


@in_loop
async def test_an_engine_that_dies_after_a_comment_is_replaced_all_the_same() -> None:
    async def die(request: EngineRequest) -> None:
        request.die()

    async def stream(request: EngineRequest) -> None:
        request.start_stream()
        request.end_stream()

    async with stage(a_config(**PATIENT)) as s:
        client, _ = await first_comment(s)
        engine = await s.engine(die)
        s.supervisor.grant(engine)
        await engine.next_request(1)
        await until(lambda: s.waiting() == 1)
        other = await s.engine(stream, name="other")
        s.supervisor.grant(other, epoch="e2")
        assert await answer_of(client) == "data: [DONE]"


@in_loop
async def test_who_does_not_stream_gets_no_comments() -> None:
    async with stage(a_config(wait_secs=0.1, **PATIENT)) as s:
        client = await s.client()
        client.chat()
        assert (await client.answer()).status == 504
        client.send(payload={"model": "alpha", "stream": True}, version="1.0")
        assert (await client.answer()).status == 504


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_stream_whose_engine_is_silent_gets_signs_of_life_too(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between admission and the first byte: a long prefill, or a full engine."""
    monkeypatch.setattr("llmux.gateway.server.SWEEP_SECS", 0.01)
    answer = asyncio.Event()
    sign = b'event: ping\ndata: {"type": "ping"}' if path == "/v1/messages" else b": waiting for"

    async def slow(request: EngineRequest) -> None:
        await answer.wait()
        request.start_stream()
        request.event("one")
        request.end_stream()

    @in_loop
    async def run() -> None:
        async with stage(a_config(**PATIENT)) as s:
            engine = await s.granted(slow)
            client = await s.client()
            client.send(path, {"model": "alpha", "stream": True})
            await engine.next_request(1)
            assert (await client.head()).status == 200
            assert (await client.chunk()).startswith(sign)
            answer.set()
            body = b""
            while data := await client.chunk():
                body += data
            assert body.endswith(b"data: one\n\ndata: [DONE]\n\n")
            client.send(path, {"model": "alpha"})
            assert (await client.answer()).status == 200, "no stream, no comment"

    run()


def test_signs_of_life_are_on_by_default() -> None:
    assert 0 < GatewayConfig().keep_alive_comment_secs <= 30

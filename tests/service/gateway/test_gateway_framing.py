"""What the fuzzer found, each as the smallest case of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from gateway_harness import EngineRequest, in_loop, soon, stage, until

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.protocol import Ask


@in_loop
async def test_an_answer_without_a_body_gets_none_under_an_alias() -> None:
    async def nothing(request: EngineRequest) -> None:
        request.writer.write(b"HTTP/1.1 204 No Content\r\nopenai-thing: 1\r\n\r\n")

    async with stage() as s:
        engine = await s.engine(nothing)
        s.supervisor.grant(engine)
        client = await s.client()
        for model in ("alpha", "alef"):
            client.chat(model)
            answer = await client.head()
            assert (answer.status, answer.headers["openai-thing"]) == (204, "1")
            assert "transfer-encoding" not in answer.headers  # RFC 9112 6.1
        client.send("/health", method="GET")  # and nothing is left between the answers
        assert (await client.answer()).json()


@pytest.mark.parametrize("version", [b"", b" HTTP/0.9", b" HTTP/2.0", b" HTTP/1.2"])
def test_other_versions_of_http_are_refused(version: bytes) -> None:
    @in_loop
    async def body() -> None:
        async with stage() as s:
            engine = await s.engine()
            s.supervisor.grant(engine)
            for path in (b"/health", b"/upstream/alpha/health"):
                client = await s.client()
                client.writer.write(b"GET " + path + version + b"\r\nhost: x\r\n\r\n")
                answer = await client.answer()
                assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert engine.requests == []

    body()


UNREADABLE = (
    "unix:/health", "http:///health", "health", "?x", "x:1", "ftp://x/health", "x://y/control/mode",
    "http://u:p@x/health", "http://u@x/health", "/health#x", "/health#", "http://x/health#x",
)  # fmt: skip


@in_loop
async def test_a_target_that_cannot_be_read_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as s:
        for target in UNREADABLE:
            client = await s.client()
            client.send(target, method="GET")
            answer = await client.answer()
            assert (answer.status, answer.code) == (400, "invalid_request")
    assert [one for one in caplog.records if one.levelname == "ERROR"] == []


@in_loop
async def test_a_target_may_be_a_whole_uri() -> None:
    """RFC 9112 3.2.2: as a client sends it that takes us for a proxy."""
    async with stage() as s:
        engine = await s.granted()
        client = await s.client()
        payload = {"model": "alpha"}
        for path in ("/v1/chat/completions", "/upstream/alpha/v1/completions?x=1"):
            client.send(f"http://127.0.0.1:1{path}", payload)
            assert (await client.answer()).status == 200
        assert [request.line.split()[1] for request in engine.requests] == [
            "/v1/chat/completions", "/v1/completions?x=1",
        ]  # fmt: skip
        for target, status in (
            ("HTTP://127.0.0.1/health", 200), ("https://[::1]:443/v1/models", 200),
            ("http://127.0.0.1/nothing", 404), ("http://127.0.0.1", 404),
            ("http://127.0.0.1?x", 404), ("http://attacker.example/v1/models", 403),
        ):  # fmt: skip
            client = await s.client()
            client.send(target, method="GET")
            assert (await client.answer()).status == status, target


@pytest.mark.parametrize("before", ["", "http://127.0.0.1", "HTTPS://localhost:8000", "x://y"])
def test_what_a_target_looks_like_opens_nothing(before: str) -> None:
    """With a whole URI for a target, whoever reached the port read logs and unloaded models."""

    @in_loop
    async def body() -> None:
        async with stage() as s:
            s.supervisor.answer = lambda _ask: {"ok": True, "result": {"lines": [], "models": {}}}
            for method, path in (
                ("POST", "/control/mode"), ("POST", "/control/wake"), ("GET", "/logs/alpha"),
                ("GET", "/logs/stream/alpha"), ("GET", "/unload"), ("POST", "/unload"),
            ):  # fmt: skip
                client = await s.client()
                client.send(before + path, {"mode": "manual", "model": "alpha"}, method=method)
                assert (await client.answer()).status == (400 if before == "x://y" else 403), path
                client = await s.client()
                client.send(f"{before}{path}#x", {"mode": "manual"}, method=method)
                assert (await client.answer()).status in (400, 403), path
            assert not [one for one in s.supervisor.heard if isinstance(one, Ask)]

    body()


@in_loop
async def test_an_engines_health_is_not_open_as_ours_is() -> None:
    async with stage(keys=lambda: (Key("use", hash_key("sk-use")),)) as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        for headers in ((), ("x-api-key: wrong",)):
            client = await s.client()
            client.send("/upstream/alpha/health", method="GET", headers=headers)
            assert (await client.answer()).status == 401
        assert engine.requests == []  # it would have been woken for a stranger


@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "more than sockets hold"])
def test_who_leaves_behind_a_long_pipeline_waits_no_more(size: int) -> None:
    @in_loop
    async def body() -> None:
        async with stage() as s:
            client = await s.client()
            for _ in range(40):  # more than are held: the gateway reads no further
                client.chat(padding="x" * size)
            await until(lambda: s.waiting() == 1)
            client.leave()
            await until(lambda: s.waiting() == 0)
            assert s.in_flight() == 0

    body()


def test_who_is_gone_before_the_first_answer_gets_no_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer's write finds it out, while requests after that one are still to be answered."""

    @in_loop
    async def body() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "g.sock"))
        listener.listen()
        async with stage(also=(listener,)) as s:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "g.sock"))
                head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
                client.sendall((head + b"{}") * 5)  # refused at once: no model
            await until(lambda: s.gateway.clients == 1)
            await until(lambda: s.gateway.clients == 0)

    body()
    assert [one for one in caplog.records if one.levelname == "ERROR"] == []


@in_loop
async def test_who_waits_with_a_long_pipeline_gets_its_answers() -> None:
    async with stage() as s:
        client = await s.client()
        for _ in range(40):
            client.chat(padding="x" * 200_000)
        await until(lambda: s.waiting() == 1)
        (exchange,) = next(iter(s.gateway.admission.queues())).waiting
        transport = exchange._client.transport if exchange._client is not None else None
        assert transport is not None
        await until(transport.is_reading)
        s.supervisor.grant(await s.engine())
        assert (await client.answer()).status == 200


@in_loop
async def test_the_last_answer_is_not_lost_to_what_was_sent_after_its_request() -> None:
    written = asyncio.Event()

    async def until_close(request: EngineRequest) -> None:
        await written.wait()
        request.writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        request.writer.close()

    async with stage() as s:
        engine = await s.engine(until_close)
        s.supervisor.grant(engine)
        client = await s.client()
        for _ in range(40):
            client.chat(padding="x" * 4000)
        await soon(client.writer.drain())
        written.set()
        answer = await client.answer()  # raises when the connection was reset
        assert (answer.status, answer.body) == (200, b"all of it")
        assert len(engine.requests) == 1


@in_loop
async def test_requests_before_one_that_cannot_be_read_are_all_answered() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        client.send("/health", method="GET")
        client.chat()
        client.send("/health", method="GET")
        client.writer.write(b"no request\r\n\r\n")
        statuses = [(await client.answer()).status for _ in range(4)]
        assert statuses == [200, 200, 200, 400]
        assert await client.ended() == b""


# What Java's HttpClient sends with its first request, whatever its method (JDK 11 and later).
WISH = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)


@in_loop
async def test_a_wish_to_upgrade_is_ignored_and_the_body_is_read() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        body = json.dumps({"model": "alpha", "padding": "x" * 5000}).encode()
        chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *WISH]).encode()
        for _ in range(3):
            client.send("/upstream/alpha/v1/completions", body=body, headers=WISH)
            client.writer.write(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
            client.send("/health", method="GET", headers=WISH)
        for _ in range(3):
            for _ in range(2):
                answer = await client.answer()
                assert (answer.status, answer.json()["echo"]) == (200, len(body))
            assert (await client.answer()).status == 200
        assert len(engine.requests) == 6
        for request in engine.requests:
            assert request.body == body
            assert not {"upgrade", "http2-settings", "connection"} & set(request.headers)


@in_loop
async def test_an_error_has_no_body_for_head() -> None:
    async with stage() as s:
        client = await s.client()
        for target in ("unix://x", "/nothing"):
            client.send(target, method="HEAD")
            assert (await client.head()).status in (400, 404)
        client.send("/health", method="GET")
        assert (await client.answer()).status == 200

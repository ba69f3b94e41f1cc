"""HTTP itself: what is refused and how, control and health routes, old clients, start and stop."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import (
    ADMIN,
    ADMINS,
    Client,
    EngineRequest,
    FakeSupervisor,
    Stage,
    a_config,
    eof_watch,
    in_loop,
    soon,
    stage,
    until,
)

from llmux.gateway.client.listeners import Access, bind_all
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.server import serve_gateway
from llmux.gateway.stopping import DrainLimits
from llmux.gateway.worker import Worker
from llmux.protocol import Ask


async def ask(s: Stage, *args: Any, **kwargs: Any) -> tuple[int, dict[str, Any]]:
    client = await s.client()
    client.send(*args, **kwargs)
    answer = await client.answer()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return answer.status, answer.json()


# ---- what is refused ----------------------------------------------------------------------------


@in_loop
async def test_bad_requests_get_openai_errors() -> None:
    chat = "/v1/chat/completions"
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (400, "invalid_request", {"path": chat, "body": b"{nope"}),
        (400, "invalid_request", {"path": chat, "body": b"\xff\xfe\x00"}),
        (400, "invalid_request", {"path": chat, "body": b""}),
        (400, "invalid_request", {"path": chat, "body": b"[" * 100_000}),
        (400, "invalid_request", {"path": chat, "payload": ["alpha"]}),
        (400, "invalid_request", {"path": chat, "payload": {"messages": []}}),
        (400, "invalid_request", {"path": chat, "payload": {"model": 7}}),
        (400, "invalid_request", {"path": chat, "payload": {"model": ""}}),
        (404, "model_not_found", {"path": chat, "payload": {"model": "nobody"}}),
        (404, "model_not_found", {"path": "/v1/models/nobody", "method": "GET"}),
        (405, "method_not_allowed", {"path": chat, "method": "GET"}),
        (405, "method_not_allowed", {"path": "/v1/models", "method": "DELETE"}),
        (404, "not_found", {"path": "/", "method": "GET"}),
        (404, "not_found", {"path": "/v1//completions", "payload": {"model": "alpha"}}),
        (404, "not_found", {"path": "/v1/completions%2e", "payload": {"model": "alpha"}}),
    ]
    async with stage() as s:
        for status, code, request in cases:
            got, body = await ask(s, **request)
            assert (got, body["error"]["code"]) == (status, code), request
            assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_engine_development_endpoints_are_out_of_reach(method: str) -> None:
    paths = (
        "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache",
        "/v1/load_lora_adapter", "/v1/../sleep", "/v1/chat/completions/../../../sleep",
        "/%73leep", "//sleep", "/v1/chat/completions#/../sleep", "http://x/sleep", "/Sleep",
        "/v1/completions/", "/V1/completions", "http://x/upstream/alpha/sleep",
        "/upstream/alpha/sleep", "/upstream/alpha/v1/../sleep",
        "/upstream/alpha%2fsleep/v1/models/", "/upstream/alpha//sleep",
        "/upstream/alpha/v1/completions/../../sleep", "/upstream/alpha/%73leep",
        "/upstream//sleep", "/upstream/alpha/collective_rpc", "/upstream/alpha/metrics",
        "/upstream/../sleep", "/v1/responses/../../sleep", "/v1/responses/%2e%2e/cancel",
        "/v1/responses/x/../sleep", "/v/sleep", "/v1/chat/completions/render", "/invocations",
        "/inference/v1/generate",
    )  # fmt: skip

    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.engine()
            s.supervisor.grant(engine)
            await until(lambda: s.gateway.admission.held("alpha") is not None)
            for path in paths:
                client = await s.client()
                client.send(path, {"model": "alpha"}, method=method)
                assert (await client.answer()).status in (307, 400, 404, 405), path
                await until(lambda: s.in_flight() == 0)
                assert not engine.requests, path

    run()


@in_loop
async def test_a_body_over_the_limit_is_a_413_before_it_is_sent() -> None:
    async with stage(a_config(max_body_bytes=1000)) as s:
        client = await s.client()
        client.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        answer = await client.answer()
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        head = await s.client()
        head.writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n" % (b"x" * 2000))
        assert (await head.answer()).status == 200, "a head has a limit of its own"
        chunked = await s.client()
        chunked.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"200\r\n" + b"x" * 0x200 + b"\r\n200\r\n" + b"x" * 0x200 + b"\r\n"
        )  # fmt: skip
        assert (await chunked.answer()).status == 413


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "deflate, gzip", "GZIP", "no-such"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/audio/transcriptions"])
def test_a_body_in_an_encoding_is_refused_by_its_name(path: str, encoding: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.engine()
            s.supervisor.grant(engine)
            client = await s.client()
            client.send(path, {"model": "alpha"}, headers=(f"Content-Encoding: {encoding}",))
            answer = await client.answer()
            assert (answer.status, answer.code) == (415, "unsupported_encoding")
            assert encoding in answer.json()["error"]["message"]
            assert answer.headers["accept-encoding"] == "identity"
            assert not engine.requests

    run()


@in_loop
async def test_identity_is_no_encoding() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        client.send(payload={"model": "alpha"}, headers=("Content-Encoding: Identity",))
        assert (await client.answer()).status == 200
        assert b"content-encoding" not in engine.requests[0].raw_head.lower()


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/completions//?a=/", "/v1/completions?a=/"),
        ("/v1/models/", "/v1/models"),
        ("/health/", "/health"),
        ("/v1/models/alpha/", "/v1/models/alpha"),
        ("/upstream/alpha/v1/embeddings/", "/upstream/alpha/v1/embeddings"),
    ],
)
def test_a_slash_at_the_end_is_redirected_as_engines_do_it(target: str, location: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            client = await s.client()
            client.send(target, {"model": "alpha", "prompt": "x" * 100_000})
            answer = await client.answer()
            assert (answer.status, answer.headers["location"]) == (307, location)
            other = await s.client()
            other.send("/nothing/here/", {})
            assert (await other.answer()).status == 404

    run()


SMUGGLING = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"Content-Length: +5\r\n\r\nhello",
    b"Content-Length: 5, 5\r\n\r\nhello",
    b"Transfer-Encoding: gzip\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    b"X: a\rb\r\n\r\n",
    b"X: a\0b\r\n\r\n",
    b"X : a\r\n\r\n",
    b"Content-Length : 5\r\n\r\nhello",
    b"Big: " + b"x" * 20_000 + b"\r\n\r\n",
]


@pytest.mark.parametrize("rest", SMUGGLING)
def test_malformed_and_ambiguous_heads_are_refused_and_end_the_connection(rest: bytes) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.engine()
            s.supervisor.grant(engine)
            await until(lambda: s.gateway.admission.held("alpha") is not None)
            client = await s.client()
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + rest)
            answer = await client.answer()
            assert answer.status in (400, 431), answer
            client.chat()
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.answer()
            assert not engine.requests

    run()


# ---- what is understood -------------------------------------------------------------------------


@in_loop
async def test_chunked_bodies_and_expect_continue() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        client.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert await soon(client.reader.readuntil(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(b'8\r\n{"model"\r\n9\r\n:"alpha"}\r\n0\r\nTrailer: x\r\n\r\n')
        assert (await client.answer()).json()["model"] == "alpha"
        request = engine.requests[0]
        assert request.body == b'{"model":"alpha"}'
        assert "expect" not in request.headers
        assert "transfer-encoding" not in request.headers
        assert "trailer" not in request.headers


@in_loop
async def test_headers_named_by_connection_stay_here() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        client.send(
            payload={"model": "alpha"}, headers=("Connection: X-Secret, keep-alive", "X-Secret: 1")
        )
        await client.answer()
        assert not {"connection", "x-secret"} & set(engine.requests[0].headers)


@in_loop
async def test_http_1_0_clients_get_no_chunks() -> None:
    async def stream(request: EngineRequest) -> None:
        request.start_stream()
        request.event("one")
        request.end_stream()

    async with stage() as s:
        engine = await s.engine(stream)
        s.supervisor.grant(engine)
        client = await s.client()
        client.send(payload={"model": "alpha"}, version="1.0")
        answer = await client.answer()
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == b"data: one\n\ndata: [DONE]\n\n"


@in_loop
async def test_connection_close_is_obeyed_on_every_route() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        for request in (
            {"payload": {"model": "alpha"}},
            {"payload": {"model": "nobody"}},
            {"path": "/health", "method": "GET"},
        ):
            client = await s.client()
            client.send(**request, headers=("Connection: close",))
            answer = await client.answer()
            assert answer.headers["connection"] == "close", request
            assert await client.ended() == b""


# ---- control and health -------------------------------------------------------------------------


@in_loop
async def test_control_verbs_go_to_the_supervisor_and_its_answer_comes_back() -> None:
    async with stage(keys=lambda: ADMINS) as s:
        s.supervisor.answer = lambda ask: {"ok": True, "result": {"verb": ask.verb, **ask.args}}
        cases = {
            ("GET", "status"): "status",
            ("GET", "eviction"): "eviction_get",
            ("POST", "eviction"): "eviction_set",
            ("POST", "mode"): "mode",
            ("POST", "pin"): "pin",
            ("POST", "unpin"): "unpin",
            ("POST", "switch"): "switch",
            ("POST", "sleep"): "sleep",
            ("POST", "wake"): "wake",
        }
        for (method, path), verb in cases.items():
            payload = {"model": "alpha"} if method == "POST" else None
            status, body = await ask(
                s, f"/control/{path}", payload, method=method, headers=(ADMIN,)
            )
            signed = {"verb": verb, **(payload or {}), "by": "key admin"}
            assert (status, body) == (200, signed)
        heard = [message for message in s.supervisor.heard if isinstance(message, Ask)]
        assert len(heard) == len(cases)


@pytest.mark.parametrize(
    ("code", "status"),
    [("model_not_found", 404), ("already_running", 409), ("manual_mode", 503), ("newer", 500)],
)
def test_control_errors_have_a_status_by_their_code(code: str, status: int) -> None:
    @in_loop
    async def run() -> None:
        async with stage(keys=lambda: ADMINS) as s:
            s.supervisor.answer = lambda _ask: {"ok": False, "code": code, "message": "because"}
            got, body = await ask(s, "/control/pin", {"model": "x"}, headers=(ADMIN,))
            assert got == status
            assert body["error"]["message"] == "because"

    run()


@in_loop
async def test_control_with_the_supervisor_away_is_a_503_and_ready_says_so() -> None:
    async with stage() as s:
        status, _ = await ask(s, "/health/ready", method="GET")
        assert status == 200
        await s.supervisor.stop()
        await until(lambda: not s.gateway.link.up)
        status, body = await ask(s, "/control/status", method="GET")
        assert (status, body["error"]["code"]) == (503, "supervisor_unreachable")
        status, body = await ask(s, "/health/ready", method="GET")
        assert status == 503
        status, _ = await ask(s, "/health/live", method="GET")
        assert status == 200
        await s.supervisor.start()
        await until(lambda: s.gateway.link.up)
        status, _ = await ask(s, "/health/ready", method="GET")
        assert status == 200


@in_loop
async def test_models_show_state() -> None:
    async with stage() as s:
        status, body = await ask(s, "/v1/models/alpha", method="GET")
        assert status == 200
        assert body == {
            "id": "alpha", "object": "model", "created": 0, "owned_by": "llmux", "root": "alpha",
            "state": "stopped", "aliases": ["alef", "org/alpha"],
        }  # fmt: skip


# ---- start and stop -----------------------------------------------------------------------------


class Notes:
    """A Notifier that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.fed = asyncio.Event()

    def ready(self) -> None:
        self.notes.append("ready")

    def status(self, text: str) -> None:
        self.notes.append(text)

    def reloading(self) -> None:
        self.notes.append("reloading")

    def stopping(self) -> None:
        self.notes.append("stopping")

    def watchdog(self) -> None:
        self.fed.set()


@in_loop
async def test_without_a_supervisor_it_is_ready_in_the_end_and_says_what_is_wrong(
    tmp_path: Path,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    notes, stop = Notes(), asyncio.Event()
    started: asyncio.Future[Worker[Exchange]] = asyncio.get_running_loop().create_future()
    served = asyncio.get_running_loop().create_task(
        serve_gateway(
            a_config(), link=str(tmp_path / "s.sock"), sockets=[listener], notifier=notes,
            stop=stop, on_started=started.set_result, ready_secs=0.01, away_secs=0.0,
        )
    )  # fmt: skip
    gateway = await soon(started)
    assert notes.notes[0] == "ready"
    await until(lambda: gateway.supervisor_lost)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    client = Client(reader, writer)
    client.chat()
    answer = await client.answer()
    assert (answer.status, answer.code) == (503, "supervisor_unreachable")
    client.chat("nobody")
    assert (await client.answer()).code == "model_not_found"
    client.leave()
    stop.set()
    await soon(served)


@in_loop
async def test_ready_is_told_only_when_the_supervisor_was_reached(tmp_path: Any) -> None:
    path = str(tmp_path / "s.sock")
    notes = Notes()
    stop = asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listening: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    served = asyncio.get_running_loop().create_task(
        serve_gateway(
            a_config(), link=path, sockets=[listener], notifier=notes, stop=stop,
            on_listen=listening.set_result, watchdog_secs=0.05,
        )
    )  # fmt: skip
    assert await soon(listening) == [listener]
    await soon(notes.fed.wait())
    assert notes.notes == []
    supervisor = FakeSupervisor(path)
    await supervisor.start()
    await until(lambda: len(notes.notes) == 2)
    assert notes.notes[0] == "ready"
    assert "127.0.0.1" in notes.notes[1]
    stop.set()
    await soon(served)
    assert notes.notes[2:] == ["stopping"]
    await supervisor.stop()


@in_loop
async def test_stop_lets_streams_end_and_closes_idle_connections() -> None:
    async def start(request: EngineRequest) -> None:
        request.start_stream()
        request.event("one")
        await eof_watch(request)

    async with stage() as s:
        engine = await s.engine(start)
        s.supervisor.grant(engine)
        streaming, idle = await s.client(), await s.client()
        streaming.chat(stream=True)
        await streaming.head()
        await streaming.chunk()
        idle.send("/health", method="GET")
        await idle.answer()
        s.stop.set()
        assert await idle.ended() == b""
        assert not s.served.done()
        engine.requests[0].end_stream()
        assert await streaming.chunk() == b"data: [DONE]\n\n"
        assert await streaming.chunk() == b""
        await soon(s.served)


@in_loop
async def test_stop_cuts_what_outlasts_the_drain() -> None:
    async def start(request: EngineRequest) -> None:
        request.start_stream()
        request.event("one")
        await eof_watch(request)

    async with stage(drain_limits=DrainLimits(0.05)) as s:
        engine = await s.engine(start)
        s.supervisor.grant(engine)
        client = await s.client()
        client.chat(stream=True)
        await client.head()
        await client.chunk()
        s.stop.set()
        assert b"shutting_down" in await client.chunk()
        await soon(s.served)


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {address}: Address already in use"):
            bind_all([address])


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/g.sock"
    (first,) = bind_all([address])
    with pytest.raises(OSError, match="cannot listen on unix:"):
        bind_all([address])
    first.close()
    (second,) = bind_all([address])
    second.close()


@in_loop
async def test_no_connection_leaves_a_trace() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        for number in range(30):
            client = await s.client()
            client.chat(("alpha", "nobody")[number % 2])
            if number % 3:
                await client.answer()
            client.leave()
        await until(lambda: s.in_flight() == 0 and s.gateway.clients == 0)


def test_json_of_every_error_is_an_object() -> None:
    from llmux.errors import Reason, Refused
    from llmux.gateway.http import problems

    assert set(problems.PROBLEMS) == set(Reason)
    for reason in Reason:
        body = json.loads(problems.error_body(Refused(reason, 'quo"te\n')))
        assert body["error"]["code"] == reason.value


def test_a_unix_socket_has_the_mode_and_the_group_that_are_configured(tmp_path: Any) -> None:
    path = tmp_path / "g.sock"
    own = grp.getgrgid(os.getgid()).gr_name
    for access, mode in ((Access(), 0o660), (Access(0o666, own), 0o666), (Access(0o600), 0o600)):
        before = os.umask(0o077)
        try:
            (listener,) = bind_all([f"unix:{path}"], access)
        finally:
            os.umask(before)
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, os.getgid())
        listener.close()
    with pytest.raises(OSError, match="no group no-such-group"):
        bind_all([f"unix:{path}"], Access(0o660, "no-such-group"))

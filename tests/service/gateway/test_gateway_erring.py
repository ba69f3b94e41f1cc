"""An engine that answers 500, its last word when it dies, and one that answers what is no HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_harness import EngineRequest, a_config, echo, eof_watch, in_loop, soon, stage, until

from llmux.protocol import Demand, EngineLost, Revoke

ERROR = {"error": {"message": "EngineCore encountered an issue", "code": 500}}


class Erring:
    """Answers everything with 500, and /health with ``health``; None hangs there."""

    def __init__(self, health: str | None, *, size: int = 0) -> None:
        self.health = health
        self.error = ERROR | {"more": "x" * size}

    async def __call__(self, request: EngineRequest) -> None:
        if not request.line.startswith("GET /health "):
            request.json(self.error, "500 Internal Server Error")
        elif self.health is None:
            await eof_watch(request)
        else:
            request.json({}, self.health)


@in_loop
async def test_the_answer_of_an_engine_that_lives() -> None:
    async with stage() as s:
        engine = await s.granted(Erring("200 OK"))
        client = await s.chat()
        for _ in range(2):  # its connections are used again
            answer = await client.answer()
            assert (answer.status, answer.json()["error"]) == (500, ERROR["error"])
            client.chat()
        await client.answer()
        assert len(engine.requests) == 6
        await until(lambda: s.in_flight() == 0)
        assert not any(isinstance(message, EngineLost) for message in s.supervisor.heard)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engines_request_goes_to_the_next_one(stream: bool) -> None:
    @in_loop
    async def body() -> None:
        async with stage(a_config(keep_alive_comment_secs=0.01)) as s:
            await s.granted(Erring("503 Service Unavailable"))
            client = await s.chat(stream=stream)
            lost = await s.supervisor.hear(EngineLost)
            assert (lost.model, lost.epoch) == ("alpha", "e1")
            await s.supervisor.hear(Demand, lambda d: d.waiting == 1)
            s.supervisor.say(Revoke("alpha", "e1", dead=True))
            s.supervisor.grant(await s.engine(stream_or_echo, name="next"), epoch="e2")
            answer = await client.answer()
            assert answer.status == 200
            assert b"EngineCore" not in answer.body

    body()


async def stream_or_echo(request: EngineRequest) -> None:
    if b'"stream": true' in request.body or b'"stream":true' in request.body:
        request.start_stream()
        request.event("{}")
        request.end_stream()
    else:
        await echo(request)


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("end", ["length", "chunks", "close"])
def test_an_error_is_held_while_the_engine_is_asked_however_its_body_ends(
    end: str, alive: bool
) -> None:
    """But for one that ends with its connection: a dead engine's would be cut anywhere."""
    body = json.dumps(ERROR).encode()
    heads = {"length": b"content-length: %d\r\n" % len(body), "close": b""}
    heads["chunks"] = b"transfer-encoding: chunked\r\n"

    async def err(request: EngineRequest) -> None:
        if request.line.startswith("GET /health "):
            request.json({}, "200 OK" if alive else "503 Service Unavailable")
            return
        framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if end == "chunks" else body
        request.writer.write(b"HTTP/1.1 500 Internal Server Error\r\n" + heads[end] + b"\r\n")
        request.writer.write(framed)
        if end == "close":
            raise ConnectionError

    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.granted(err)
            client = await s.chat()
            if not alive and end != "close":
                await s.supervisor.hear(EngineLost)
                s.supervisor.say(Revoke("alpha", "e1", dead=True))
                s.supervisor.grant(await s.engine(name="next"), epoch="e2")
                assert (await client.answer()).status == 200
            else:
                answer = await client.answer()
                assert (answer.status, answer.body) == (500, body)
            await until(lambda: s.in_flight() == 0)
            assert len(engine.requests) == (1 if end == "close" else 2)

    run()


@in_loop
async def test_an_engine_that_can_not_be_asked_any_more_is_dead() -> None:
    async def err_and_die(request: EngineRequest) -> None:
        if request.line.startswith("GET /health "):
            request.die()
        else:
            request.json(ERROR, "500 Internal Server Error")

    async with stage() as s:
        await s.granted(err_and_die)
        client = await s.chat()
        await s.supervisor.hear(EngineLost)
        s.supervisor.say(Revoke("alpha", "e1", dead=True))
        s.supervisor.grant(await s.engine(name="next"), epoch="e2")
        assert (await client.answer()).status == 200


@in_loop
async def test_one_that_does_not_say_is_believed() -> None:
    async with stage() as s:
        await s.granted(Erring(None))
        client = await s.chat()
        answer = await client.answer()
        assert answer.json()["error"] == ERROR["error"]
        await until(lambda: s.in_flight() == 0)


@in_loop
async def test_a_long_error_is_passed_on_as_it_comes() -> None:
    async with stage() as s:
        engine = await s.granted(Erring("503 Service Unavailable", size=300_000))
        client = await s.chat()
        answer = await client.answer()
        assert (answer.status, len(answer.json()["more"])) == (500, 300_000)
        assert len(engine.requests) == 1


@in_loop
async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind() -> None:
    async with stage() as s:
        engine = await s.granted(Erring(None))
        client = await s.chat()
        await engine.next_request(2)
        client.leave()
        await s.supervisor.hear(Demand, lambda d: d.in_flight == 0)
        s.supervisor.revoke("e1")
        async with asyncio.timeout(20):
            await engine.requests[1].gone.wait()


# ---- what is no HTTP -----------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
MALFORMED = {
    "a length with a sign": HEAD + b"content-length: +2\r\n\r\n{}",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    "a chunk's size": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "an error's chunk": HEAD.replace(b"200 OK", b"500 E") + b"transfer-encoding: chunked\r\n\r\n-",
    "trailing bytes": HEAD + b"content-length: 2\r\n\r\n{}junk",
    "a body after 204": b"HTTP/1.1 204 No\r\ncontent-length: 5\r\n\r\nhello",
    "a head without an end": HEAD + b"x: " + b"y" * 70_000,
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_ends_its_request_alone(answer: bytes) -> None:
    """It was taken for a death: the request came six times, and all others of the model waited."""

    async def talk(request: EngineRequest) -> None:
        if b"neighbour" in request.body:
            await go_on.wait()
            request.json({"fine": True})
        else:
            request.writer.write(answer)

    go_on = asyncio.Event()

    @in_loop
    async def body() -> None:
        async with stage() as s:
            engine = await s.granted(talk)
            neighbour = await s.chat(user="neighbour")
            client = await s.chat()
            refused = await client.answer()
            assert (refused.status, refused.code) == (502, "malformed_answer")
            assert "the engine" in refused.json()["error"]["message"]
            another = await s.chat(user="neighbour")
            await engine.next_request(3)
            go_on.set()
            for other in (neighbour, another):
                assert (await other.answer()).status == 200
            assert len(engine.requests) == 3
            await until(lambda: s.in_flight() == 0)
            assert not any(isinstance(message, EngineLost) for message in s.supervisor.heard)

    body()


@pytest.mark.parametrize("model", ["alpha", "alef"])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_what_an_engine_refuses_after_a_comment_is_told_in_its_words(
    model: str, in_chunks: bool
) -> None:
    error = json.dumps({"error": {"message": "This model's maximum context length is 8"}}).encode()

    @in_loop
    async def body() -> None:
        may = asyncio.Event()

        async def refuse(request: EngineRequest) -> None:
            await may.wait()
            write = request.writer.write
            if in_chunks:
                write(b"HTTP/1.1 400 Bad Request\r\ntransfer-encoding: chunked\r\n\r\n")
                for piece in (error[:9], error[9:], b""):
                    write(b"%x\r\n%b\r\n" % (len(piece), piece))
            else:
                write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n" % len(error))
                write(error)

        async with stage(a_config(keep_alive_comment_secs=0.01)) as s:
            await s.granted(refuse)
            client = await s.client()
            await until(lambda: s.gateway.names.get("alef") == "alpha")
            client.chat(model, stream=True)
            await client.head()
            assert (await client.chunk()).startswith(b": waiting")
            may.set()
            told = b""
            while data := await client.chunk():
                told += data
            event = json.loads(told.rpartition(b"data: ")[2])
            assert event["error"]["message"] == "This model's maximum context length is 8"

    body()


@in_loop
async def test_an_answer_that_ends_with_its_connection_is_whole_under_an_alias() -> None:
    async def answer(request: EngineRequest) -> None:
        request.writer.write(b'HTTP/1.0 200 OK\r\n\r\n{"text": 1, "model":"alpha"}')
        await request.writer.drain()
        request.die()

    async with stage() as s:
        await s.granted(answer)
        await until(lambda: s.gateway.names.get("alef") == "alpha")
        for model in ("alpha", "alef"):
            client = await s.chat(model)
            await client.head()
            rest = await soon(client.reader.read())
            assert json.loads(rest) == {"text": 1, "model": model}

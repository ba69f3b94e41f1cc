"""Connections to engines are used again, also by those that do something to the answer."""

from __future__ import annotations

import asyncio

import pytest
from gateway_harness import EngineRequest, StubEngine, in_loop, soon, stage


async def chatter(request: EngineRequest) -> None:
    """A name cut by the end of a write, so that something is held back midway."""
    request.start_stream()
    request.event('{"model":"alpha"}')
    request.event('{"mod')
    request.end_stream()


@in_loop
async def test_connections_under_an_alias_are_used_again() -> None:
    async with stage() as s:
        engine = await s.engine(chatter)
        s.supervisor.grant(engine)
        client = await s.client()
        for name in ("alef", "org/alpha", "alef"):
            client.chat(name)
            answer = await client.answer()
            expected = f'data: {{"model":"{name}"}}\n\ndata: {{"mod\n\ndata: [DONE]\n\n'
            assert answer.body.decode() == expected
        assert engine.accepted == 1


@in_loop
async def test_connections_for_old_clients_are_used_again() -> None:
    async with stage() as s:
        engine = await s.engine(chatter)
        s.supervisor.grant(engine)
        bodies = []
        for _ in range(2):
            client = await s.client()
            client.send(payload={"model": "alpha"}, version="1.0")
            bodies.append((await client.answer()).body)
        assert bodies[0] == bodies[1]
        assert bodies[0].endswith(b"data: [DONE]\n\n")
        assert engine.accepted == 1


@in_loop
async def test_a_connection_is_used_again_only_by_its_own_kind() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        for name in ("alpha", "alef", "alpha", "alef"):
            client.chat(name)
            assert (await client.answer()).json()["model"] == name
        assert engine.accepted == 2


@pytest.mark.parametrize("name", ["alpha", "alef"])
@pytest.mark.parametrize(
    ("line", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\n", True),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n", True),
    ],
)
def test_the_engine_decides_whether_its_connection_is_used_again(
    line: bytes, again: bool, name: str
) -> None:
    """It reads on although it said "close": what it does with more is not known."""

    async def answer(request: EngineRequest) -> None:
        request.writer.write(line + b"content-length: 2\r\n\r\n{}")

    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.granted(answer)
            client = await s.client()
            for number in (1, 2):
                client.chat(name)
                assert (await client.answer()).body == b"{}"
                if not again:
                    await soon(engine.requests[number - 1].gone.wait())
            assert engine.accepted == (1 if again else 2)

    run()


class Hasty(StubEngine):
    """Answers when it has read the head."""

    @staticmethod
    async def _read(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> EngineRequest:
        head = await reader.readuntil(b"\r\n\r\n")
        return EngineRequest(head.decode(), {}, b"", reader, writer, number, raw_head=head)


@in_loop
async def test_a_connection_is_not_used_again_while_a_request_is_still_being_sent() -> None:
    """The rest of the upload would be taken for the next request."""

    async def refuse(request: EngineRequest) -> None:
        request.json({"error": "too long"}, "400 Bad Request")
        await answered.wait()
        while await request.reader.read(1 << 16):
            pass

    answered = asyncio.Event()
    async with stage() as s:
        engine = Hasty(refuse, path=str(s.directory / "hasty.sock"))
        await engine.start()
        s.engines.append(engine)
        s.supervisor.grant(engine)
        client = await s.chat(padding="x" * (4 << 20))
        assert (await client.answer()).status == 400
        answered.set()
        await soon(engine.requests[0].gone.wait())
        assert engine.accepted == 1


@in_loop
async def test_a_head_with_a_bare_line_feed_is_no_answer() -> None:
    async def split(request: EngineRequest) -> None:
        request.writer.write(
            b"HTTP/1.1 200 OK\r\nx: y\nset-cookie: z\r\ncontent-length: 2\r\n\r\n{}"
        )

    async with stage() as s:
        engine = await s.engine(split)
        s.supervisor.grant(engine)
        client = await s.client()
        client.chat()
        answer = await client.answer()
        assert answer.status == 502
        assert "set-cookie" not in answer.headers


@in_loop
async def test_an_idle_connection_on_which_an_engine_speaks_is_not_used_again() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        client = await s.client()
        for number in (1, 2):
            client.chat()
            assert (await client.answer()).status == 200
            request = await engine.next_request(number)
            request.json({"answer": "to nobody"})
            await soon(request.gone.wait())  # the gateway closed it
        assert engine.accepted == 2

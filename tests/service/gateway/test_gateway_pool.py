"""Connections to engines are used again, also by those that do something to the answer."""

from __future__ import annotations

from gateway_harness import EngineRequest, in_loop, soon, stage


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

"""Requests on an engine that hangs: what it never began waits for the next one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from gateway_harness import EngineRequest, Handler, Stage, eof_watch, in_loop, stage, until

from llmux.protocol import Cut, Grant, Revoke

HANG = (Revoke("alpha", "e1"), Cut("alpha", "e1", "engine_died", "engine does not answer"))
BODIES = ["", "x" * (4 << 20)]  # the longer one stays in our own buffers


async def hang(request: EngineRequest) -> None:
    await eof_watch(request)


async def err_and_hang(request: EngineRequest) -> None:
    if request.line.startswith("GET /health "):
        await eof_watch(request)
    request.json({"error": {}}, "500 Internal Server Error")


def stopped(where: Path | None, backlog: int = 100) -> socket.socket:
    """A listener as of a process after SIGSTOP: connections are made, and nobody reads them."""
    if where is None:
        return socket.create_server(("127.0.0.1", 0))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(where))
    listener.listen(backlog)
    return listener


async def sent(s: Stage, count: int, of: int | None = None) -> None:
    """So many of the requests in flight are on a connection: their bytes are on their way."""
    await until(lambda: s.in_flight() == (of or count))
    held = s.gateway.admission.held("alpha")
    assert held is not None
    await until(lambda: sum(one.connection is not None for one in held.in_flight) == count)


@pytest.mark.parametrize("more", BODIES, ids=["short", "long"])
@in_loop
async def test_a_request_that_a_hung_engine_never_read_is_answered_by_the_next_one(
    more: str,
) -> None:
    """Before, it got 502 although no engine had seen a byte of it."""
    async with stage() as s:
        path = s.directory / "stopped.sock"
        with stopped(path):
            s.supervisor.say(Grant("alpha", "e1", uds=str(path)))
            await until(lambda: s.gateway.admission.held("alpha") is not None)
            plain, stream = await s.chat(user=more), await s.chat(user=more, stream=True)
            await sent(s, 2)
            s.supervisor.say(*HANG)
            await until(lambda: s.waiting() == 2)
        engine = await s.engine()
        s.supervisor.grant(engine, epoch="e2")
        for client in (plain, stream):
            assert (await client.answer()).status == 200
        assert len(engine.requests) == 2


@in_loop
async def test_so_is_one_whose_connection_a_hung_engine_never_took() -> None:
    async with stage() as s:
        path = s.directory / "stopped.sock"
        with stopped(path, backlog=0):
            s.supervisor.say(Grant("alpha", "e1", uds=str(path)))
            clients = [await s.chat() for _ in range(2)]
            await sent(s, 1, of=2)
            s.supervisor.say(*HANG)
            await until(lambda: s.waiting() == 2)
        s.supervisor.grant(await s.engine(), epoch="e2")
        for client in clients:
            assert (await client.answer()).status == 200


@in_loop
async def test_it_waits_again_where_the_next_engine_hangs_too() -> None:
    async with stage() as s:
        path = s.directory / "stopped.sock"
        with stopped(path):
            client = await s.chat()
            for epoch in ("e1", "e2"):
                s.supervisor.say(Grant("alpha", epoch, uds=str(path)))
                await sent(s, 1)
                hang = Cut("alpha", epoch, "engine_died", "engine does not answer")
                s.supervisor.say(Revoke("alpha", epoch), hang)
                await until(lambda: s.waiting() == 1)
        s.supervisor.grant(await s.engine(), epoch="e3")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(("engine_does", "requests"), [(hang, 1), (err_and_hang, 2)])
@in_loop
async def test_a_request_that_a_hung_engine_has_read_is_not_repeated(
    engine_does: Handler, requests: int
) -> None:
    """Nor one that it has answered with 500, and is then asked for its health."""
    async with stage() as s:
        engine = await s.granted(engine_does)
        client = await s.chat()
        await engine.next_request(requests)
        s.supervisor.say(*HANG)
        answer = await client.answer()
        assert (answer.status, answer.code) == (502, "engine_died")


@in_loop
async def test_over_tcp_it_cannot_be_seen_what_a_hung_engine_has_read() -> None:
    async with stage() as s:
        with stopped(None) as listener:
            s.supervisor.say(Grant("alpha", "e1", port=listener.getsockname()[1]))
            client = await s.chat()
            await sent(s, 1)
            s.supervisor.say(*HANG)
            answer = await client.answer()
        assert (answer.status, answer.code) == (502, "engine_died")


@in_loop
async def test_a_cut_that_makes_room_ends_what_its_engine_never_read() -> None:
    async with stage() as s:
        path = s.directory / "stopped.sock"
        with stopped(path):
            s.supervisor.say(Grant("alpha", "e1", uds=str(path)))
            client = await s.chat()
            await sent(s, 1)
            s.supervisor.say(Revoke("alpha", "e1"), Cut("alpha", "e1", "cut_by_switch", "room"))
            answer = await client.answer()
        assert (answer.status, answer.code) == (503, "cut_by_switch")

"""Answers of 500 that are held, ids of stored responses, the client's pace and patience."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_desk import Desk, answers, in_a_loop

from llmux.gateway.admission.queue import Stage
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.exchange.held_error import MAX_HELD
from llmux.protocol import ResponseOwners

FIXED = b"HTTP/1.1 200 OK\r\nserver: e\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
ENDLESS = b"HTTP/1.1 200 OK\r\nserver: e\r\n\r\nok"
OWN = b"x-request-id: r1\r\nx-llmux-wait-ms: %d\r\nx-llmux-switch: none\r\n"
ALIAS = b'{"model":"alpha-2"}'
STREAM = b'{"model":"alpha","stream":true}'


# ---- answers of 500 ------------------------------------------------------------------------------

ERRED = b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\nab"


@in_a_loop
async def test_an_answer_of_500_is_held_until_its_engine_is_known_to_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, ERRED)
    exchange.response_bytes(b"cd")
    assert (client.got, exchange.holds, exchange.repeatable) == (b"", True, True)
    exchange.response_end()
    health, question = pool.sent[-1]
    assert health.head.startswith(b"GET /health HTTP/1.1\r\n")
    answers(question, FIXED)
    question.response_end()
    assert client.got.startswith(b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n")
    assert client.got.endswith(b"\r\n\r\nabcd")
    assert client.done == [False]
    assert desk.worker.observer.requests == {("alpha", 500): 1}


@pytest.mark.parametrize("how", ["503", "no connection"])
@in_a_loop
async def test_one_whose_engine_died_is_repeated(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, ERRED)
    exchange.response_end()
    question = pool.sent[-1][1]
    if how == "503":
        answers(question, FIXED.replace(b"200 OK", b"503 Service Unavailable"))
        question.response_end()
    else:
        question.response_failed(EngineFailure("refused", connected=False))
    assert (client.got, exchange.stage, exchange.holds) == (b"", Stage.WAITING, True)
    assert desk.worker.observer.retried == {"alpha": 1}
    desk.grant(epoch="e2")
    assert not exchange.holds
    answers(exchange, FIXED)
    exchange.response_end()
    assert client.got.startswith(b"HTTP/1.1 200 OK")
    assert client.got.endswith(b"\r\n\r\nok")


@in_a_loop
async def test_an_engine_that_talks_nonsense_about_its_health_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, ERRED)
    exchange.response_end()
    pool.sent[-1][1].response_failed(EngineFailure("no HTTP", malformed=True))
    assert client.got.startswith(b"HTTP/1.1 500 Oh\r\n")


@in_a_loop
async def test_of_an_endless_or_a_long_one_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks()
    answers(exchange, b"HTTP/1.1 500 Oh\r\n\r\nab", until_close=True)
    assert client.got.endswith(b"ab")
    client, exchange = desk.asks()
    answers(exchange, ERRED.replace(b"4", b"99999"))
    exchange.response_bytes(b"c" * (MAX_HELD - 2))
    assert client.got == b""
    exchange.response_bytes(b"d")
    assert client.got.endswith(b"\r\n\r\nab" + b"c" * (MAX_HELD - 2) + b"d")
    exchange.response_bytes(b"e")
    assert client.got.endswith(b"de")


@in_a_loop
async def test_who_leaves_while_it_is_held_hears_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, ERRED)
    exchange.response_end()
    exchange.client_gone()
    pool.sent[-1][1].response_end()
    assert (client.got, client.done) == (b"", [])


# ---- the rest ------------------------------------------------------------------------------------


@in_a_loop
async def test_the_id_of_a_stored_response_is_told_before_the_client_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    for path, keeps in (("/v1/responses", True), ("/v1/chat/completions", False)):
        client, exchange = desk.asks(desk.incoming(path=path))
        answers(exchange, CHUNKED + b'{"id": "re')
        assert client.got.endswith(b'{"id": "re')
        exchange.response_bytes(b'sp_1", "id": "resp_2"}')
        exchange.response_bytes(b'{"id": "resp_3"}')
        owners = [one for one in desk.link.sent if isinstance(one, ResponseOwners)]
        assert owners == [ResponseOwners({"resp_1": "alpha"}, {})]
        assert client.got.endswith(b'{"id": "resp_3"}')
        assert desk.worker.responses.model_of("resp_1") == "alpha", keeps


@in_a_loop
async def test_the_clients_pace_reaches_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks()
    assert exchange.unsent() == 0
    client.writing_paused = True
    answers(exchange, FIXED)
    connection: Any = exchange.connection
    assert connection.calls == ["pause"]
    exchange.resume()
    exchange.pause()
    assert connection.calls == ["pause", "resume", "pause"]
    client.wire.buffered = 17
    assert exchange.unsent() == 17
    exchange.connection = None
    exchange.pause()
    exchange.resume()
    exchange.response_end()
    assert exchange.unsent() == 0


@pytest.mark.parametrize(
    ("header", "limit"),
    [("X-Request-Timeout: 5", 5.0), ("X-Request-Timeout: 50", 30.0), (None, 30)],
)
@in_a_loop
async def test_it_waits_no_longer_than_its_client(
    header: str | None, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    headers = [] if header is None else [header]
    _, exchange = desk.asks(desk.incoming(b'{"model":"alpha"}', *headers))
    assert exchange.deadline == desk.now + limit
    assert desk.worker.admission.wake_at == desk.now + limit

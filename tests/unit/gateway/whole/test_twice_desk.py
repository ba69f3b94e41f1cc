"""Requests of a worker where something happens twice, at once, or as something else ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_desk import Desk, answers, in_a_loop, retry_after, said, told

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import Stage
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.engine.health import HealthQuestion
from llmux.protocol import EngineLost, Revoke

DIED = EngineFailure("it died")
REFUSED = EngineFailure("refused", connected=False)
FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM = b'{"model":"alpha","stream":true}'
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = EVENTS + b"transfer-encoding: chunked\r\n\r\n"
ERRED = b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\nabcd"


@in_a_loop
async def test_what_is_repeated_is_sent_and_the_next_look_is_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "llmux.gateway.journal")
    desk = Desk(monkeypatch)
    pool = desk.grant()
    _, exchange = desk.asks()
    exchange.response_failed(REFUSED)
    assert (exchange.stage, exchange.lease, exchange.deaths) == (Stage.WAITING, None, 0)
    assert [one.__dict__["request"] for one in caplog.records] == ["r1"]
    desk.now += 1.0
    desk.dispatch._tick()
    assert [sink for _, sink in pool.sent] == [exchange, exchange]
    exchange.response_failed(REFUSED)
    assert exchange.stage is Stage.ENDED
    timer: Any = desk.dispatch._timer
    assert timer.when() == desk.now + 1.0, "for those that come"
    assert len(caplog.records) == 2


@pytest.mark.parametrize("newer", [True, False])
@in_a_loop
async def test_what_a_revoked_engine_loses_goes_to_the_newer_one(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    _, exchange = desk.asks()
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    pool = desk.grant(epoch="e2") if newer else None
    exchange.response_failed(DIED)
    if pool is not None:
        assert [sink for _, sink in pool.sent] == [exchange]
    else:
        timer: Any = desk.dispatch._timer
        assert (exchange.stage, timer.when()) == (Stage.WAITING, exchange.deadline)


@in_a_loop
async def test_the_first_deadline_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.asks()
    late: Any = desk.dispatch._timer
    _, hurried = desk.asks(desk.incoming(STREAM, "X-Request-Timeout: 5"))
    soon: Any = desk.dispatch._timer
    assert (late.cancelled(), soon.when()) == (True, hurried.deadline)
    assert hurried.deadline == desk.now + 5.0
    desk.asks()
    assert desk.dispatch._timer is soon


@in_a_loop
async def test_who_ends_as_others_are_sent_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    pairs = [desk.asks() for _ in range(2)]
    before = len(pool.sent)
    pairs[0][1].client_gone()
    desk.dispatch.send_admitted([exchange for _, exchange in pairs])
    assert [sink for _, sink in pool.sent[before:]] == [pairs[1][1]]


@in_a_loop
async def test_a_refusal_keeps_its_own_time_and_others_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rare = Key("one", hash_key("1"), requests_per_minute=1)
    desk = Desk(monkeypatch, keys=lambda: (rare,))
    assert desk.worker.guard is not None

    def asks(body: bytes) -> Any:
        incoming = desk.incoming(body)
        assert desk.worker.guard is not None
        incoming.key = desk.worker.guard.identify(incoming.path, b"1", None)
        return desk.asks(incoming)

    client, exchange = asks(b'{"model":"alpha"}')
    assert exchange.stage is Stage.WAITING
    client, refused = asks(b'{"model":"alpha"}')
    assert (told(client)[:2], retry_after(client)) == ((429, "rate_limit_exceeded"), 60)
    desk.now += 60.0
    client, _ = asks(b'{"model":"else"}')
    assert (told(client)[0], retry_after(client)) == (404, None)
    assert sum(desk.worker.observer.times_of("alpha").waits.counts) == 0, "it never waited"
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    use = exchange.key
    for one in (exchange, refused):
        one.break_off(Refused(Reason.INTERNAL, "x"), between_chunks=True)
        one.client_gone()
    assert (use.in_flight, use.waiting) == (0, 0), "given back once"


@in_a_loop
async def test_a_response_without_an_owner_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    desk.link.answer = lambda _verb, _args: {"model": "alpha"}
    desk.asks(desk.incoming(b"", path="/v1/responses/resp_1", method="GET"))
    while desk.dispatch._searches:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0)
    assert (desk.worker.responses.model_of("resp_1"), desk.worker.responses.key_of("resp_1")) == (
        "alpha", "",
    )  # fmt: skip


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("how", ["cut", "left"])
@in_a_loop
async def test_of_a_request_that_has_ended_no_verdict_is_heard(
    how: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, ERRED)
    exchange.response_end()
    question = pool.sent[-1][1]
    if how == "cut":
        exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    else:
        exchange.client_gone()
    before = client.got
    if dead:
        question.response_failed(DIED)
    else:
        answers(question, FIXED)
        question.response_end()
    assert (client.got, client.done) == (before, [False] if how == "cut" else [])
    assert said(desk, EngineLost) == []
    assert (desk.worker.observer.retried, exchange.stage) == ({}, Stage.ENDED)
    assert sum(desk.worker.observer.times["alpha"].durations.counts) == 0
    assert desk.worker.admission.demand("alpha").completed == 0


@in_a_loop
async def test_an_engine_that_takes_its_time_to_say_that_it_lives_is_not_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool: Any = desk.grant()
    judged: list[Any] = []
    question = HealthQuestion(pool, judged.append)
    connection: Any = question.connection
    assert not question.wants_connection(), "it has one"
    question.connection = None
    assert question.wants_connection()
    question.connection = connection
    question._give_up()
    assert (judged, connection.calls, question.connection) == ([None], ["abort"], None)
    assert not question.wants_connection(), "nobody asks any more"
    question.response_failed(DIED)
    question._give_up()
    assert judged == [None]
    judged.clear()
    again = HealthQuestion(pool, judged.append)
    again.response_end()
    assert (judged, again._timer.cancelled()) == ([None], True)


@in_a_loop
async def test_an_answer_of_500_in_chunks_is_held_to_its_end_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    client, exchange = desk.asks()
    answers(exchange, b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
    assert (client.got, exchange.holds) == (b"", True)
    exchange.connection = None
    exchange.response_end()
    question = pool.sent[-1][1]
    answers(question, FIXED)
    question.response_end()
    head, _, body = client.got.partition(b"\r\n\r\n")
    assert (body, client.done) == (b"2\r\nab\r\n0\r\n\r\n", [False])
    assert head.count(b"transfer-encoding: chunked") == 1


@in_a_loop
async def test_a_connection_is_wanted_until_there_is_one_or_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    _, exchange = desk.asks()
    assert not exchange.wants_connection(), "it waits"
    desk.grant()
    assert not exchange.wants_connection(), "it has one"
    connection, exchange.connection = exchange.connection, None
    assert exchange.wants_connection()
    exchange.connection = connection
    answers(exchange, FIXED)
    exchange.connection = None
    assert not exchange.wants_connection(), "an answer was begun"
    assert desk.worker.admission.demand("alpha").progress == 1


@pytest.mark.parametrize("origins", [(), ("https://a",)])
@pytest.mark.parametrize("origin", [None, "https://a"])
@in_a_loop
async def test_other_sites_are_told_what_they_may_when_they_ask(
    origin: str | None, origins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, cors_origins=origins)
    desk.grant()
    headers = () if origin is None else (f"Origin: {origin}",)
    incoming = desk.incoming(STREAM, *headers, keep_alive=False)
    client, exchange = desk.asks(incoming)
    answers(exchange, CHUNKED)
    head = client.got.partition(b"\r\n\r\n")[0]
    assert (b"access-control-" in head) is (origin is not None and bool(origins))
    assert b"\r\nconnection: close" in head
    exchange.response_end()
    assert client.done == [True]


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/completions", b'\n\ndata: {"error": {"message": "cut"'),
        ("/v1/messages", b'\n\nevent: error\ndata: {"type": "error", "error": {'),
    ],
)
@in_a_loop
async def test_an_event_follows_a_stream_without_chunks_wherever_it_breaks(
    path: str, begins: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks(desk.incoming(path=path))
    answers(exchange, EVENTS + b"\r\ndata: x\n\n", until_close=True)
    before = len(client.got)
    connection: Any = exchange.connection
    connection.between_chunks = False
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    event = client.got[before:]
    assert event.startswith(begins)
    assert event.endswith(b"}\n\n")
    assert b'"cut"' in event
    assert (client.done, client.aborted) == ([True], 0)


@pytest.mark.parametrize("begun", [True, False])
@in_a_loop
async def test_after_a_sign_of_life_it_is_the_answer_that_is_cut(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    desk.grant()
    client, exchange = desk.asks(desk.incoming(STREAM))
    exchange.send_keep_alive()
    connection: Any = exchange.connection
    connection.between_chunks = False
    if begun:
        answers(exchange, CHUNKED + b"5\r\nda")
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    assert (client.done, client.aborted) == (([], 1) if begun else ([True], 0))


@pytest.mark.parametrize(("until_close", "framed"), [(True, True), (False, False)])
@in_a_loop
async def test_after_a_sign_of_life_a_renamed_stream_has_chunks_once(
    until_close: bool, framed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    desk.catalog()
    desk.grant()
    client, exchange = desk.asks(desk.incoming(STREAM.replace(b"alpha", b"alpha-2")))
    exchange.send_keep_alive()
    before = len(client.got)
    ends = b"" if until_close else b"content-length: 9\r\n"
    answers(exchange, EVENTS + ends + b"\r\n", until_close=until_close)
    exchange.response_bytes(b"data: x\n\n")  # of the connection that renames
    assert client.got[before:] == (b"9\r\ndata: x\n\n\r\n" if framed else b"data: x\n\n")


@pytest.mark.parametrize("name", ["alpha", "alpha-2"])
@in_a_loop
async def test_the_words_come_under_the_clients_name_and_for_chat_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, loading_text=True, keep_alive_comment_secs=5.0)
    desk.catalog()
    body = STREAM.replace(b"alpha", name.encode())
    client, exchange = desk.asks(desk.incoming(body))
    exchange.send_keep_alive()
    assert client.got == b"", "nothing is known yet, and no head commits to anything"
    exchange.send_keep_alive()
    event = client.got.partition(b"data: ")[2].partition(b"\n")[0]
    assert json.loads(event)["model"] == name
    client, exchange = desk.asks(desk.incoming(body, path="/v1/completions"))
    exchange.send_keep_alive()
    assert b"\r\n: waiting for alpha\n\n" in client.got
    await asyncio.sleep(0)


@in_a_loop
async def test_the_first_byte_is_counted_once_while_an_id_is_sought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    _, exchange = desk.asks(desk.incoming(STREAM, path="/v1/responses"))
    answers(exchange, CHUNKED)
    for piece in (b'5\r\n{"id"', b': "re', b'sp_1"}\r\n'):
        exchange.response_bytes(piece)
    assert sum(desk.worker.observer.times["alpha"].first_tokens.counts) == 1
    assert desk.worker.responses.model_of("resp_1") == "alpha"


@in_a_loop
async def test_one_that_is_answered_lets_the_next_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    exchanges = [desk.asks()[1] for _ in range(2)]
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    for exchange in exchanges:
        exchange.response_failed(DIED)
    pool = desk.grant(epoch="e2")
    ((_, tried),) = pool.sent
    answers(tried, FIXED)
    assert (tried.deaths, tried.repeatable) == (0, False)
    assert {sink for _, sink in pool.sent} == set(exchanges)


@pytest.mark.parametrize("broken", [True, False])
@in_a_loop
async def test_what_fails_is_said_of_its_request_and_its_model_once(
    broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "llmux.gateway.journal")
    desk = Desk(monkeypatch)
    desk.grant()
    _, exchange = desk.asks()
    if broken:
        answers(exchange, CHUNKED)
    for _ in range(2):
        exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    (line,) = caplog.records
    assert line.getMessage().endswith(": cut")
    assert (line.__dict__["request"], line.__dict__["model"]) == ("r1", "alpha")


@in_a_loop
async def test_an_error_after_a_sign_of_life_is_no_answer_that_was_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    desk.grant()
    client, exchange = desk.asks(desk.incoming(STREAM))
    exchange.send_keep_alive()
    answers(exchange, b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\nno")
    exchange.connection = None
    exchange.response_end()
    assert (client.done, client.aborted) == ([True], 0)
    assert client.got.endswith(b"}\n\n\r\n0\r\n\r\n")
    assert sum(desk.worker.observer.times["alpha"].durations.counts) == 0
    assert desk.worker.admission.demand("alpha").completed == 0

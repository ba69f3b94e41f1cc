"""What a client gets of one request, to the byte, and what is counted of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_desk import Desk, FakeClient, answers, in_a_loop

from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import Stage
from llmux.gateway.engine.request import Delivery, Rename

FIXED = b"HTTP/1.1 200 OK\r\nserver: e\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
ENDLESS = b"HTTP/1.1 200 OK\r\nserver: e\r\n\r\nok"
OWN = b"x-request-id: r1\r\nx-llmux-wait-ms: %d\r\nx-llmux-switch: none\r\n"
ALIAS = b'{"model":"alpha-2"}'
STREAM = b'{"model":"alpha","stream":true}'
STREAMLESS = ("/v1/embeddings", "/v1/audio/speech", "/tokenize", "/v1/messages/count_tokens")


def head_of(client: FakeClient) -> list[bytes]:
    return client.got.partition(b"\r\n\r\n")[0].split(b"\r\n")


@pytest.mark.parametrize(
    ("answer", "asked", "lines", "close"),
    [
        (FIXED, {}, [b"server: e", b"content-length: 2"], False),
        (FIXED, {"keep_alive": False}, [b"server: e", b"content-length: 2"], True),
        (FIXED, {"version": "1.0"}, [b"server: e", b"content-length: 2"], False),
        (
            FIXED,
            {"version": "1.0", "keep_alive": False},
            [b"server: e", b"content-length: 2"],
            True,
        ),
        (CHUNKED, {}, [b"content-type: text/event-stream", b"transfer-encoding: chunked"], False),
        (CHUNKED, {"version": "1.0"}, [b"content-type: text/event-stream"], True),
        (ENDLESS, {}, [b"server: e"], True),
        (FIXED, {"body": ALIAS}, [b"server: e", b"transfer-encoding: chunked"], False),
        (FIXED, {"body": ALIAS, "version": "1.0"}, [b"server: e"], True),
        (ENDLESS, {"body": ALIAS}, [b"server: e"], True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", {"body": ALIAS}, [], False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", {"body": ALIAS, "version": "1.0"}, [], False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", {"keep_alive": False}, [], True),
    ],
)
@in_a_loop
async def test_the_head_says_where_the_body_ends_and_what_becomes_of_the_connection(
    answer: bytes,
    asked: dict[str, Any],
    lines: list[bytes],
    close: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog()
    desk.grant()
    client, exchange = desk.asks(desk.incoming(**asked))
    answers(exchange, answer, until_close=answer is ENDLESS)
    more = [b"connection: close"] if close else []
    if asked.get("version") == "1.0" and not close:
        more = [b"connection: keep-alive"]
    own = (OWN % 0).strip().split(b"\r\n")
    assert head_of(client) == [answer.partition(b"\r\n")[0], *lines, *own, *more]
    assert client.got.partition(b"\r\n\r\n")[2] == answer.partition(b"\r\n\r\n")[2]
    assert client.done == []
    exchange.response_bytes(b"more")
    assert client.got.endswith(b"more")
    exchange.connection = None
    exchange.response_end()
    assert (client.done, client.aborted, exchange.stage) == ([close], 0, Stage.ENDED)
    assert desk.worker.observer.requests == {("alpha", int(answer[9:12])): 1}
    demand = desk.worker.admission.demand("alpha")
    assert (demand.in_flight, demand.completed) == (0, 1)


@pytest.mark.parametrize(
    ("asked", "delivery", "rename"),
    [
        ({}, Delivery.VERBATIM, None),
        ({"version": "1.0"}, Delivery.UNCHUNKED, None),
        ({"body": ALIAS}, Delivery.RENAMED, Rename("alpha", "alpha-2", chunked=True)),
        (
            {"body": ALIAS, "version": "1.0"},
            Delivery.RENAMED,
            Rename("alpha", "alpha-2", chunked=False),
        ),
    ],
)
@in_a_loop
async def test_the_engine_gets_its_own_name_and_says_how_it_is_delivered(
    asked: dict[str, Any],
    delivery: Delivery,
    rename: Rename | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog()
    pool = desk.grant()
    _, exchange = desk.asks(desk.incoming(**asked))
    ((request, sink),) = pool.sent
    assert sink is exchange
    assert json.loads(request.body if isinstance(request.body, bytes) else b"") == {
        "model": "alpha"
    }
    assert (request.delivery, request.rename) == (delivery, rename)
    assert request.head == (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-request-id: r1\r\n"
        b"content-length: %d\r\n\r\n" % len(request.body)  # type: ignore[arg-type]
    )


@in_a_loop
async def test_what_it_waited_is_said_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    client, exchange = desk.asks()
    assert exchange.stage is Stage.WAITING
    desk.now += 1.5
    desk.grant()
    desk.now += 0.5
    answers(exchange, FIXED)
    desk.now += 2.0
    exchange.response_end()
    assert OWN % 1500 in client.got
    times = desk.worker.observer.times["alpha"]
    assert [one.sum for one in (times.waits, times.first_tokens, times.durations)] == [
        1.5, 2.0, 4.0,
    ]  # fmt: skip
    assert [sum(one.counts) for one in (times.waits, times.first_tokens, times.durations)] == [
        1, 1, 1,
    ]  # fmt: skip


@in_a_loop
async def test_the_first_byte_of_a_body_is_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks()
    answers(exchange, CHUNKED)
    first = desk.worker.observer.times["alpha"].first_tokens
    assert sum(first.counts) == 0
    desk.now += 3.0
    for number in range(1, 4):
        exchange.response_bytes(b"1\r\nx\r\n")
        assert (first.sum, sum(first.counts)) == (3.0, 1)
        assert desk.worker.admission.demand("alpha").progress == number
    assert client.got.endswith(b"1\r\nx\r\n" * 3)


@pytest.mark.parametrize(
    ("draining", "origin", "anthropic"),
    [(False, None, False), (True, None, False), (False, "https://a", True), (True, "https://b", 0)],
)
@pytest.mark.parametrize("keep_alive", [True, False])
@in_a_loop
async def test_a_refusal_is_an_answer(
    draining: bool,
    origin: str | None,
    anthropic: bool,
    keep_alive: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, cors_origins=("https://a",))
    headers = [] if origin is None else [f"Origin: {origin}"]
    path = "/v1/messages" if anthropic else "/v1/chat/completions"
    incoming = desk.incoming(b'{"model":"alpha"}', *headers, path=path, keep_alive=keep_alive)
    client, exchange = desk.asks(incoming)
    closes = draining or not keep_alive
    desk.worker.draining = draining
    desk.now += 2.0
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut", retry_after=7.2))
    head = head_of(client)
    assert head[0] == b"HTTP/1.1 503 Service Unavailable"
    assert b"retry-after: 8" in head
    assert (OWN % 2000).strip().split(b"\r\n") == head[4:7]
    assert (b"connection: close" in head) is closes
    assert (b"access-control-allow-origin: https://a" in head) is (origin == "https://a")
    body = json.loads(client.got.partition(b"\r\n\r\n")[2])
    assert body["error"]["message"] == "cut"
    assert ("code" in body["error"]) is not bool(anthropic)
    assert client.done == [closes]
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "again"))
    assert client.done == [closes], "it has ended"
    observer = desk.worker.observer
    assert observer.requests == {("alpha", 503): 1}
    assert (observer.times["alpha"].waits.sum, observer.broken, observer.abandoned) == (2.0, {}, {})


@pytest.mark.parametrize(
    ("heard", "between", "event"),
    [(CHUNKED, True, True), (CHUNKED, False, False), (FIXED[:-1], True, False)],
)
@in_a_loop
async def test_an_answer_that_breaks_off_ends_with_an_event_where_one_can_follow(
    heard: bytes, between: bool, event: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks()
    answers(exchange, heard)
    connection: Any = exchange.connection
    connection.between_chunks = between
    before = len(client.got)
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    assert connection.calls == ["abort"]
    assert (client.done, client.aborted) == (([True], 0) if event else ([], 1))
    told = client.got[before:]
    size, _, rest = told.partition(b"\r\n")
    assert bool(told) is event
    if event:
        assert len(rest) == int(size, 16) + len(b"\r\n0\r\n\r\n")
        assert b'"message": "cut"' in rest
        assert rest.endswith(b"\r\n0\r\n\r\n")
    assert desk.worker.observer.broken == {"alpha": 1}
    assert desk.worker.observer.requests == {("alpha", 200): 1}
    exchange.response_bytes(b"late")
    assert client.got[before:] == told


@in_a_loop
async def test_a_client_that_leaves_is_counted_and_its_engine_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    waiting, begun = desk.asks()[1], desk.asks()[1]
    desk.now += 2.0
    waiting.client_gone()
    desk.grant()
    connection: Any = begun.connection
    begun.client_gone()
    assert connection.calls == ["abort"]
    observer = desk.worker.observer
    assert observer.abandoned == {"alpha": 2}
    assert (observer.times["alpha"].waits.sum, sum(observer.times["alpha"].waits.counts)) == (
        4.0,
        2,
    )
    demand = desk.worker.admission.demand("alpha")
    assert (demand.waiting, demand.in_flight, demand.completed) == (0, 0, 0)
    for exchange in (waiting, begun):
        exchange.break_off(Refused(Reason.INTERNAL, "x"), between_chunks=True)
        assert not exchange.wants_connection()
    assert observer.broken == {}


# ---- signs of life -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "secs", "alive"),
    [
        ({"body": STREAM}, 5.0, True),
        ({"body": STREAM}, 0.0, False),
        ({"body": STREAM, "version": "1.0"}, 5.0, False),
        ({}, 5.0, False),
        ({"body": STREAM, "path": "/v1/messages"}, 5.0, True),
        *(({"body": STREAM, "path": path}, 5.0, False) for path in STREAMLESS),
    ],
)
@in_a_loop
async def test_what_waits_and_can_be_a_stream_shows_signs_of_life(
    asked: dict[str, Any], secs: float, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=secs)
    client, exchange = desk.asks(desk.incoming(**asked))
    assert client.deadline == (desk.now + secs if alive else 0.0)
    desk.now += 5.0
    exchange.send_keep_alive()
    assert bool(client.got) is alive
    if not alive:
        return
    comment = (
        b'event: ping\ndata: {"type": "ping"}\n\n'
        if "path" in asked
        else b": waiting for alpha\n\n"
    )
    chunk = b"%x\r\n%b\r\n" % (len(comment), comment)
    head, _, body = client.got.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"content-type: text/event-stream; charset=utf-8",
        b"cache-control: no-cache",
        b"x-accel-buffering: no",
        b"transfer-encoding: chunked",
        *(OWN % 5000).strip().split(b"\r\n"),
    ]
    assert body == chunk
    assert client.deadline == desk.now + 5.0
    exchange.send_keep_alive()
    assert client.got.endswith(b"\r\n\r\n" + chunk + chunk)
    assert desk.worker.observer.requests == {("alpha", 200): 1}
    exchange.refuse(Refused(Reason.START_FAILED, "no"))
    assert (client.done, client.aborted) == ([True], 0)
    assert b'"no"' in client.got
    assert client.got.endswith(b"\r\n0\r\n\r\n")
    exchange.send_keep_alive()
    assert client.got.endswith(b"\r\n0\r\n\r\n")
    assert desk.worker.observer.requests == {("alpha", 200): 1}


IN_CHUNKS = b'b\r\n{"error":{"\r\n10\r\nmessage":"odd"}}\r\n0\r\n\r\n'


@pytest.mark.parametrize(
    ("answer", "body", "passed"),
    [
        (CHUNKED, b"3\r\nabc\r\n", b"3\r\nabc\r\n"),
        (CHUNKED.replace(b"200 OK", b"400 Bad"), IN_CHUNKS, None),
        (CHUNKED.replace(b"event-stream", b"html"), IN_CHUNKS, None),
        (FIXED[:-2], b'{"error":{"message":"odd"}}', None),
    ],
)
@in_a_loop
async def test_after_a_sign_of_life_only_a_stream_can_follow(
    answer: bytes, body: bytes, passed: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    client, exchange = desk.asks(desk.incoming(STREAM))
    exchange.send_keep_alive()
    before = len(client.got)
    desk.grant()
    assert client.deadline == desk.now + 5.0, "for the engine's first byte"
    answers(exchange, answer + body[:3])
    exchange.send_keep_alive()  # the answer has begun: no more of them
    exchange.response_bytes(body[3:])
    exchange.connection = None
    exchange.response_end()
    told = client.got[before:]
    if passed is not None:
        assert (told, client.done) == (passed, [False])
    else:
        assert b'"message": "odd"' in told
        assert told.endswith(b"\r\n0\r\n\r\n")
        assert (client.done, desk.worker.observer.broken) == ([True], {"alpha": 1})
    assert desk.worker.observer.requests == {("alpha", 200): 1}


@pytest.mark.parametrize("until_close", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
@in_a_loop
async def test_after_a_sign_of_life_a_stream_without_chunks_gets_them(
    until_close: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    desk.grant()
    ends = b"" if until_close else b"content-length: 14\r\n"
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + ends + b"\r\n"
    client, exchange = desk.asks(desk.incoming(STREAM, path=path))
    exchange.send_keep_alive()
    before = len(client.got)
    answers(exchange, answer + b"data: ", until_close=until_close)
    exchange.response_bytes(b"")
    exchange.response_bytes(b"one\n\n")
    exchange.response_bytes(b"\n\n\n")
    assert client.got[before:] == b"6\r\ndata: \r\n5\r\none\n\n\r\n3\r\n\n\n\n\r\n"
    assert desk.worker.admission.demand("alpha").progress == 3
    exchange.connection = None
    exchange.response_end()
    assert client.got.endswith(b"\n\r\n0\r\n\r\n")
    assert (client.done, client.aborted, exchange.stage) == ([False], 0, Stage.ENDED)
    assert desk.worker.observer.broken == {}
    client, exchange = desk.asks(desk.incoming(STREAM, path=path))
    exchange.send_keep_alive()
    answers(exchange, answer + b"data: one\n\n", until_close=until_close)
    exchange.refuse(Refused(Reason.CUT_BY_SWITCH, "cut"))
    assert b'"message": "cut"' in client.got, "each of our chunks is whole"
    assert client.got.endswith(b"\r\n0\r\n\r\n")


@in_a_loop
async def test_a_stream_whose_answer_begins_in_time_has_no_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=5.0)
    desk.grant()
    client, exchange = desk.asks(desk.incoming(STREAM))
    assert client.deadline == desk.now + 5.0
    answers(exchange, CHUNKED)
    before = client.got
    exchange.send_keep_alive()
    assert client.got == before

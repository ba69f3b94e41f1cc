"""From a request to its model: names, keys, the queue."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_desk import Desk, FakeClient, answers, in_a_loop, retry_after, said, told

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import Stage
from llmux.gateway.dispatch import OWNER_SECS
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.http.request import Incoming
from llmux.protocol import (
    KeepAliveHint,
    ModelInfo,
    ResponseOwners,
)

ALPHA = b'{"model":"alpha"}'
FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
DIED = EngineFailure("it died")
REFUSED = EngineFailure("refused", connected=False)
ONE, TWO = Key("one", hash_key("1")), Key("two", hash_key("2"))
ADMIN = Key("boss", hash_key("3"), role=KeyRole.ADMIN)


def with_key(desk: Desk, incoming: Incoming, key: Key) -> Incoming:
    assert desk.worker.guard is not None
    secret = {"one": b"1", "two": b"2", "boss": b"3"}[key.name]
    incoming.key = desk.worker.guard.identify(incoming.path, secret, None)
    return incoming


async def settle(desk: Desk) -> None:
    while desk.dispatch._searches:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "path", "fallback", "model", "sent"),
    [
        (ALPHA, "/v1/completions", None, "alpha", "alpha"),
        (b'{"model":"alpha-2"}', "/v1/completions", None, "alpha", "alpha"),
        (b'{"model":"lora"}', "/v1/completions", None, "alpha", "lora"),
        (b'{"model":"else"}', "/v1/completions", "beta", "beta", "beta"),
        (ALPHA, "/upstream/beta/v1/completions", None, "beta", "alpha"),
        (b'{"model":"beta-2"}', "/upstream/beta/v1/completions", None, "beta", "beta"),
        (b'{"model":"lora"}', "/upstream/alpha/v1/completions", None, "alpha", "lora"),
        (ALPHA, "/upstream/beta-2/v1/completions", None, "beta", "alpha"),
        (b"junk", "/upstream/beta/v1/completions", None, "beta", None),
        (b'{"model":"else"}', "/upstream/alpha/v1/completions", "beta", "alpha", "else"),
    ],
)
@in_a_loop
async def test_a_name_finds_its_model_and_the_engine_gets_its_own(
    body: bytes,
    path: str,
    fallback: str | None,
    model: str,
    sent: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, fallback_model=fallback)
    desk.catalog(
        ModelInfo("alpha", "stopped", aliases=["alpha-2"], adapters=["lora"]),
        ModelInfo("beta", "stopped", aliases=["beta-2"]),
    )
    pool = desk.grant(model)
    _, exchange = desk.asks(desk.incoming(body, path=path))
    assert exchange.model == model
    ((request, _),) = pool.sent
    assert isinstance(request.body, bytes)
    assert (None if sent is None else json.loads(request.body)["model"]) == sent


@pytest.mark.parametrize("path", ["/v1/completions", "/upstream/else/v1/completions"])
@in_a_loop
async def test_an_unknown_name_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, fallback_model="beta" if path.startswith("/upstream") else None)
    client, exchange = desk.asks(desk.incoming(b'{"model":"else"}', path=path))
    assert told(client)[:2] == (404, "model_not_found")
    assert 'the model "else" does not exist' in told(client)[2]
    assert exchange.stage is Stage.ENDED
    assert desk.worker.observer.requests == {("", 404): 1}


@in_a_loop
async def test_a_fallback_is_for_what_a_body_names(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, fallback_model="beta")
    desk.link.answer = lambda _verb, _args: {"model": "alpha"}
    pool = desk.grant()
    _, exchange = desk.asks(desk.incoming(b"", path="/v1/responses/resp_1", method="GET"))
    await settle(desk)
    assert (exchange.model, [sink for _, sink in pool.sent]) == ("alpha", [exchange])
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nelse\r\n--b--\r\n'
    incoming = desk.incoming(
        b"", "Content-Type: multipart/form-data; boundary=b", path="/v1/audio/transcriptions"
    )
    incoming.begin_form()
    assert incoming.add_upload(form) == "else"
    beta = desk.grant("beta", "e2")
    _, exchange = desk.asks(incoming)
    assert exchange.model == "beta"
    body = beta.sent[0][0].body
    assert not isinstance(body, bytes)
    whole = b""
    while piece := body.read(len(whole), 1000):
        whole += piece
    assert whole == form.replace(b"else", b"beta")


# ---- waiting -------------------------------------------------------------------------------------


@in_a_loop
async def test_a_request_waits_for_its_grant_and_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(ModelInfo("alpha", "waking", switch_secs=8.0), ModelInfo("beta", "stopped"))
    first_client, first = desk.asks()
    desk.now += 10.0
    _, second = desk.asks()
    timer: Any = desk.dispatch._timer
    assert timer.when() == first.deadline == desk.now + 20.0
    desk.now += 20.0
    desk.dispatch._tick()
    assert told(first_client) == (
        504, "wait_expired",
        ('model "alpha" could not be made ready in time (the limit is policy.request_timeout_secs'
        " or the client's own timeout)"),
    )  # fmt: skip
    assert retry_after(first_client) == 1, "its switch is due"
    assert second.stage is Stage.WAITING
    timer = desk.dispatch._timer
    assert timer.when() == second.deadline == desk.now + 10.0
    pool = desk.grant()
    assert [sink for _, sink in pool.sent] == [second]
    assert second.switch == b"woken"
    _, third = desk.asks()
    assert third.switch == b"none"
    assert pool.sent[-1][1] is third


@pytest.mark.parametrize(("header", "seconds"), [("10m", 600.0), ("0", 0.0), ("-1", None)])
@in_a_loop
async def test_how_long_a_model_may_stay_is_passed_on(
    header: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.asks(desk.incoming(ALPHA, f"X-Llmux-Keep-Alive: {header}"))
    assert said(desk, KeepAliveHint) == [KeepAliveHint("alpha", seconds)]
    desk.asks()
    assert len(said(desk, KeepAliveHint)) == 1


@pytest.mark.parametrize("serves", [True, False])
@in_a_loop
async def test_one_too_many_is_told_when_to_come_back(
    serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, max_waiting=1, max_in_flight=1)
    desk.catalog(ModelInfo("alpha", "stopped", switch_secs=20.0), ModelInfo("beta", "stopped"))
    if serves:
        desk.grant()
        desk.asks()
    desk.asks()
    client, _ = desk.asks()
    status, code, _ = told(client)
    assert (status, code) == ((429, "model_overloaded") if serves else (503, "queue_full"))
    assert retry_after(client) == (1 if serves else 20)


@in_a_loop
async def test_who_finds_no_place_in_time_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, max_in_flight=1)
    desk.catalog(ModelInfo("alpha", "serving"))
    desk.grant()
    desk.asks()
    client, waiting = desk.asks()
    desk.now = waiting.deadline
    desk.dispatch._tick()
    status, code, said = told(client)
    assert (status, code) == (504, "wait_expired")
    assert said.startswith('model "alpha" had no place free in time (')


@in_a_loop
async def test_without_a_supervisor_only_what_is_here_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant("alpha")
    desk.worker.supervisor_lost = True
    assert desk.asks()[1].in_flight
    client, _ = desk.asks(desk.incoming(b'{"model":"beta"}'))
    assert told(client)[:2] == (503, "supervisor_unreachable")
    assert retry_after(client) == 10
    client, _ = desk.asks(desk.incoming(b'{"model":"else"}'))
    assert told(client)[0] == 404


@in_a_loop
async def test_the_absence_of_the_supervisor_refuses_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    client, _ = desk.asks()
    watch = asyncio.get_running_loop().create_task(desk.supervisor.watch(30.0))
    for _ in range(3):
        await asyncio.sleep(0)
    assert [desk.worker.supervisor_lost] == [False]
    desk.link.away.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [desk.worker.supervisor_lost] == [True]
    assert told(client)[:2] == (503, "supervisor_unreachable")
    desk.link.away.clear()
    desk.link.here.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [desk.worker.supervisor_lost] == [False]
    watch.cancel()


# ---- keys ----------------------------------------------------------------------------------------


@in_a_loop
async def test_the_limits_of_a_key_are_kept_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Key("one", hash_key("1"), max_in_flight=2, max_waiting=1)
    desk = Desk(monkeypatch, keys=lambda: (limited,))

    def asks() -> tuple[FakeClient, Exchange]:
        return desk.asks(with_key(desk, desk.incoming(), limited))

    _, waits = asks()
    use = waits.key
    assert use is not None
    assert (use.in_flight, use.waiting) == (1, 1)
    client, _ = asks()
    assert told(client)[:2] == (429, "rate_limit_exceeded")
    assert retry_after(client) is not None
    assert (use.in_flight, use.waiting) == (1, 1)
    desk.grant()
    assert (use.in_flight, use.waiting) == (1, 0)
    _, second = asks()
    client, _ = asks()
    assert told(client)[:2] == (429, "rate_limit_exceeded")
    desk.dispatch.engine_failed(second, DIED)
    assert (use.in_flight, use.waiting) == (2, 1)
    second.client_gone()
    assert (use.in_flight, use.waiting) == (1, 0)
    answers(waits, FIXED)
    waits.response_end()
    assert (use.in_flight, use.waiting) == (0, 0)


@in_a_loop
async def test_a_key_reaches_no_model_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Key("one", hash_key("1"), models=frozenset({"beta-2"}))
    desk = Desk(monkeypatch, keys=lambda: (bound,))
    desk.catalog()
    client, _ = desk.asks(with_key(desk, desk.incoming(), bound))
    assert told(client)[:2] == (404, "model_not_found")
    _, exchange = desk.asks(with_key(desk, desk.incoming(b'{"model":"beta"}'), bound))
    assert exchange.stage is Stage.WAITING


@pytest.mark.parametrize(
    ("key", "owner", "known", "found"),
    [
        (ONE, "one", True, True),
        (ONE, "two", True, False),
        (ONE, "", True, False),
        (ADMIN, "two", True, True),
        (None, "two", True, True),
        (ONE, "one", False, True),
        (ONE, "two", False, False),
        (ADMIN, "two", False, True),
        (None, None, False, False),
        (None, "", False, True),
    ],
)
@in_a_loop
async def test_a_stored_response_is_there_for_the_key_that_made_it(
    key: Key | None, owner: str | None, known: bool, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keys=lambda: (ONE, TWO, ADMIN))
    pool = desk.grant()
    if known:
        desk.worker.responses.keep({"resp_1": "alpha"}, {"resp_1": owner} if owner else {})
    model = None if owner is None else "alpha"
    desk.link.answer = lambda _verb, _args: {"model": model, "key": owner}
    incoming = desk.incoming(b"", path="/v1/responses/resp_1", method="GET")
    if key is not None:
        incoming = with_key(desk, incoming, key)
    try:
        client, exchange = desk.asks(incoming)
    except Refused as problem:
        assert (found, problem.reason) == (False, Reason.NOT_FOUND)
        assert (known, 'no response "resp_1"' in str(problem)) == (True, True)
        return
    await settle(desk)
    asked = [("response", {"id": "resp_1"}, OWNER_SECS)]
    assert desk.link.asked == ([] if known else asked)
    if found:
        assert [sink for _, sink in pool.sent] == [exchange]
        assert exchange.model == "alpha"
        assert desk.worker.responses.model_of("resp_1") == "alpha"
        assert desk.worker.responses.key_of("resp_1") == owner
    else:
        assert told(client)[:2] == (404, "not_found")


@pytest.mark.parametrize("continues", ["resp_1", "resp_2", None])
@pytest.mark.parametrize("in_path", [True, False])
@in_a_loop
async def test_a_key_continues_its_own_responses_alone(
    continues: str | None, in_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, keys=lambda: (ONE, TWO))
    pool = desk.grant()
    desk.worker.responses.keep(
        {"resp_1": "alpha", "resp_2": "alpha"}, {"resp_1": "one", "resp_2": "two"}
    )
    named = {} if in_path else {"model": "alpha"}
    body = json.dumps({**named, "previous_response_id": continues}).encode()
    path = "/upstream/alpha/v1/responses" if in_path else "/v1/responses"
    incoming = with_key(desk, desk.incoming(body, path=path), ONE)
    if continues == "resp_2":
        with pytest.raises(Refused, match="no response"):
            desk.asks(incoming)
        return
    _, exchange = desk.asks(incoming)
    answers(
        exchange, FIXED.replace(b"content-length: 2", b"content-length: 16") + b'"id": "resp_9"'
    )
    assert said(desk, ResponseOwners) == [ResponseOwners({"resp_9": "alpha"}, {"resp_9": "one"})]
    assert len(pool.sent) == 1


@in_a_loop
async def test_who_leaves_while_the_owner_is_asked_for_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    desk.link.answer = lambda _verb, _args: {"model": "alpha"}
    _, exchange = desk.asks(desk.incoming(b"", path="/v1/responses/resp_1", method="GET"))
    exchange.client_gone()
    await settle(desk)
    assert pool.sent == []
    desk.link.answer = lambda _verb, _args: Refused(Reason.SUPERVISOR_UNREACHABLE, "away")
    client, _ = desk.asks(desk.incoming(b"", path="/v1/responses/resp_1", method="GET"))
    await settle(desk)
    assert told(client)[0] == 503

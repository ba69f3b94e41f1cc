"""What goes on until its client leaves: events, an engine's lines, and what is kept of numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_desk import Desk, FakePool, a_request, answers, in_a_loop

from llmux.errors import Reason, Refused
from llmux.gateway import engine_series
from llmux.gateway.control import app as app_module
from llmux.gateway.control import observation
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.engine_series import EngineSeries, _Scrape
from llmux.protocol import News, Revoke, Watch


class Response:
    """Of Sanic's: ``sent`` is its body so far."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.ends: list[int] = []
        self.given: dict[str, Any] = {}

    async def respond(self, **given: Any) -> Response:
        self.given = given
        return self

    async def send(self, text: str) -> None:
        self.sent.append(text)

    async def eof(self) -> None:
        self.ends.append(len(self.sent))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def event(number: int) -> dict[str, Any]:
    return {"id": number, "type": "x", "time": 1.0}


@in_a_loop
async def test_events_missed_come_first_and_none_comes_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    response = Response()

    def answer(_verb: str, _args: dict[str, Any]) -> Any:
        for number in (5, 6):
            desk.supervisor.on_message(News("events", "", event(number)))
        return {"events": [event(4), event(5)]}

    desk.link.answer = answer
    request = a_request(desk, headers={"last-event-id": "3"}, respond=response.respond)
    task = asyncio.create_task(observation._events(request))
    await turns()
    for number in (7, 5):  # a supervisor that restarted numbers anew
        desk.supervisor.on_message(News("events", "", event(number)))
    await turns()
    assert response.given == {
        "content_type": "text/event-stream",
        "headers": {"cache-control": "no-store", "x-accel-buffering": "no"},
    }
    first, *others = response.sent
    assert first == ": llmux\n\n"
    assert [text.partition("\n")[0] for text in others] == [f"id: {n}" for n in (4, 5, 6, 7, 5)]
    desk.now += observation.KEEP_ALIVE_SECS + 0.5
    await turns()
    assert response.sent[-1] == ": still here\n\n"
    assert response.ends == []
    desk.worker.subscriptions.close()
    await task
    assert len(response.ends) == 1
    assert [one for one in desk.link.sent if isinstance(one, Watch)] == [
        Watch("events", ""), Watch("events", "", on=False),
    ]  # fmt: skip


@pytest.mark.parametrize("query", ["", "no-history"])
@in_a_loop
async def test_an_engines_lines_follow_its_last_ones(
    query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog()
    desk.link.answer = lambda _verb, _args: {"lines": ["one", "two"]}
    response = Response()
    request = a_request(desk, query_string=query, respond=response.respond)
    task = asyncio.create_task(observation._log_stream(request, "alpha-2"))
    await turns()
    history = "\n" if query else "one\ntwo\n"
    assert response.sent == [history]
    assert response.given == {
        "content_type": "text/plain; charset=utf-8", "headers": {"x-accel-buffering": "no"},
    }  # fmt: skip
    desk.now += observation.KEEP_ALIVE_SECS + 0.5
    await turns()
    assert response.sent == [history], "silence is no line"
    desk.supervisor.on_message(News("logs", "beta", "of another"))
    desk.supervisor.on_message(News("logs", "alpha", "three"))
    await turns()
    assert response.sent == [history, "three\n"]
    desk.worker.subscriptions.close()
    await task
    assert len(response.ends) == 1


@in_a_loop
async def test_an_engine_that_is_silent_has_no_numbers_and_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    series = EngineSeries(desk.dispatch)
    task = asyncio.create_task(series.read())
    await turns()
    ((_, sink),) = pool.sent
    answers(sink, b"HTTP/1.1 200 OK\r\n\r\nvllm:running 3\n")
    connection = sink.connection
    desk.now += engine_series.ENGINE_SECS - 0.01
    await turns()
    assert not task.done()
    desk.now += 0.1
    samples = await task
    assert samples["alpha"].families == {}
    assert connection.calls == ["abort"]
    assert sink.connection is None
    sink.response_end()
    sink.response_failed(EngineFailure("too late"))
    assert list(series._cache) == ["alpha"]
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    assert await series.read() == {}
    assert series._cache == {}, "nothing is kept of what has gone"


@in_a_loop
async def test_a_connection_is_wanted_by_who_has_none_and_waits() -> None:
    scrape = _Scrape()
    assert scrape.wants_connection()
    connection: Any = FakePool(None, lambda: None)
    scrape.connection = connection
    assert not scrape.wants_connection()
    scrape.connection = None
    scrape.close()
    assert not scrape.wants_connection()
    with pytest.raises(asyncio.CancelledError):
        await scrape.done


@in_a_loop
async def test_an_error_of_a_request_without_an_id_is_told_as_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    desk = Desk(monkeypatch)
    response = app_module._on_error(a_request(desk), Refused(Reason.NOT_FOUND, "no"))
    assert response.status == 404
    (line,) = (record for record in caplog.records if "refused" in record.getMessage())
    assert line.__dict__["request"] == ""

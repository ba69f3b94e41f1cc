"""Engines that fail, and what the supervisor's words do to the requests of a worker."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gateway_desk import Desk, answers, in_a_loop, retry_after, said, told

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.gateway.admission.queue import Stage
from llmux.gateway.admission.suspects import TRIAL_SECS
from llmux.gateway.dispatch import REPORT_SECS
from llmux.gateway.engine.connection import EngineFailure
from llmux.protocol import (
    Collect,
    Collected,
    Cut,
    Drained,
    EngineLost,
    Hello,
    ModelInfo,
    News,
    Progress,
    Refuse,
    ResponseOwners,
    Revoke,
    Watch,
)

FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
DIED = EngineFailure("it died")
REFUSED = EngineFailure("refused", connected=False)


# ---- failures ------------------------------------------------------------------------------------


@in_a_loop
async def test_a_death_is_reported_once_and_its_requests_wait_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    exchanges = [desk.asks()[1] for _ in range(3)]
    connections: list[Any] = [one.connection for one in exchanges]
    for one in exchanges:
        desk.dispatch.engine_failed(one, DIED)
    assert said(desk, EngineLost) == [EngineLost("alpha", "e1", "it died")]
    assert [one.stage for one in exchanges] == [Stage.WAITING] * 3
    assert [one.calls for one in connections] == [["abort"]] * 3
    assert desk.worker.observer.retried == {"alpha": 3}
    timer: Any = desk.dispatch._timer
    assert timer.when() == desk.now + 1.0, "then the grant is tried once more"
    desk.worker.admission.revoke("alpha", "e1")
    desk.now += 5.0
    desk.dispatch._tick()
    pool = desk.grant(epoch="e2")
    assert {sink for _, sink in pool.sent} <= set(exchanges)
    timer = desk.dispatch._timer
    assert len(pool.sent) == 1
    assert timer.when() == desk.now + TRIAL_SECS[1][0], "others wait for the end of the trial"


@in_a_loop
async def test_a_malformed_answer_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine lives: nobody else is held up, and it would answer the same again."""
    desk = Desk(monkeypatch)
    pool = desk.grant()
    (client, exchange), (begun_client, begun) = desk.asks(), desk.asks()
    answers(begun, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na")
    for one in (exchange, begun):
        one.response_failed(EngineFailure("it is not HTTP", malformed=True))
    assert told(client) == (
        502, "malformed_answer", 'cannot get an answer from model "alpha": it is not HTTP'
    )  # fmt: skip
    assert begun_client.aborted == 1
    assert (said(desk, EngineLost), desk.worker.observer.retried) == ([], {})
    _, after = desk.asks()
    assert [sink for _, sink in pool.sent] == [exchange, begun, after]


@pytest.mark.parametrize(("later", "reports"), [(0.0, 1), (REPORT_SECS, 2)])
@in_a_loop
async def test_streams_that_break_off_are_reported_at_intervals(
    later: float, reports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    pairs = [desk.asks() for _ in range(2)]
    for client, exchange in pairs:
        answers(exchange, FIXED[:-1])
        desk.dispatch.engine_failed(exchange, DIED)
        assert (client.aborted, client.done) == (1, [])
        desk.now += later
    assert len(said(desk, EngineLost)) == reports
    assert desk.asks()[1].in_flight, "its other requests may be well"


@in_a_loop
async def test_of_a_revoked_lease_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    exchanges = [desk.asks()[1] for _ in range(2)]
    answers(exchanges[0], FIXED[:-1])
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    for one in exchanges:
        desk.dispatch.engine_failed(one, DIED)
    assert said(desk, EngineLost) == []


@in_a_loop
async def test_one_that_cannot_be_sent_twice_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    client, exchange = desk.asks()
    desk.dispatch.engine_failed(exchange, REFUSED)
    assert exchange.stage is Stage.WAITING
    desk.now += 1.0
    desk.dispatch._tick()
    assert exchange.in_flight
    desk.dispatch.engine_failed(exchange, REFUSED)
    assert told(client)[:2] == (502, "engine_unreachable")
    assert 'cannot get an answer from model "alpha": refused' in told(client)[2]


@in_a_loop
async def test_what_kills_its_engine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    client, exchange = desk.asks()
    for number in range(1, 3):
        desk.grant(epoch=f"e{number}")
        desk.dispatch.engine_failed(exchange, DIED)
    assert told(client)[:2] == (502, "engine_died")
    assert "2 times the engine died with this request" in told(client)[2]


@pytest.mark.parametrize("deaths", [0, 1])
@pytest.mark.parametrize("gone", ["supervisor", "gateway"])
@in_a_loop
async def test_what_was_there_at_one_death_is_not_said_to_kill(
    deaths: int, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    client, exchange = desk.asks()
    for number in range(deaths):
        desk.grant(epoch=f"e{number}")
        desk.dispatch.engine_failed(exchange, DIED)
    desk.grant(epoch="last")
    if gone == "supervisor":
        desk.worker.supervisor_lost = True
    else:
        desk.dispatch.stop_queueing()
        exchange.deaths = 0  # this death is counted
    desk.dispatch.engine_failed(exchange, DIED)
    assert told(client) == (
        502, "engine_died", 'cannot get an answer from model "alpha": it died',
    )  # fmt: skip
    assert desk.worker.observer.retried == ({"alpha": 1} if deaths else {})


@pytest.mark.parametrize("dead", [True, False])
@in_a_loop
async def test_a_revoke_drains_and_a_dead_engines_requests_go_on(
    dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    (_, waits), (begun_client, begun) = desk.asks(), desk.asks()
    answers(begun, FIXED[:-1])
    pool.empty = False
    desk.supervisor.on_message(Revoke("alpha", "e1", dead=dead))
    assert pool.closed
    assert said(desk, Drained) == []
    if dead:
        assert (waits.stage, begun.stage, begun_client.aborted) == (Stage.WAITING, Stage.ENDED, 1)
        waits.client_gone()
    else:
        assert (waits.in_flight, begun.in_flight) == (True, True)
        for one in (waits, begun):
            one.response_end()
    pool.empty = True
    pool.on_empty()
    assert said(desk, Drained) == [Drained("alpha", "e1")]
    desk.supervisor.on_message(Revoke("alpha", "e7"))
    assert said(desk, Drained)[1:] == [Drained("alpha", "e7")], "one that is not held is drained"
    assert desk.grant(epoch="e1") is not pool


@in_a_loop
async def test_a_lease_that_is_granted_again_keeps_its_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    pool.empty = False
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    assert desk.grant() is pool
    assert not pool.closed
    assert said(desk, Drained) == []


@in_a_loop
async def test_the_supervisors_refusals_reach_who_they_are_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    running, _ = desk.asks()
    waiting, _ = desk.asks(desk.incoming(b'{"model":"beta"}'))
    desk.supervisor.on_message(Cut("beta", "e1", "cut_by_switch", "cut"))
    desk.supervisor.on_message(Cut("alpha", "e2", "cut_by_switch", "cut"))
    desk.supervisor.on_message(Refuse("alpha", "start_failed", "no"))
    assert (running.done, waiting.done) == ([], [])
    desk.supervisor.on_message(Cut("alpha", "e1", "cut_by_switch", "cut"))
    assert told(running) == (503, "cut_by_switch", "cut")
    desk.supervisor.on_message(Refuse("beta", "of_tomorrow", "no", retry_after=4.0))
    assert (told(waiting)[0], told(waiting)[2]) == (500, "no"), "a reason of a newer one"
    assert retry_after(waiting) == 4


@in_a_loop
async def test_other_words_of_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(monkeypatch)
    desk.supervisor.on_message(Collect(7))
    (collected,) = said(desk, Collected)
    assert isinstance(collected, Collected)
    assert collected.id == 7
    assert "llmux_gateway_workers" in collected.snapshot
    with desk.worker.subscriptions.subscribe("logs", "alpha") as subscription:
        desk.supervisor.on_message(News("logs", "alpha", "line"))
        assert await anext(subscription.items(1.0)) == "line"
        assert desk.supervisor._greetings() == [Watch("logs", "alpha")]
    desk.worker.responses.keep({"resp_1": "alpha"}, {"resp_1": "one"})
    assert desk.supervisor._greetings() == [ResponseOwners({"resp_1": "alpha"}, {"resp_1": "one"})]
    desk.supervisor.on_message(Progress(1, "parking", 1.0))
    assert caplog.text == ""
    desk.supervisor.on_message(Hello("cli"))
    assert "unexpected type: hello" in caplog.text


@in_a_loop
async def test_what_the_link_is_told_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    callbacks = desk.link.callbacks
    assert callbacks["hello"]() == Hello("gateway", "w1", {})
    assert callbacks["active"]() == []
    desk.asks()
    desk.grant("beta", "e5")
    assert callbacks["hello"]() == Hello("gateway", "w1", {"beta": "e5"})
    assert sorted(callbacks["active"]()) == ["alpha", "beta"]
    demand = callbacks["demand"]("alpha")
    assert (demand.model, demand.waiting, demand.in_flight) == ("alpha", 1, 0)
    assert desk.link.changed[:1] == ["alpha"]
    callbacks["on_message"](Collect(1))
    assert len(said(desk, Collected)) == 1
    assert callbacks["greetings"]() == []
    desk.worker.responses.keep({"r1": "alpha"}, {"r1": "one"})
    with desk.worker.subscriptions.subscribe("logs", "beta"):
        assert callbacks["greetings"]() == [
            Watch("logs", "beta"), ResponseOwners({"r1": "alpha"}, {"r1": "one"}),
        ]  # fmt: skip


@in_a_loop
async def test_a_catalog_replaces_models_names_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, keys=lambda: (Key("one", hash_key("1"), models=frozenset({"new-2"})),))
    worker = desk.worker
    desk.catalog(
        ModelInfo("new", "starting", aliases=["new-2"], switch_secs=50.0),
        request_timeout_secs=5.0, startup_timeout_secs=77.0, min_active_secs=3.0,
    )  # fmt: skip
    assert list(worker.models) == ["new"]
    assert worker.names == {"new": "new", "new-2": "new"}
    assert worker.guard is not None
    use = worker.guard.identify(b"/", b"1", None)
    assert use is not None
    assert use.models == frozenset({"new"})
    assert (worker.admission.wait_secs, worker.startup_secs) == (5.0, 77.0)
    assert worker.switches.min_active_secs == 3.0
    assert worker.switches.secs_until("new", []) == 50.0
    client, _ = desk.asks()
    assert told(client)[0] == 404
    _, exchange = desk.asks(desk.incoming(b'{"model":"new"}'))
    assert exchange.deadline == desk.now + 5.0
    assert worker.observer.requests == {("", 404): 1}
    desk.catalog(ModelInfo("new", "starting"))
    assert (worker.admission.wait_secs, worker.startup_secs) == (5.0, 77.0), "not said: as before"


# ---- estimates and the end -----------------------------------------------------------------------


@in_a_loop
async def test_the_estimate_of_a_wait_counts_the_queue_and_the_switches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, max_in_flight=1)
    desk.catalog(
        ModelInfo("alpha", "stopped", switch_secs=20.4),
        ModelInfo("beta", "stopped", switch_secs=7.0),
    )
    assert desk.dispatch.secs_until("alpha") == 20
    desk.asks(desk.incoming(b'{"model":"beta"}'))
    ahead = 7.0 + desk.worker.switches.min_active_secs
    assert desk.dispatch.secs_until("alpha") == round(20.4 + ahead)
    desk.grant()
    assert desk.dispatch.secs_until("alpha") == 1, "nothing was measured"
    desk.asks()
    waiting = [desk.asks()[1] for _ in range(3)]
    desk.now += 4.0
    desk.worker.admission.leave(next(iter(desk.worker.admission.in_flight_on("alpha", "e1"))))
    assert waiting[0].in_flight
    assert desk.dispatch.secs_until("alpha") == 4 * 3


@in_a_loop
async def test_a_stop_refuses_who_waits_and_cuts_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    running, _ = desk.asks()
    waiting, _ = desk.asks(desk.incoming(b'{"model":"beta"}'))
    timer: Any = desk.dispatch._timer
    desk.dispatch.close()
    assert timer.cancelled()
    assert told(running) == (503, "shutting_down", "the gateway is shutting down")
    assert told(waiting)[:2] == (503, "shutting_down")
    assert 'cannot wait for model "beta"' in told(waiting)[2]
    assert (running.done, waiting.done) == ([True], [True])
    assert pool.closed
    assert (desk.worker.draining, desk.worker.closing) == (True, True)
    late, _ = desk.asks(desk.incoming(b'{"model":"beta"}'))
    assert told(late)[:2] == (503, "shutting_down")
    assert [one async for one in desk.worker.subscriptions.subscribe("events").items(1.0)] == []


@pytest.mark.parametrize(("named", "expected"), [(None, 20), (3.0, 3), (0.0, 1)])
@in_a_loop
async def test_who_is_refused_in_a_stop_is_told_when_to_come_back(
    named: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(ModelInfo("alpha", "stopped", switch_secs=20.0))
    client, _ = desk.asks()
    desk.dispatch.refuse_stopping(desk.worker.admission.refuse("alpha"), named)
    assert retry_after(client) == expected
    assert math.isfinite(expected)

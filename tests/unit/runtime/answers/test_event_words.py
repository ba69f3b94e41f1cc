"""What each event says: of every transition with its reason, and what the next supervisor adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import OFFLOAD, model

from llmux.config.schema import Config
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
)
from llmux.errors import StateFileError
from llmux.protocol import News, Watch
from llmux.runtime.control import event_log
from llmux.runtime.control.event_log import KEEP_SECS, TAIL_EVENTS, EventLog
from llmux.runtime.control.order_book import Order
from llmux.runtime.control.watchers import Watchers
from tests.twins.disk import MemoryEvents


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(event_log, "time", lambda: now[0])
    return now


def state_of(*records: ModelRecord, **facts: Any) -> State:
    models = MappingProxyType({record.config.name: record for record in records})
    return State(Config(), 1, "e", models=models, **facts)


def record(phase: Phase, name: str = "a", gpus: tuple[int, ...] = ()) -> ModelRecord:
    return ModelRecord(model(name), phase, gpus)


STARTING = Starting(1, 2.0)
WAKING = Waking(1, 2.0, OFFLOAD)
DRAINING = Draining("e", 1.0, 2.0, 9.0, OFFLOAD, None)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (Stopped(2.0), Starting(1, 3.5), "wanted, and not parked"),
        (Stopped(2.0), Starting(1, 3.5, "its image failed"), "its image failed"),
        (STARTING, Serving("e", 3.5), "started"),
        (WAKING, Serving("e", 3.5), "woken and verified"),
        (DRAINING, Serving("e", 3.5), "its room is not wanted any more"),
        (Stopped(2.0), Serving("e", 3.5), "adopted"),
        (Serving("e", 2.0), Draining("e", 2.0, 3.5, 9.0, OFFLOAD, "b"), "room for b"),
        (Serving("e", 2.0), Draining("e", 2.0, 3.5, 9.0, OFFLOAD, None), "asked"),
        (DRAINING, Parking(1, 3.5, OFFLOAD, "b"), "room for b"),
        (DRAINING, Parking(1, 3.5, OFFLOAD), "asked"),
        (Parking(1, 2.0, OFFLOAD), Parked(OFFLOAD, 3.5), str(OFFLOAD)),
        (Parked(OFFLOAD, 2.0), Waking(1, 3.5, OFFLOAD), str(OFFLOAD)),
        (Serving("e", 2.0), Stopping(1, 3.5, "it died", 0.9), "it died"),
        (Serving("e", 2.0), Stopping(1, 3.5, "", 0.9), "asked"),
        (STARTING, Stopped(3.5), "asked"),
        (STARTING, Stopped(3.5, "removed"), "removed"),
        (STARTING, Failed(3.5, 9.0, "no memory"), "no memory"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.state.value,
)
def test_a_transition_says_whence_why_and_how_long_it_was_there(
    before: Phase, after: Phase, reason: str
) -> None:
    log = EventLog(Watchers())
    log.published(state_of(record(before)), state_of(record(after, gpus=(2, 3))))
    assert list(log.recent) == [
        {
            "id": 1, "time": 1000.0, "model": "a", "type": "transition",
            "from": before.state.value, "to": after.state.value, "reason": reason,
            "gpus": [2, 3], "duration_secs": 1.5,
        }
    ]  # fmt: skip


def test_a_model_that_is_new_was_nowhere_before_and_no_time_is_below_nothing() -> None:
    log = EventLog(Watchers())
    log.published(state_of(), state_of(record(Serving("e", 3.0))))
    assert (log.recent[0]["from"], log.recent[0]["duration_secs"]) == (None, None)
    assert log.recent[0]["reason"] == "adopted"
    log.published(state_of(record(Serving("e", 3.0))), state_of(record(Stopped(1.0))))
    assert log.recent[1]["duration_secs"] == 0.0
    log.published(state_of(record(Stopped(1.0))), state_of(record(Stopped(2.0))))
    assert len(log.recent) == 2, "the same state"


# ---- the next supervisor -------------------------------------------------------------------------


def resumed(*events: dict[str, Any], found: State) -> list[dict[str, Any]]:
    """What is said of what was ``found``, after the ``events`` of the former supervisor."""
    base = {"time": 999.0, "model": "a"}
    store = MemoryEvents(*({**base, "id": n, **one} for n, one in enumerate(events, 1)))
    log = EventLog(Watchers(), store)
    log.resume()
    log.adopted(found)
    said = list(log.recent)[len(events) :]
    assert [event["id"] for event in said] == list(range(len(events) + 1, len(log.recent) + 1))
    return [{k: v for k, v in e.items() if k not in ("id", "time")} for e in said]


WAS = {"type": "transition", "to": "serving"}


@pytest.mark.parametrize(
    ("events", "phase", "said"),
    [
        ([WAS], Serving("e", 0.0), []),
        ([WAS], Stopped(), ["serving → stopped: found so after a restart"]),
        ([WAS], Stopped(0.0, "it died"), ["serving → stopped: it died"]),
        ([WAS], Parked(OFFLOAD, 0.0), [f"serving → parked: {OFFLOAD}"]),
        ([{"type": "transition"}], Serving("e", 0.0), [" → serving: adopted"]),
        ([WAS, {"type": "removed"}], Stopped(), []),
        ([{"type": "removed"}, WAS], Stopped(), ["serving → stopped: found so after a restart"]),
        ([{"type": "removed"}], Stopped(), []),
        ([{"type": "transition", "to": "parked"}, WAS], Serving("e", 0.0), []),
        ([WAS, {"type": "order"}, {"type": "switch"}], Serving("e", 0.0), []),
    ],
)
def test_what_is_not_what_the_last_event_said_is_an_event(
    events: list[dict[str, Any]], phase: Phase, said: list[str]
) -> None:
    found = resumed(*events, found=state_of(record(phase)))
    assert [f"{e['from']} → {e['to']}: {e['reason']}" for e in found] == said
    assert all(e["type"] == "transition" and e["model"] == "a" for e in found)


def test_models_that_are_gone_are_removed_and_queues_that_waited_have_ended() -> None:
    queue = {"type": "queue", "waiting": 2}
    of_b = {"model": "b"}
    found = state_of(record(Serving("e", 0.0), "b"))
    said = resumed(WAS, queue, WAS | of_b, queue | of_b, found=found)
    assert said == [
        {"model": "a", "type": "queue", "waiting": 0},
        {"model": "b", "type": "queue", "waiting": 0},
        {"model": "a", "type": "removed"},
    ]
    ended: list[dict[str, Any]] = [
        queue,
        {"type": "queue", "waiting": 0},
        {"type": "queue", "model": "c"},
    ]
    assert resumed(*ended, found=found) == []


# ---- queues --------------------------------------------------------------------------------------


def queued(**waiting: int) -> State:
    demands = MappingProxyType({n: WorkerDemand(waiting=count) for n, count in waiting.items()})
    return state_of(
        *(record(Stopped(), name) for name in "ab"),
        demands=demands, workers=MappingProxyType({"w": Worker(demands=demands)}),
    )  # fmt: skip


def lengths(log: EventLog) -> list[tuple[str, int]]:
    return [(e["model"], e["waiting"]) for e in log.recent if e["type"] == "queue"]


@pytest.mark.parametrize("silent", ["a", "b"])
def test_a_queue_that_says_nothing_new_holds_up_no_other(silent: str, clock: list[float]) -> None:
    log = EventLog(Watchers())
    other = "b" if silent == "a" else "a"
    log.published(queued(), queued(**{silent: 1}))
    log.published(queued(**{silent: 1}), queued(**{silent: 2, other: 5}))
    assert lengths(log) == [(silent, 1), (other, 5)]
    log.published(queued(**{silent: 2, other: 5}), queued(**{silent: 1, other: 0}))
    assert lengths(log)[2:] == [(other, 0)]


def watched(log: Watchers) -> list[News]:
    heard: list[News] = []
    for topic in ("events", "timeline", "logs"):
        log.watch("peer", Watch(topic, "a" if topic == "logs" else ""), heard.append)
    return heard


def test_who_watches_hears_of_its_topic_and_model_alone() -> None:
    watchers = Watchers()
    heard = watched(watchers)
    log = EventLog(watchers)
    watchers.line("a", "loading")
    watchers.line("b", "loading")
    log.published(queued(), queued(a=1))
    log.ordered(Order(1, "load", ("a",), "bob"), "given")
    assert [(news.topic, news.model) for news in heard] == [
        ("logs", "a"), ("timeline", ""), ("timeline", ""), ("events", ""),
    ]  # fmt: skip
    assert heard[0].item == "loading"
    watchers.watch("peer", Watch("logs", "a", on=False), heard.append)
    watchers.line("a", "more")
    watchers.left("peer")
    log.ordered(Order(1, "load", ("a",), "bob"), "done")
    assert len(heard) == 4


@pytest.mark.parametrize("moved", ["u", "v", "w"])
def test_a_worker_without_news_hides_no_other(moved: str, clock: list[float]) -> None:
    log = EventLog(Watchers())
    before = {name: Worker(demands=MappingProxyType({})) for name in "uvw"}
    demands = MappingProxyType({"a": WorkerDemand(waiting=2)})
    after = before | {moved: Worker(demands=demands)}
    models = (record(Stopped()),)
    now = state_of(*models, workers=after, demands=demands)
    log.published(state_of(*models, workers=before), now)
    assert [event["type"] for event in log.recent] == ["queue"]


def test_a_length_is_held_back_for_a_second_and_not_for_longer(clock: list[float]) -> None:
    log = EventLog(Watchers())
    log.published(queued(), queued(a=1))
    for passed, waiting, noted in ((0.999, 2, False), (1.0, 3, True), (1.5, 4, False)):
        clock[0] = 1000.0 + passed
        log.published(queued(a=9), queued(a=waiting))
        assert (("a", waiting) in lengths(log)) is noted


def test_a_length_that_stays_is_noted_once(clock: list[float]) -> None:
    """What a worker says may change in other ways while as many wait."""
    log = EventLog(Watchers())
    former = queued()
    for passed in (0.0, 2.0, 4.0):
        clock[0] = 1000.0 + passed
        log.published(former, present := queued(a=2))
        log.published(present, former := queued(a=2))
    assert lengths(log) == [("a", 2)]


def test_a_model_that_was_removed_begins_a_queue_of_its_own(clock: list[float]) -> None:
    log = EventLog(Watchers())
    log.published(queued(), queued(a=1))
    with_a = queued(a=1)
    without = replace(with_a, models=MappingProxyType({"b": with_a.models["b"]}))
    log.published(with_a, without)
    log.published(without, with_a)
    log.published(queued(), queued(a=1))
    assert lengths(log) == [("a", 1), ("a", 1)]


def test_workers_that_ask_for_models_of_no_configuration_make_no_queue() -> None:
    log = EventLog(Watchers())
    log.published(queued(), queued(x=1))
    assert not log.recent


# ---- what is kept and answered ------------------------------------------------------------------


def test_an_hour_ends_after_its_last_second(clock: list[float]) -> None:
    log = EventLog(Watchers())
    log.published(state_of(), state_of(record(Stopped())))
    clock[0] += KEEP_SECS
    log.published(state_of(), state_of(record(Stopped())))
    assert [e["id"] for e in log.recent] == [1, 2]
    clock[0] += 0.001
    log.published(state_of(), state_of(record(Stopped())))
    assert [e["id"] for e in log.recent] == [2, 3]


def test_the_time_is_told_to_the_millisecond(clock: list[float]) -> None:
    clock[0] = 1000.12345
    log = EventLog(Watchers())
    log.published(state_of(), state_of(record(Stopped())))
    assert log.recent[0]["time"] == 1000.123


def test_without_a_number_the_newest_are_answered_and_with_one_what_follows() -> None:
    log = EventLog(Watchers())
    for _ in range(TAIL_EVENTS + 2):
        log.published(state_of(), state_of(record(Stopped())))
    tail = log.answer({})
    assert [e["id"] for e in tail["events"]] == list(range(3, TAIL_EVENTS + 3))
    assert tail["more"] is False
    rest = log.answer({"after": TAIL_EVENTS})
    assert ([e["id"] for e in rest["events"]], rest["more"]) == (
        [TAIL_EVENTS + 1, TAIL_EVENTS + 2], False,
    )  # fmt: skip
    assert log.answer({"after": TAIL_EVENTS + 2}) == {"events": [], "more": False}
    for queues, kinds in (
        (True, {"queue", "transition"}),
        (1, {"transition"}),
        (None, {"transition"}),
    ):
        log.published(queued(), queued(a=1))
        assert {e["type"] for e in log.answer({"queues": queues})["events"]} == kinds


def test_an_order_is_an_event_of_each_of_its_models() -> None:
    log = EventLog(Watchers())
    log.ordered(Order(7, "restart", ("a", "b"), "bob"), "given")
    log.ordered(Order(8, "restart", (), "bob"), "done")
    facts = {"time": 1000.0, "type": "order", "verb": "restart", "by": "bob"}
    assert list(log.recent) == [
        {**facts, "id": 1, "model": "a", "order": 7, "result": "given"},
        {**facts, "id": 2, "model": "b", "order": 7, "result": "given"},
        {**facts, "id": 3, "model": "", "order": 8, "result": "done"},
    ]


def test_each_time_that_nothing_can_be_stored_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryEvents()
    log = EventLog(Watchers(), store)
    for fails, warnings in ((True, 1), (True, 1), (False, 1), (True, 2), (True, 2)):
        store.fails = fails
        log.published(state_of(), state_of(record(Stopped())))
        assert len(caplog.records) == warnings


class Unreadable(MemoryEvents):
    def load(self) -> Sequence[Mapping[str, Any]]:
        raise StateFileError("cannot read the events: no such device")


def test_a_file_that_cannot_be_read_begins_a_new_history(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(Watchers(), Unreadable())
    log.resume()
    assert caplog.messages == ["cannot read the events: no such device"]
    assert not log.recent
    log.ordered(Order(7, "restart", (), "bob"), "given")
    assert log.recent[0]["id"] == 1
    EventLog(Watchers()).resume()  # nothing to go on from

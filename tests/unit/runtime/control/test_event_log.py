"""The last hour: what is kept, and in which pieces it is answered."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import SwitchFinished
from llmux.core.records import ModelRecord, Serving, State, Stopped
from llmux.errors import Refused
from llmux.protocol import MAX_LINE, News, Watch
from llmux.runtime.control import event_log
from llmux.runtime.control.event_log import EventLog
from llmux.runtime.control.watchers import Watchers
from tests.twins.disk import MemoryEvents


def state(phase: Any = None, **waiting: int) -> State:
    models = {
        name: ModelRecord(ModelConfig(name, f"models/{name}"), phase=phase or Stopped())
        for name in ("a", "b")
    }
    demands = MappingProxyType({n: WorkerDemand(waiting=count) for n, count in waiting.items()})
    return State(
        Config(), 1, "e", models=MappingProxyType(models), demands=demands,
        workers=MappingProxyType({"w": Worker(demands=demands)}),
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(event_log, "time", lambda: now[0])
    return now


def queues(log: EventLog) -> list[tuple[str, int]]:
    return [(e["model"], e["waiting"]) for e in log.recent if e["type"] == "queue"]


def test_lengths_of_queues_are_noted_once_a_second_and_their_end_at_once(
    clock: list[float],
) -> None:
    log = EventLog(Watchers())
    steps = [(0, 1), (0.1, 2), (0.5, 3), (1.2, 4), (1.3, 0), (1.4, 1)]
    former = state()
    for passed, waiting in steps:
        clock[0] = 1000.0 + passed
        present = state(a=waiting)
        log.published(former, present)
        former = present
    assert queues(log) == [("a", 1), ("a", 4), ("a", 0), ("a", 1)]


def test_a_queue_of_a_worker_that_left_has_ended(clock: list[float]) -> None:
    log = EventLog(Watchers())
    log.published(state(), state(a=2, b=1))
    log.published(state(a=2, b=1), replace(state(), workers=MappingProxyType({})))
    assert sorted(queues(log)) == [("a", 0), ("a", 2), ("b", 0), ("b", 1)]


def test_who_follows_events_hears_of_no_queue(clock: list[float]) -> None:
    watchers = Watchers()
    heard: dict[str, list[News]] = {"events": [], "timeline": []}
    for topic, news in heard.items():
        watchers.watch(topic, Watch(topic), news.append)
    log = EventLog(watchers)
    log.published(state(), state(a=1))
    log.published(state(), state(Serving("e1", 0.0)))
    assert {one.item["type"] for one in heard["events"]} == {"transition"}
    assert {one.item["type"] for one in heard["timeline"]} == {"queue", "transition"}
    assert "queue" not in {e["type"] for e in log.answer({})["events"]}
    with_queues = log.answer({"after": 0, "queues": True})
    assert {e["type"] for e in with_queues["events"]} == {"queue", "transition"}


def test_an_hour_is_kept(clock: list[float]) -> None:
    log = EventLog(Watchers())
    for passed in (0, 1800, 3599, 3602):
        clock[0] = 1000.0 + passed
        log.published(state(), state(Serving("e1", 0.0)))
    assert min(e["time"] for e in log.recent) == 1000.0 + 1800


def test_pages_hold_everything_and_fit_into_a_message(clock: list[float]) -> None:
    log = EventLog(Watchers())
    for _ in range(3000):
        log.published(state(), state(Serving("e1", 0.0)))
    seen, pages = 0, 0
    more = True
    while more:
        answer = log.answer({"after": seen})
        assert len(json.dumps(answer)) < MAX_LINE
        assert [e["id"] for e in answer["events"]] == list(
            range(seen + 1, seen + 1 + len(answer["events"]))
        )
        seen, more, pages = answer["events"][-1]["id"], answer["more"], pages + 1
    assert seen == 6000 and pages > 1


@pytest.mark.parametrize("after", ["1", True, 1.5])
def test_after_is_a_number(after: object) -> None:
    with pytest.raises(Refused, match="after"):
        EventLog(Watchers()).answer({"after": after})


# ---- over a restart ------------------------------------------------------------------------------


def restarted(store: MemoryEvents, found: State) -> EventLog:
    """What the supervisor does when it starts and adopts ``found``."""
    log = EventLog(Watchers(), store)
    log.resume()
    log.published(state(), found)
    log.adopted(found)
    return log


def told(log: EventLog, after: int) -> list[tuple[str, str, Any]]:
    """(model, type, to or waiting) of the events newer than number ``after``."""
    return [
        (e["model"], e["type"], e.get("to", e.get("waiting")))
        for e in log.recent
        if e["id"] > after
    ]


def test_the_next_supervisor_goes_on_with_the_events(clock: list[float]) -> None:
    store = MemoryEvents()
    log = EventLog(Watchers(), store)
    log.published(state(), state(Serving("e1", 0.0)))
    clock[0] += 60
    again = restarted(store, state(Serving("e1", 0.0)))
    assert list(again.recent)[:2] == list(log.recent)
    assert [e["id"] for e in again.recent] == list(range(1, len(again.recent) + 1))
    assert {(e["from"], e["to"]) for e in again.answer({"after": 2})["events"]} == {
        ("stopped", "serving")
    }
    assert store.load() == list(again.recent)


def test_what_was_found_otherwise_is_said(clock: list[float]) -> None:
    """Engines that ended, models that were removed and queues of before."""
    store = MemoryEvents()
    log = EventLog(Watchers(), store)
    former = state(Serving("e1", 0.0), a=3)
    log.published(state(), former)
    log.published(former, state(Serving("e1", 0.0), a=3))
    last = log.recent[-1]["id"]
    found = state()
    found = replace(found, models=MappingProxyType({"a": found.models["a"]}))
    again = EventLog(Watchers(), store)
    again.resume()
    again.adopted(found)
    assert sorted(told(again, last)) == [
        ("a", "queue", 0), ("a", "transition", "stopped"), ("b", "removed", None),
    ]  # fmt: skip
    ended = next(e for e in again.recent if e["id"] > last and e["type"] == "transition")
    assert (ended["from"], ended["reason"]) == ("serving", "found so after a restart")


def test_the_events_of_the_last_hour_only(clock: list[float]) -> None:
    store = MemoryEvents()
    EventLog(Watchers(), store).published(state(), state(Serving("e1", 0.0)))
    clock[0] += event_log.KEEP_SECS + 1
    log = EventLog(Watchers(), store)
    log.resume()
    assert not log.recent
    log.published(state(), state(Serving("e2", 0.0)))
    assert [e["id"] for e in log.recent] == [3, 4], "numbers go on"


def test_a_stored_event_of_another_form_is_left_out(clock: list[float]) -> None:
    whole = {"id": 7, "time": 1000.0, "model": "a", "type": "order"}
    store = MemoryEvents(whole, *({**whole, key: None} for key in whole), {})
    log = EventLog(Watchers(), store)
    log.resume()
    assert list(log.recent) == [whole]


def test_without_room_events_go_on_and_one_warning_says_so(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryEvents()
    log = EventLog(Watchers(), store)
    store.fails = True
    log.published(state(), state(Serving("e1", 0.0)))
    assert len(log.recent) == 2 and len(caplog.records) == 1
    store.fails = False
    log.published(state(), state(Serving("e1", 0.0)))
    assert len(store.lines) == 2


def test_a_switch_says_what_each_part_of_it_took(clock: list[float]) -> None:
    log = EventLog(Watchers())
    log.switched(SwitchFinished("a", ("b",), True, 10.0, 10.25, 12.0, 16.00001))
    assert log.recent[-1] == {
        "id": 1, "time": 1000.0, "model": "a", "type": "switch", "victims": ["b"], "cold": True,
        "drain_secs": 0.25, "park_secs": 1.75, "up_secs": 4.0, "duration_secs": 6.0,
    }  # fmt: skip


def test_a_model_that_is_added_and_one_that_stays_as_it_is(clock: list[float]) -> None:
    log = EventLog(Watchers())
    both = state()
    one = replace(both, models=MappingProxyType({"a": both.models["a"]}))
    log.published(one, both)
    assert [(e["model"], e["type"], e["to"]) for e in log.recent] == [
        ("b", "transition", "stopped")
    ]
    log.published(both, one)
    assert (log.recent[-1]["model"], log.recent[-1]["type"]) == ("b", "removed")


NINES = int("9" * 4300)  # one more has too many digits to be written


@pytest.mark.parametrize(
    "damaged",
    [
        {"id": NINES}, {"id": 10**30}, {"id": 2**63 - 1}, {"id": -1}, {"id": True}, {"id": 1.0},
        {"time": 10**400}, {"time": 1e300}, {"time": -1}, {"time": "now"},
        {"duration_secs": "x"}, {"duration_secs": 1e300}, {"gpus": "y"}, {"gpus": [NINES]},
        {"to": ["serving"]}, {"reason": {}}, {"victims": [1]}, {"cold": 1}, {"waiting": [1]},
    ],
)  # fmt: skip
def test_a_damaged_event_is_left_out_and_numbers_go_on_from_the_others(
    clock: list[float], caplog: pytest.LogCaptureFixture, damaged: dict[str, object]
) -> None:
    whole = {"id": 7, "time": 1000.0, "model": "a", "type": "transition", "to": "serving"}
    log = EventLog(Watchers(), MemoryEvents(whole | damaged, whole, whole | damaged))
    log.resume()
    assert list(log.recent) == [whole]
    assert caplog.messages == ["2 events of before are damaged, and left out"]
    log.published(state(), state(Serving("e1", 0.0)))
    assert log.recent[-1]["id"] == 9


def test_of_a_kept_event_only_what_is_known_is_told(clock: list[float]) -> None:
    whole = {"id": 7, "time": 1000.0, "model": "a", "type": "of a newer llmux"}
    deep: list[object] = []
    for _ in range(800):
        deep = [deep]
    log = EventLog(Watchers(), MemoryEvents(whole | {"z": deep}))
    log.resume()
    assert list(log.recent) == [whole]

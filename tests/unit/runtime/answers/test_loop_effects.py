"""The loop alone: what it does with each effect, what it notes, whom it tells and wakes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import pytest
from runtime_harness import STOP, in_loop, in_virtual_time, model

from llmux.config.schema import Config
from llmux.core.effects import (
    DropAhead,
    Effect,
    EndReading,
    OrderAnswered,
    Probe,
    ReadAhead,
    ReadWeights,
    RestoreAhead,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
    Verdict,
)
from llmux.core.events import Event, LoadAsked, ModeSet, Tick
from llmux.core.plans import stop_plan
from llmux.core.records import Failed, ModelRecord, Phase, Serving, Starting, State, Stopped
from llmux.errors import StateFileError
from llmux.protocol import Address, Cut, Grant, Message, Refuse, Revoke
from llmux.runtime import loop as loop_module
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.instance import Instance
from llmux.runtime.loop import Loop, orders_changed, phases_changed
from tests.twins.disk import MemoryStore

CONFIG = model("a")
AGAIN = 5000.0  # virtual seconds


class Hands:
    """An executor that only says what it was asked."""

    def __init__(self, post: Callable[[Event], None]) -> None:
        self.post = post
        self.asked: list[tuple[str, Any]] = []
        facts = EngineFacts(address=Address(uds="/a.sock"))
        other = EngineFacts(address=Address(port=4242))
        self.instances = {"a": Instance(CONFIG, facts=facts), "b": Instance(CONFIG, facts=other)}

    def notes(self, name: str) -> Mapping[str, Any]:
        return {"pid": 7} if name == "a" else {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return lambda effect: self.asked.append((name, effect))


class Store(MemoryStore):
    full = False
    tried = 0

    def save(self, document: Mapping[str, Any]) -> None:
        self.tried += 1
        if self.full:
            raise StateFileError("cannot write the notes: no room")
        super().save(document)


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def published(self, old: State, new: State) -> None:
        self.heard.append((old, new))

    def switched(self, switch: SwitchFinished) -> None:
        self.heard.append(switch)


def state_of(**phases: Phase) -> State:
    models = {name: ModelRecord(model(name), phase) for name, phase in phases.items()}
    config = Config(models=MappingProxyType({name: r.config for name, r in models.items()}))
    return State(config, 1, "e", models=MappingProxyType(models))


class Bench:
    def __init__(self, state: State | None = None) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.store, self.listener = Store(), Listener()
        self.loop = Loop(
            state_of(a=Stopped()) if state is None else state,
            executor=lambda post: cast(Executor, Hands(post)),
            store=self.store,
            send=lambda worker, message: self.sent.append((worker, message)),
        )
        self.loop.listeners.append(self.listener)

    @property
    def hands(self) -> Hands:
        return cast(Hands, self.loop.executor)

    def enter(self, state: State | None = None, *effects: Effect) -> None:
        self.loop.enter(self.loop.state if state is None else state, effects)


@pytest.mark.parametrize(
    ("effect", "asked"),
    [
        (RunPlan("a", 1, stop_plan(CONFIG), CONFIG), "run"),
        (Probe("a", "e1", CONFIG, 3.0), "probe"),
        (ReadAhead("a", CONFIG), "read_ahead"),
        (ReadWeights("a", CONFIG), "read_weights"),
        (RestoreAhead("a", CONFIG, (), (), 3.0), "restore_ahead"),
        (DropAhead("a"), "drop_ahead"),
    ],
)
def test_what_engines_have_to_do_goes_to_the_executor(effect: Effect, asked: str) -> None:
    bench = Bench()
    bench.enter(None, effect, EndReading("b"))
    assert bench.hands.asked == [(asked, effect), ("end_reading", "b")]
    assert bench.sent == []


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (SendGrant("w", "a", "e1"), Grant("a", "e1", "/a.sock", None)),
        (SendGrant("w", "b", "e1"), Grant("b", "e1", None, 4242)),
        (SendRevoke("w", "a", "e1"), Revoke("a", "e1", False)),
        (SendRevoke("w", "a", "e1", True), Revoke("a", "e1", True)),
        (
            SendCut("w", "a", "e1"),
            Cut("a", "e1", "cut_by_switch",
                'model "a" had to make room before this answer was complete'),
        ),
        (SendCut("w", "a", "e1", "it died"), Cut("a", "e1", "engine_died", "it died")),
        (
            SendRefuse("w", "a", "wait_expired", "too late", 3.0),
            Refuse("a", "wait_expired", "too late", 3.0),
        ),
    ],
)  # fmt: skip
def test_what_workers_have_to_know_is_sent_to_the_one_that_is_named(
    effect: Effect, message: Message
) -> None:
    bench = Bench()
    bench.enter(None, effect)
    assert bench.sent == [("w", message)]
    assert bench.hands.asked == []


class Fails(Listener):
    def published(self, old: State, new: State) -> None:
        raise ValueError("Exceeds the limit (4300 digits)")

    def switched(self, switch: SwitchFinished) -> None:
        raise RecursionError


def test_a_listener_that_fails_ends_nothing_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    bench.loop.listeners.insert(0, Fails())
    switch = SwitchFinished("a", (), True, 0.0, 0.0, 0.0, 1.0)
    former, present = bench.loop.state, state_of(a=Stopped())
    bench.enter(present, switch)
    assert bench.listener.heard == [(former, present), switch]
    assert caplog.messages == ["cannot tell Fails what changed"] * 2


def test_a_switch_is_told_to_all_and_kept_by_its_model() -> None:
    bench = Bench()
    switch = SwitchFinished("a", (), True, 0.0, 0.0, 0.0, 1.0)
    second = Listener()
    bench.loop.listeners.append(second)
    bench.enter(None, switch)
    assert bench.listener.heard[-1] is switch and second.heard[-1] is switch
    assert bench.loop.last_switches == {"a": switch}


@in_loop
async def test_each_order_gets_its_own_answer_and_one_that_left_gets_none() -> None:
    bench = Bench()
    first, second, third = (asyncio.create_task(bench.loop.order(LoadAsked("a"))) for _ in range(3))
    await asyncio.sleep(0)
    asked = cast(Sequence[LoadAsked], bench.loop._events)
    assert [event.order for event in asked] == [1, 2, 3]
    third.cancel()
    await asyncio.wait([third])
    answer = OrderAnswered(2, Verdict.ALREADY)
    bench.enter(None, answer, answer, OrderAnswered(3, Verdict.ALREADY))
    assert await second is answer
    assert not first.done()
    bench.enter(None, OrderAnswered(1, Verdict.ACCEPTED))
    assert (await first).verdict is Verdict.ACCEPTED
    assert bench.loop._orders == {}


# ---- notes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "phases", "orders"),
    [
        ({}, False, False),
        ({"generation": 5}, False, False),
        ({"manual": True}, False, True),
        ({"pinned": "a"}, False, True),
        ({"pins": MappingProxyType({"a": 9.0})}, False, True),
        ({"models": {"a": {"eviction_override": STOP}}}, False, True),
        ({"models": {"a": {"failures": 3}}}, False, False),
        ({"models": {"a": {"phase": Serving("e", 1.0)}}}, True, False),
        ({"models": {"b": {}}}, True, False),
    ],
)
def test_only_what_a_successor_needs_is_written(
    change: dict[str, Any], phases: bool, orders: bool
) -> None:
    bench = Bench()
    old = bench.loop.state
    if (models := change.get("models")) is not None:
        records = dict(old.models)
        for name, facts in models.items():
            records[name] = replace(records.get(name, ModelRecord(model(name))), **facts)
        change = {"models": MappingProxyType(records)}
    new = replace(old, **change)
    assert (phases_changed(old, new), orders_changed(old, new)) == (phases, orders)
    bench.enter(new)
    assert bench.store.saves == (1 if phases or orders else 0)
    assert bench.listener.heard == [(old, new)] and bench.loop.state is new
    if phases or orders:
        assert bench.store.document["manual"] == new.manual


@in_virtual_time
async def test_notes_that_cannot_be_written_are_tried_again_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loop_module, "SAVE_AGAIN_SECS", AGAIN)
    bench = Bench()
    bench.store.full = True
    for manual in (True, False):
        bench.enter(replace(bench.loop.state, manual=manual))
    assert bench.store.tried == 2
    await asyncio.sleep(2.5 * AGAIN)
    assert bench.store.tried == 4, "the second failure has put off the first's next try"
    assert caplog.messages == ["cannot write the notes: no room"]
    bench.store.full = False
    await asyncio.sleep(10 * AGAIN)
    assert (bench.store.tried, bench.store.saves) == (5, 1)
    assert caplog.messages[1:] == ["the state file is written again"]
    bench.store.full = True
    bench.enter(replace(bench.loop.state, manual=True))
    bench.store.full = False
    bench.enter(replace(bench.loop.state, pinned="a"))
    await asyncio.sleep(10 * AGAIN)
    assert bench.store.tried == 7, "what is written needs no other try"
    assert len(caplog.messages) == 4


def test_a_mode_that_is_lent_is_not_noted_until_it_is_given_back() -> None:
    bench = Bench()
    before = bench.loop.lend_mode(ModeSet(True, "a"))
    assert before == ModeSet(False, None)
    assert bench.loop._events == [ModeSet(True, "a")]

    def entered(manual: bool, pinned: str | None) -> tuple[bool, str | None]:
        bench.enter(replace(bench.loop.state, manual=manual, pinned=pinned))
        return bench.store.document["manual"], bench.store.document["pinned"]

    assert entered(True, "a") == (False, None)
    assert entered(False, None) == (False, None)  # given back
    assert entered(True, "b") == (True, "b")
    assert bench.loop.lend_mode(ModeSet(True, "b")) == ModeSet(True, "b")
    assert entered(True, "a") == (True, "a"), "the same mode is not lent"


# ---- the journal ---------------------------------------------------------------------------------


def test_each_transition_is_a_line_with_its_reason_and_a_failure_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    still = Serving("e", 0.0)
    bench = Bench(state_of(still=still, a=Stopped(), b=Stopped(), c=still, gone=Stopped()))
    new = state_of(
        still=replace(still, since=5.0), a=Starting(1, 0.0, "its image failed"),
        b=Failed(0.0, 1.0, "no memory"), c=Stopped(), new=Serving("e", 0.0),
    )  # fmt: skip
    bench.enter(new)
    assert caplog.messages == [
        "gone: gone, it was removed from the configuration",
        "a: stopped → starting (its image failed)",
        "b: stopped → failed (no memory)",
        "c: serving → stopped",
        "new: unknown → serving",
    ]
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO", "WARNING", "INFO", "INFO"]
    facts = [
        [getattr(record, name) for name in ("model", "from", "to", "reason")]
        for record in caplog.records[1:]
    ]
    assert facts == [
        ["a", "stopped", "starting", "its image failed"], ["b", "stopped", "failed", "no memory"],
        ["c", "serving", "stopped", ""], ["new", "unknown", "serving", ""],
    ]  # fmt: skip


# ---- waiting -------------------------------------------------------------------------------------


@in_virtual_time
async def test_who_waits_is_woken_by_the_first_state_that_fits_and_by_no_other() -> None:
    bench = Bench()
    first = bench.loop.state
    assert await bench.loop.wait_for(lambda state: state is first, 5.0) is first
    waiting = [
        asyncio.create_task(bench.loop.wait_for(lambda s, n=n: s.generation >= n, 50.0))  # type: ignore[misc]
        for n in (1, 2)
    ]
    with pytest.raises(TimeoutError):
        await bench.loop.wait_for(lambda _: False, 1.0)
    for generation in (1, 2, 3):
        bench.enter(replace(bench.loop.state, generation=generation))
    assert [(await task).generation for task in waiting] == [1, 2]
    assert bench.loop._waiters == set()


@in_virtual_time
async def test_events_are_taken_together_and_a_tick_comes_in_its_time() -> None:
    bench = Bench()
    loop = bench.loop
    for event in (Tick(), LoadAsked("a"), Tick()):
        loop.post(event)
    assert loop.pending == 3
    assert await loop._arrivals() == [Tick(), LoadAsked("a"), Tick()]
    assert loop.pending == 0
    loop.state = replace(loop.state, wakeup=0.0)
    assert await loop._arrivals() == [Tick()]
    loop.state = replace(loop.state, wakeup=None)
    arriving = asyncio.create_task(loop._arrivals())
    await asyncio.sleep(1000.0)
    assert not arriving.done(), "without a time there is none"
    loop.post(LoadAsked("a"))
    assert await arriving == [LoadAsked("a")]
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(1.0)
    assert loop.turned == 0
    loop.post(Tick())
    await asyncio.sleep(1.0)
    assert loop.turned == 1
    running.cancel()
    await asyncio.wait([running])


def test_notes_hold_what_the_executor_knows_beside_the_state() -> None:
    bench = Bench(state_of(a=Stopped(), b=Stopped()))
    bench.enter(state_of(a=Serving("e1", 2.0), b=Stopped()))
    assert bench.store.document["models"]["a"] == {
        "pid": 7, "state": "serving", "gpus": [], "since": 2.0, "epoch": "e1"
    }  # fmt: skip
    assert bench.store.document["models"]["b"] == {"state": "stopped", "gpus": []}

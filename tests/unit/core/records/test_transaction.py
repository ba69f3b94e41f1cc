"""The working copy of the state: what each change of it leaves behind in the next state."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from core_harness import CHECKPOINT, DISCARD, OFFLOAD, Core, config_of, model

from llmux.core.demand.usage import Usage
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import (
    DropAhead,
    Effect,
    EndReading,
    OrderAnswered,
    Probe,
    ReadWeights,
    RunPlan,
    Verdict,
)
from llmux.core.plans import PROBE_SECS, stop_plan
from llmux.core.records import (
    Draining,
    Failed,
    Parked,
    Phase,
    Reservation,
    Serving,
    Starting,
    State,
    Stopped,
)
from llmux.core.reducer import initial, reduce
from llmux.core.transaction import OVERDUE_SECS, Transaction
from llmux.errors import InvariantError, Reason

NOW = 100.0
UP = Serving("t.1", 50.0)


def state_of(*phases: Phase, **facts: Any) -> State:
    """Models a, b, … in these phases."""
    names = "abcd"[: max(1, len(phases))]
    state = initial(config_of(*(model(n) for n in names)), gpu_count=1, epoch_prefix="t")
    models = {
        name: replace(state.models[name], phase=phase)
        for name, phase in zip(names, phases or (Stopped(),), strict=True)
    }
    return replace(state, models=MappingProxyType(models), **facts)


def transaction(*phases: Phase, **facts: Any) -> Transaction:
    return Transaction(state_of(*phases, **facts), NOW)


def effects(tx: Transaction) -> tuple[Effect, ...]:
    return tx.finish()[1]


# ---- the whole ----------------------------------------------------------------------------------


def test_what_nothing_happened_to_stays_as_it_is() -> None:
    demand = WorkerDemand(2, 90.0, 1)
    state = state_of(
        UP,
        workers={"w": Worker({"a": "t.1"}, {"a": demand})},
        demands={"a": demand},
        wants={"a": 80.0},
        reservations={"a": Reservation(80.0, 80.0)},
        usage={"a": Usage(90.0, rate=2.0)},
        costs={("a", "start"): 12.0},
        manual=True,
        pinned="a",
        memory_short=True,
        pins={"a": math.inf},
        next_op=7,
        next_epoch=9,
        generation=41,
        wakeup=95.0,
    )
    assert Transaction(state, NOW).finish() == (replace(state, generation=42, wakeup=None), ())


def test_operations_and_epochs_are_numbered_through_all_reductions() -> None:
    tx = transaction(next_op=7, next_epoch=9)
    assert [tx.operation(), tx.operation()] == [7, 8]
    assert [tx.epoch(), tx.epoch()] == ["t.9", "t.10"]
    after = Transaction(tx.finish()[0], NOW)
    assert (after.operation(), after.epoch()) == (9, "t.11")


@pytest.mark.parametrize("times", [(5.0, 3.0, 4.0), (3.0, 5.0, 4.0), (4.0, 5.0, 3.0)])
def test_the_next_tick_is_the_soonest_that_was_asked_for(times: tuple[float, ...]) -> None:
    tx = transaction()
    for time in times:
        tx.wake_at(time)
    assert tx.finish()[0].wakeup == 3.0


def test_a_new_configuration_takes_its_policy_with_it_and_judges_all_who_wait_anew() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    tx = Transaction(core.state, NOW)
    assert tx.waiters
    tx.configure(core.state.config)
    assert tx.waiters, "the same"
    other = config_of(model("a"), max_wait_secs=3.0)
    tx.configure(other)
    assert (tx.config, tx.waiters) == (other, {})
    assert tx.policy == core.state.policy_of(other.policy)
    assert tx.finish()[0].config is other


def test_an_event_of_no_known_kind_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        reduce(state_of(), object(), NOW)  # type: ignore[arg-type]


# ---- models -------------------------------------------------------------------------------------


def test_models_are_found_by_their_phase_in_the_order_of_all() -> None:
    tx = transaction(Starting(1, 50.0), UP, Starting(2, 60.0), Stopped())
    assert [name for name, _ in tx.at(Starting)] == ["a", "c"]
    assert [name for name, _ in tx.at(Serving, Starting)] == ["a", "b", "c"]
    assert tx.at(Failed) == tx.at(Failed, Parked) == []
    tx.move("a", UP)
    tx.put(replace(tx.models["b"], failures=3))
    assert [(name, record.failures) for name, record in tx.at(Serving)] == [("a", 0), ("b", 3)]
    tx.forget("d")
    assert tx.at(Stopped) == []
    tx.add(replace(tx.models["b"], config=model("e"), phase=Stopped()))
    assert [name for name, _ in tx.at(Stopped)] == ["e"]
    assert list(tx.finish()[0].models) == ["a", "b", "c", "e"]


def test_a_state_changes_by_a_move_alone_and_only_as_it_may() -> None:
    tx = transaction(UP)
    with pytest.raises(InvariantError, match="a changes its state without a move"):
        tx.put(replace(tx.models["a"], phase=Stopped()))
    with pytest.raises(InvariantError, match="a cannot go serving → parked"):
        tx.move("a", Parked(OFFLOAD, NOW))
    tx.move("a", Serving("t.2", NOW))  # the same state
    assert tx.models["a"].phase == Serving("t.2", NOW)
    tx.found("a", Parked(OFFLOAD, NOW))
    assert tx.finish()[0].models["a"].phase == Parked(OFFLOAD, NOW)


def test_of_a_forgotten_model_nothing_is_left() -> None:
    tx = transaction(
        Stopped(),
        UP,
        wants={"a": 80.0},
        pins={"a": math.inf, "b": math.inf},
        usage={"a": Usage(), "b": Usage()},
        reservations={"a": Reservation(80.0, 80.0, loading=True, ahead=True)},
    )
    tx.answer_load_when_decided(5, "a")
    tx.forget("a")
    state, done = tx.finish()
    removed = OrderAnswered(5, Verdict.REFUSED, Reason.UNKNOWN_MODEL, 'the model "a" was removed')
    assert done == (DropAhead("a"), EndReading("a"), removed)
    assert (set(state.models), dict(state.wants), dict(state.reservations)) == ({"b"}, {}, {})
    assert (set(state.pins), set(state.usage)) == ({"b"}, {"b"})


@pytest.mark.parametrize(
    ("phase", "may"),
    [
        (Stopped(), True), (Failed(1.0, 2.0, ""), True), (Failed(1.0, 2.0, "", held=True), False),
        (UP, False), (Parked(OFFLOAD, 1.0), False),
    ],
)  # fmt: skip
def test_only_what_has_no_process_is_forgotten(phase: Phase, may: bool) -> None:
    assert transaction(phase).can_forget("a") is may


def test_an_operation_has_a_deadline_behind_those_of_its_steps() -> None:
    tx = transaction(Starting(7, NOW))
    record = replace(tx.models["a"], gpus=(3,), trial=DISCARD)
    tx.put(record)
    plan = stop_plan(record.config)
    tx.run("a", 7, plan)
    state, done = tx.finish()
    due = NOW + plan.deadline + OVERDUE_SECS
    assert done == (RunPlan("a", 7, plan, record.engine, (3,)),)
    assert record.engine.eviction == DISCARD
    assert (state.models["a"].overdue_at, state.wakeup) == (due, due)


@pytest.mark.parametrize(
    ("limit", "stalled", "seconds"),
    [
        (30.0, True, 15.0), (30.0, False, PROBE_SECS), (120.0, True, 60.0),
        (120.0, False, PROBE_SECS), (12.0, False, 12.0), (0.0, False, PROBE_SECS),
    ],
)  # fmt: skip
def test_a_sign_of_life_is_waited_for_within_the_stall_timeout(
    limit: float, stalled: bool, seconds: float
) -> None:
    tx = transaction(UP)
    config = replace(tx.models["a"].config, stall_timeout_secs=limit)
    tx.put(replace(tx.models["a"], config=config))
    for _ in range(2):  # one look at a time
        tx.suspect("a", stalled=stalled)
    record = tx.models["a"]
    assert effects(tx) == (Probe("a", "t.1", record.engine, seconds, stalled),)
    assert (record.probing, record.probed_at) == (True, NOW)


def test_by_itself_a_suspicion_is_of_a_broken_connection_and_of_what_serves() -> None:
    tx = transaction(UP, Stopped(), Draining("t.2", 1.0, 2.0, 3.0, OFFLOAD, None))
    for name in "abc":
        tx.suspect(name)
    assert [(e.model, e.epoch, e.stalled) for e in effects(tx) if isinstance(e, Probe)] == [
        ("a", "t.1", False),
        ("c", "t.2", False),
    ]
    assert not tx.models["b"].probing


# ---- pins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "kept", "left", "wakeup"),
    [
        ({}, False, set(), None),
        ({"pins": {"a": NOW + 5}}, True, {"a"}, NOW + 5),
        ({"pins": {"a": NOW}}, False, set(), None),
        ({"pins": {"a": NOW}, "pinned": "a"}, True, set(), None),
        ({"pins": {"a": math.inf}}, True, {"a"}, None),
        ({"pins": {"b": NOW + 5}, "pinned": "b"}, False, {"b"}, None),
        ({"pinned": "a"}, True, set(), None),
    ],
)
def test_a_model_is_kept_until_its_pin_ends(
    facts: dict[str, Any], kept: bool, left: set[str], wakeup: float | None
) -> None:
    tx = transaction(UP, UP, **facts)
    assert tx.is_kept("a") is kept
    state, _ = tx.finish()
    assert (set(state.pins), state.wakeup) == (left, wakeup)


def test_pins_are_set_and_taken_back() -> None:
    tx = transaction(UP, UP, pins={"a": NOW + 5})
    tx.pin("a", math.inf)
    tx.pin("b", NOW + 7)
    tx.pin("ghost", math.inf)
    tx.pin("ghost", None)
    assert tx.finish()[0].pins == {"a": math.inf, "b": NOW + 7}
    tx.pin("a", None)
    assert tx.finish()[0].pins == {"b": NOW + 7}


# ---- wants and reservations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "wanted", "oldest"),
    [
        (WorkerDemand(), None, None), (WorkerDemand(1, 90.0), None, 90.0),
        (WorkerDemand(0, 90.0), None, None), (WorkerDemand(), 80.0, 80.0),
        (WorkerDemand(1, 90.0), 80.0, 80.0), (WorkerDemand(1, 90.0), 95.0, 90.0),
    ],
)  # fmt: skip
def test_the_oldest_waiter_is_a_request_or_an_operator(
    demand: WorkerDemand, wanted: float | None, oldest: float | None
) -> None:
    state = state_of(
        demands={"a": demand, "b": WorkerDemand(1, 1.0)}, wants={"a": wanted} if wanted else {}
    )
    assert Transaction(state, NOW).oldest_since("a") == state.oldest_since("a") == oldest
    assert (state.waiting("a"), state.in_flight("a")) == (demand.waiting, demand.in_flight)
    assert (state.waiting("c"), state.in_flight("c"), state.oldest_since("c")) == (0, 0, None)


def test_a_want_begins_now_and_ends_fulfilled_or_not() -> None:
    tx = transaction(Stopped(), Stopped())
    tx.want("a")
    tx.want("b")
    assert tx.finish()[0].wants == {"a": NOW, "b": NOW}
    tx.unwant("b", Reason.PINNED, "no")
    place = Reservation(90.0, 80.0, loading=True)
    tx.reserve("a", place)
    assert tx.reservations == {"a": place}
    assert (tx.fulfil("a"), tx.fulfil("a")) == (place, None)
    state, done = tx.finish()
    assert (dict(state.wants), dict(state.reservations), done) == ({}, {}, (EndReading("a"),))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ()), ({"ahead": True}, (DropAhead("a"),)), ({"loading": True}, (EndReading("a"),)),
        ({"ahead": True, "loading": True}, (DropAhead("a"), EndReading("a"))),
    ],
)  # fmt: skip
def test_who_gives_its_place_up_gives_up_what_was_done_ahead(
    facts: dict[str, bool], expected: tuple[Effect, ...]
) -> None:
    tx = transaction(reservations={"a": Reservation(1.0, 1.0, **facts)})  # type: ignore[arg-type]
    tx.drop_ahead("ghost")
    tx.drop_ahead("a")
    assert tx.reservations["a"].ahead is False
    assert effects(tx) == expected[: int("ahead" in facts)]
    tx.forget_reservation("a")
    tx.forget_reservation("a")
    assert (effects(tx), dict(tx.reservations)) == (expected, {})


@pytest.mark.parametrize(
    ("phase", "image", "reads"),
    [
        (Stopped(), None, True), (Stopped(), CHECKPOINT, True),
        (Stopped(), replace(CHECKPOINT, weights=OFFLOAD.weights), False),
        (Parked(DISCARD, 1.0), None, True), (Parked(OFFLOAD, 1.0), None, False),
        (Parked(OFFLOAD, 1.0), CHECKPOINT, False),
    ],
)  # fmt: skip
def test_weights_are_read_once_where_the_way_back_loads_them(
    phase: Phase, image: Any, reads: bool
) -> None:
    tx = transaction(phase, reservations={"a": Reservation(1.0, 1.0)})
    tx.put(replace(tx.models["a"], image=image))
    for _ in range(2):
        tx.read_weights("a", (3,))
    assert effects(tx) == ((ReadWeights("a", tx.models["a"].engine, (3,)),) if reads else ())
    assert tx.reservations["a"].loading is reads


# ---- orders -------------------------------------------------------------------------------------


def test_only_an_order_with_a_number_is_answered() -> None:
    tx = transaction(UP)
    tx.answer(None, Verdict.ALREADY)
    tx.answer(3, Verdict.ALREADY)
    tx.answer(4, Verdict.REFUSED, "no", Reason.PINNED)
    tx.answer_load_when_decided(None, "a")
    tx.answer_load_when_decided(6, "a")
    assert effects(tx) == (
        OrderAnswered(3, Verdict.ALREADY),
        OrderAnswered(4, Verdict.REFUSED, Reason.PINNED, "no"),
        OrderAnswered(6, Verdict.ACCEPTED),
    )


@pytest.mark.parametrize(
    ("phase", "wants", "verdict"),
    [
        (Stopped(), {"a": 1.0}, Verdict.ACCEPTED), (Stopped(), {}, Verdict.REFUSED),
        (Starting(1, 1.0), {}, Verdict.ACCEPTED), (UP, {}, Verdict.ACCEPTED),
        (Failed(1.0, 2.0, ""), {}, Verdict.REFUSED), (Parked(OFFLOAD, 1.0), {}, Verdict.REFUSED),
    ],
)  # fmt: skip
def test_a_load_is_accepted_where_it_waits_or_the_model_comes(
    phase: Phase, wants: dict[str, float], verdict: Verdict
) -> None:
    tx = transaction(phase, wants=wants)
    if not wants:
        tx.unwant("a", Reason.CANNOT_FIT, "too large")
    tx.answer_load_when_decided(6, "a")
    refused = (Reason.CANNOT_FIT, "too large") if verdict is Verdict.REFUSED else (None, "")
    assert effects(tx) == (OrderAnswered(6, verdict, *refused),)

"""What the gateway's workers hold and ask for, what is learned from it, and who waits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from core_harness import OFFLOAD, config_of, model

from llmux.config.schema import GatewayConfig
from llmux.core.demand.usage import (
    RATE_SECS,
    UNKNOWN_COST_SECS,
    UNUSED,
    WORK_SECS,
    Costs,
    Usage,
    averaged,
)
from llmux.core.demand.workers import (
    NO_DEMAND,
    Worker,
    WorkerDemand,
    busy,
    demand_by_model,
    demand_for,
    holders,
)
from llmux.core.effects import SendGrant, SendRefuse
from llmux.core.policies.base import Waiting
from llmux.core.records import (
    Failed,
    Parked,
    Phase,
    Serving,
    State,
    Stopped,
    coming,
)
from llmux.core.reducer import initial
from llmux.core.transaction import Transaction
from llmux.core.waiting import MANUAL_RETRY_SECS, find_waiting
from llmux.errors import Reason

NOW = 100.0


def state_of(**facts: Any) -> State:
    """a serves, b is stopped."""
    state = initial(config_of(model("a"), model("b")), gpu_count=1, epoch_prefix="t")
    models = {**state.models, "a": replace(state.models["a"], phase=Serving("t.1", 50.0))}
    return replace(state, models=MappingProxyType(models), **facts)


def transaction(**facts: Any) -> Transaction:
    return Transaction(state_of(**facts), NOW)


# ---- workers ------------------------------------------------------------------------------------


def workers() -> dict[str, Worker]:
    return {
        "v": Worker({"a": "t.1", "b": "t.2"}, {"a": WorkerDemand(1, 90.0, 2), "b": WorkerDemand()}),
        "w": Worker({"b": "t.2"}, {"a": WorkerDemand(2, 80.0, 3), "b": WorkerDemand(1, 70.0)}),
        "x": Worker({}, {"b": WorkerDemand(3, 60.0)}),
    }


def test_what_a_worker_holds_is_noted_for_it_alone() -> None:
    tx = transaction(workers=workers())
    tx.hold("v", "a", None)
    tx.hold("v", "a", None)
    tx.hold("x", "a", "t.3")
    held = {name: dict(worker.holds) for name, worker in tx.finish()[0].workers.items()}
    assert held == {"v": {"b": "t.2"}, "w": {"b": "t.2"}, "x": {"a": "t.3"}}
    assert tx.workers["x"].demands == workers()["x"].demands
    tx.release_holds("b")
    assert [dict(worker.holds) for worker in tx.workers.values()] == [{}, {}, {"a": "t.3"}]
    tx.grant("a", "t.4")
    assert [worker.holds["a"] for worker in tx.workers.values()] == ["t.4"] * 3
    assert tx.finish()[1] == tuple(SendGrant(name, "a", "t.4") for name in "vwx")


def test_each_worker_with_requests_that_wait_is_told_of_a_refusal_once() -> None:
    tx = transaction(workers=workers())
    for _ in range(2):
        tx.refuse("b", Reason.CANNOT_FIT, "too large", 3.0)
        tx.refuse("a", Reason.PINNED, "no")
    assert tx.finish()[1] == (
        SendRefuse("w", "b", Reason.CANNOT_FIT.value, "too large", 3.0),
        SendRefuse("x", "b", Reason.CANNOT_FIT.value, "too large", 3.0),
        SendRefuse("v", "a", Reason.PINNED.value, "no"),
        SendRefuse("w", "a", Reason.PINNED.value, "no"),
    )
    assert tx.workers["w"].demands["a"] == WorkerDemand(0, None, 3), "what is in flight goes on"
    assert tx.demand("a") == WorkerDemand(0, None, 5)


def test_the_demand_of_all_workers_is_added_up() -> None:
    first = WorkerDemand(1, 90.0, 2, 3, 4, 5)
    assert demand_for("a", [Worker(demands={"a": first}), Worker()]) is first
    second = WorkerDemand(10, 80.0, 20, 30, 40, 50)
    both = [Worker(demands={"a": first}), Worker(), Worker(demands={"a": second, "b": first})]
    assert demand_for("a", both) == WorkerDemand(11, 80.0, 22, 33, 44, 55)
    assert demand_for("nobody", both) == NO_DEMAND == WorkerDemand(0, None, 0, 0, 0, 0)
    by_model = demand_by_model(dict(zip("vwx", both, strict=True)))
    assert by_model == {"a": WorkerDemand(11, 80.0, 22, 33, 44, 55), "b": first}


@pytest.mark.parametrize(
    ("one", "other", "oldest"),
    [
        (WorkerDemand(0, 10.0), WorkerDemand(1, 20.0), 20.0),  # nobody waits there any more
        (WorkerDemand(1, None), WorkerDemand(1, 20.0), 20.0),
        (WorkerDemand(0, 10.0), WorkerDemand(0, 20.0), None),
        (WorkerDemand(1, 30.0), WorkerDemand(2, 20.0), 20.0),
    ],
)
def test_the_oldest_of_all_workers_is_one_that_waits(
    one: WorkerDemand, other: WorkerDemand, oldest: float | None
) -> None:
    workers = [Worker(demands={"a": one}), Worker(demands={"a": other})]
    assert demand_for("a", workers).oldest_since == oldest


def test_busy_is_who_holds_the_epoch_or_has_requests_of_an_earlier_one() -> None:
    found = {
        "holds": Worker({"a": "t.1"}),
        "earlier": Worker({"a": "t.0"}, {"a": WorkerDemand(in_flight=1)}),
        "waits": Worker({"a": "t.0"}, {"a": WorkerDemand(1, 90.0)}),
        "elsewhere": Worker({"b": "t.1"}, {"b": WorkerDemand(in_flight=1)}),
        "new": Worker(),
    }
    assert holders(found, "a", "t.1") == ["holds"]
    assert busy(found, "a", "t.1") == ["holds", "earlier"]


# ---- what is learned of use ---------------------------------------------------------------------


def test_arrivals_and_answers_are_forgotten_with_time() -> None:
    usage = Usage(at=10.0, rate=2.0, work=40.0, done=20.0, in_flight=3)
    assert (usage.service, UNUSED.service, UNUSED) == (2.0, 1.0, Usage(0.0, 0.0, 1.0, 1.0, 0))
    assert usage.rate_at(10.0 + RATE_SECS) == pytest.approx(2.0 / math.e)
    assert UNUSED.rate_at(1e9) == 0.0
    later = usage.after(10.0 + WORK_SECS, arrived=6, completed=5, in_flight=4, places=2)
    assert (later.at, later.in_flight) == (10.0 + WORK_SECS, 4)
    rate = 2.0 * math.exp(-WORK_SECS / RATE_SECS) + 6 / RATE_SECS
    assert later.rate == pytest.approx(rate)
    assert later.work == pytest.approx(40.0 / math.e + 2 * WORK_SECS), "two at a time"
    assert later.done == pytest.approx(20.0 / math.e + 5)
    idle = replace(usage, done=0.0).after(10.0, arrived=0, completed=0, in_flight=0, places=2)
    assert (idle.rate, idle.work) == (2.0, 40.0)
    assert idle.service > 0
    back = usage.after(5.0, arrived=0, completed=0, in_flight=0, places=2)
    assert (back.at, back.rate, back.work) == (5.0, 2.0, 40.0), "never by a time that ran back"


def used(
    before: WorkerDemand, after: WorkerDemand, *, in_flight: int = 0, places: int = 9
) -> Usage:
    """What is known of the model when one worker's demand changes ten seconds later."""
    usage = Usage(NOW - 10, work=1.0, in_flight=in_flight)
    tx = transaction(workers={"w": Worker({}, {"a": before})}, usage={"a": usage})
    tx.configure(replace(tx.config, gateway=GatewayConfig(max_in_flight=places)))
    tx.set_demand("w", "a", after)
    assert tx.workers["w"].demands["a"] == after == tx.demand("a")
    return tx.usage["a"]


@pytest.mark.parametrize(
    ("before", "after", "arrived", "completed", "in_flight"),
    [
        (WorkerDemand(), WorkerDemand(3, 90.0, 2), 5, 0, 2),
        (WorkerDemand(3, 90.0, 2), WorkerDemand(0, None, 5), 0, 0, 5),
        (WorkerDemand(0, None, 5, 0, 4), WorkerDemand(0, None, 2, 0, 7), 0, 3, 2),
        (WorkerDemand(0, None, 5, 0, 4), WorkerDemand(1, 90.0, 5, 0, 7), 4, 3, 5),
        (WorkerDemand(3, 90.0, 0), WorkerDemand(), 0, 0, 0),  # they gave up
        (WorkerDemand(0, None, 1, 0, 7), WorkerDemand(0, None, 1, 0, 0), 0, 0, 1),  # a new worker
    ],
)
def test_use_follows_from_how_a_workers_demand_changes(
    before: WorkerDemand, after: WorkerDemand, arrived: int, completed: int, in_flight: int
) -> None:
    usage = used(before, after, in_flight=before.in_flight)
    assert usage.rate == pytest.approx(arrived / RATE_SECS)
    kept = math.exp(-10 / WORK_SECS)
    assert usage.done == pytest.approx(kept + completed)
    assert usage.work == pytest.approx(kept + 10.0 * before.in_flight)
    assert (usage.at, usage.in_flight) == (NOW, in_flight)


def test_the_requests_of_all_workers_are_in_flight_together_as_far_as_there_are_places() -> None:
    usage = used(WorkerDemand(in_flight=2), WorkerDemand(in_flight=3), in_flight=6, places=4)
    assert usage.in_flight == 7
    assert usage.work == pytest.approx(math.exp(-10 / WORK_SECS) + 40.0)
    assert used(WorkerDemand(in_flight=2), WorkerDemand(), in_flight=1).in_flight == 0


def test_a_worker_that_is_gone_asks_for_nothing_and_its_requests_have_ended() -> None:
    demand = WorkerDemand(1, 90.0, 2)
    tx = transaction(
        workers={"w": Worker({}, {"a": demand, "ghost": demand}), "v": Worker({}, {"a": demand})},
        usage={"a": Usage(NOW, in_flight=4)},
    )
    tx.remove_worker("w")
    tx.remove_worker("w")
    assert (set(tx.workers), dict(tx.demands)) == ({"v"}, {"a": demand})
    assert {name: usage.in_flight for name, usage in tx.usage.items()} == {"a": 2}
    tx.set_worker("x", Worker({}, {"b": demand}))
    assert dict(tx.demands) == {"a": demand, "b": demand}


def test_costs_are_the_models_own_or_else_those_of_others_or_else_a_guess() -> None:
    costs = Costs({("a", "start"): 10.0, ("b", "start"): 30.0, ("a", "park"): 7.0})
    assert [costs.of("a", "start"), costs.of("c", "start"), costs.of("c", "wake")] == [
        10.0, 20.0, UNKNOWN_COST_SECS,
    ]  # fmt: skip
    costs.learn("c", "wake", 4.0)
    assert costs.of("b", "wake") == 4.0
    costs.learn("b", "start", 40.0)
    assert costs.of("b", "start") == averaged(30.0, 40.0)
    assert costs.of("c", "start") == (10.0 + averaged(30.0, 40.0)) / 2
    assert costs.of("c", "park") == 7.0
    tx = transaction(costs={("a", "start"): 10.0})
    tx.learn_cost("b", "start", 30.0)
    assert (tx.cost("b", "start"), tx.cost("c", "start")) == (30.0, 20.0)
    assert tx.finish()[0].costs == {("a", "start"): 10.0, ("b", "start"): 30.0}


# ---- who waits ----------------------------------------------------------------------------------


def test_who_waits_is_described_by_what_is_known_of_it() -> None:
    usage = Usage(90.0, rate=2.0)
    tx = transaction(
        demands={
            "a": WorkerDemand(0, None, 1),
            "b": WorkerDemand(3, 80.0),
            "ghost": WorkerDemand(1),
        },
        wants={"b": 70.0, "a": 60.0, "gone": 1.0},
        usage={"b": usage},
        costs={("b", coming(None)): 12.0, ("a", coming(None)): 5.0},
    )
    config = replace(model("b"), priority=4)
    tx.put(replace(tx.models["b"], config=config, phase=Stopped(40.0)))
    tx.configure(replace(tx.config, gateway=GatewayConfig(max_in_flight=7)))
    assert find_waiting(tx) == {
        "a": Waiting("a", 0, 60.0, 5.0, UNUSED, 7, 0, 50.0),
        "b": Waiting("b", 3, 70.0, 12.0, usage, 7, 4, 40.0),
    }
    assert tx.finish()[1] == ()


@pytest.mark.parametrize(
    ("phase", "image", "cost"),
    [
        (Stopped(), None, 12.0), (Stopped(), OFFLOAD, 3.0), (Parked(OFFLOAD, 1.0), None, 3.0),
        (Failed(1.0, 2.0, ""), None, 12.0),
    ],
)  # fmt: skip
def test_what_a_return_costs_depends_on_where_it_is(phase: Phase, image: Any, cost: float) -> None:
    costs = {("b", coming(None)): 12.0, ("b", coming(OFFLOAD)): 3.0}
    tx = transaction(demands={"b": WorkerDemand(1, 80.0)}, costs=costs)
    tx.add(replace(tx.models["b"], phase=phase, image=image))
    assert find_waiting(tx)["b"].cost == cost


def waits(**facts: Any) -> tuple[State, Waiting]:
    """The state after it was looked at, and what was found of b."""
    tx = Transaction(replace(state_of(demands={"b": WorkerDemand(1, 80.0)}), **facts), NOW)
    found = find_waiting(tx)
    return tx.finish()[0], found["b"]


@pytest.mark.parametrize(
    "change",
    [
        {"demands": {"b": WorkerDemand(2, 80.0)}}, {"wants": {"b": 70.0}},
        {"usage": {"b": Usage(90.0, 2.0)}}, {"models": None}, {},
    ],
    ids=str,
)  # fmt: skip
def test_one_that_waits_is_looked_at_again_when_anything_about_it_changed(
    change: dict[str, Any],
) -> None:
    state, former = waits(usage={"b": Usage(80.0)})
    if "models" in change:
        record = replace(state.models["b"], phase=Stopped(95.0))
        change = {"models": {**state.models, "b": record}}
    state = replace(state, **change)
    now = find_waiting(Transaction(state, NOW))["b"]
    assert now == find_waiting(Transaction(replace(state, waiters={}), NOW))["b"]
    assert (now is former) is (not change)
    for again in (Transaction(state, NOW), Transaction(state, NOW)):
        again.learn_cost("a", "start", 5.0)
        assert find_waiting(again)["b"].cost == 5.0


def test_one_that_nobody_waits_for_any_more_is_forgotten() -> None:
    state, _ = waits()
    tx = Transaction(replace(state, demands={"b": WorkerDemand(0, 80.0)}), NOW)
    assert (find_waiting(tx), tx.finish()[0].waiters) == ({}, {})


def test_a_model_that_was_removed_is_waited_for_by_nobody() -> None:
    tx = transaction(demands={"b": WorkerDemand(1, 80.0)}, wants={"a": 1.0})
    for name in "ab":
        tx.put(replace(tx.models[name], removed=True))
    assert (find_waiting(tx), tx.finish()[1]) == ({}, ())


@pytest.mark.parametrize(
    ("facts", "found", "refused"),
    [
        ({}, "", "b"), ({"wants": {"b": 70.0}}, "b", ""), ({"pinned": "b"}, "b", ""),
        ({"pinned": "a"}, "a", "b"), ({"manual": False}, "ab", ""),
    ],
)  # fmt: skip
def test_in_manual_mode_only_operators_and_the_pinned_model_are_waited_for(
    facts: dict[str, Any], found: str, refused: str
) -> None:
    demand = {name: WorkerDemand(1, 80.0) for name in "ab"}
    tx = transaction(
        **({"manual": True, "demands": demand, "workers": {"w": Worker({}, demand)}} | facts)
    )
    assert "".join(find_waiting(tx)) == found
    text = 'model "b" is not resident and llmux is in manual mode'
    reason = Reason.MANUAL_MODE.value
    expected = (SendRefuse("w", "b", reason, text, MANUAL_RETRY_SECS),) if refused else ()
    assert tx.finish()[1] == expected


def test_a_removed_model_is_not_said_to_be_in_manual_mode() -> None:
    demand = {"b": WorkerDemand(1, 80.0)}
    tx = transaction(manual=True, demands=demand, workers={"w": Worker({}, demand)})
    tx.put(replace(tx.models["b"], removed=True))
    assert (find_waiting(tx), tx.finish()[1]) == ({}, ())


def test_models_that_wait_are_found_in_one_order_whatever_came_first() -> None:
    tx = transaction(demands={name: WorkerDemand(1, 80.0) for name in "ba"})
    assert list(find_waiting(tx)) == ["a", "b"]

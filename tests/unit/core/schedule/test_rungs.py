"""Rungs of the ladder: which one a model takes when it leaves, and which of those that are parked
goes down when, and how far."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from core_harness import CHECKPOINT, DISCARD, OFFLOAD, STOP, config_of, model

from llmux.config.schema import CheckpointConfig, Eviction, Process, Weights
from llmux.core.demand.usage import Usage
from llmux.core.effects import RunPlan
from llmux.core.ladder import (
    image_fits,
    lower_parked,
    may_choose,
    rung_below,
    rung_for,
    rungs,
    used_bytes,
)
from llmux.core.plans import deepen_plan, stop_plan
from llmux.core.records import (
    Draining,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    Stopping,
    coming,
)
from llmux.core.reducer import initial
from llmux.core.room import Room
from llmux.core.transaction import Transaction

NOW = 1000.0
FROZEN = Eviction(Weights.OFFLOAD, Process.FREEZE)
SUSPENDED = Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND)
IMAGE = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
REST = Parked(OFFLOAD, 900.0)
UP = Serving("t.1", 900.0)


def record(
    name: str, phase: Phase = REST, below: tuple[Eviction, ...] = (STOP,), **own: Any
) -> ModelRecord:
    settings = {k[1:]: v for k, v in own.items() if k[0] == "-"}
    facts = {"gpus": (0,)} | {k: v for k, v in own.items() if k[0] != "-"}
    return ModelRecord(model(name, ladder=below, gpu_memory=0.1, **settings), phase, **facts)


def transaction(
    *records: ModelRecord,
    images: int | None = None,
    policy: dict[str, Any] | None = None,
    **facts: Any,
) -> Transaction:
    config = replace(
        config_of(*(one.config for one in records), **(policy or {})),
        checkpoint=CheckpointConfig(max_bytes=images),
    )
    state = initial(config, gpu_count=2, epoch_prefix="t")
    models = MappingProxyType({one.config.name: one for one in records})
    return Transaction(replace(state, models=models, **facts), NOW)


# ---- which rungs there are ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "override", "expected"),
    [
        ((), None, (OFFLOAD,)), ((FROZEN, STOP), None, (OFFLOAD, FROZEN, STOP)),
        ((FROZEN, STOP), DISCARD, (DISCARD,)), ((STOP,), OFFLOAD, (OFFLOAD,)),
    ],
)  # fmt: skip
def test_the_rungs_of_a_model(
    below: tuple[Eviction, ...], override: Eviction | None, expected: tuple[Eviction, ...]
) -> None:
    one = record("a", below=below, eviction_override=override)
    assert rungs(one) == expected
    assert may_choose(transaction(one), "a") is (len(expected) > 1)


@pytest.mark.parametrize(
    ("present", "below", "images", "next_"),
    [
        (OFFLOAD, (FROZEN, IMAGE, STOP), None, FROZEN),
        (FROZEN, (FROZEN, IMAGE, STOP), None, IMAGE),
        (FROZEN, (FROZEN, SUSPENDED, STOP), None, SUSPENDED),
        (FROZEN, (OFFLOAD, IMAGE, STOP), 10, IMAGE),
        (FROZEN, (FROZEN, IMAGE, STOP), 9, STOP),  # no room for its image
        (FROZEN, (FROZEN, IMAGE), 9, None),
        (OFFLOAD, (FROZEN, STOP), 9, FROZEN),
        (IMAGE, (FROZEN, IMAGE, STOP), None, STOP),
        (OFFLOAD, (CHECKPOINT, STOP), None, STOP),  # it has other weights
        (OFFLOAD, (CHECKPOINT, FROZEN), None, FROZEN),
        (OFFLOAD, (), None, None),
    ],
)
def test_the_next_rung_that_a_parked_engine_reaches_where_it_is(
    present: Eviction, below: tuple[Eviction, ...], images: int | None, next_: Eviction | None
) -> None:
    one = record("a", Parked(present, 900.0), below, parked_bytes=10)
    assert rung_below(transaction(one, images=images), "a") == next_
    failed = replace(one, phase=Parked(present, 900.0, "the disk is full"))
    last = STOP if STOP in below else None
    assert rung_below(transaction(failed, images=images), "a") == last


def test_host_memory_is_used_by_what_is_parked_in_it_or_on_its_way_there() -> None:
    tx = transaction(
        record("a", parked_bytes=1),
        record("b", Parking(1, 950.0, FROZEN), parked_bytes=2),
        record("c", Draining("t.1", 900.0, 950.0, 990.0, SUSPENDED, None), parked_bytes=4),
        record("d", Parked(IMAGE, 900.0), parked_bytes=8),
        record("e", Parking(2, 950.0, STOP), parked_bytes=16),
        record("f", UP, parked_bytes=32),
    )
    assert [used_bytes(tx), used_bytes(tx, "a"), used_bytes(tx, "f")] == [7, 6, 7]


@pytest.mark.parametrize(
    ("budget", "own", "fits"),
    [
        (None, {"image_bytes": 10**15}, True), (20, {"image_bytes": 6}, True),
        (20, {"image_bytes": 7}, False), (20, {"parked_bytes": 7}, False),
        (20, {"parked_bytes": 6}, True), (20, {"image_bytes": 6, "parked_bytes": 99}, True),
        (14, {}, False), (15, {}, True),
    ],
)  # fmt: skip
def test_an_image_has_room_beside_those_that_parked_models_come_back_from(
    budget: int | None, own: dict[str, Any], fits: bool
) -> None:
    tx = transaction(
        record("a", Parked(IMAGE, 900.0), **own),
        record("b", Parked(IMAGE, 900.0), image_bytes=2),
        record("c", Parking(1, 950.0, CHECKPOINT), image_bytes=4),
        record("d", Draining("t.1", 900.0, 950.0, 990.0, IMAGE, None), image_bytes=8),
        record("e", image_bytes=16),
        record("f", UP, image_bytes=32),
        images=budget,
    )
    assert image_fits(tx, "a") is fits


ALL = (IMAGE, DISCARD, STOP)


@pytest.mark.parametrize(
    ("asked", "below", "own", "facts", "rung"),
    [
        (OFFLOAD, ALL, {}, {}, OFFLOAD),
        (DISCARD, ALL, {}, {"memory_short": True}, DISCARD),  # ordered so
        (OFFLOAD, (), {}, {"memory_short": True}, OFFLOAD),  # there is no other
        (OFFLOAD, ALL, {}, {"memory_short": True}, IMAGE),
        (OFFLOAD, ALL, {}, {"memory_short": True, "images": 4}, STOP),
        (OFFLOAD, (DISCARD, STOP), {}, {"memory_short": True}, STOP),
        (OFFLOAD, (STOP, DISCARD), {}, {"memory_short": True}, STOP),
        (OFFLOAD, ALL, {}, {"policy": {"parked_max_bytes": 15}}, OFFLOAD),
        (OFFLOAD, ALL, {}, {"policy": {"parked_max_bytes": 14}}, IMAGE),
        (OFFLOAD, ALL, {}, {"policy": {"parked_max_bytes": 14}, "images": 4}, STOP),
        (OFFLOAD, ALL, {"parked_bytes": 0}, {"policy": {"parked_max_bytes": 10}}, IMAGE),
        (OFFLOAD, ALL, {"parked_bytes": 0}, {"policy": {"parked_max_bytes": 11}}, OFFLOAD),
        (OFFLOAD, (FROZEN,), {}, {"policy": {"parked_max_bytes": 14}}, FROZEN),
    ],
)
def test_the_rung_that_a_model_takes_when_it_leaves(
    asked: Eviction, below: tuple[Eviction, ...], own: dict[str, Any], facts: dict[str, Any],
    rung: Eviction,
) -> None:  # fmt: skip
    one = record("a", UP, below, **({"parked_bytes": 5} | own))
    tx = transaction(one, record("b", parked_bytes=10), **facts)
    assert rung_for(tx, "a", asked) == rung


# ---- going down ---------------------------------------------------------------------------------


def lower(tx: Transaction, *, waiting: str = "") -> list[str]:
    """What is begun, as words."""
    lower_parked(tx, Room(tx.models, 2), waiting)
    return [f"{e.plan.kind} {e.model}" for e in tx.finish()[1] if isinstance(e, RunPlan)]


SHORT: dict[str, Any] = {"memory_short": True}


@pytest.mark.parametrize(
    "first",
    [
        record("a", Parked(IMAGE, 900.0)), record("a", Parked(STOP, 900.0)), record("a", UP),
        record("a", below=()), record("a", park_request=STOP),
    ],
)  # fmt: skip
def test_one_that_stays_keeps_none_behind_it(first: ModelRecord) -> None:
    assert lower(transaction(first, record("b"), **SHORT)) == ["stop b"]


def test_one_that_is_waited_for_or_whose_gpu_is_busy_stays() -> None:
    two = (record("a"), record("b", gpus=(1,)))
    assert lower(transaction(*two, **SHORT)) == ["stop a"]
    assert lower(transaction(*two, **SHORT), waiting="a") == ["stop b"]
    assert lower(transaction(*two, **SHORT), waiting="ab") == []
    thawing = Parking(1, 950.0, OFFLOAD, released_at=960.0)
    assert lower(transaction(*two, record("c", thawing), **SHORT)) == [], "a switch comes first"
    assert lower(transaction(*two, record("c", Starting(1, 950.0)), **SHORT)) == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"memory_short": True}, "host memory is short"),
        ({"policy": {"parked_max_bytes": 9}}, "policy.parked_max_bytes is exceeded"),
        ({"policy": {"parked_max_bytes": 9}, "memory_short": True}, "host memory is short"),
        ({"policy": {"parked_max_bytes": 10}}, None),
        ({"policy": {"idle_timeout_secs": 100.0}}, "not used"),
        ({"policy": {"idle_timeout_secs": 101.0}}, None),
        ({}, None),
    ],
)
def test_why_a_parked_engine_is_stopped(facts: dict[str, Any], reason: str | None) -> None:
    tx = transaction(record("a", parked_bytes=10), **facts)
    assert lower(tx) == (["stop a"] if reason else [])
    if reason:
        assert tx.models["a"].phase == Stopping(1, NOW, reason, 0.03, was_parked=True)
        (plan,) = [e.plan for e in tx.finish()[1] if isinstance(e, RunPlan)]
        assert plan == stop_plan(tx.models["a"].config, grace=True)
    late = facts.get("policy", {}).get("idle_timeout_secs") == 101.0
    assert (tx.finish()[0].wakeup == 1001.0) is late


def test_going_further_down_is_a_park_of_its_own() -> None:
    tx = transaction(record("a", below=(FROZEN, STOP)), **SHORT)
    assert lower(tx) == ["park a"]
    assert tx.models["a"].phase == Parking(1, NOW, FROZEN, share=0.03)
    (plan,) = [e.plan for e in tx.finish()[1] if isinstance(e, RunPlan)]
    assert plan == deepen_plan(tx.models["a"].config, OFFLOAD, FROZEN)


def value(**own: Any) -> dict[str, Any]:
    """A model's rate, seconds of a start and of its wake, bytes, priority and last use."""
    return {
        "rate": 1.0,
        "start": 60.0,
        "wake": 10.0,
        "bytes": 100,
        "-priority": 0,
        "last": 950.0,
    } | own


@pytest.mark.parametrize(
    ("a", "b", "first"),
    [
        (value(), value(), "a"),
        (value(last=951.0), value(), "b"),
        (value(rate=2.0), value(last=960.0), "b"),
        (value(start=61.0), value(last=960.0), "b"),
        (value(wake=9.0), value(last=960.0), "b"),
        (value(bytes=99), value(last=960.0), "b"),
        (value(**{"-priority": 1}), value(rate=50.0), "b"),
        (value(rate=0.1, start=10.2), value(rate=9.0, start=10.0, last=960.0), "b"),
        (value(rate=0.0), value(rate=9.0, start=5.0, last=960.0), "a"),  # it comes back sooner so
    ],
)
def test_the_least_worth_its_place_goes_first(
    a: dict[str, Any], b: dict[str, Any], first: str
) -> None:
    costs: dict[tuple[str, str], float] = {}
    usage: dict[str, Usage] = {}
    records = []
    for name, of in (("a", a), ("b", b)):
        costs[name, coming(None)], costs[name, coming(OFFLOAD)] = of["start"], of["wake"]
        usage[name] = Usage(NOW, rate=of["rate"])
        facts = {"parked_bytes": of["bytes"], "last_active": of["last"]}
        records.append(record(name, **facts, **{"-priority": of["-priority"]}))
    assert lower(transaction(*records, costs=costs, usage=usage, **SHORT)) == [f"stop {first}"]


def test_what_a_lower_rung_keeps_is_no_loss() -> None:
    """From an image it comes back nearly as soon: its place is worth little."""
    costs = {("a", coming(OFFLOAD)): 1.0, ("a", coming(IMAGE)): 2.0, ("a", coming(None)): 90.0}
    costs |= {("b", coming(OFFLOAD)): 1.0, ("b", coming(None)): 4.0}
    usage = dict.fromkeys("ab", Usage(NOW, rate=1.0))
    two = (record("a", below=(IMAGE,), last_active=960.0), record("b", last_active=950.0))
    assert lower(transaction(*two, costs=costs, usage=usage, **SHORT)) == ["park a"]
    assert lower(transaction(*two, costs=costs, **SHORT)) == ["stop b"], "nobody uses either"

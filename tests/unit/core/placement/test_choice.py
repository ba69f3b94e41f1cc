"""What the present state makes of each GPU: what it costs to empty, whose place is taken there, and
whether a parked engine is given up to start elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from core_harness import CHECKPOINT, OFFLOAD, STOP, Core, model

from llmux.core.demand.usage import UNKNOWN_COST_SECS, Usage
from llmux.core.demand.workers import WorkerDemand
from llmux.core.effects import RunPlan
from llmux.core.placement.choice import Choice
from llmux.core.placement.prices import IN_USE_SECS, Absent, worth_of
from llmux.core.policies.base import Resident, Waiting
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Phase,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    coming,
)
from llmux.core.reducer import initial
from llmux.core.room import Room
from llmux.core.transaction import Transaction

NOW = 1000.0
UP = Serving("e", 900.0)
START_SECS = 60.0


def record(
    name: str, phase: Phase, gpus: tuple[int, ...] = (0,), *, last: float = 900.0, **settings: Any
) -> ModelRecord:
    settings = {"gpus": 1, "gpu_memory": 0.4, "gpu_memory_parked": 0.01} | settings
    return ModelRecord(model(name, **settings), phase, gpus, last_active=last)


def state_of(*records: ModelRecord, gpu_count: int = 2, **facts: Any) -> State:
    core = Core(*(one.config for one in records), gpu_count=gpu_count)
    state = initial(core.state.config, gpu_count=gpu_count, epoch_prefix="t")
    return replace(state, models={one.config.name: one for one in records}, **facts)


def choice_of(state: State) -> tuple[Transaction, Choice]:
    tx = Transaction(state, NOW)
    return tx, Choice(tx, Room(tx.models, state.gpu_count, tx.config.exclusive))


# ---- emptying a GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "waiting", "in_flight", "price"),
    [
        (UP, 0, 0, 1.0),
        (UP, 3, 4, 8.0),
        (Starting(1, 950.0), 0, 0, 2.0),
        (Starting(1, 950.0), 3, 4, 9.0),
        (Parked(OFFLOAD, 950.0), 3, 0, 0.0),  # not resident
        (Draining("e", 900.0, 950.0, 990.0, OFFLOAD, None), 0, 4, 0.0),  # leaves anyway
        (Stopping(1, 950.0, "", 0.4), 0, 0, 0.0),
    ],
)
def test_what_it_costs_to_send_a_model_away(
    phase: Phase, waiting: int, in_flight: int, price: float
) -> None:
    demands = {"a": WorkerDemand(waiting, 950.0 if waiting else None, in_flight)}
    _, choice = choice_of(state_of(record("a", phase), demands=demands))
    assert (choice.making_room(0), choice.making_room(1)) == (price, 0.0)


def test_the_price_of_a_gpu_is_that_of_all_that_live_there() -> None:
    there = (record("a", UP), record("b", Parked(OFFLOAD, 950.0)), record("c", Starting(1, 950.0)))
    _, choice = choice_of(state_of(*there))
    assert choice.making_room(0) == 3.0


@pytest.mark.parametrize(
    ("facts", "price"),
    [
        ({"pins": {"b": math.inf}}, math.inf), ({"pinned": "b"}, math.inf),
        ({"pins": {"p": math.inf}}, 2.0),  # parked, it is in nobody's way
        ({"pins": {"b": NOW}}, 2.0),
    ],
)  # fmt: skip
def test_a_gpu_with_a_kept_model_cannot_be_emptied(facts: dict[str, Any], price: float) -> None:
    there = (record("p", Parked(OFFLOAD, 950.0)), record("a", UP), record("b", UP))
    _, choice = choice_of(state_of(*there, **facts))
    assert choice.making_room(0) == price


def test_a_gpu_was_in_use_when_the_last_resident_model_there_was() -> None:
    _, choice = choice_of(
        state_of(
            record("a", UP, last=700.0),
            record("b", UP, last=800.0),
            record("p", Parked(OFFLOAD, 950.0), last=900.0),
        )
    )
    assert (choice.last_used(0), choice.last_used(1)) == (800.0, 0.0)


# ---- whose place is taken -----------------------------------------------------------------------

USED = Usage(at=NOW, rate=0.5)  # worth half the seconds of its return


@pytest.mark.parametrize(
    ("away", "usage", "lost"),
    [
        (record("away", Stopped(), gpus=()), USED, 30.0),
        (record("away", Failed(900.0, 990.0, "it died"), gpus=()), USED, 30.0),
        (record("away", Parked(OFFLOAD, 900.0), gpus=(0,)), USED, 5.0),  # it wakes sooner
        (record("away", Parked(OFFLOAD, 900.0), gpus=(1,)), USED, 0.0),  # it cannot come here
        (record("away", Stopped(), gpus=(), gpu_memory=0.9), USED, 0.0),  # nor could before
        (record("away", Stopped(), gpus=(), gpu_memory=0.2), USED, 0.0),  # it still can
        (record("away", UP, gpus=(1,)), USED, 0.0),  # it has a place
        (record("away", Stopped(), gpus=(), last=NOW - IN_USE_SECS), USED, 0.0),  # not in use
        (record("away", Stopped(), gpus=(), last=NOW - IN_USE_SECS + 1), USED, 30.0),
        (record("away", Stopped(), gpus=()), None, 0.0),  # nobody ever asked for it
    ],
)  # fmt: skip
def test_whose_place_a_model_would_take(
    away: ModelRecord, usage: Usage | None, lost: float
) -> None:
    costs = {("away", coming(None)): 60.0, ("away", coming(OFFLOAD)): 10.0}
    facts: dict[str, Any] = {"usage": {"away": usage} if usage else {}, "costs": costs}
    new = record("new", Stopped(), gpus=())
    _, choice = choice_of(state_of(new, away, **facts))
    assert choice.displaced(new, 0, 0.7) == lost


@pytest.mark.parametrize(("gpus", "lost"), [((0,), 30.0), ((1,), 0.0), (1, 30.0)])
def test_only_a_model_that_may_live_there_has_a_place_there(
    gpus: tuple[int, ...] | int, lost: float
) -> None:
    away = ModelRecord(model("away", gpus=gpus, gpu_memory=0.4), last_active=900.0)
    new = record("new", Stopped(), gpus=())
    costs = {("away", coming(None)): 60.0}
    _, choice = choice_of(state_of(new, away, usage={"away": USED}, costs=costs))
    assert choice.displaced(new, 0, 0.5) == lost


def test_a_model_takes_no_place_from_itself() -> None:
    new = record("new", Stopped(), gpus=())
    other = record("other", Stopped(), gpus=())
    costs = {("new", coming(None)): 60.0, ("other", coming(None)): 20.0}
    state = state_of(new, other, usage={"new": USED, "other": USED}, costs=costs)
    _, choice = choice_of(state)
    assert choice.displaced(new, 0, 0.4) == 10.0
    assert choice.displaced(other, 0, 0.4) == 30.0
    # a parked one that would move counts where it is, and nowhere else
    parked = replace(new, phase=Parked(OFFLOAD, 900.0), gpus=(0,))
    models = {"new": parked, "other": other}
    _, choice = choice_of(replace(state, models=models))
    started = replace(parked, phase=Stopped(NOW))
    assert (choice.displaced(started, 0, 0.4), choice.displaced(started, 1, 0.4)) == (10.0, 10.0)


def test_what_a_return_takes_is_guessed_before_it_was_measured() -> None:
    new, away = record("new", Stopped(), gpus=()), record("away", Stopped(), gpus=())
    _, choice = choice_of(state_of(new, away, usage={"away": USED}))
    assert choice.displaced(new, 0, 0.4) == UNKNOWN_COST_SECS / 2


def test_worth_is_what_absence_is_expected_to_cost_a_second() -> None:
    assert worth_of(0.25, 8.0) == 2.0
    absent = Absent([(0.4, 2.0), (0.4, 3.0), (0.2, 7.0)])
    assert absent.displaced(0.4, 0.4, 0.0) == 12.0
    assert absent.displaced(0.4, 0.1, 0.0) == 5.0
    assert absent.displaced(0.4, 0.4, 2.0) == 10.0
    assert absent.displaced(0.4, 0.1, 2.0) == 5.0, "one that small has a place in any case"
    assert absent.displaced(0.3, 0.4, 2.0) == 7.0, "one that large had none"
    assert absent.displaced(0.4, 0.4, 50.0) == 0.0
    assert Absent([]).displaced(1.0, 0.5, 0.0) == 0.0
    assert Absent([(0.3, 5.0)]).displaced(1.0, 0.7, 0.0) == 0.0, "just what is left fits"
    assert Absent([(0.4, 0.1), (0.4, 0.2)]).displaced(0.4, 0.4, 0.3) == 0.0, "whatever was rounded"


# ---- giving up a parked engine ------------------------------------------------------------------


def cornered(**settings: Any) -> dict[str, ModelRecord]:
    """a is parked on GPU 0, where ``large`` serves; on GPU 1 there is room beside ``b``."""
    return {
        "a": replace(
            record("a", Parked(OFFLOAD, 900.0), **settings), switched_secs=START_SECS
        ),
        "large": record("large", UP, gpu_memory=0.9),
        "b": record("b", UP, (1,)),
    }  # fmt: skip


def move(
    records: dict[str, ModelRecord], *, alone: bool = False, gpu_count: int = 2, **facts: Any
) -> list[str]:
    """What is begun when ``a`` is wanted; ``alone``: nothing leaves for it at home."""
    costs = {("a", coming(None)): START_SECS}
    tx, choice = choice_of(
        state_of(*records.values(), gpu_count=gpu_count, **({"costs": costs} | facts))
    )
    victims = [] if alone else [Resident("large", 900.0, 0, 900.0)]
    before = [choice.room.free(gpu) for gpu in range(gpu_count)]
    moved = choice.move(Waiting("a", 1, 990.0), victims)
    _, effects = tx.finish()
    plans = [effect for effect in effects if isinstance(effect, RunPlan)]
    assert moved is bool(plans)
    if moved:
        phase = tx.models["a"].phase
        assert isinstance(phase, Stopping)
        assert (phase.reason, phase.was_parked) == ("moves to GPUs that have room", True)
        assert any(step.kind == "terminate" for step in plans[0].plan.steps), "it is well"
        assert not choice.room.may_leave("large")
        after = [choice.room.free(gpu) for gpu in range(1, gpu_count)]
        assert after[-1] == pytest.approx(before[-1] - 0.4), "nobody behind it gets the place"
    return [f"{plan.plan.kind} {plan.model}" for plan in plans]


def test_it_starts_where_there_is_room() -> None:
    assert move(cornered()) == ["stop a"]


Change = Callable[[dict[str, ModelRecord]], dict[str, ModelRecord]]


def changed(name: str, **facts: Any) -> Change:
    return lambda records: records | {name: replace(records[name], **facts)}


def with_config(**settings: Any) -> Change:
    def change(records: dict[str, ModelRecord]) -> dict[str, ModelRecord]:
        one = records["a"]
        return records | {"a": replace(one, config=replace(one.config, **settings))}

    return change


def added(one: ModelRecord) -> Change:
    return lambda records: {**records, one.config.name: one}


@pytest.mark.parametrize(
    "change",
    [
        changed("a", phase=Stopped(900.0), gpus=()),
        with_config(gpus=(0,)),
        with_config(gpu_memory=0.7),
        with_config(gpus=2),
        changed("a", image=CHECKPOINT),
        changed("a", phase=Parked(CHECKPOINT, 900.0)),
        changed("a", switched_secs=START_SECS - 1),
        changed("large", phase=Starting(1, 950.0)),  # its GPU is not quiet
        changed("b", phase=Starting(1, 950.0)),  # nor is the other
        changed("b", phase=Draining("e", 900.0, 950.0, 990.0, STOP, None), config=model("b")),
    ],
)
def test_what_does_not_move(change: Change) -> None:
    assert move(change(cornered())) == []
    assert move(change(cornered()), alone=True) == []


def test_it_does_not_take_the_place_of_one_in_use() -> None:
    other = record("other", Parked(OFFLOAD, 900.0), (1,), gpu_memory=0.5)
    assert move(added(other)(cornered()), usage={"other": USED}) == []
    assert move(added(other)(cornered()), usage={}) == ["stop a"], "nobody asks for it"


def test_it_moves_at_once_where_one_that_stays_is_in_the_way() -> None:
    records = changed("a", switched_secs=0.0)(cornered())
    assert move(records, alone=True) == []
    assert move(records, alone=True, pins={"large": math.inf}) == ["stop a"]
    assert move(records, alone=True, pins={"b": math.inf}) == [], "that one is elsewhere"
    parked = added(record("p", Parked(OFFLOAD, 900.0)))(records)
    assert move(parked, alone=True, pins={"p": math.inf}) == [], "that one does not serve"


def test_it_does_not_move_to_gpus_of_which_one_is_its_own() -> None:
    """Of three GPUs: the one beside ``large`` is its own and has room, and so has the third."""
    records = with_config(gpus=2)(changed("a", gpus=(1, 0))(cornered()))
    records["b"] = replace(records["b"], config=model("b", gpu_memory=0.1))
    assert move(records, gpu_count=3) == []


def test_of_other_gpus_an_empty_one_is_taken() -> None:
    assert move(cornered(), gpu_count=3) == ["stop a"]

"""Decisions on events that come together, and what the policies are told for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from core_harness import CHECKPOINT, FREEZE, OFFLOAD, STOP, WORKER, Core, config_of, model

from llmux.config.schema import GatewayConfig, PolicyConfig, PolicyType
from llmux.core.adopt import Note, adopt
from llmux.core.demand.usage import Usage
from llmux.core.effects import DropAhead, OrderAnswered, ReadAhead, ReadWeights, RunPlan, SendRefuse
from llmux.core.events import (
    ConfigChanged,
    DemandChanged,
    EngineExited,
    Event,
    ImageKnown,
    LoadAsked,
    OperationFinished,
    ParkAsked,
    ParkWithdrawn,
    PinSet,
    Tick,
    WorkerDrained,
    WorkerJoined,
)
from llmux.core.plans import Outcome
from llmux.core.policies.base import Policy, Resident, Waiting
from llmux.core.policies.fifo import Fifo
from llmux.core.records import Failed, Parked, Stopped, Waking, coming, leaving
from llmux.core.reducer import initial, reduce, reduce_all
from llmux.core.schedule import LOOK_AGAIN_SECS
from llmux.core.states import ModelState
from llmux.errors import Reason


def batch(core: Core, *events: Event) -> list[str]:
    """What is begun on these events together."""
    core.state, core.effects = reduce_all(core.state, events, core.now)
    core.running |= {plan.model: plan for plan in core.done(RunPlan)}
    return core.plans()


def asks(name: str, waiting: int = 1, in_flight: int = 0) -> DemandChanged:
    return DemandChanged(WORKER, name, waiting, 100.0 if waiting else None, in_flight, 0)


def drained(core: Core, name: str) -> list[Event]:
    epoch = core.record(name).epoch
    assert epoch is not None
    return [asks(name, 0), WorkerDrained(WORKER, name, epoch)]


def crowd(*names: str, **settings: Any) -> Core:
    """All of them serve on one GPU; ``new`` has room beside them."""
    share = {"gpu_memory": 0.2}
    core = Core(*(model(name, **(share | settings)) for name in names), model("new", **share))
    for name in names:
        core.serve(name)
    return core


# ---- one transition at a time -------------------------------------------------------------------


def test_who_leaves_goes_before_who_comes() -> None:
    core = crowd("a")
    core.demand("a", in_flight=1)
    core.happen(ParkAsked("a"))
    assert batch(core, asks("new"), *drained(core, "a")) == ["park a"]
    assert core.done(ReadWeights) == [ReadWeights("new", core.record("new").config, (0,))]
    core.finish("a")
    assert core.plans() == ["start new"]


def test_of_two_that_may_leave_one_does() -> None:
    core = crowd("a", "b")
    for name in "ab":
        core.demand(name, in_flight=1)
        core.happen(ParkAsked(name))
    assert batch(core, *drained(core, "a"), *drained(core, "b")) == ["park a"]
    core.finish("a")
    assert core.plans() == ["park b"]
    core.finish("b")
    assert batch(core, ParkAsked("a", STOP), ParkAsked("b", STOP)) == ["stop a"]
    core.finish("a")
    assert core.plans() == ["stop b"]


def test_an_order_to_stop_what_is_parked_is_done_once() -> None:
    core = crowd("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.happen(ParkAsked("a", STOP))
    core.finish("a")
    core.demand("a", waiting=1)
    core.finish("a")
    assert core.at("a") is ModelState.SERVING


def test_one_that_is_to_be_stopped_is_not_woken_before() -> None:
    core = crowd("a", eviction=FREEZE)
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("new", waiting=1)
    assert core.at("new") is ModelState.STARTING
    core.happen(ParkAsked("a", STOP))
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.PARKED


def test_a_start_that_is_given_up_leaves_room_that_is_counted_on_at_once() -> None:
    core = Core(model("a"), model("new"))
    core.demand("a", waiting=1)
    core.demand("a")
    core.demand("new", waiting=1)
    assert core.plans() == ["stop a"]
    assert [order.model for order in core.done(ReadWeights)] == ["new"]
    assert set(core.state.reservations) == {"new"}


# ---- those behind -------------------------------------------------------------------------------


def test_the_image_of_one_behind_a_full_queue_is_not_read() -> None:
    core = Core(model("a"), model("b"), model("c"), min_active_secs=60.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1, age=5.0)
    core.put("c", phase=Parked(CHECKPOINT, 50.0), gpus=(0,))
    core.demand("c", waiting=1)
    assert core.done(ReadAhead) == []


def test_an_order_that_is_refused_keeps_no_room_from_those_behind_it() -> None:
    core = Core(model("alpha"), model("beta", gpus=(0, 1)), model("gamma", gpus=(1,)), gpu_count=2)
    core.serve("alpha")
    core.happen(PinSet("alpha", math.inf))
    assert batch(core, LoadAsked("beta", 7), asks("gamma")) == ["start gamma"]
    assert len(core.done(OrderAnswered)) == 1


def test_an_order_that_waited_with_requests_is_refused_when_they_are_gone() -> None:
    core = Core(model("alpha"), model("beta"))
    core.serve("alpha")
    core.happen(PinSet("alpha", math.inf))
    core.demand("beta", waiting=1)
    core.happen(LoadAsked("beta"))
    assert set(core.state.wants) == {"beta"}
    core.demand("beta")
    assert (dict(core.state.wants), dict(core.state.reservations)) == ({}, {})


def test_one_that_moves_keeps_no_room_at_home() -> None:
    core = Core(
        model("a", gpus=1, gpu_memory=0.4, gpu_memory_parked=0.01),
        model("large", gpus=(0,), gpu_memory=0.5), model("late", gpus=(0,), gpu_memory=0.4),
        model("b", gpus=(0,), gpu_memory=0.1), gpu_count=2,
    )  # fmt: skip
    core.serve("large")
    core.serve("b")
    core.happen(PinSet("large", math.inf))
    core.happen(PinSet("b", math.inf))
    core.put("a", phase=Parked(OFFLOAD, 50.0), gpus=(0,))
    core.put("a", config=replace(core.record("a").config, gpu_memory=0.45))
    assert batch(core, asks("a"), asks("late")) == ["stop a"]
    assert [order.model for order in core.done(ReadWeights)] == ["late"]
    core.finish("a")
    assert sorted(core.plans()) == ["start a", "start late"]
    assert core.record("a").gpus == (1,)


# ---- what policies are told ---------------------------------------------------------------------


@dataclass
class Recorder:
    """Fifo, which notes what it is asked."""

    config: PolicyConfig
    asked: list[tuple[Waiting, Resident, list[str]]] = field(default_factory=list)

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        return Fifo(self.config).order(waiting, now)

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return Fifo(self.config).victims(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        self.asked.append((target, victim, [one.model for one in waiting]))
        return now + 1e6


@pytest.mark.parametrize(
    ("eviction", "back"), [(OFFLOAD, coming(OFFLOAD)), (STOP, coming(None))], ids=str
)
def test_what_a_policy_is_told_of_the_model_that_would_leave(eviction: Any, back: str) -> None:
    names = {"a": (0,), "b": (0,), "c": 1, "d": (1,), "e": (0,)}
    models = [model(name, gpus=gpus) for name, gpus in names.items()]
    config = config_of(*models)
    config = replace(config, gateway=GatewayConfig(max_in_flight=7))
    recorder = Recorder(config.policy)

    def policy_of(_: PolicyConfig) -> Policy:
        return recorder

    core = Core(*models, gpu_count=2)
    state = initial(config, gpu_count=2, epoch_prefix="t", policy_of=policy_of)
    core.state, _ = reduce(state, WorkerJoined(WORKER, {}), core.now)
    core.serve("a")
    core.put("a", last_active=90.0, config=model("a", eviction=eviction, priority=3))
    costs = {("a", leaving(eviction)): 4.0, ("a", back): 9.0}
    usage = {**core.state.usage, "a": Usage(100.0, 2.0, work=6.0, done=3.0)}
    demand = {**core.state.demands, "a": replace(core.state.demands["a"], waiting=2, in_flight=5)}
    core.state = replace(core.state, costs=costs, usage=usage, demands=demand)
    core.put("e", phase=Parked(OFFLOAD, 50.0), gpus=(1,))
    recorder.asked.clear()
    batch(core, asks("b"), asks("d"), asks("e"))
    target, victim, rivals = recorder.asked[0]
    assert target.model == "b"
    assert victim == Resident("a", 100.0, 7, 90.0, 4.0, 9.0, 2.0, 2.0, 7, 3)
    assert rivals == ["b"], "d is named for another GPU, and e is parked on it"


def test_a_model_that_was_never_asked_for_leaves_as_well() -> None:
    core = Core(model("a"), model("b"), policy_type=PolicyType.FAIR)
    core.happen(LoadAsked("a"))
    core.finish("a")
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.DRAINING


def test_a_time_that_comes_near_is_not_looked_at_again_and_again() -> None:
    core = Core(model("a", stall_timeout_secs=0.0), model("b"), min_active_secs=60.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    assert core.state.wakeup == 160.0
    core.pass_time(60.0 - LOOK_AGAIN_SECS / 4)
    assert core.state.wakeup == core.now + LOOK_AGAIN_SECS


# ---- back-off -----------------------------------------------------------------------------------


def test_what_is_preloaded_starts_when_its_back_off_is_over() -> None:
    """Nothing said when that was: it came with the next request for any model, or never."""
    config = replace(config_of(model("a")), preload=("a",))
    state = initial(config, gpu_count=1, epoch_prefix="t")
    note = Note(ModelState.FAILED, since=90.0, until=130.0, message="it died", failures=1)
    state, effects = adopt(state, [], [], 100.0, {"a": note})
    assert (effects, dict(state.wants), state.wakeup) == ((), {"a": 100.0}, 130.0)
    state, effects = reduce(state, Tick(), 130.0)
    assert [effect.model for effect in effects if isinstance(effect, RunPlan)] == ["a"]


def test_a_failure_takes_everything_back_that_waited_for_it() -> None:
    core = Core(model("a"), backoff_secs=2.0, backoff_max_secs=1e9)
    core.happen(LoadAsked("a"))
    core.put("a", park_request=STOP, failures=4)
    core.finish("a", Outcome.DOWN, "no weights")
    assert core.record("a").phase == Failed(100.0, 100.0 + 2.0 * 2**4, "no weights")
    assert core.record("a").park_request is None
    assert (dict(core.state.wants), dict(core.state.reservations)) == ({}, {})
    for failures, delay in ((20, 2.0 * 2**20), (30, 2.0 * 2**20)):
        core = Core(model("a"), backoff_secs=2.0, backoff_max_secs=1e9)
        core.demand("a", waiting=1)
        core.put("a", failures=failures)
        core.finish("a", Outcome.DOWN, "no weights")
        assert [one.retry_after for one in core.done(SendRefuse)] == [delay]


def test_requests_wait_with_what_is_preloaded() -> None:
    core = Core(model("a"))
    core.put("a", phase=Failed(90.0, 130.0, "it died"))
    core.state = replace(core.state, wants={"a": 100.0})
    core.demand("a", waiting=1)
    assert (core.effects, core.state.wakeup) == ((), 130.0)
    core.pass_time(30)
    assert core.plans() == ["start a"]


def test_a_request_that_comes_with_the_failure_gets_no_place_in_the_queue() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    ended = OperationFinished("a", core.running["a"].op, Outcome.DOWN, "no weights")
    assert batch(core, ended, asks("a", 2)) == []
    assert [one.reason for one in core.done(SendRefuse)] == [
        Reason.START_FAILED,
        Reason.BACKING_OFF,
    ]
    assert dict(core.state.reservations) == {}


# ---- further rare ways --------------------------------------------------------------------------


def test_a_worker_that_comes_back_has_what_it_had_asked_for_and_holds_what_it_says() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("a", in_flight=3)
    core.happen(WorkerJoined(WORKER, {"b": "old.1"}))
    assert core.state.workers[WORKER].holds == {"a": core.record("a").epoch}
    assert core.state.demands["a"].in_flight == 3
    core.happen(ParkAsked("a"))
    core.happen(WorkerJoined(WORKER, {}))
    core.demand("a")
    assert core.at("a") is ModelState.DRAINING, "its drained is to come"


def test_a_model_that_parks_goes_on_as_it_was_ordered_last() -> None:
    core = Core(model("a"))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.drained("a")
    core.happen(ParkAsked("a", STOP))
    core.put("a", failures=3)
    core.finish("a", Outcome.DOWN, "it died")
    assert core.record("a").phase == Stopped(100.0, "it died")
    assert (core.record("a").failures, core.record("a").park_request) == (0, None)


@pytest.mark.parametrize(
    ("how", "begun"), [(OFFLOAD, []), (FREEZE, []), (STOP, ["stop a"]), (CHECKPOINT, [])]
)
def test_a_parked_model_is_only_ever_stopped_by_an_order(how: Any, begun: list[str]) -> None:
    core = Core(model("a"))
    core.put("a", phase=Parked(OFFLOAD, 50.0), gpus=(0,))
    core.happen(ParkAsked("a", how))
    assert core.plans() == begun


def test_what_was_done_when_its_time_was_over_was_not_cut() -> None:
    core = Core(model("a"), drain_timeout_secs=5.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    core.happen(ParkAsked("a"))
    core.now += 5
    assert batch(core, *drained(core, "a")) == ["park a"]
    assert core.record("a").cut is False


def test_what_was_restored_ahead_is_dropped_by_a_cold_start() -> None:
    """Its image is lost in the moment in which the room is there."""
    core = Core(model("a", eviction=CHECKPOINT), model("b"))
    core.serve("b")
    core.demand("b", in_flight=1)
    core.put("a", image=CHECKPOINT)
    core.demand("a", waiting=1)
    assert core.state.reservations["a"].ahead
    core.drained("b")
    op = core.running["b"].op
    lost = ImageKnown("a", None)
    assert batch(core, lost, OperationFinished("b", op, Outcome.PARKED)) == ["start a"]
    assert core.done(DropAhead) == [DropAhead("a")]


def test_an_order_that_is_withdrawn_from_a_model_on_its_way_out_changes_nothing() -> None:
    core = Core(model("a"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.happen(ConfigChanged(config_of()))
    core.happen(ParkWithdrawn("a"))
    assert core.at("a") is ModelState.DRAINING


def test_only_a_return_for_which_others_left_is_counted_as_one() -> None:
    core = Core(model("a"))
    core.put("a", phase=Parked(OFFLOAD, 50.0), gpus=(0,))
    core.demand("a", waiting=1)
    core.now += 7
    core.finish("a")
    assert core.record("a").switched_secs == 0.0


def test_a_wake_that_an_operator_wants_parked_again_parks_and_forgets_the_order() -> None:
    core = Core(model("a"))
    core.put("a", phase=Waking(1, 50.0, OFFLOAD), gpus=(0,), overdue_at=math.inf, probing=True)
    core.happen(ParkAsked("a"))
    assert core.record("a").park_request == OFFLOAD
    core.state = replace(core.state, next_op=2)
    core.happen(EngineExited("a", "gone"))
    assert core.at("a") is ModelState.WAKING, "its operation sees that"
    core.happen(OperationFinished("a", 1, Outcome.UP))
    assert (core.at("a"), core.record("a").park_request) == (ModelState.DRAINING, None)

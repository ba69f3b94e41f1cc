"""How operations and orders begin and end, field by field."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from core_harness import (
    CHECKPOINT,
    DISCARD,
    OFFLOAD,
    STOP,
    WORKER,
    Core,
    model,
)

from llmux.core.effects import (
    OrderAnswered,
    RunPlan,
    SendCut,
    SendRevoke,
    SwitchFinished,
    Verdict,
)
from llmux.core.events import (
    DemandChanged,
    EngineExited,
    EngineSuspect,
    LoadAsked,
    OperationFinished,
    ParkAsked,
    ParkWithdrawn,
    ProbeFinished,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.operations import CUT_GRACE_SECS, HEALTHY_SECS, UNCUT_DRAINS
from llmux.core.plans import Outcome, park_plan, start_plan, stop_plan, wake_plan
from llmux.core.records import (
    Draining,
    Failed,
    Parked,
    Parking,
    Reservation,
    Serving,
    Starting,
    Stopped,
    Stopping,
    Waking,
)
from llmux.core.states import ModelState
from llmux.errors import InvariantError, Reason


def serving(**policy: Any) -> Core:
    """a serves since 100.0, now it is 150.0; b is stopped."""
    core = Core(model("a"), model("b"), **policy)
    core.serve("a")
    core.now = 150.0
    return core


KILL = "engine cannot be killed"


def unknown(name: str) -> tuple[Verdict, Reason, str]:
    return Verdict.REFUSED, Reason.UNKNOWN_MODEL, f'the model "{name}" does not exist'


# ---- how operations begin -----------------------------------------------------------------------


def test_a_start_a_drain_a_park_and_a_wake_field_by_field() -> None:
    core = Core(model("a"), model("b"), drain_timeout_secs=30.0)
    core.demand("a", waiting=1)
    assert core.record("a").phase == Starting(1, 100.0)
    assert core.done(RunPlan)[0].plan == start_plan(core.record("a").config, 1800.0)
    assert core.state.reservations["a"] == Reservation(100.0, 100.0, room_at=100.0, cold=True)
    core.now = 104.0
    core.put("a", probing=True, switched_secs=9.0)
    core.finish("a")
    record = core.record("a")
    assert record.phase == Serving("t.1", 104.0)
    assert (record.probing, record.progress_at, record.last_active) == (False, 104.0, 104.0)
    assert (record.start_secs, core.state.costs["a", "start"]) == (4.0, 4.0)
    assert core.done(SwitchFinished) == [
        SwitchFinished("a", (), True, 100.0, 100.0, 100.0, 104.0, (), 0.0)
    ]
    core.demand("a", in_flight=1)
    core.now = 110.0
    core.demand("b", waiting=1, age=2.0)
    assert core.record("a").phase == Draining("t.1", 104.0, 110.0, 140.0, OFFLOAD, "b")
    core.now = 115.0
    core.drained("a")
    assert core.record("a").phase == Parking(2, 115.0, OFFLOAD, "b")
    assert core.done(RunPlan)[0].plan == park_plan(core.record("a").config, OFFLOAD)
    assert core.record("a").cut is False
    assert core.state.reservations["b"].drained_at == 115.0
    core.now = 118.0
    core.happen(OperationFinished("a", 2, Outcome.PARKED, "so", host_bytes=77))
    assert core.record("a").phase == Parked(OFFLOAD, 118.0, "so")
    assert core.record("a").parked_bytes == 77
    core.now = 125.0
    core.finish("b")
    assert core.done(SwitchFinished) == [
        SwitchFinished("b", ("a",), True, 110.0, 115.0, 118.0, 125.0, (), 0.0)
    ]
    core.demand("b")
    core.demand("a", waiting=1)
    core.park("b")
    assert core.record("a").phase == Waking(5, 125.0, OFFLOAD)
    assert core.done(RunPlan)[0].plan == wake_plan(core.record("a").config, OFFLOAD)
    assert core.state.reservations["a"].cold is False
    core.now = 131.0
    core.finish("a")
    assert core.record("a").switched_secs == 15.0, "others made room for these six"
    assert core.record("b").switched_secs == 0.0
    assert core.state.costs["a", f"wake from {OFFLOAD}"] == 6.0
    core.demand("a")
    core.happen(ParkAsked("a"))
    core.drained("a")
    core.happen(OperationFinished("a", core.running["a"].op, Outcome.PARKED))
    assert core.record("a").parked_bytes == 77, "not known: as before"


@pytest.mark.parametrize(
    ("cut", "by_order", "policy", "patience"),
    [
        (False, False, {}, 30.0), (True, True, {}, 30.0), (True, False, {}, 30.0 * UNCUT_DRAINS),
        (True, False, {"request_timeout_secs": 999.0}, 999.0),
        (False, False, {"drain_before_switch": False}, 0.0),
    ],
)  # fmt: skip
def test_how_long_a_drain_waits(
    cut: bool, by_order: bool, policy: dict[str, Any], patience: float
) -> None:
    core = serving(**({"drain_timeout_secs": 30.0, "request_timeout_secs": 60.0} | policy))
    core.demand("a", in_flight=1)
    core.put("a", cut=cut)
    if by_order:
        core.happen(ParkAsked("a"))
    else:
        core.demand("b", waiting=1)
    phase = core.record("a").phase
    assert isinstance(phase, Draining)
    assert phase.deadline == core.now + patience


def test_a_cut_is_sent_once_to_who_is_busy_and_then_nobody_is_waited_for() -> None:
    core = serving(drain_timeout_secs=10.0)
    core.happen(WorkerJoined("idle", {}))
    core.happen(WorkerJoined("left", {}))
    core.demand("a", in_flight=1)
    epoch = str(core.record("a").epoch)
    core.demand("b", waiting=1)
    core.happen(WorkerDrained("left", "a", epoch))
    assert core.state.wakeup == 160.0
    core.pass_time(10)
    assert core.done(SendCut) == [SendCut(WORKER, "a", epoch), SendCut("idle", "a", epoch)]
    phase = core.record("a").phase
    assert isinstance(phase, Draining)
    assert (phase.cut_at, core.state.wakeup) == (160.0, 160.0 + CUT_GRACE_SECS)
    core.pass_time(CUT_GRACE_SECS)
    assert core.at("a") is ModelState.PARKING
    assert core.record("a").cut
    assert all("a" not in worker.holds for worker in core.state.workers.values())


# ---- how operations end -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "outcome"),
    [
        (Starting(9, 140.0), Outcome.PARKED), (Waking(9, 140.0, OFFLOAD), Outcome.PARKED),
        (Parking(9, 140.0, OFFLOAD), Outcome.UP), (Stopping(9, 140.0, "", 0.9), Outcome.UP),
        (Stopping(9, 140.0, "", 0.9), Outcome.PARKED),
    ],
)  # fmt: skip
def test_an_end_that_cannot_be_is_a_bug(phase: Any, outcome: Outcome) -> None:
    core = serving()
    core.put("a", phase=phase, overdue_at=math.inf)
    with pytest.raises(InvariantError, match=f"a is {phase.state}, operation {outcome}"):
        core.happen(OperationFinished("a", 9, outcome))


@pytest.mark.parametrize(
    ("phase", "outcome", "after", "failures"),
    [
        (Starting(9, 140.0), Outcome.DOWN, Failed(150.0, 158.0, "why"), 3),
        (Waking(9, 140.0, OFFLOAD), Outcome.DOWN, Starting(2, 150.0, "wake failed: why"), 2),
        (Parking(9, 140.0, OFFLOAD), Outcome.DOWN, Stopped(150.0, "why"), 0),
        (Parking(9, 140.0, OFFLOAD), Outcome.PARKED, Parked(OFFLOAD, 150.0, "why"), 0),
        (Stopping(9, 140.0, "so", 0.9), Outcome.DOWN, Stopped(150.0, "so"), 2),
        (
            Stopping(9, 140.0, "so", 0.9, crashed=True), Outcome.DOWN,
            Failed(150.0, 154.0, 'cannot keep model "a" up: so'), 2,
        ),
        *(
            (phase, Outcome.STUCK, Failed(150.0, 158.0, f"{KILL}: why", True, 0.9), 3)
            for phase in (Starting(9, 140.0), Waking(9, 140.0, OFFLOAD), Parking(9, 140.0, OFFLOAD))
        ),
        (
            Stopping(9, 140.0, "so", 0.1, was_parked=True), Outcome.STUCK,
            Failed(150.0, 158.0, f"{KILL}: why", True, 0.1, True), 3,
        ),
    ],
)  # fmt: skip
def test_how_each_operation_ends(phase: Any, outcome: Outcome, after: Any, failures: int) -> None:
    core = Core(model("a"), backoff_secs=2.0)
    core.now = 150.0
    core.put("a", phase=phase, overdue_at=math.inf, failures=2, gpus=(0,), park_request=None)
    core.state = replace(core.state, next_op=2)
    core.happen(OperationFinished("a", 8, outcome, "why"))
    assert core.record("a").phase == phase, "another operation"
    core.happen(OperationFinished("a", 9, outcome, "why"))
    assert (core.record("a").phase, core.record("a").failures) == (after, failures)


def test_an_order_that_came_while_it_parked_is_carried_out_once() -> None:
    core = serving()
    core.happen(ParkAsked("a", OFFLOAD))
    core.drained("a")
    core.put("a", park_request=STOP)
    core.finish("a", Outcome.PARKED)
    assert isinstance(core.record("a").phase, Stopping)
    assert core.record("a").park_request is None


def test_one_that_was_parked_otherwise_than_ordered_says_how() -> None:
    core = serving()
    core.happen(ParkAsked("a", CHECKPOINT))
    core.drained("a")
    op = core.running["a"].op
    core.happen(OperationFinished("a", op, Outcome.PARKED, "the disk is full", DISCARD))
    assert core.record("a").phase == Parked(DISCARD, 150.0, "the disk is full")


@pytest.mark.parametrize(
    ("since", "failures"), [(150.0 - HEALTHY_SECS, 1), (150.1 - HEALTHY_SECS, 4)]
)
def test_a_crash_counts_with_former_ones_unless_it_had_served_well(
    since: float, failures: int
) -> None:
    for phase in (Serving("t.1", since), Draining("t.1", since, 140.0, 900.0, OFFLOAD, None)):
        core = serving()
        core.demand("a", in_flight=1)
        core.put("a", phase=phase, failures=3, probing=True)
        core.happen(EngineExited("a", "exit status 1"))
        record = core.record("a")
        reason = "engine died: exit status 1"
        assert record.phase == Stopping(2, 150.0, reason, 0.9, crashed=True)
        assert (record.failures, record.probing) == (failures, False)
        assert core.done(SendRevoke) == [SendRevoke(WORKER, "a", "t.1", dead=True)]
        assert core.done(SendCut) == []
        assert core.done(RunPlan)[0].plan == stop_plan(record.config, grace=False)
        assert core.state.workers[WORKER].holds == {}


@pytest.mark.parametrize(
    ("error", "stalled", "bytes_at", "after"),
    [
        (None, True, 0.0, 150.0), (None, False, 0.0, 150.0), ("no", True, 145.0, 145.0),
        ("no", True, 140.0, None), ("no", False, 145.0, None),
    ],
)  # fmt: skip
def test_what_a_look_at_an_engine_says(
    error: str | None, stalled: bool, bytes_at: float, after: float | None
) -> None:
    """The look began at 140.0. ``after``: since when it is silent then; None: it is ended."""
    core = serving()
    core.demand("a", in_flight=1)
    core.put("a", probing=True, probed_at=140.0, bytes_at=bytes_at, progress_at=1.0)
    core.happen(ProbeFinished("a", "t.1", error, stalled))
    record = core.record("a")
    if after is not None:
        assert (record.probing, record.progress_at, core.done(SendRevoke)) == (False, after, [])
        return
    reason = "engine does not answer: no"
    assert record.phase == Stopping(2, 150.0, reason, 0.9, crashed=True)
    assert core.done(SendRevoke) == [SendRevoke(WORKER, "a", "t.1", dead=not stalled)]
    assert core.done(SendCut) == ([SendCut(WORKER, "a", "t.1", reason)] if stalled else [])


def test_events_of_what_is_unknown_or_over_change_nothing() -> None:
    core = serving()
    before = core.state.models
    for event in (
        ProbeFinished("a", "t.9", "no"), ProbeFinished("ghost", "t.1", "no"),
        EngineExited("ghost", "gone"), EngineExited("b", "gone"),
        EngineSuspect("a", "t.9", "no"), EngineSuspect("ghost", "t.1", "no"),
        OperationFinished("ghost", 1, Outcome.DOWN), OperationFinished("a", 1, Outcome.DOWN),
        WorkerLeft("ghost"), ParkWithdrawn("ghost"), ParkWithdrawn("b"),
        DemandChanged("ghost", "a", 1, 140.0, 0, 0),
    ):  # fmt: skip
        core.happen(event)
        assert (core.effects, core.state.models) == ((), before), event


# ---- orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "answer"),
    [
        (LoadAsked("ghost", 7), unknown("ghost")),
        (ParkAsked("ghost", None, 7), unknown("ghost")),
        (LoadAsked("a", 7), (Verdict.ALREADY, None, "")),
        (ParkAsked("b", None, 7), (Verdict.ALREADY, None, "")),
        (ParkAsked("stuck", None, 7), (Verdict.REFUSED, Reason.START_FAILED, "state D")),
        (ParkAsked("failed", None, 7), (Verdict.ACCEPTED, None, "")),
        (LoadAsked("failed", 7), (Verdict.ACCEPTED, None, "")),
        (LoadAsked("removed", 7), unknown("removed")),
    ],
)  # fmt: skip
def test_how_an_order_is_answered(event: Any, answer: tuple[Any, ...]) -> None:
    names = ("a", "b", "stuck", "failed", "removed")
    core = Core(*(model(name, gpus=(gpu,)) for gpu, name in enumerate(names)), gpu_count=5)
    core.serve("a")
    core.put("stuck", phase=Failed(90.0, 900.0, "state D", held=True, share=0.9), gpus=(2,))
    core.put("failed", phase=Failed(90.0, 900.0, "it died"), failures=4)
    core.put("removed", removed=True)
    core.happen(event)
    assert core.done(OrderAnswered) == [OrderAnswered(7, *answer)]
    if event == ParkAsked("failed", None, 7):
        assert core.record("failed").phase == Stopped(100.0, "an operator asked")
        assert core.record("failed").failures == 0


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("by_order", [False, True])
def test_only_an_order_to_park_that_has_not_cut_anybody_is_withdrawn(
    cut: bool, by_order: bool
) -> None:
    core = serving(drain_timeout_secs=10.0)
    core.demand("a", in_flight=1)
    core.happen(ParkAsked("a") if by_order else LoadAsked("b"))
    if cut:
        core.pass_time(10)
    core.happen(ParkWithdrawn("a"))
    assert (core.at("a") is ModelState.SERVING) is (by_order and not cut)


def test_an_order_to_park_says_how_although_it_drains_already() -> None:
    core = serving()
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    core.happen(ParkAsked("a", STOP))
    phase = core.record("a").phase
    assert isinstance(phase, Draining)
    assert (phase.eviction, phase.wanted_by) == (STOP, None)

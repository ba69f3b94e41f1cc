"""Whose turn it is: the queue for room, starts that are given up, and what is noted of each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from core_harness import CHECKPOINT, DISCARD, OFFLOAD, STOP, WORKER, Core, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.demand.workers import WorkerDemand
from llmux.core.effects import DropAhead, OrderAnswered, ReadAhead, Verdict
from llmux.core.events import (
    DemandChanged,
    GpuReleased,
    ImageKnown,
    LoadAsked,
    ParkAsked,
    PinSet,
    Tick,
)
from llmux.core.plans import Outcome, stop_plan
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Phase,
    Reservation,
    Serving,
    Starting,
    Stopped,
    Stopping,
)
from llmux.core.reducer import reduce_all
from llmux.core.states import ModelState
from llmux.errors import Reason


def small(name: str, share: float = 0.4, **settings: Any) -> ModelConfig:
    return model(name, gpu_memory=share, gpu_memory_parked=0.1, **settings)


# ---- the queue ----------------------------------------------------------------------------------


def waiting_for_a(*names: str, **policy: Any) -> Core:
    """a serves a request and may stay; the others wait, the first the longest."""
    core = Core(*(model(name) for name in ("a", *names)), min_active_secs=60.0, **policy)
    core.serve("a")
    core.demand("a", in_flight=1)
    for age, name in enumerate(reversed(names)):
        core.demand(name, waiting=1, age=float(age))
    return core


def test_what_waits_behind_one_that_takes_everything_restores_nothing_ahead() -> None:
    core = waiting_for_a("b", "c", "d")
    places = core.state.reservations
    core.state = replace(
        core.state,
        reservations={
            "b": places["b"],
            **{name: replace(places[name], ahead=True) for name in "cd"},
        },
    )
    core.happen(Tick())
    assert core.done(DropAhead) == [DropAhead("c"), DropAhead("d")]
    assert not any(place.ahead for place in core.state.reservations.values())
    core.happen(Tick())
    assert core.effects == (), "once"


def test_one_behind_a_full_queue_is_told_of_its_back_off_all_the_same() -> None:
    core = waiting_for_a("b", "c")
    core.demand("c")
    core.put("c", phase=Failed(core.now, core.now + 30, "it died"))
    core.demand("c", waiting=1)
    assert core.refused() == [("c", Reason.BACKING_OFF)]


def test_each_that_waits_has_a_place_since_it_began_to() -> None:
    core = waiting_for_a("b", "c")
    assert dict(core.state.reservations) == {
        "b": Reservation(core.now, core.now),
        "c": Reservation(core.now, core.now),
    }
    former = core.now
    core.pass_time(60)
    place = core.state.reservations["b"]
    assert (place.since, place.decided_at, place.victims) == (former, core.now, ("a",))
    core.pass_time(5)
    assert core.state.reservations["b"].decided_at == former + 60, "when its first victim was"


@pytest.mark.parametrize(("age", "order"), [(9.0, "tvw"), (4.0, "tvw"), (1.0, "twv")])
def test_a_model_that_left_comes_behind_the_one_that_it_left_for(age: float, order: str) -> None:
    """And before those behind that one, as far as it has waited longer than they."""
    core = waiting_for_a("t")
    core.now += 10
    place = replace(core.state.reservations["t"], victims=("v", "gone"))
    names = [model(name) for name in "vw"]
    models = {**core.state.models, **{one.name: ModelRecord(one) for one in names}}
    core.state = replace(core.state, models=models, reservations={"t": place})
    both = [DemandChanged(WORKER, n, 1, core.now - a, 0, 0) for n, a in (("w", 3.0), ("v", age))]
    core.state, _ = reduce_all(core.state, both, core.now)
    assert "".join(core.state.reservations) == order


def test_one_that_is_waited_for_no_more_gives_its_place_up_before_it_begins() -> None:
    core = waiting_for_a("b", "c")
    core.demand("b")
    assert set(core.state.reservations) == {"c"}
    core.demand("a")
    core.park("a")
    assert core.at("c") is ModelState.STARTING
    core.demand("c")
    assert set(core.state.reservations) == {"c"}, "it is on its way"


def test_only_an_image_is_read_ahead_and_that_once() -> None:
    for way, reads in ((CHECKPOINT, True), (OFFLOAD, False), (DISCARD, False), (STOP, False)):
        core = Core(model("a"), model("b"), min_active_secs=60.0)
        core.serve("a")
        core.demand("a", in_flight=1)
        phase: Phase = Stopped() if way is STOP else Parked(way, 90.0)
        core.put("b", phase=phase, gpus=(0,))
        core.demand("b", waiting=1)
        image = core.record("b").engine
        assert core.done(ReadAhead) == ([ReadAhead("b", image, (0,))] if reads else [])
        assert core.state.reservations["b"].read is reads
        core.pass_time(1)
        assert core.done(ReadAhead) == []
    core = Core(model("a"))
    core.happen(ImageKnown("a", CHECKPOINT))
    core.demand("a", waiting=1)
    assert core.plans() == ["wake a"]
    assert [order.model for order in core.done(ReadAhead)] == ["a"]


# ---- making room --------------------------------------------------------------------------------


def residues() -> Core:
    """p and q are parked on GPU 0 and GPU 1, and x moves on GPU 0; wide wants both."""
    core = Core(
        small("p", gpus=(0,)), small("q", gpus=(1,)), small("x", gpus=(0,), eviction=STOP),
        model("wide", gpus=(0, 1), gpu_memory=0.95), gpu_count=2,
    )  # fmt: skip
    for name, gpu in (("p", 0), ("q", 1)):
        core.put(name, phase=Parked(OFFLOAD, 50.0 + gpu), gpus=(gpu,))
    core.serve("x")
    core.happen(ParkAsked("x"))
    core.drained("x")
    assert core.at("x") is ModelState.PARKING
    core.demand("wide", waiting=1)
    return core


def test_a_residue_on_a_busy_gpu_does_not_keep_another_from_leaving() -> None:
    core = residues()
    assert core.plans() == ["stop q"]
    assert core.running["q"].plan == stop_plan(core.record("q").config, grace=True), "it is well"
    assert core.record("q").phase == Stopping(
        core.running["q"].op, core.now, 'room for model "wide"', 0.1, was_parked=True
    )
    assert set(core.state.reservations["wide"].victims) == {"q"}
    core.finish("x")
    assert core.plans() == ["stop p"]
    assert core.state.reservations["wide"].victims == ("q", "p")
    core.finish("p")
    assert core.plans() == []
    core.finish("q")
    assert core.plans() == ["start wide"]


def test_the_longest_parked_residue_ends_first() -> None:
    core = Core(*(small(name) for name in "pqr"), model("new", gpu_memory=0.85))
    for name, since in (("p", 60.0), ("q", 50.0), ("r", 70.0)):
        core.put(name, phase=Parked(OFFLOAD, since), gpus=(0,))
    core.demand("new", waiting=1)
    assert core.plans() == ["stop q"]
    core.finish("q")
    assert core.plans() == ["stop p"]
    core.finish("p")
    assert core.plans() == ["start new"]


def test_what_holds_nothing_is_no_residue() -> None:
    core = Core(small("p"), small("q"), model("new", gpu_memory=0.95))
    suspended = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
    core.put("p", phase=Parked(suspended, 50.0), gpus=(0,))
    core.put("q", phase=Parked(OFFLOAD, 60.0), gpus=(0,))
    core.demand("new", waiting=1)
    assert core.plans() == ["stop q"]


def stuck_beside_kept() -> Core:
    """Half of the GPU is held by an engine that cannot be killed, and kept serves there."""
    core = Core(small("stuck", 0.5), small("kept", 0.3), small("new", 0.9), backoff_secs=50.0)
    core.serve("kept")
    core.happen(PinSet("kept", math.inf))
    core.demand("stuck", waiting=1)
    core.finish("stuck", Outcome.STUCK, "state D")
    return core


def test_a_kept_model_whose_leaving_would_not_help_is_not_to_blame() -> None:
    core = stuck_beside_kept()
    core.demand("new", waiting=1)
    assert core.state.reservations["new"].behind == ()
    core = stuck_beside_kept()
    core.happen(LoadAsked("new", 7))
    (answer,) = core.done(OrderAnswered)
    assert answer.verdict is Verdict.ACCEPTED, "the stuck engine may end"
    assert set(core.state.wants) == {"new"}


@pytest.mark.parametrize("pinned", [True, False])
def test_a_request_waits_behind_a_kept_model_that_is_noted_with_its_place(pinned: bool) -> None:
    core = Core(small("kept", 0.5, never_evict=not pinned), small("new", 0.9))
    core.serve("kept")
    if pinned:
        core.happen(PinSet("kept", math.inf))
    core.demand("new", waiting=1)
    for _ in range(2):
        assert core.state.reservations["new"].behind == ("kept",)
        assert core.at("kept") is ModelState.SERVING
        core.happen(Tick())


# ---- starts that are given up -------------------------------------------------------------------


def started(*names: str, grace: float = 10.0) -> Core:
    """Each of these is being started on a GPU of its own, and nobody waits for it any more."""
    core = Core(
        *(model(name, gpus=(gpu,)) for gpu, name in enumerate(names)),
        model("new", gpus=(len(names) - 1,)),
        model("first", gpus=(0,)),
        gpu_count=len(names),
        give_up_start_secs=grace,
    )
    for name in names:
        core.demand(name, waiting=1)
        core.demand(name)
    assert [core.at(name) for name in names] == [ModelState.STARTING] * len(names)
    return core


def test_a_start_that_is_in_nobodys_way_hides_none_that_is() -> None:
    core = started("a", "b", "c")
    core.demand("new", waiting=1)
    assert core.plans() == ["stop c"]
    phase = core.record("c").phase
    assert isinstance(phase, Stopping)
    assert phase.reason == "no request waits for it, and others need the room"
    assert core.running["c"].plan == stop_plan(core.record("c").config, grace=False)


def test_a_start_that_is_nearly_done_hides_none_that_is_not() -> None:
    core = started("a", "b")
    core.put("a", start_secs=60.0)
    core.now += 55
    core.demand("first", waiting=1)
    assert core.plans() == []
    core.demand("new", waiting=1)
    assert core.plans() == ["stop b"]
    assert core.state.wakeup == core.now + 15.0, "then a has had its time"


@pytest.mark.parametrize(
    ("elapsed", "waits"),
    [(0, False), (49.9, False), (50, True), (60, True), (69.9, True), (70, False), (500, False)],
)
def test_how_near_to_its_usual_time_a_start_must_be(elapsed: float, waits: bool) -> None:
    core = started("a")
    core.put("a", start_secs=60.0, overdue_at=math.inf)
    began = core.now
    core.now += elapsed
    core.demand("new", waiting=1)
    assert (core.at("a") is ModelState.STARTING) is waits
    if waits:
        assert core.state.wakeup == began + 70.0


@pytest.mark.parametrize("other", ["waited for", "ordered", "kept", "fits", "elsewhere"])
def test_what_is_wanted_or_in_nobodys_way_is_started_to_its_end(other: str) -> None:
    core = Core(
        model("a", gpu_memory=0.3 if other == "fits" else 0.9, never_evict=other == "kept"),
        model("new", gpu_memory=0.5, gpus=(1,) if other == "elsewhere" else (0,)),
        gpu_count=2,
    )
    if other == "ordered":
        core.happen(LoadAsked("a"))
    else:
        core.demand("a", waiting=1)
        core.demand("a", waiting=int(other == "waited for"))
    core.demand("new", waiting=1)
    assert core.at("a") is ModelState.STARTING


# ---- drains that are turned back ----------------------------------------------------------------


def test_only_a_drain_for_one_that_nobody_waits_for_is_turned_back() -> None:
    names = "abcd"
    core = Core(
        *(model(name, gpus=(gpu,)) for gpu, name in enumerate(names)),
        *(model(f"for_{name}", gpus=(gpu,)) for gpu, name in enumerate(names)),
        gpu_count=4,
        drain_timeout_secs=10.0,
    )
    for name in names:
        core.serve(name)
        core.demand(name, in_flight=1)
    core.happen(ParkAsked("a"))  # by order
    core.demand("for_b", waiting=1)
    core.pass_time(10)  # cut
    core.demand("for_c", waiting=1)
    core.demand("for_d", waiting=1)
    since = core.record("d").phase
    for name in "bd":
        core.demand(f"for_{name}")
    assert [core.at(name).value for name in names] == [
        "draining",
        "draining",
        "draining",
        "serving",
    ]
    serving = core.record("d").phase
    assert isinstance(serving, Serving)
    assert serving.since == 100.0, "it has served since then"
    assert serving.epoch != getattr(since, "epoch", "")
    assert core.state.workers[WORKER].holds["d"] == serving.epoch


# ---- what moves the memory of a GPU --------------------------------------------------------------


def test_a_model_comes_where_a_leaving_one_was_seen_gone_although_it_is_not_done() -> None:
    core = Core(model("a", eviction=CHECKPOINT), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    op = core.running["a"].op
    core.now += 4
    core.happen(GpuReleased("a", op))
    assert core.plans() == ["start b"]
    assert isinstance(core.record("b").phase, Starting)
    core.now += 9
    core.happen(GpuReleased("a", op))
    phase = core.record("a").phase
    assert getattr(phase, "released_at", None) == core.now - 9, "the first time counts"
    assert core.state.demands["b"] == WorkerDemand(1, 100.0)

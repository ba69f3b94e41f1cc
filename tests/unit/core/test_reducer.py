"""What each event does to one model: demand, grants, drains, ends of operations, operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from core_harness import FREEZE, OFFLOAD, STOP, WORKER, Core, config_of, model

from llmux.core.effects import (
    Probe,
    ReadWeights,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
)
from llmux.core.events import (
    ConfigChanged,
    DemandChanged,
    EngineExited,
    EngineSuspect,
    EvictionSet,
    LoadAsked,
    ModeSet,
    OperationFinished,
    ParkAsked,
    ProbeFinished,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.operations import CUT_GRACE_SECS, HEALTHY_SECS, SEARCH_DEATHS
from llmux.core.plans import PROBE_SECS, Outcome
from llmux.core.records import Draining, Failed, Parking, Stopped, Stopping, Waking
from llmux.core.states import ModelState
from llmux.errors import Reason


def epoch_of(core: Core, name: str) -> str:
    epoch = core.record(name).epoch
    assert epoch is not None
    return epoch


def two(**policy: Any) -> Core:
    """a serves; b is stopped."""
    core = Core(model("a"), model("b"), **policy)
    core.serve("a")
    return core


# ---- serving ------------------------------------------------------------------------------------


def test_demand_starts_a_stopped_model_and_success_grants_it() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=2)
    assert core.plans() == ["start a"]
    assert core.at("a") is ModelState.STARTING
    core.demand("a", waiting=3)
    assert core.plans() == []  # later requests join the start in flight
    core.finish("a")
    assert core.granted() == ["a"]
    (switch,) = core.done(SwitchFinished)
    assert (switch.model, switch.victims, switch.cold) == ("a", (), True)


def test_every_worker_gets_the_grant_and_one_that_joins_later_too() -> None:
    core = Core(model("a"))
    core.happen(WorkerJoined("w2", {}))
    core.demand("a", waiting=1)
    core.finish("a")
    assert [grant.worker for grant in core.done(SendGrant)] == [WORKER, "w2"]
    core.happen(WorkerJoined("w3", {}))
    assert core.done(SendGrant) == [SendGrant("w3", "a", epoch_of(core, "a"))]


def test_a_worker_that_comes_back_keeps_what_it_holds_and_loses_what_is_old() -> None:
    core = two()
    epoch = epoch_of(core, "a")
    core.happen(WorkerLeft(WORKER))
    core.happen(WorkerJoined(WORKER, {"a": epoch, "b": "old.1"}))
    assert core.effects == (SendRevoke(WORKER, "b", "old.1"),)


def test_a_worker_that_joins_during_a_drain_is_told_to_drain() -> None:
    core = two()
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    epoch = epoch_of(core, "a")
    core.happen(WorkerJoined("w2", {"a": epoch}))
    assert core.done(SendRevoke) == [SendRevoke("w2", "a", epoch)]
    core.drained("a")
    assert core.at("a") is ModelState.DRAINING  # w2 has not said so
    core.happen(WorkerDrained("w2", "a", epoch))
    assert core.at("a") is ModelState.PARKING


def test_demand_for_an_unknown_model_is_refused() -> None:
    core = Core(model("a"))
    core.demand("nobody", waiting=1)
    assert core.refused() == [("nobody", Reason.UNKNOWN_MODEL)]


def test_demand_of_a_worker_that_is_gone_is_ignored() -> None:
    core = Core(model("a"))
    core.happen(DemandChanged("ghost", "a", 1, 0.0, 0, 0))
    assert core.at("a") is ModelState.STOPPED


# ---- draining -----------------------------------------------------------------------------------


def test_a_switch_waits_for_what_runs_then_parks_then_starts() -> None:
    core = two()
    core.demand("a", in_flight=1)
    epoch = epoch_of(core, "a")
    core.demand("b", waiting=1)
    assert core.effects[0] == SendRevoke(WORKER, "a", epoch)
    assert [type(effect) for effect in core.effects[1:]] == [ReadWeights]
    assert core.states() == {"a": "draining", "b": "stopped"}
    core.drained("a")
    assert core.plans() == ["park a"]
    core.finish("a")
    assert core.plans() == ["start b"]
    core.finish("b")
    (switch,) = core.done(SwitchFinished)
    assert (switch.model, switch.victims) == ("b", ("a",))


def test_a_drained_answer_for_another_epoch_counts_for_nothing() -> None:
    core = two()
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    core.happen(WorkerDrained(WORKER, "a", "t.999"))
    assert core.at("a") is ModelState.DRAINING


def test_past_the_drain_deadline_requests_are_cut_once() -> None:
    core = two(drain_timeout_secs=10.0)
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    assert core.state.wakeup == core.now + 10
    core.pass_time(9)
    assert core.effects == ()
    core.pass_time(1)
    assert core.done(SendCut) == [SendCut(WORKER, "a", epoch_of(core, "a"))]
    core.pass_time(1)
    assert core.effects == ()
    core.drained("a")
    assert core.at("a") is ModelState.PARKING


def test_a_worker_that_does_not_answer_a_cut_has_no_say() -> None:
    core = two(drain_timeout_secs=10.0)
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    core.pass_time(10)
    assert core.state.wakeup == core.now + CUT_GRACE_SECS
    core.pass_time(CUT_GRACE_SECS)
    assert core.plans() == ["park a"]


def test_without_drain_the_cut_comes_at_once() -> None:
    core = two(drain_before_switch=False)
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    assert [type(effect) for effect in core.effects] == [SendRevoke, ReadWeights, SendCut]


def test_a_drain_is_cancelled_when_nobody_wants_the_room_any_more() -> None:
    core = two()
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    old = epoch_of(core, "a")
    core.demand("b")
    assert core.at("a") is ModelState.SERVING
    assert epoch_of(core, "a") != old  # the old one was revoked for good
    assert core.granted() == ["a"]
    assert core.state.reservations == {}


def test_a_drain_whose_requests_were_cut_is_not_cancelled() -> None:
    core = two(drain_timeout_secs=0.0)
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    assert core.done(SendCut)
    core.demand("b")
    assert core.at("a") is ModelState.DRAINING


# ---- how operations end -------------------------------------------------------------------------


def test_a_failed_start_refuses_who_waits_and_backs_off_growing() -> None:
    core = Core(model("a"), backoff_secs=2.0, backoff_max_secs=10.0)
    delays = []
    for _ in range(5):
        core.demand("a", waiting=1)
        core.finish("a", Outcome.DOWN, "no weights")
        (refusal,) = core.done(SendRefuse)
        assert (refusal.reason, refusal.message) == (Reason.START_FAILED, "no weights")
        delays.append(refusal.retry_after)
        phase = core.record("a").phase
        assert isinstance(phase, Failed)
        core.now = phase.until
    assert delays == [2, 4, 8, 10, 10]


def test_demand_during_the_back_off_is_refused_with_what_is_left_of_it() -> None:
    core = Core(model("a"), backoff_secs=4.0)
    core.demand("a", waiting=1)
    core.finish("a", Outcome.DOWN, "no weights")
    core.now += 1
    core.demand("a", waiting=1)
    assert core.effects == (SendRefuse(WORKER, "a", Reason.BACKING_OFF.value, "no weights", 3.0),)
    core.now += 3
    core.demand("a", waiting=1)
    assert core.plans() == ["start a"]


def test_an_operator_does_not_wait_for_the_back_off() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    core.finish("a", Outcome.DOWN, "no weights")
    core.happen(LoadAsked("a"))
    assert core.plans() == ["start a"]


def test_parking_well_or_being_up_long_forgets_failures() -> None:
    core = Core(model("a"), model("b"))
    core.demand("a", waiting=1)
    core.finish("a", Outcome.DOWN)
    core.happen(LoadAsked("a"))
    core.finish("a")
    assert core.record("a").failures == 1
    core.demand("b", waiting=1)
    core.park("a")
    assert core.record("a").failures == 0


def test_a_failed_wake_becomes_a_cold_start_for_the_same_waiters() -> None:
    core = Core(model("a"))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("a", waiting=1)
    assert core.plans() == ["wake a"]
    core.finish("a", Outcome.DOWN, "500")
    assert core.plans() == ["start a"]
    assert core.refused() == []
    core.finish("a")
    (switch,) = core.done(SwitchFinished)
    assert switch.cold


def test_a_wake_follows_how_the_model_was_parked_not_how_it_is_configured_now() -> None:
    core = Core(model("a", eviction=OFFLOAD))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.happen(ConfigChanged(config_of(model("a", eviction=FREEZE))))
    core.demand("a", waiting=1)
    (plan,) = core.done(RunPlan)
    assert plan.plan.eviction == OFFLOAD
    phase = core.record("a").phase
    assert isinstance(phase, Waking)
    assert phase.eviction == OFFLOAD


@pytest.mark.parametrize("outcome", [Outcome.PARKED, Outcome.DOWN])
def test_parking_ends_as_observed(outcome: Outcome) -> None:
    core = Core(model("a"))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.drained("a")
    core.finish("a", outcome)
    assert core.at("a") is (ModelState.PARKED if outcome is Outcome.PARKED else ModelState.STOPPED)


def test_an_operation_of_a_former_life_is_ignored() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    core.happen(OperationFinished("a", 999, Outcome.DOWN))
    core.happen(OperationFinished("nobody", 1, Outcome.DOWN))
    assert core.at("a") is ModelState.STARTING


def test_an_engine_that_cannot_be_killed_keeps_its_claim_and_is_tried_again() -> None:
    core = Core(model("a"), model("b"), backoff_secs=2.0)
    core.demand("a", waiting=1)
    core.finish("a", Outcome.STUCK, "state D")
    phase = core.record("a").phase
    assert isinstance(phase, Failed)
    assert phase.held
    core.demand("b", waiting=1)
    assert core.plans() == []  # its memory is not there
    core.pass_time(2)
    assert core.plans() == ["stop a"]
    core.finish("a", Outcome.STUCK, "state D")
    core.pass_time(4)
    core.finish("a", Outcome.DOWN)
    assert core.plans() == ["start b"]
    # Twice stuck is no crash: nothing is left of it, and a next request starts it.
    phase = core.record("a").phase
    assert isinstance(phase, Stopped)
    assert phase.reason == "ended at a further try, after: engine cannot be killed: state D"


def test_a_stuck_engine_is_not_started_over_even_by_an_operator() -> None:
    core = Core(model("a"), backoff_secs=100.0)
    core.demand("a", waiting=1)
    core.finish("a", Outcome.STUCK, "state D")
    core.happen(LoadAsked("a"))
    assert "start a" not in core.plans()


# ---- engines that die or hang -------------------------------------------------------------------


def test_the_death_of_a_serving_engine_gives_its_requests_back_and_starts_it_again() -> None:
    core = two()
    core.demand("a", in_flight=1)
    epoch = epoch_of(core, "a")
    core.happen(EngineExited("a", "exit status 1"))
    assert core.done(SendRevoke) == [SendRevoke(WORKER, "a", epoch, dead=True)]
    (plan,) = core.done(RunPlan)
    assert plan.plan.kind == "stop"
    core.demand("a", waiting=1)  # what had no byte yet waits again
    core.finish("a")
    assert core.plans() == ["start a"]


@pytest.mark.parametrize(
    ("waiting", "repeated", "crashes"), [(0, 0, 2), (1, 0, 2), (1, 1, SEARCH_DEATHS + 1)]
)
def test_crashes_soon_after_each_other_back_off(waiting: int, repeated: int, crashes: int) -> None:
    """Later where requests are repeated until the one that kills the engine is found."""
    core = two()
    for crash in range(crashes):
        core.happen(EngineExited("a", "exit status 1"))
        core.demand("a", waiting=waiting, repeated=repeated)
        core.finish("a")
        assert (core.at("a") is ModelState.FAILED) is (crash == crashes - 1)
        if not waiting and core.at("a") is ModelState.STOPPED:
            core.demand("a", waiting=1)
        if core.at("a") is ModelState.STARTING:
            core.finish("a")
            core.demand("a")
    assert core.refused() == ([("a", Reason.START_FAILED)] if waiting else [])


def test_an_engine_that_answered_in_between_was_not_failing_to_start() -> None:
    """One client's bad request, sent again and again, costs the others no 503."""
    core = two()
    for crash in range(SEARCH_DEATHS + 5):
        core.demand("a", in_flight=1, completed=crash)
        core.happen(EngineExited("a", "exit status 139"))
        core.demand("a", waiting=1, completed=crash + 1)  # comes late: of the dead engine
        core.finish("a")
        assert core.at("a") is ModelState.STARTING
        core.finish("a")
        core.demand("a", in_flight=1, completed=crash + 1)
        assert core.record("a").failures == 1
        core.demand("a", completed=crash + 2)
    assert core.refused() == []


def test_a_crash_after_a_long_good_life_is_a_first_one_again() -> None:
    core = two()
    core.happen(EngineExited("a", "exit status 1"))
    core.demand("a", waiting=1)
    core.finish("a")
    core.finish("a")
    core.now += HEALTHY_SECS
    core.happen(EngineExited("a", "exit status 1"))
    assert core.record("a").failures == 1


def test_the_death_of_a_parked_engine_is_cleaned_up() -> None:
    core = two()
    core.happen(ParkAsked("a"))
    core.park("a")
    core.happen(EngineExited("a", "gone"))
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert core.at("a") is ModelState.STOPPED
    assert core.record("a").failures == 0


def test_a_silent_busy_engine_is_probed_and_a_failed_probe_kills_it() -> None:
    core = Core(model("a", stall_timeout_secs=30.0))
    core.serve("a")
    core.demand("a", in_flight=1)
    assert core.state.wakeup == core.now + 15
    core.pass_time(15)  # the other half is the probe's: a hang is found within the time-out
    (probe,) = core.done(Probe)
    assert (probe.seconds, probe.stalled) == (15.0, True)
    core.pass_time(15)
    assert core.done(Probe) == []  # one at a time
    core.happen(ProbeFinished("a", probe.epoch, "no answer", stalled=True))
    assert [(e.worker, e.error) for e in core.done(SendCut)] == [
        (WORKER, "engine does not answer: no answer")
    ]
    assert [revoke.dead for revoke in core.done(SendRevoke)] == [False], "nothing is repeated"
    assert core.plans() == ["stop a"]
    phase = core.record("a").phase
    assert isinstance(phase, Stopping)
    assert "no answer" in phase.reason


def test_models_that_are_not_watched_hide_no_silence_of_those_behind_them() -> None:
    core = Core(
        model("a", stall_timeout_secs=0.0, gpu_memory=0.2),  # never
        *(model(name, stall_timeout_secs=30.0, gpu_memory=0.2) for name in "bcd"),
    )
    for name in "abcd":
        core.serve(name)
    for name in "ac":  # b is idle
        core.demand(name, in_flight=1)
    core.pass_time(5)
    core.demand("d", in_flight=1)
    core.pass_time(10)
    assert [probe.model for probe in core.done(Probe)] == ["c"]
    core.pass_time(5)  # c is looked at already
    assert [probe.model for probe in core.done(Probe)] == ["d"]


def test_bytes_that_came_during_a_probe_are_life_and_the_limit_begins_with_them() -> None:
    """An engine that stood still for 1.4 s was ended with a limit of 4 s."""
    core = Core(model("a", stall_timeout_secs=30.0))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.pass_time(15)
    (probe,) = core.done(Probe)
    core.pass_time(5)
    core.demand("a", in_flight=1, progress=100)
    core.pass_time(20)  # a watch may last longer than half the limit
    core.happen(ProbeFinished("a", probe.epoch, "no answer", stalled=True))
    assert core.at("a") is ModelState.SERVING
    (probe,) = core.done(Probe)
    core.demand("a", in_flight=0, progress=100)
    core.demand("a", in_flight=1, progress=100)  # its client tries again: no sign of the engine's
    core.pass_time(15)
    core.happen(ProbeFinished("a", probe.epoch, "no answer", stalled=True))
    assert core.plans() == ["stop a"]


def test_a_probe_that_is_answered_buys_time() -> None:
    core = Core(model("a", stall_timeout_secs=30.0))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.pass_time(15)
    core.happen(ProbeFinished("a", epoch_of(core, "a"), None))
    assert core.at("a") is ModelState.SERVING
    assert core.state.wakeup == core.now + 15


def test_progress_and_idleness_keep_the_stall_watch_quiet() -> None:
    core = Core(model("a", stall_timeout_secs=30.0))
    core.serve("a")
    core.pass_time(1000)
    assert core.done(Probe) == []
    core.demand("a", in_flight=1, progress=1)
    core.now += 14
    core.demand("a", in_flight=1, progress=2)
    core.pass_time(14)
    assert core.done(Probe) == []


def test_suspicion_of_the_present_epoch_asks_the_engine() -> None:
    core = two()
    core.happen(EngineSuspect("a", "t.999", "refused"))
    assert core.effects == ()
    core.happen(EngineSuspect("a", epoch_of(core, "a"), "refused"))
    (probe,) = core.done(Probe)
    assert (probe.model, probe.stalled, probe.seconds) == ("a", False, PROBE_SECS), (
        "any answer does"
    )


def test_a_probe_of_a_former_epoch_says_nothing_about_this_one() -> None:
    core = two()
    core.happen(ProbeFinished("a", "t.999", "no answer"))
    assert core.at("a") is ModelState.SERVING


# ---- operators ----------------------------------------------------------------------------------


def test_load_brings_a_model_up_though_nobody_waits_and_ends_with_serving() -> None:
    core = Core(model("a"))
    core.happen(LoadAsked("a"))
    assert core.plans() == ["start a"]
    core.finish("a")
    assert core.state.wants == {}


def test_park_of_a_starting_model_takes_effect_when_it_is_up() -> None:
    core = Core(model("a"))
    core.happen(LoadAsked("a"))
    core.happen(ParkAsked("a", OFFLOAD))
    assert core.at("a") is ModelState.STARTING
    core.finish("a")
    assert core.at("a") is ModelState.DRAINING
    core.drained("a")
    phase = core.record("a").phase
    assert isinstance(phase, Parking)
    assert phase.eviction == OFFLOAD


def test_load_takes_a_park_request_back() -> None:
    core = Core(model("a"))
    core.happen(LoadAsked("a"))
    core.happen(ParkAsked("a", OFFLOAD))
    core.happen(LoadAsked("a"))
    core.finish("a")
    assert core.at("a") is ModelState.SERVING


def test_an_operator_s_drain_is_not_cancelled_by_lack_of_demand() -> None:
    core = two()
    core.demand("a", in_flight=1)
    core.happen(ParkAsked("a"))
    core.demand("a", in_flight=1)
    assert core.at("a") is ModelState.DRAINING
    phase = core.record("a").phase
    assert isinstance(phase, Draining)
    assert phase.wanted_by is None


def test_unload_of_a_parked_model_stops_it_and_sleep_leaves_it() -> None:
    core = two()
    core.happen(ParkAsked("a"))
    core.park("a")
    core.happen(ParkAsked("a"))
    assert core.at("a") is ModelState.PARKED
    core.happen(ParkAsked("a", STOP))
    assert core.plans() == ["stop a"]


def test_unload_of_a_failed_model_forgets_its_failures() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    core.finish("a", Outcome.DOWN)
    core.happen(ParkAsked("a", STOP))
    assert (core.at("a"), core.record("a").failures) == (ModelState.STOPPED, 0)


def test_an_eviction_set_at_run_time_wins_until_it_is_taken_back() -> None:
    core = two()
    core.happen(EvictionSet("a", FREEZE))
    assert core.record("a").eviction == FREEZE
    core.happen(EvictionSet("a", None))
    assert core.record("a").eviction == OFFLOAD
    core.happen(EvictionSet("nobody", FREEZE))


def test_manual_mode_refuses_demand_for_what_is_not_resident() -> None:
    core = two()
    core.happen(ModeSet(manual=True))
    core.demand("b", waiting=1)
    assert core.refused() == [("b", Reason.MANUAL_MODE)]
    assert core.at("a") is ModelState.SERVING
    core.happen(LoadAsked("b"))
    assert core.at("a") is ModelState.DRAINING


def test_a_pinned_model_is_never_a_victim() -> None:
    core = two()
    core.happen(ModeSet(manual=True, pinned="a"))
    core.happen(LoadAsked("b"))
    assert core.at("a") is ModelState.SERVING


def test_demand_for_the_pinned_model_brings_it_back() -> None:
    core = two()
    core.happen(ModeSet(manual=True, pinned="a"))
    core.happen(EngineExited("a", "exit status 1"))
    core.demand("a", waiting=1)
    core.finish("a")
    assert core.plans() == ["start a"]


# ---- configuration ------------------------------------------------------------------------------


def test_a_new_model_can_be_asked_for_and_a_removed_one_is_stopped_then_forgotten() -> None:
    core = two()
    core.happen(ConfigChanged(config_of(model("b"), model("c"))))
    assert core.at("a") is ModelState.DRAINING
    core.drained("a")
    core.finish("a")
    assert set(core.state.models) == {"b", "c"}
    core.demand("c", waiting=1)
    assert core.plans() == ["start c"]


def test_an_unload_while_the_model_parks_is_done_when_it_is_parked() -> None:
    core = two()
    core.happen(ParkAsked("a"))
    core.drained("a")
    core.happen(ParkAsked("a", STOP))
    assert core.at("a") is ModelState.PARKING
    core.finish("a")
    assert core.plans() == ["stop a"]


@pytest.mark.parametrize("at", ["stopped", "starting", "serving", "draining", "parking", "parked"])
def test_a_model_removed_in_any_state_ends_up_forgotten(at: str) -> None:
    core = Core(model("a"), model("b"))
    steps: dict[str, Callable[[], object]] = {
        "starting": lambda: core.happen(LoadAsked("a")),
        "serving": lambda: core.finish("a"),
        "draining": lambda: core.happen(ParkAsked("a")),
        "parking": lambda: core.drained("a"),
        "parked": lambda: core.finish("a"),
    }
    for state, step in steps.items():
        if core.at("a").value == at:
            break
        step()
        assert core.at("a").value == state
    core.happen(ConfigChanged(config_of(model("b"))))
    for _ in range(4):
        if "a" not in core.state.models:
            break
        if core.record("a").epoch is not None:
            core.drained("a")
        else:
            core.finish("a")
    assert set(core.state.models) == {"b"}
    assert core.running == {}


def test_who_waits_for_a_removed_model_is_told_and_the_pin_goes_with_it() -> None:
    core = Core(model("a"), model("b"))
    core.happen(ModeSet(manual=True, pinned="a"))
    core.demand("a", waiting=1)
    core.happen(ConfigChanged(config_of(model("b"))))
    assert core.refused() == [("a", Reason.UNKNOWN_MODEL)]
    assert core.state.pinned is None


def test_a_model_that_is_configured_again_before_it_is_gone_stays() -> None:
    core = two()
    core.demand("a", in_flight=1)
    core.happen(ConfigChanged(config_of(model("b"))))
    assert core.at("a") is ModelState.DRAINING
    core.happen(ConfigChanged(config_of(model("a"), model("b"))))
    core.drained("a")
    core.finish("a")
    assert core.at("a") is ModelState.STOPPED
    core.demand("a", waiting=1)
    assert core.plans() == ["start a"]

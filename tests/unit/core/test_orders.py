"""What the core answers to an operator's order."""

from __future__ import annotations

from core_harness import DISCARD, OFFLOAD, STOP, WORKER, Core, model

from llmux.core.effects import OrderAnswered, Verdict
from llmux.core.events import DemandChanged, LoadAsked, ParkAsked, TrialSet
from llmux.core.plans import Outcome
from llmux.core.reducer import reduce_all
from llmux.errors import Reason


def answer(core: Core, order: LoadAsked | ParkAsked) -> tuple[Verdict, Reason | None]:
    core.happen(order)
    (answered,) = core.done(OrderAnswered)
    assert answered.order == 7
    return answered.verdict, answered.reason


def load(name: str) -> LoadAsked:
    return LoadAsked(name, order=7)


def park(name: str, **how: object) -> ParkAsked:
    return ParkAsked(name, order=7, **how)  # type: ignore[arg-type]


def test_a_load_is_accepted_once_and_then_already_so() -> None:
    core = Core(model("a"))
    assert answer(core, load("a")) == (Verdict.ACCEPTED, None)
    assert answer(core, load("a")) == (Verdict.ACCEPTED, None), "on its way"
    core.finish("a")
    assert answer(core, load("a")) == (Verdict.ALREADY, None)


def test_a_load_that_waits_for_room_is_accepted() -> None:
    core = Core(model("a"), model("b"), min_active_secs=30.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    assert answer(core, load("b")) == (Verdict.ACCEPTED, None)
    assert "b" in core.state.wants


def test_a_load_of_what_cannot_be_is_refused_with_the_reason() -> None:
    core = Core(model("a", gpus=3))
    assert answer(core, load("a")) == (Verdict.REFUSED, Reason.CANNOT_FIT)
    assert answer(core, load("ghost")) == (Verdict.REFUSED, Reason.UNKNOWN_MODEL)


def test_a_load_of_an_engine_that_could_not_be_killed_tries_the_kill_again() -> None:
    core = Core(model("b"))
    core.demand("b", waiting=1)
    core.finish("b", Outcome.STUCK, "state D")
    assert answer(core, load("b")) == (Verdict.ACCEPTED, None)
    assert core.plans() == ["stop b"]


def test_a_park_is_accepted_until_the_model_is_down() -> None:
    core = Core(model("a"))
    core.serve("a")
    assert answer(core, park("a")) == (Verdict.ACCEPTED, None)
    core.park("a")
    assert answer(core, park("a")) == (Verdict.ALREADY, None)
    assert answer(core, park("a", eviction=STOP)) == (Verdict.ACCEPTED, None)
    assert answer(core, park("a", eviction=STOP)) == (Verdict.ACCEPTED, None), "under way"
    core.finish("a")
    assert answer(core, park("a", eviction=OFFLOAD)) == (Verdict.ALREADY, None)


def test_a_park_of_what_cannot_be_moved_is_refused() -> None:
    core = Core(model("a"))
    assert answer(core, park("ghost")) == (Verdict.REFUSED, Reason.UNKNOWN_MODEL)
    core.demand("a", waiting=1)
    core.finish("a", Outcome.STUCK, "state D")
    assert answer(core, park("a")) == (Verdict.REFUSED, Reason.START_FAILED)


def test_a_load_that_a_park_of_the_same_batch_takes_back_is_refused() -> None:
    core = Core(model("a"))
    _, effects = reduce_all(core.state, [load("a"), ParkAsked("a")], core.now)
    (answered,) = [effect for effect in effects if isinstance(effect, OrderAnswered)]
    assert answered.verdict is Verdict.REFUSED
    assert "operator" in answered.message


def test_a_batch_is_applied_before_one_decision_is_made() -> None:
    """Of two models that become wanted together the older waiter goes first, in whatever order
    the events came."""
    core = Core(model("a"), model("b"))
    late = DemandChanged(WORKER, "a", 1, core.now - 1, 0, 0)
    early = DemandChanged(WORKER, "b", 1, core.now - 5, 0, 0)
    for batch in ([late, early], [early, late]):
        state, _ = reduce_all(core.state, batch, core.now)
        assert {n: r.state.value for n, r in state.models.items()} == {
            "a": "stopped",
            "b": "starting",
        }


def test_a_trial_changes_how_the_engine_is_started_until_it_ends() -> None:
    core = Core(model("a"))
    core.happen(TrialSet("a", DISCARD))
    core.happen(TrialSet("nosuch", DISCARD))
    assert core.record("a").engine.eviction == DISCARD
    core.happen(TrialSet("a", None))
    assert core.record("a").engine is core.record("a").config

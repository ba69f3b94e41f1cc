"""An operator's order that pinned models stand in the way of is refused at once (it used to wait
for 39 minutes without a word); requests wait, since a pin may end."""

from __future__ import annotations

import math

import pytest
from core_harness import Core, model

from llmux.core.effects import OrderAnswered, SwitchFinished, Verdict
from llmux.core.events import LoadAsked, ModeSet, ParkAsked, PinSet
from llmux.core.states import ModelState
from llmux.errors import Reason


def answer(core: Core) -> OrderAnswered:
    (found,) = core.done(OrderAnswered)
    return found


def switched_from(
    core: Core, name: str, to: str
) -> tuple[tuple[str, ...], float, tuple[str, ...], float]:
    """``name`` has five seconds more to drain, and ``to`` is resident three after it was parked:
    behind whom it waited and how long, its victims, and the drain."""
    core.pass_time(5)
    core.drained(name)
    core.finish(name)
    core.pass_time(3)
    core.finish(to)
    (switch,) = core.done(SwitchFinished)
    assert switch.serving_at - switch.room_at == 3.0
    return switch.behind, switch.waited_secs, switch.victims, switch.drained_at - switch.decided_at


@pytest.mark.parametrize("how", ["pin", "mode", "never_evict"])
def test_an_order_is_refused_at_once_and_leaves_nothing_behind(how: str) -> None:
    core = Core(model("alpha", never_evict=how == "never_evict"), model("beta"))
    core.serve("alpha")
    if how == "pin":
        core.happen(PinSet("alpha", math.inf))
    elif how == "mode":
        core.happen(ModeSet(True, "alpha"))
    core.happen(LoadAsked("beta", 7))
    found = answer(core)
    assert (found.verdict, found.reason) == (Verdict.REFUSED, Reason.PINNED)
    assert found.message == ("alpha stays resident, pinned or by never_evict (llmux unpin alpha)")
    assert not core.state.wants
    assert not core.state.reservations
    core.happen(PinSet("alpha", None))
    core.happen(ModeSet(False, None))
    assert core.at("alpha") is ModelState.SERVING, "nothing displaces it later"


def test_requests_wait_and_get_their_turn_when_the_pin_ends() -> None:
    core = Core(model("alpha"), model("beta"))
    core.serve("alpha")
    core.happen(PinSet("alpha", core.now + 60))
    core.demand("beta", waiting=1)
    assert core.refused() == []
    assert core.at("alpha") is ModelState.SERVING
    core.pass_time(61)
    assert core.at("alpha") is ModelState.DRAINING
    assert switched_from(core, "alpha", "beta") == (("alpha",), 61.0, ("alpha",), 5.0)


def test_a_wait_behind_a_pinned_model_that_then_goes_is_no_drain() -> None:
    """The log said "drain 160 s" of a model that had no victim."""
    core = Core(model("alpha", never_evict=True), model("beta"))
    core.serve("alpha")
    core.demand("beta", waiting=1)
    core.pass_time(160)
    core.happen(ParkAsked("alpha"))
    core.pass_time(4)
    assert switched_from(core, "alpha", "beta") == (("alpha",), 169.0, (), 0.0)


def test_of_two_in_the_way_the_one_that_stays_is_named() -> None:
    core = Core(model("alpha"), model("gamma", gpus=(1,)), model("beta", gpus=(0, 1)), gpu_count=2)
    for name in ("alpha", "gamma"):
        core.serve(name)
    core.happen(PinSet("alpha", core.now + 60))
    core.demand("beta", waiting=1)
    assert core.at("gamma") is ModelState.SERVING, "its leaving would help nobody"
    core.pass_time(61)
    for name in ("alpha", "gamma"):
        core.drained(name)
        core.finish(name)
    core.finish("beta")
    (switch,) = core.done(SwitchFinished)
    assert (switch.behind, switch.waited_secs) == (("alpha",), 61.0)


def test_a_switch_that_waited_behind_nobody_says_so() -> None:
    core = Core(model("alpha"), model("beta"))
    core.serve("alpha")
    core.demand("beta", waiting=1)
    core.pass_time(7)
    assert switched_from(core, "alpha", "beta") == ((), 0.0, ("alpha",), 12.0)


def test_an_order_for_what_requests_wait_for_waits_with_them() -> None:
    core = Core(model("alpha"), model("beta"))
    core.serve("alpha")
    core.happen(PinSet("alpha", math.inf))
    core.demand("beta", waiting=1)
    core.happen(LoadAsked("beta", 7))
    assert answer(core).verdict is Verdict.ACCEPTED
    core.happen(PinSet("alpha", None))
    assert core.at("alpha") is ModelState.DRAINING


def test_an_order_waits_for_what_can_still_leave() -> None:
    half = {"gpu_memory": 0.5, "gpu_memory_parked": 0.0}
    core = Core(model("alpha", **half), model("gamma", **half), model("beta", **half))
    core.serve("alpha")
    core.happen(PinSet("alpha", math.inf))
    core.demand("gamma", waiting=1)  # it starts beside alpha, and may leave again
    core.happen(LoadAsked("beta", 7))
    assert answer(core).verdict is Verdict.ACCEPTED
    core.finish("gamma")
    core.demand("gamma")
    assert core.at("gamma") is ModelState.DRAINING


def test_a_pin_on_one_gpu_stops_nothing_on_another() -> None:
    core = Core(model("alpha"), model("beta", gpus=(1,)), model("gamma", gpus=(1,)), gpu_count=2)
    core.serve("alpha")
    core.happen(PinSet("alpha", math.inf))
    core.serve("beta")
    core.happen(LoadAsked("gamma", 7))
    assert answer(core).verdict is Verdict.ACCEPTED
    assert core.at("beta") is ModelState.DRAINING


def test_two_pinned_models_are_both_named() -> None:
    half = {"gpu_memory": 0.5}
    core = Core(model("alpha", **half), model("gamma", **half), model("beta"))
    for name in ("alpha", "gamma"):
        core.serve(name)
        core.happen(PinSet(name, math.inf))
    core.happen(LoadAsked("beta", 7))
    assert answer(core).message.startswith("alpha, gamma stay resident")


@pytest.mark.parametrize("how", ["pin", "never_evict"])
@pytest.mark.parametrize("others_share", [0.9, 0.4])
def test_who_waits_for_a_model_that_stays_holds_up_nobody_elsewhere(
    how: str, others_share: float
) -> None:
    core = Core(
        model("stays", gpus=(1,), never_evict=how == "never_evict"), model("both", gpus=2),
        model("idle", gpus=(0,), gpu_memory=others_share),
        model("other", gpus=(0,), gpu_memory=others_share),
        gpu_count=2,
    )  # fmt: skip
    core.serve("stays")
    core.serve("idle")
    if how == "pin":
        core.happen(PinSet("stays", math.inf))
    core.demand("both", waiting=1, age=9.0)
    core.demand("other", waiting=1)
    if others_share > 0.5:
        assert core.at("idle") is ModelState.DRAINING
        core.park("idle")
    assert core.at("other") is ModelState.STARTING
    assert core.at("both") is ModelState.STOPPED


def test_nor_beside_it_and_is_the_first_when_it_may_go() -> None:
    core = Core(
        model("stays", gpu_memory=0.5), model("large"), model("small", gpu_memory=0.4),
        model("late", gpu_memory=0.4),
    )  # fmt: skip
    core.serve("stays")
    core.happen(PinSet("stays", math.inf))
    core.demand("large", waiting=1, age=9.0)
    core.demand("small", waiting=1)
    assert core.plans() == ["start small"]
    core.finish("small")
    core.demand("small")
    core.demand("late", waiting=1, age=1.0)
    assert core.at("small") is ModelState.DRAINING
    core.happen(PinSet("stays", None))
    core.park("small")
    core.park("stays")
    assert core.plans() == ["start large"]

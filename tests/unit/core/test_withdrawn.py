"""Operators' orders that are taken back before they were carried out."""

from __future__ import annotations

from core_harness import OFFLOAD, STOP, Core, model

from llmux.core.events import LoadAsked, LoadWithdrawn, ParkAsked, ParkWithdrawn
from llmux.core.records import Draining
from llmux.core.states import ModelState


def busy() -> Core:
    """``a`` serves a request; an operator wants ``b``, so that ``a`` drains."""
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.happen(LoadAsked("b"))
    assert isinstance(core.record("a").phase, Draining)
    return core


def test_a_load_that_is_withdrawn_lets_the_other_serve_on() -> None:
    core = busy()
    core.happen(LoadWithdrawn("b"))
    assert core.at("a") is ModelState.SERVING
    assert not core.state.wants and not core.state.reservations


def test_requests_that_wait_keep_what_an_operator_no_longer_wants() -> None:
    core = busy()
    core.demand("b", waiting=1)
    core.happen(LoadWithdrawn("b"))
    assert core.at("a") is ModelState.DRAINING
    assert "b" in core.state.reservations


def test_a_start_that_is_under_way_goes_on() -> None:
    core = Core(model("a"))
    core.happen(LoadAsked("a"))
    core.happen(LoadWithdrawn("a"))
    core.finish("a")
    assert core.at("a") is ModelState.SERVING


def test_a_park_that_is_withdrawn_while_it_drains_gives_the_requests_back_their_engine() -> None:
    core = Core(model("a"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.happen(ParkAsked("a", STOP))
    assert core.at("a") is ModelState.DRAINING
    core.happen(ParkWithdrawn("a"))
    assert core.at("a") is ModelState.SERVING
    assert core.granted() == ["a"]


def test_a_park_that_waits_for_the_start_is_forgotten() -> None:
    core = Core(model("a"))
    core.happen(LoadAsked("a"))
    core.happen(ParkAsked("a", OFFLOAD))
    core.happen(ParkWithdrawn("a"))
    core.finish("a")
    assert core.at("a") is ModelState.SERVING


def test_a_drain_for_another_model_is_not_the_operators_to_withdraw() -> None:
    core = busy()
    core.happen(ParkWithdrawn("a"))
    assert core.at("a") is ModelState.DRAINING


def test_an_unknown_model_has_no_orders() -> None:
    core = Core(model("a"))
    core.happen(ParkWithdrawn("b"))
    core.happen(LoadWithdrawn("b"))
    assert core.states() == {"a": "stopped"}

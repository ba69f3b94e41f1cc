"""Why a model is where it is: each reason in the words that operators read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from core_harness import DISCARD, FREEZE, OFFLOAD, STOP, Core, model

from llmux.core.demand.workers import WorkerDemand
from llmux.core.events import EngineExited, LoadAsked, ParkAsked, PinSet
from llmux.core.operations import CUT_GRACE_SECS
from llmux.core.plans import Outcome
from llmux.core.records import (
    Draining,
    Failed,
    Parked,
    Parking,
    Phase,
    Reservation,
    Serving,
    Starting,
    Stopped,
    Stopping,
    Waking,
)
from llmux.core.why import NAMED, Why, explain, in_flight, stays


def why(core: Core, name: str) -> Why:
    return explain(core.state, name, core.now)


def two(**policy: Any) -> Core:
    return Core(model("alpha"), model("beta"), **policy)


def test_a_model_waits_for_the_requests_of_one_that_drains_and_the_time_counts_down() -> None:
    core = two(drain_timeout_secs=120.0)
    core.serve("alpha")
    core.demand("alpha", in_flight=1)
    core.demand("beta", waiting=1)
    assert why(core, "beta") == Why(
        "waits for alpha: 1 request in flight, at most 120 s", ("alpha",), 120.0
    )
    assert why(core, "alpha").text == "makes room for beta: 1 request in flight, at most 120 s"
    core.pass_time(12.0)
    assert why(core, "beta").text == "waits for alpha: 1 request in flight, at most 108 s"


def test_a_model_waits_for_another_to_release_its_memory() -> None:
    core = two()
    core.serve("alpha")
    core.demand("beta", waiting=1)
    core.drained("alpha")
    assert why(core, "beta") == Why("waits for alpha to release its GPU memory", ("alpha",))
    assert why(core, "alpha") == Why("makes room for beta")


def test_a_model_waits_for_another_that_comes_up_on_its_gpu() -> None:
    core = two()
    core.demand("alpha", waiting=1)
    core.demand("beta", waiting=1)
    assert why(core, "beta") == Why("waits for alpha, which starts on the same GPU", ("alpha",))
    assert why(core, "alpha") == Why()


def test_a_model_waits_while_the_policy_lets_another_serve() -> None:
    core = two(min_active_secs=60.0)
    core.serve("alpha")
    core.demand("alpha", in_flight=1)
    core.demand("beta", waiting=1)
    assert why(core, "beta") == Why("waits for its turn; alpha may serve longer", ("alpha",))


def test_a_model_on_other_gpus_is_not_waited_for() -> None:
    core = Core(model("alpha", gpus=(1,)), model("beta"), model("gamma"), gpu_count=2)
    core.serve("beta")
    core.demand("alpha", waiting=1)
    core.demand("beta", in_flight=2)
    core.demand("gamma", waiting=1)
    assert why(core, "gamma").waits_for == ("beta",)


def test_of_two_gpus_that_change_hands_each_waits_for_its_own() -> None:
    names = (("alpha", 1), ("delta", 1), ("beta", 0), ("gamma", 0))
    core = Core(*(model(name, gpus=(gpu,)) for name, gpu in names), gpu_count=2)
    for serves, waits in (("alpha", "delta"), ("beta", "gamma")):
        core.serve(serves)
        core.demand(serves, in_flight=1)
        core.demand(waits, waiting=1)
    assert why(core, "delta").waits_for == ("alpha",)
    assert why(core, "gamma").waits_for == ("beta",)
    core.drained("alpha")
    assert why(core, "delta").text == "waits for alpha to release its GPU memory"
    assert why(core, "gamma").waits_for == ("beta",)


def test_a_failure_is_named_by_its_first_line_with_the_time_to_the_next_try() -> None:
    core = two()
    core.demand("alpha", waiting=1)
    core.finish("alpha", Outcome.DOWN, "it died: exit status 1; its last lines:\nValueError: no")
    assert why(core, "alpha").text == (
        "it died: exit status 1; its last lines; no new start for 2 s"
    )


def test_an_engine_that_died_says_so_although_it_is_stopped() -> None:
    core = two()
    core.serve("alpha")
    core.happen(EngineExited("alpha", "killed by SIGKILL"))
    core.finish("alpha", Outcome.DOWN)
    assert core.at("alpha").value == "stopped"
    assert why(core, "alpha") == Why("engine died: killed by SIGKILL")


def test_an_operators_park_is_named_while_it_is_waited_for() -> None:
    core = two(drain_timeout_secs=30.0)
    core.happen(LoadAsked("alpha"))
    core.happen(ParkAsked("alpha", DISCARD))
    assert why(core, "alpha") == Why("parked by order as soon as it serves")
    core.finish("alpha")
    assert why(core, "alpha").text == "parked by order: 0 requests in flight, at most 30 s"


def test_an_idle_model_is_parked_for_that() -> None:
    core = Core(model("alpha"), idle_timeout_secs=20.0)
    core.serve("alpha")
    core.pass_time(20)
    assert why(core, "alpha").text.startswith("not used for 20 s: 0 requests in flight")


def test_a_model_that_stays_resident_is_named_to_requests_that_wait() -> None:
    core = two()
    core.serve("alpha")
    core.happen(PinSet("alpha", core.now + 60))
    core.demand("beta", waiting=1)
    expected = "waits for alpha, which stays resident (pinned or never_evict)"
    assert why(core, "beta") == Why(expected, ("alpha",))


def test_a_model_at_rest_that_nothing_waits_for_needs_no_reason() -> None:
    core = two()
    assert why(core, "alpha") == Why()
    core.serve("alpha")
    core.happen(ParkAsked("alpha", OFFLOAD))
    core.park("alpha")
    assert why(core, "alpha") == Why()
    core.happen(ParkAsked("alpha", STOP))
    assert why(core, "alpha") == Why("an operator asked")


# ---- each phase, beside others ------------------------------------------------------------------

UP = Serving("t.1", 50.0)
ORDERED = {"own": {"park_request": STOP}}
PLACE = {"reservations": {"me": Reservation(1.0, 1.0)}}


def draining(deadline: float = 130.0, **facts: Any) -> Draining:
    by = facts.pop("wanted_by", None)
    return Draining("t.1", 50.0, 90.0, deadline, OFFLOAD, by, **facts)


def reason(phase: Phase, *others: Phase, gpus: str = "", **facts: Any) -> Why:
    """Of ``me`` on GPU 0 at 100.0, which a request waits for; the others are b, c, … there, or on
    the GPUs of ``gpus``. ``requests``: in flight by model."""
    core = Core(model("me"), *(model(name) for name in "bcdefg"[: len(others)]), gpu_count=2)
    requests = {n: WorkerDemand(in_flight=v) for n, v in facts.pop("requests", {}).items()}
    waits = {"me": WorkerDemand(1, 90.0)} if facts.pop("waits", True) else {}
    own = facts.pop("own", {})
    models = {"me": replace(core.record("me"), phase=phase, gpus=(0,), **own)}
    for at, other in enumerate(others):
        where = (int(gpus[at]),) if gpus else (0,)
        models["bcdefg"[at]] = replace(core.record("bcdefg"[at]), phase=other, gpus=where)
    state = replace(core.state, models=models, demands={**waits, **requests}, **facts)
    return explain(state, "me", 100.0)


@pytest.mark.parametrize(
    ("phase", "facts", "text"),
    [
        (Failed(90.0, 107.4, "no weights:\nlong"), {}, "no weights; no new start for 7 s"),
        (Failed(90.0, 107.0, "state D", held=True), {}, "state D; its end is tried again in 7 s"),
        (Failed(90.0, 100.0, "no weights"), {}, "no weights"),
        (Failed(90.0, 95.0, "no weights ; "), {}, "no weights"),
        (draining(), {}, "parked by order: 0 requests in flight, at most 30 s"),
        (draining(reason="not used"), {}, "not used: 0 requests in flight, at most 30 s"),
        (draining(wanted_by="b"), {}, "makes room for b: 0 requests in flight, at most 30 s"),
        (draining(90.0), {}, "parked by order: 0 requests in flight, at most 0 s"),
        (draining(90.0, cut_at=98.0), {}, "parked by order: 0 requests in flight, at most 3 s"),
        (Parking(1, 90.0, OFFLOAD, wanted_by="b"), {}, "makes room for b"),
        (Parking(1, 90.0, OFFLOAD), {}, ""),
        (Starting(1, 90.0), ORDERED, "parked by order as soon as it serves"),
        (Waking(1, 90.0, OFFLOAD), ORDERED, "parked by order as soon as it serves"),
        (Starting(1, 90.0, "wake failed\nlong"), {}, "wake failed"),
        (Waking(1, 90.0, OFFLOAD), {}, ""),
        (Stopping(1, 90.0, "engine died\nlong", 0.9), {}, "engine died"),
        (Stopped(90.0, "an operator asked\n"), {"waits": False}, "an operator asked"),
        (Parked(OFFLOAD, 90.0, "the disk is full\n"), {"waits": False}, "the disk is full"),
        (UP, {}, ""),
        (Stopped(), {}, "waits for its turn"),
        (Stopped(), {"waits": False, "wants": {"me": 90.0}}, "waits for its turn"),
        (Parked(OFFLOAD, 90.0, "no"), {"waits": False, **PLACE}, "waits for its turn"),
    ],
)  # fmt: skip
def test_the_reason_of_each_phase(phase: Phase, facts: dict[str, Any], text: str) -> None:
    why = reason(phase, **facts)
    assert (why.text, why.waits_for) == (text, ())
    assert (why.at_most_secs is not None) is ("at most" in text)
    assert why.at_most_secs is None or f"{why.at_most_secs:.0f} s" in text
    assert CUT_GRACE_SECS == 5.0


@pytest.mark.parametrize(
    ("others", "facts", "expected"),
    [
        (
            (draining(), draining(115.0), Parking(1, 90.0, OFFLOAD)),
            {"requests": {"b": 1, "c": 2, "d": 9}},
            Why("waits for b, c: 3 requests in flight, at most 30 s", ("b", "c"), 30.0),
        ),
        (
            (Starting(1, 90.0), Parking(1, 90.0, OFFLOAD), Stopping(1, 90.0, "", 0.9)),
            {}, Why("waits for c, d to release its GPU memory", ("c", "d")),
        ),
        ((UP, Starting(1, 90.0)), {}, Why("waits for c, which starts on the same GPU", ("c",))),
        ((Waking(1, 90.0, OFFLOAD),), {}, Why("waits for b, which wakes on the same GPU", ("b",))),
        ((Waking(1, 90.0, FREEZE),), {}, Why("waits for its turn")),
        (
            (UP, UP), {"pinned": "c"},
            Why("waits for c, which stays resident (pinned or never_evict)", ("c",)),
        ),
        ((UP, Parked(OFFLOAD, 1.0)), {}, Why("waits for its turn; b may serve longer", ("b",))),
        (
            (Stopped(), Parked(OFFLOAD, 1.0)),
            {"reservations": {"c": Reservation(1.0, 1.0), "me": Reservation(1.0, 1.0)}},
            Why("waits behind c", ("c",)),
        ),
        ((UP, draining()), {"gpus": "01"}, Why("waits for its turn; b may serve longer", ("b",))),
        (
            (UP,) * 5, {},
            Why("waits for its turn; b, c, d and 2 more may serve longer", tuple("bcdef")),
        ),
        ((UP,) * NAMED, {}, Why("waits for its turn; b, c, d may serve longer", tuple("bcd"))),
    ],
)  # fmt: skip
def test_what_a_model_at_rest_waits_for(
    others: tuple[Phase, ...], facts: dict[str, Any], expected: Why
) -> None:
    assert reason(Stopped(), *others, **facts) == expected
    assert reason(Parked(OFFLOAD, 90.0), *others, **facts) == expected


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 requests"), (1, "1 request"), (2, "2 requests")]
)
def test_requests_are_counted(count: int, text: str) -> None:
    assert in_flight(count) == f"{text} in flight"


def test_which_models_make_no_room() -> None:
    core = Core(model("a"), model("b", never_evict=True))
    cases: list[tuple[dict[str, Any], list[bool]]] = [
        ({}, [False, True]), ({"pinned": "a"}, [True, True]),
        ({"pins": {"a": 101.0}}, [True, True]), ({"pins": {"a": 100.0}}, [False, True]),
    ]  # fmt: skip
    for facts, expected in cases:
        state = replace(core.state, **facts)
        assert [stays(state, record, 100.0) for record in state.models.values()] == expected

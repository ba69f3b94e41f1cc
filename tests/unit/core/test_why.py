"""Why a model is where it is: each reason in the words that operators read."""

from __future__ import annotations

from typing import Any

from core_harness import DISCARD, OFFLOAD, STOP, Core, model

from llmux.core.events import EngineExited, LoadAsked, ParkAsked, PinSet
from llmux.core.plans import Outcome
from llmux.core.why import Why, explain


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

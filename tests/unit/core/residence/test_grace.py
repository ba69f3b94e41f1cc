"""Which engines are asked to end before they are killed: those that live."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_harness import STOP, Core, config_of, model

from llmux.core.events import ConfigChanged, EngineExited, ParkAsked, ProbeFinished
from llmux.core.plans import Outcome, stop_plan


def parked() -> Core:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    return core


def by_an_operator() -> Core:
    core = parked()
    core.happen(ParkAsked("a", STOP))
    return core


def by_a_reload() -> Core:
    core = parked()
    core.happen(ConfigChanged(config_of(model("b"))))
    return core


def dead_while_parked() -> Core:
    core = parked()
    core.happen(EngineExited("a", "gone"))
    return core


def dead_while_serving() -> Core:
    core = Core(model("a"))
    core.serve("a")
    core.happen(EngineExited("a", "gone"))
    return core


def hung() -> Core:
    core = Core(model("a"))
    core.serve("a")
    epoch = core.record("a").epoch
    assert epoch is not None
    core.happen(ProbeFinished("a", epoch, "no answer"))
    return core


def given_up() -> Core:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    core.happen(ParkAsked("a", STOP))
    return core


def tried_again() -> Core:
    core = Core(model("a"), backoff_secs=2.0)
    core.demand("a", waiting=1)
    core.finish("a", Outcome.STUCK, "state D")
    core.pass_time(2)
    return core


@pytest.mark.parametrize(
    ("ended", "grace"),
    [
        (by_an_operator, True), (by_a_reload, True), (dead_while_parked, False),
        (dead_while_serving, False), (hung, False), (given_up, False), (tried_again, False),
    ],
)  # fmt: skip
def test_only_a_healthy_engine_is_asked(ended: Callable[[], Core], grace: bool) -> None:
    core = ended()
    assert core.running["a"].plan == stop_plan(core.record("a").config, grace=grace)

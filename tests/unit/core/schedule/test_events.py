"""What each event leaves on the model's record and asks of the workers, field by field."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from core_harness import (
    CHECKPOINT,
    DISCARD,
    FREEZE,
    OFFLOAD,
    WORKER,
    Core,
    config_of,
    model,
)

from llmux.core.demand.workers import WorkerDemand
from llmux.core.effects import (
    SendGrant,
    SendRefuse,
    SendRevoke,
)
from llmux.core.events import (
    AwakeSeen,
    ConfigChanged,
    DemandChanged,
    EvictionSet,
    ImageKnown,
    KeepAliveSet,
    MemoryPressure,
    ModeSet,
    ParkAsked,
    PinSet,
    ResidueSeen,
    TrialSet,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.records import (
    Draining,
    Stopping,
)
from llmux.errors import Reason


def serving(**policy: Any) -> Core:
    """a serves since 100.0, now it is 150.0; b is stopped."""
    core = Core(model("a"), model("b"), **policy)
    core.serve("a")
    core.now = 150.0
    return core


# ---- facts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        (ImageKnown("a", CHECKPOINT, 7), {"image": CHECKPOINT, "image_bytes": 7}),
        (ImageKnown("a", CHECKPOINT), {"image": CHECKPOINT, "image_bytes": 5}),
        (ImageKnown("a", None), {"image": None, "image_bytes": 5}),
        (EvictionSet("a", FREEZE), {"eviction_override": FREEZE}),
        (TrialSet("a", FREEZE), {"trial": FREEZE}),
        (KeepAliveSet("a", 900.0), {"keep_alive": 900.0}),
    ],
)
def test_what_is_told_of_a_model_is_known_of_it(event: Any, facts: dict[str, Any]) -> None:
    core = serving()
    core.put("a", image_bytes=5, image=DISCARD)
    before = core.record("a")
    core.happen(event)
    assert core.record("a") == replace(before, **facts)
    core.happen(replace(event, model="ghost"))
    assert set(core.state.models) == {"a", "b"}


def test_what_the_whole_is_told_of_is_known() -> None:
    core = serving()
    core.happen(ModeSet(True, "a"))
    core.happen(MemoryPressure(True))
    core.happen(PinSet("a", math.inf))
    assert (core.state.manual, core.state.pinned, core.state.memory_short) == (True, "a", True)
    assert core.state.pins == {"a": math.inf}
    core.happen(ModeSet(False))
    core.happen(MemoryPressure(False))
    assert (core.state.manual, core.state.pinned, core.state.memory_short) == (False, None, False)


def test_what_is_seen_of_another_operation_counts_for_nothing() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    op = core.running["a"].op
    core.happen(AwakeSeen("a", op, 0.7))
    assert (core.record("a").awake, core.record("a").residue) == (0.7, None)
    core.happen(ResidueSeen("a", op, 0.1))
    assert (core.record("a").awake, core.record("a").residue) == (0.7, 0.1)
    for event in (AwakeSeen("a", op + 1, 0.2), ResidueSeen("a", op + 1, 0.2)):
        core.happen(event)
    core.finish("a")
    core.happen(AwakeSeen("a", op, 0.2))
    assert (core.record("a").awake, core.record("a").residue) == (0.7, 0.1)
    core.happen(ConfigChanged(core.state.config))
    assert (core.record("a").awake, core.record("a").residue) == (0.7, 0.1), "the same engine"
    core.happen(ConfigChanged(config_of(model("a", priority=1))))
    assert (core.record("a").awake, core.record("a").residue) == (None, None)


# ---- demand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "progressed", "answered", "used"),
    [
        ({}, {"waiting": 1, "oldest_since": 140.0}, False, False, True),
        ({}, {"in_flight": 1}, True, False, True),
        ({"in_flight": 1}, {"in_flight": 2}, False, False, True),
        ({"in_flight": 1}, {}, False, False, True),
        ({"in_flight": 1}, {"in_flight": 1, "progress": 3}, True, True, True),
        ({"progress": 3}, {"progress": 4}, True, True, False),
        ({"waiting": 1, "oldest_since": 140.0}, {}, False, False, False),
        ({}, {}, False, False, False),
    ],
)
def test_demand_is_use_and_signs_of_life(
    before: dict[str, Any], after: dict[str, Any], progressed: bool, answered: bool, used: bool
) -> None:
    core = serving()
    none = {"waiting": 0, "oldest_since": None, "in_flight": 0, "progress": 0}
    core.happen(DemandChanged(WORKER, "a", **(none | before)))
    core.put("a", progress_at=1.0, bytes_at=2.0, last_active=3.0)
    core.now = 160.0
    core.happen(DemandChanged(WORKER, "a", **(none | after)))
    record = core.record("a")
    assert (record.progress_at == 160.0, record.bytes_at == 160.0) == (progressed, answered)
    assert (record.last_active == 160.0) is used
    assert core.state.demands["a"] == WorkerDemand(**(none | after))


@pytest.mark.parametrize(
    ("completed", "phase", "failures"),
    [
        (5, None, 0), (4, None, 3), (5, Draining("t.1", 1.0, 2.0, 900.0, OFFLOAD, None), 0),
        (5, Stopping(99, 1.0, "", 0.9), 3),
    ],
)  # fmt: skip
def test_an_answer_forgets_the_failures_of_one_that_serves(
    completed: int, phase: Any, failures: int
) -> None:
    core = serving()
    core.demand("a", in_flight=1, completed=4)
    core.put("a", failures=3, overdue_at=math.inf, **({"phase": phase} if phase else {}))
    core.demand("a", in_flight=1, completed=completed)
    assert core.record("a").failures == failures


def test_what_is_on_its_way_out_is_asked_for_in_vain() -> None:
    core = serving()
    core.put("a", removed=True)
    core.demand("a", waiting=1)
    core_text = 'the model "a" does not exist'
    assert core.done(SendRefuse) == [SendRefuse(WORKER, "a", Reason.UNKNOWN_MODEL.value, core_text)]
    assert core.state.demands["a"] == WorkerDemand()


# ---- workers ------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_is_given_what_serves_and_asked_for_what_does_not() -> None:
    core = Core(*(model(name, gpus=(gpu,)) for gpu, name in enumerate("abcd")), gpu_count=4)
    for name in "abc":
        core.serve(name)
    core.demand("c", in_flight=1)
    core.happen(ParkAsked("c"))
    epochs = {name: core.record(name).epoch for name in "abc"}
    held = {"a": "old.1", "b": epochs["b"], "d": "old.4", "ghost": "old.9"}
    core.happen(WorkerJoined("x", {name: str(epoch) for name, epoch in held.items()}))
    assert core.effects == (
        SendRevoke("x", "a", "old.1"),
        SendRevoke("x", "d", "old.4"),
        SendRevoke("x", "ghost", "old.9"),
        SendGrant("x", "a", str(epochs["a"])),
        SendRevoke("x", "c", str(epochs["c"])),
    )
    assert core.state.workers["x"].holds == epochs
    core.demand("c")
    core.happen(WorkerDrained("x", "c", "old.3"))
    core.happen(WorkerDrained("ghost", "c", str(epochs["c"])))
    assert "c" in core.state.workers["x"].holds
    core.happen(WorkerJoined("x", {}))
    assert core.state.workers["x"].holds == epochs
    core.happen(WorkerLeft("x"))
    assert set(core.state.workers) == {WORKER}

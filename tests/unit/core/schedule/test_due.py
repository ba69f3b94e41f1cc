"""What becomes due as time passes: each model is looked at, whatever is true of those before it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from core_harness import FREEZE, OFFLOAD, config_of, model

from llmux.core.demand.workers import WorkerDemand
from llmux.core.effects import Probe, RunPlan
from llmux.core.plans import stop_plan
from llmux.core.records import (
    Draining,
    Failed,
    Parking,
    Phase,
    Serving,
    Starting,
    Stopping,
    Waking,
)
from llmux.core.reducer import initial
from llmux.core.timeouts import end_overdue, park_idle, retry_kills, watch_for_stalls
from llmux.core.transaction import Transaction

NOW = 1000.0
UP = Serving("t.1", 900.0)


def transaction(
    *models: tuple[Phase, dict[str, Any]], policy: dict[str, Any] | None = None, **facts: Any
) -> Transaction:
    """Models a, b, … on a GPU each; the facts of a model are its record's, or its configuration's
    with a dash in front."""
    config = config_of(
        *(
            model(name, **{k[1:]: v for k, v in own.items() if k[0] == "-"}, gpus=(gpu,))
            for gpu, (name, (_, own)) in enumerate(zip("abcdefgh", models, strict=False))
        ),
        **(policy or {}),
    )
    state = initial(config, gpu_count=len(models), epoch_prefix="t")
    records = {
        name: replace(
            record, phase=phase, gpus=(gpu,), **{k: v for k, v in own.items() if k[0] != "-"}
        )
        for gpu, ((name, record), (phase, own)) in enumerate(
            zip(state.models.items(), models, strict=True)
        )
    }
    return Transaction(replace(state, models=MappingProxyType(records), **facts), NOW)


def plans(tx: Transaction) -> list[str]:
    return [f"{e.plan.kind} {e.model}" for e in tx.finish()[1] if isinstance(e, RunPlan)]


def states(tx: Transaction) -> str:
    return " ".join(record.state for record in tx.models.values())


# ---- operations without an end ------------------------------------------------------------------

OPERATIONS: list[Phase] = [
    Starting(1, 960.0), Parking(2, 960.0, OFFLOAD), Waking(3, 960.0, OFFLOAD),
    Stopping(4, 960.0, "", 0.9),
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.state.value)
def test_an_operation_hangs_at_its_deadline_and_not_before(operation: Phase) -> None:
    tx = transaction(
        (operation, {"overdue_at": NOW + 0.5}),
        (operation, {"overdue_at": NOW, "failures": 2}),
        (operation, {"overdue_at": NOW + 7}),
        (operation, {"overdue_at": NOW - 3}),
        (UP, {"overdue_at": NOW - 3}),
        policy={"backoff_secs": 2.0},
    )
    end_overdue(tx)
    assert tx.finish()[0].wakeup == NOW + 0.5
    text = "its operation has not ended after 40 s"
    assert [tx.models[name].phase for name in "abcde"] == [
        operation,
        Failed(NOW, NOW + 8, text, held=True, share=0.9),
        operation,
        Failed(NOW, NOW + 2, text, held=True, share=0.9),
        UP,
    ]
    assert [tx.models[name].failures for name in "abcde"] == [0, 3, 0, 1, 0]


def test_an_engine_that_could_not_be_killed_is_tried_again_when_it_is_time() -> None:
    def failed(until: float, **facts: Any) -> tuple[Phase, dict[str, Any]]:
        return Failed(900.0, until, "state D", **facts), {}

    tx = transaction(
        failed(NOW + 9, held=True, share=0.9), failed(NOW - 1), failed(NOW, held=True, share=0.2),
        failed(NOW + 5, held=True), failed(NOW - 1, held=True, share=0.1, was_parked=True),
    )  # fmt: skip
    retry_kills(tx)
    assert states(tx) == "failed failed stopping failed stopping"
    assert plans(tx) == ["stop c", "stop e"]
    ended = [e.plan for e in tx.finish()[1] if isinstance(e, RunPlan)]
    assert ended == [stop_plan(tx.models[name].config, grace=False) for name in "ce"]
    reason = "ended at a further try, after: state D"
    assert tx.models["c"].phase == Stopping(1, NOW, reason, 0.2)
    assert tx.models["e"].phase == Stopping(2, NOW, reason, 0.1, was_parked=True)
    assert tx.finish()[0].wakeup == NOW + 5


# ---- models that nobody uses --------------------------------------------------------------------

IDLE: tuple[Phase, dict[str, Any]] = (UP, {"last_active": 940.0})


@pytest.mark.parametrize(
    "own",
    [
        {"keep_alive": math.inf}, {"-idle_timeout_secs": 0.0}, {"-never_evict": True},
        {"-eviction": FREEZE}, {"last_active": 990.0}, {"keep_alive": 70.0},
        {"-idle_timeout_secs": 70.0}, {"demand": 1}, {"waiting": True}, {"phase": 945.0},
        {"pin": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_stays_keeps_no_idle_one_behind_it(own: dict[str, Any]) -> None:
    phase = Serving("t.1", own.pop("phase", 900.0))
    waiting = {"a"} if own.pop("waiting", None) else set()
    facts: dict[str, Any] = {}
    if own.pop("demand", None):
        facts["demands"] = {"a": WorkerDemand(in_flight=1)}
    if own.pop("pin", None):
        facts["pins"] = {"a": math.inf}
    tx = transaction(
        (phase, {"last_active": 940.0, **own}), IDLE, policy={"idle_timeout_secs": 60.0}, **facts
    )
    park_idle(tx, waiting)
    assert states(tx) == "serving draining"
    drain = tx.models["b"].phase
    assert isinstance(drain, Draining)
    assert (drain.reason, drain.wanted_by, drain.eviction) == ("not used for 60 s", None, OFFLOAD)


@pytest.mark.parametrize(
    ("own", "due"),
    [
        ({}, 1000.0), ({"last_active": 950.0}, 1010.0), ({"keep_alive": 70.0}, 1010.0),
        ({"keep_alive": 0.0}, 940.0), ({"-idle_timeout_secs": 61.0}, 1001.0),
        ({"-idle_timeout_secs": 61.0, "keep_alive": 5.0}, 945.0), ({"last_active": 100.0}, 960.0),
    ],
    ids=str,
)  # fmt: skip
def test_an_idle_model_leaves_after_its_time_and_says_for_how_long_it_was_idle(
    own: dict[str, Any], due: float
) -> None:
    """Since it serves or was used, the later; by the request, its own key or the policy."""
    one = (UP, {"last_active": 940.0, **own})
    tx = transaction(one, policy={"idle_timeout_secs": 60.0})
    park_idle(tx, ())
    if due > NOW:
        assert (states(tx), tx.finish()[0].wakeup) == ("serving", due)
        return
    drain = tx.models["a"].phase
    assert isinstance(drain, Draining)
    limit = own.get("keep_alive", own.get("-idle_timeout_secs", 60.0))
    assert drain.reason == f"not used for {limit:g} s"


def test_in_manual_mode_no_model_leaves_for_idleness() -> None:
    tx = transaction(IDLE, policy={"idle_timeout_secs": 60.0}, manual=True)
    park_idle(tx, ())
    assert states(tx) == "serving"


# ---- engines that are silent --------------------------------------------------------------------

BUSY = WorkerDemand(in_flight=1)
SILENT: dict[str, Any] = {"-stall_timeout_secs": 40.0, "progress_at": 980.0}


@pytest.mark.parametrize(
    ("own", "wakeup"),
    [
        ({**SILENT, "probing": True}, None),
        ({**SILENT, "probing": True, "progress_at": 985.0}, None),
        ({**SILENT, "idle": True}, None),
        ({**SILENT, "-stall_timeout_secs": 0.0}, None), ({**SILENT, "progress_at": 985.0}, 1005.0),
        ({**SILENT, "-stall_timeout_secs": 41.0}, 1000.5),
    ],
    ids=str,
)  # fmt: skip
def test_one_that_is_not_asked_hides_no_silent_one_behind_it(
    own: dict[str, Any], wakeup: float | None
) -> None:
    own = dict(own)
    busy = "bcd" if own.pop("idle", None) else "abcd"
    drain = Draining("t.2", 900.0, 990.0, 1100.0, OFFLOAD, None)
    starting = (Starting(1, 900.0), {**SILENT, "overdue_at": 2000.0})
    tx = transaction(
        (UP, own), (drain, SILENT), starting, (UP, SILENT), demands=dict.fromkeys(busy, BUSY)
    )
    watch_for_stalls(tx)
    state, effects = tx.finish()
    assert effects == tuple(
        Probe(name, epoch, tx.models[name].engine, 20.0, stalled=True)
        for name, epoch in (("b", "t.2"), ("d", "t.1"))
    )
    assert state.wakeup == wakeup

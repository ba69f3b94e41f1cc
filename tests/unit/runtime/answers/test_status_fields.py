"""Every field of the status and of the catalogue, of models in each state, at a fixed time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import pytest
from runtime_harness import OFFLOAD, STOP, model

from llmux.config.schema import Config, Eviction, PolicyConfig, Process, Weights
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import SwitchFinished
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Reservation,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
)
from llmux.ports import UnitHandle
from llmux.protocol import Address
from llmux.runtime.control import status as module
from llmux.runtime.control.holdings import Gpu, Held
from llmux.runtime.control.status import (
    LONGEST_MESSAGE,
    active_models,
    catalog,
    one_line,
    overall,
    process_state,
    status,
)
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.instance import Instance, Step

NOW = 1000.0
CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
HANDLE = UnitHandle("a", "llmux-a.scope", 77, 5, "/llmux.slice/llmux-a.scope")


@dataclass
class Engines:
    """What the status asks of the executor."""

    instances: dict[str, Instance] = field(default_factory=dict)
    old: frozenset[str] = frozenset()

    def stale(self, record: ModelRecord) -> bool:
        return record.config.name in self.old


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "monotonic", lambda: NOW)
    monkeypatch.setattr(module, "time", lambda: 4242.9)


def state_of(*records: ModelRecord, **facts: Any) -> State:
    models = MappingProxyType({record.config.name: record for record in records})
    return State(Config(), 2, "e", models=models, **facts)


def status_of(state: State, engines: Engines | None = None, **args: Any) -> dict[str, Any]:
    return status(state, cast(Executor, engines or Engines()), args.pop("switches", {}), **args)


def model_of(record: ModelRecord, engines: Engines | None = None, **facts: Any) -> dict[str, Any]:
    name = record.config.name
    found = status_of(state_of(record, **facts), engines)["models"][name]
    assert isinstance(found, dict)
    return found


AT_REST: dict[str, Any] = {
    "in_flight": 0, "queue_depth": 0, "oldest_wait_secs": None, "process_state": "not_started",
    "state": "stopped", "since_secs": 10.0, "eviction": str(OFFLOAD), "parked_as": None,
    "writing_image": False, "epoch": None, "wanted_by": None, "failures": 0, "message": None,
    "retry_in_secs": None, "gpus": [], "gpu_memory": 0.9, "pid": None, "unit": None,
    "address": None, "stale": False, "engine_version": None, "last_phases": {}, "why": None,
    "waits_for": [], "wait_at_most_secs": None, "phase": None, "phase_text": None,
    "phase_secs": None, "progress": None, "usual_secs": None, "left_secs": None,
    "usual_start_secs": None, "idle_secs": None, "pinned": False, "pinned_secs": None,
    "image": None, "gpu_bytes": None, "ram_bytes": None, "last_switch": None,
}  # fmt: skip

SINCE = NOW - 10.0004  # what is shown is rounded to milliseconds
COSTS = {
    ("a", "start"): 40.0,
    ("a", f"wake from {OFFLOAD}"): 12.5,
    ("a", f"park by {OFFLOAD}"): 9.0,
}
COMING = {"usual_start_secs": 40.0}


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (Stopped(SINCE, "it died\nthere"), {"why": "it died"}),
        (Starting(1, SINCE), {"state": "starting", "process_state": "starting",
                              "usual_secs": 40.0, "left_secs": 30.0}),
        (Serving("e1", SINCE), {"state": "serving", "process_state": "running", "epoch": "e1"}),
        (Draining("e2", SINCE, SINCE, NOW + 3, OFFLOAD, "b"),
         {"state": "draining", "process_state": "running", "epoch": "e2", "wanted_by": "b",
          "why": "makes room for b: 0 requests in flight, at most 3 s",
          "wait_at_most_secs": 3.0}),
        (Parking(1, SINCE, OFFLOAD, "b"),
         {"state": "parking", "process_state": "running", "wanted_by": "b",
          "why": "makes room for b", "usual_secs": 9.0}),
        (Parking(1, NOW - 2, OFFLOAD, released_at=NOW - 1),
         {"state": "parking", "process_state": "running", "writing_image": True,
          "since_secs": 2.0, "usual_secs": 9.0, "left_secs": 7.0}),
        (Parked(OFFLOAD, SINCE, "full"),
         {"state": "parked", "process_state": "sleeping:Offload+KeepRunning",
          "parked_as": str(OFFLOAD), "why": "full"}),
        (Waking(1, SINCE, OFFLOAD),
         {"state": "waking", "process_state": "sleeping:Offload+KeepRunning",
          "usual_secs": 12.5, "left_secs": 2.5}),
        (Stopping(1, SINCE, "asked", 0.5), {"state": "stopping", "why": "asked"}),
        (Failed(SINCE, NOW + 5.0004, "no memory"),
         {"state": "failed", "process_state": "failed:no memory", "message": "no memory",
          "retry_in_secs": 5.0, "why": "no memory; no new start for 5 s"}),
        (Failed(SINCE, NOW - 5, "no memory"),
         {"state": "failed", "process_state": "failed:no memory", "message": "no memory",
          "retry_in_secs": 0.0, "why": "no memory"}),
    ],
    ids=lambda value: value.state.value if not isinstance(value, dict) else "",
)  # fmt: skip
def test_each_field_of_a_model_in_each_state(phase: Phase, told: dict[str, Any]) -> None:
    record = ModelRecord(model("a"), phase)
    assert model_of(record, costs=COSTS) == AT_REST | COMING | told


def test_the_engine_of_a_model_is_named_while_it_lives() -> None:
    facts = EngineFacts(address=Address(port=4242), version="0.32.0", max_model_len=7)
    phases = [("spawn", 0.5), ("wait_healthy", 2.0)]
    instance = Instance(model("a"), HANDLE, facts, phases=phases)
    record = ModelRecord(model("a", gpu_memory=0.4), Serving("e1", SINCE), (1,), failures=3)
    found = model_of(record, Engines({"a": instance}, frozenset("a")))
    assert found == AT_REST | {
        "state": "serving", "process_state": "running", "epoch": "e1", "failures": 3,
        "gpus": [1], "gpu_memory": 0.4, "pid": 77, "unit": "llmux-a.scope",
        "address": "127.0.0.1:4242", "stale": True, "engine_version": "0.32.0",
        "last_phases": {"spawn": 0.5, "wait_healthy": 2.0},
    }  # fmt: skip
    instance.handle = None  # what is known of an engine that ended says nothing of the next
    found = model_of(record, Engines({"a": instance}))
    assert (found["address"], found["engine_version"], found["pid"]) == (None, None, None)
    assert found["last_phases"], "of the last operation"
    instance.handle, instance.facts = HANDLE, EngineFacts()
    assert model_of(record, Engines({"a": instance}))["address"] is None


@pytest.mark.parametrize(
    ("done", "total", "progress"),
    [
        (0, 0, None),
        (0, 4, {"done": 0, "total": 4, "unit": "shards"}),
        (3, 0, {"done": 3, "total": 0, "unit": "shards"}),
    ],
)
def test_a_step_under_way_is_shown_with_its_time_and_progress(
    done: int, total: int, progress: object
) -> None:
    instance = Instance(model("a"), step=Step("load_weights", NOW - 1.25, done, total))
    record = ModelRecord(model("a"), Starting(1, SINCE, "cold"))
    found = model_of(record, Engines({"a": instance}))
    told = {
        "state": "starting", "process_state": "starting", "why": "cold",
        "phase": "load_weights", "phase_text": "loading weights", "phase_secs": 1.25,
        "progress": progress,
    }  # fmt: skip
    assert found == AT_REST | told


@pytest.mark.parametrize(
    ("passed", "left"), [(0.0, 9.0), (8.998, 0.002), (8.9995, None), (9.0, None), (10.0, None)]
)
def test_what_is_left_of_an_operation_is_not_below_nothing(
    passed: float, left: float | None
) -> None:
    record = ModelRecord(model("a"), Parking(1, NOW - passed, OFFLOAD))
    found = model_of(record, costs=COSTS)["left_secs"]
    assert found == (None if left is None else pytest.approx(left, abs=6e-4))


@pytest.mark.parametrize(
    ("demand", "active", "told"),
    [
        ({}, 0.0, {}),
        ({}, NOW - 2.5, {"idle_secs": 2.5}),
        ({"waiting": 2, "oldest_since": NOW - 1.5004}, NOW - 2.5,
         {"queue_depth": 2, "oldest_wait_secs": 1.5, "idle_secs": 0.0,
          "why": "waits for its turn"}),
        ({"in_flight": 3}, 0.0, {"in_flight": 3, "idle_secs": 0.0}),
    ],
)  # fmt: skip
def test_requests_are_counted_and_without_any_the_model_is_idle(
    demand: dict[str, Any], active: float, told: dict[str, Any]
) -> None:
    record = ModelRecord(model("a"), Stopped(SINCE), last_active=active)
    demands = MappingProxyType({"a": WorkerDemand(**demand)})
    assert model_of(record, demands=demands) == AT_REST | told


@pytest.mark.parametrize(
    ("pinned", "pins", "told", "mode"),
    [
        (None, {}, {}, {"mode": "auto"}),
        ("a", {}, {"pinned": True}, {"mode": "auto", "pinned": "a"}),
        (None, {"a": math.inf, "0": NOW + 1}, {"pinned": True},
         {"mode": "auto", "pins": ["0", "a"]}),
        (None, {"a": NOW + 0.5004}, {"pinned": True, "pinned_secs": 0.5},
         {"mode": "auto", "pins": ["a"]}),
        (None, {"a": NOW}, {}, {"mode": "auto"}),
        (None, {"a": NOW - 1}, {}, {"mode": "auto"}),
    ],
)  # fmt: skip
def test_pins_are_shown_until_they_end(
    pinned: str | None, pins: dict[str, float], told: dict[str, Any], mode: dict[str, Any]
) -> None:
    record = ModelRecord(model("a"), Stopped(SINCE))
    state = state_of(record, pinned=pinned, pins=MappingProxyType(pins))
    whole = status_of(state)
    assert whole["models"]["a"] == AT_REST | told
    assert whole["mode"] == mode


def test_the_whole_has_what_is_not_of_one_model() -> None:
    early, late = Serving("e1", 1.0), Serving("e2", 2.0)
    records = [ModelRecord(model(n), p) for n, p in (("a", late), ("b", early), ("c", Stopped()))]
    state = state_of(
        *records,
        manual=True,
        generation=7,
        workers=MappingProxyType({"w": Worker(), "v": Worker()}),
    )
    gpus = [Gpu(1, 100, 60, 40)]
    found = status_of(state, observer="no NVML", orders=[{"id": 1}], gpus=gpus)
    models = found.pop("models")
    assert found == {
        "state": "active:b", "active_model": "b", "active_models": ["b", "a"],
        "mode": {"mode": "manual"}, "generation": 7, "gpu_count": 2, "gpu_observer": "no NVML",
        "gpus": [{"index": 1, "total_bytes": 100, "used_bytes": 60, "engines_bytes": 40}],
        "workers": 2, "orders": [{"id": 1}],
    }  # fmt: skip
    assert list(models) == ["a", "b", "c"]
    nothing = status_of(state_of())
    assert (nothing["state"], nothing["active_model"], nothing["gpu_observer"]) == (
        "idle", None, "ok"
    )  # fmt: skip
    assert (nothing["mode"], nothing["orders"], nothing["gpus"]) == ({"mode": "auto"}, [], [])


@pytest.mark.parametrize("cold", [True, False])
def test_memory_and_the_last_switch_are_those_of_the_model(cold: bool) -> None:
    state = state_of(ModelRecord(model("a")), ModelRecord(model("b")))
    switch = SwitchFinished("a", ("b",), cold, 10.0, 10.25004, 12.00001, 16.00004)
    found = status_of(state, switches={"a": switch}, held={"a": Held(5, 7)})["models"]
    up = "start_secs" if cold else "wake_secs"
    assert found["a"]["last_switch"] == {
        "victims": ["b"], "cold": cold, "drain_secs": 0.25, "park_secs": 1.75, up: 4.0,
        "total_secs": 6.0,
    }  # fmt: skip
    assert (found["a"]["gpu_bytes"], found["a"]["ram_bytes"]) == (5, 7)
    assert (found["b"]["gpu_bytes"], found["b"]["ram_bytes"]) == (None, None)
    assert found["b"]["last_switch"] is None


def test_an_override_and_an_image_are_shown_by_their_evictions() -> None:
    record = ModelRecord(model("a"), Stopped(SINCE), eviction_override=STOP, image=CHECKPOINT)
    found = model_of(record)
    assert (found["eviction"], found["image"]) == (str(STOP), str(CHECKPOINT))


@pytest.mark.parametrize(
    ("length", "shown"), [(LONGEST_MESSAGE, LONGEST_MESSAGE), (LONGEST_MESSAGE + 1, None)]
)
def test_a_message_of_any_length_is_shown_up_to_a_bound(length: int, shown: int | None) -> None:
    record = ModelRecord(model("a"), Failed(0.0, 1.0, "x" * length))
    text = model_of(record)["message"]
    assert text == ("x" * shown if shown else "x" * LONGEST_MESSAGE + " …")
    assert process_state(record) == f"failed:{text}"


def test_a_switch_names_its_first_victim_and_the_line_what_there_is() -> None:
    reservation = Reservation(0.0, 0.0, ("b", "c"))
    records = [
        ModelRecord(model("a")),
        ModelRecord(model("b"), Serving("e1", 2.0)),
        ModelRecord(model("c"), Serving("e2", 1.0)),
        ModelRecord(model("d"), Parked(OFFLOAD, 0.0)),
        ModelRecord(model("f"), Failed(0.0, 1.0, "x")),
        ModelRecord(model("g"), Failed(0.0, 1.0, "x")),
    ]
    state = state_of(*records, reservations=MappingProxyType({"a": reservation}))
    assert overall(state) == "switching:b->a"
    assert active_models(state) == ["c", "b"]
    assert one_line(state) == "serving c, b; switching:b->a; 1 parked; failed: f, g"
    first = replace(state, reservations=MappingProxyType({"a": replace(reservation, victims=())}))
    assert overall(first) == "switching:none->a"
    assert one_line(state_of(records[0])) == "no model active"


def test_the_catalogue_has_each_model_and_the_times_in_force() -> None:
    arguments = ("--max-model-len", "9", "--lora-modules", "z=/z")
    named = model("a", aliases=("x", "y"), extra_args=arguments, startup_timeout_secs=70.0)
    models = {"a": named, "b": model("b"), "c": model("c")}
    policy = PolicyConfig(request_timeout_secs=5.0, min_active_secs=6.0)
    config = Config(models=MappingProxyType(models), policy=policy, startup_timeout_secs=50.0)
    records = {name: ModelRecord(one, Serving("e", 1.0)) for name, one in models.items()}
    records["b"] = replace(records["b"], removed=True)
    state = State(config, 1, "e", models=MappingProxyType(records))
    known = Instance(models["a"], facts=EngineFacts(max_model_len=8))
    engines = Engines({"a": known, "c": Instance(models["c"])}, frozenset("c"))
    switch = SwitchFinished("a", (), True, 10.0, 11.0, 12.0, 16.12345)
    found = catalog(state, cast(Executor, engines), {"a": switch}, 77.7)
    assert found.times == {
        "request_timeout_secs": 5.0, "min_active_secs": 6.0, "startup_timeout_secs": 70.0
    }  # fmt: skip
    assert found.models == [
        {"name": "a", "state": "serving", "created": 77, "max_model_len": 8,
         "aliases": ["x", "y"], "switch_secs": 6.123, "adapters": ["z"], "stale": False},
        {"name": "c", "state": "serving", "created": 77, "max_model_len": None,
         "aliases": [], "switch_secs": None, "adapters": [], "stale": True},
    ]  # fmt: skip
    known.facts = EngineFacts()
    again = catalog(state, cast(Executor, engines), {}, 0.0)
    assert (again.models[0]["max_model_len"], again.models[0]["created"]) == (9, 4242)
    empty = catalog(State(replace(config, models=MappingProxyType({})), 1, "e"),
                    cast(Executor, engines), {}, 1.0)  # fmt: skip
    assert (empty.models, empty.times["startup_timeout_secs"]) == ([], 50.0)


def test_a_model_without_an_engine_has_the_length_that_was_configured() -> None:
    state = state_of(ModelRecord(model("a", extra_args=("--max-model-len", "9"))))
    assert catalog(state, cast(Executor, Engines()), {}, 1.0).models[0]["max_model_len"] == 9

"""Metrics: the format, the sums over processes, and a golden file of a scripted run."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmux import metrics as m
from llmux.config.schema import CheckpointConfig, Config, Eviction, ModelConfig, Process, Weights
from llmux.core.effects import SwitchFinished
from llmux.core.plans import StepKind
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
)
from llmux.drivers.gpu import NoGpu
from llmux.errors import Unsupported
from llmux.gateway.exposition import TEXT, encode
from llmux.image_ports import Checkpointer, Image
from llmux.metrics import METRICS, SECONDS, Histogram, Kind, Store
from llmux.ports import GpuObserver, GpuProcess
from llmux.protocol import Collected
from llmux.runtime.control.event_log import EventLog
from llmux.runtime.control.telemetry import MOST_KEPT, Telemetry
from llmux.runtime.control.watchers import Watchers

GOLDEN = Path(__file__).parents[1] / "fixtures" / "metrics" / "golden.txt"


class Gpu:
    available = True
    blind = None

    async def gpu_count(self) -> int:
        return 1

    async def processes(self) -> list[GpuProcess]:
        return [GpuProcess(0, 1, 600), GpuProcess(0, 2, 100)]

    async def totals(self) -> dict[int, int]:
        return {0: 1000}

    async def used(self) -> dict[int, int]:
        return {0: 700}


def text_of(store: Store) -> str:
    return asyncio.run(encode(store.families(), TEXT)).decode()


# ---- definitions ---------------------------------------------------------------------------------


def test_names_follow_the_rules() -> None:
    for metric in METRICS.values():
        assert metric.name.startswith(("llmux_", "process_"))
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        if metric.kind is Kind.HISTOGRAM:
            assert metric.name.endswith("_seconds")
        assert "le" not in metric.labels
    assert SECONDS[-1] == 600 and list(SECONDS) == sorted(SECONDS)


@pytest.mark.parametrize(
    "name",
    [
        "llmux_switches_total",
        "llmux_switch_total_seconds",
        "llmux_switch_phase_seconds",
        "llmux_request_queue_wait_seconds",
        "llmux_requests_total",
    ],
)
def test_the_names_that_users_have_dashboards_for(name: str) -> None:
    assert name in METRICS


# ---- numbers -------------------------------------------------------------------------------------


def test_a_histogram_is_one_for_prometheus() -> None:
    store = Store()
    for seconds in (0.005, 0.006, 45.0, 599.0, 601.0):
        store.observe(m.QUEUE_WAIT, "a", seconds=seconds)
    (family,) = text_string_to_metric_families(text_of(store))
    assert family.type == "histogram"
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert buckets["0.005"] == 1 and buckets["0.01"] == 2, "a bound is inside its bucket"
    assert buckets["60.0"] == 3 and buckets["600.0"] == 4 and buckets["+Inf"] == 5
    assert {s.name: s.value for s in family.samples if s.name.endswith("_count")} == {
        "llmux_request_queue_wait_seconds_count": 5
    }


def test_label_values_are_escaped() -> None:
    store = Store()
    store.add(m.REQUESTS, 'a"b\\c\nd', "200")
    (family,) = text_string_to_metric_families(text_of(store))
    assert family.samples[0].labels == {"model": 'a"b\\c\nd', "code": "200"}


def test_snapshots_travel_as_json_and_add_up() -> None:
    first, second = Store(), Store()
    for store, count in ((first, 1), (second, 2)):
        store.add(m.REQUESTS, "a", "200", amount=count)
        store.set(m.IN_FLIGHT, "a", value=count)
        for _ in range(count):
            store.observe(m.FIRST_TOKEN, "a", seconds=0.2)
    first.merge(json.loads(json.dumps(second.snapshot())) | {"llmux_of_a_newer_version": [[[], 1]]})
    text = text_of(first)
    assert 'llmux_requests_total{code="200",model="a"} 3.0' in text
    assert 'llmux_in_flight{model="a"} 3.0' in text
    assert 'llmux_time_to_first_token_seconds_count{model="a"} 3.0' in text
    assert "newer" not in text


MALFORMED = {
    m.REQUESTS: [
        [["a"], 5], [["a", "200"], "5"], [["a", "200"], None], [["a", 200], 5], 7, [["a", "200"]],
        [["a", "200"], float("nan")], [["a", "200"], True], [["a", "200"], 1e308],
        [["a", "200"], 10**400], [["a" * 257, "200"], 5],
    ],
    m.IN_FLIGHT: "all of them",
    m.QUEUE_WAIT: [
        [["a"], 5], [["a"], [[1], 0.5]], [["a"], [[1] * 18, "x"]], [["a"], [[-1] * 18, 0.5]],
        [["a"], [[10**400] * 18, 0.5]], [["a"], [[1] * 18, 10**400]],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_number_of_ours_is_left_out(name: str) -> None:
    good = {m.REQUESTS: [[["a", "200"], 1]], m.QUEUE_WAIT: [[["a"], [[1] * 18, 0.5]]]}
    store = Store()
    store.merge({name: MALFORMED[name]})
    store.merge(good)
    assert store.snapshot() == good


def test_of_several_workers_the_memory_adds_up_and_the_limits_do_not() -> None:
    store = Store()
    for resident, limit, started in ((300, 1024, 20.0), (200, 4096, 10.0)):
        store.merge({
            "process_resident_memory_bytes": [[[], resident]],
            "process_max_fds": [[[], limit]],
            "process_start_time_seconds": [[[], started]],
        })  # fmt: skip
    assert store.snapshot() == {
        "process_resident_memory_bytes": [[[], 500]],
        "process_max_fds": [[[], 1024]],
        "process_start_time_seconds": [[[], 10.0]],
    }


def test_every_number_of_the_process_collector_is_defined() -> None:
    for namespace in ("", m.SUPERVISOR):
        store = Store()
        m.ProcessNumbers(namespace).read_into(store)
        names = store.snapshot().keys()
        assert len(names) == 6 and names <= METRICS.keys()


def test_an_observation_in_a_histogram_counts_once() -> None:
    histogram = Histogram()
    histogram.observe(0.3)
    assert sum(histogram.counts) == 1 and histogram.sum == 0.3


# ---- a scripted run ------------------------------------------------------------------------------

A = ModelConfig("a", "m/a", eviction=Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING))
B = ModelConfig("b", "m/b")
OFFLOAD = A.eviction


def state(**phases: Any) -> State:
    configs = {"a": A, "b": B}
    records = {name: ModelRecord(configs[name], phase) for name, phase in phases.items()}
    config = Config(
        models=MappingProxyType(configs), checkpoint=CheckpointConfig(max_bytes=5 << 30)
    )
    return State(config, 1, "e", models=MappingProxyType(records))


RUN = (
    state(a=Stopped(), b=Stopped()),
    state(a=Starting(1, 10.0), b=Stopped()),
    state(a=Serving("e1", 12.0), b=Stopped()),
    state(a=Parking(2, 13.0, OFFLOAD, "b"), b=Stopped()),
    state(a=Parked(OFFLOAD, 14.0), b=Starting(3, 14.0)),
    state(a=Parked(OFFLOAD, 14.0), b=Failed(15.0, 17.0, "no memory")),
    state(a=Waking(4, 20.0, OFFLOAD), b=Stopped()),
    state(a=Starting(5, 21.0), b=Stopped()),  # the wake failed: cold
    state(a=Serving("e2", 25.0), b=Stopped()),
    state(a=Parking(6, 26.0, OFFLOAD), b=Stopped()),
    state(a=Stopped(27.0), b=Stopped()),  # the parking failed: stopped
    state(a=Serving("e3", 28.0), b=Stopped()),
    state(a=Stopping(7, 29.0, "died", 0.9, crashed=True), b=Stopped()),
)


async def engines() -> set[int]:
    return {1}


def scripted() -> tuple[Telemetry, EventLog, Watchers]:
    watchers = Watchers()
    telemetry, events = Telemetry("1.2.3", Gpu(), None, engines), EventLog(watchers)
    for old, new in itertools.pairwise(RUN):
        telemetry.published(old, new)
        events.published(old, new)
    for listener in (telemetry, events):
        listener.switched(SwitchFinished("a", (), True, 10.0, 10.0, 10.0, 12.0))
        listener.switched(SwitchFinished("a", ("b",), False, 20.0, 20.5, 21.0, 25.0))
    telemetry.stepped("a", StepKind.SPAWN, 0.02, "ok")
    telemetry.stepped("a", StepKind.WAKE_UP, 30.0, "timeout")
    telemetry.quarantined("a")
    return telemetry, events, watchers


def test_a_scripted_run_gives_the_golden_file() -> None:
    telemetry, _, _ = scripted()
    store = Store()
    snapshot = asyncio.run(telemetry.snapshot())
    own = {name: snapshot.pop(name) for name in list(snapshot) if "_process_" in name}
    assert own["llmux_supervisor_process_resident_memory_bytes"][0][1] > 1 << 20
    assert own["llmux_supervisor_process_open_fds"][0][1] >= 3
    store.merge(snapshot)
    text = text_of(store)
    families = {family.name for family in text_string_to_metric_families(text)}
    assert "llmux_switch_total_seconds" in families
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_events_of_the_same_run() -> None:
    _, events, _ = scripted()
    said = [(e["model"], e.get("from"), e.get("to"), e.get("reason")) for e in events.recent]
    assert said[:4] == [
        ("a", "stopped", "starting", "wanted, and not parked"),
        ("a", "starting", "serving", "started"),
        ("a", "serving", "parking", "room for b"),
        ("a", "parking", "parked", "offload+keep_running"),
    ]
    assert ("b", "starting", "failed", "no memory") in said
    transitions = [e for e in events.recent if e["type"] == "transition"]
    assert all(e["reason"] for e in transitions), "none is without a reason"
    assert events.recent[1]["duration_secs"] == 2.0, "it was starting for two seconds"
    assert [e["id"] for e in events.recent] == list(range(1, len(events.recent) + 1))
    switch = events.recent[-1]
    assert (switch["type"], switch["victims"], switch["duration_secs"]) == ("switch", ["b"], 5.0)


class Blind(Gpu):
    async def totals(self) -> dict[int, int]:
        raise Unsupported("observe", "the GPUs", "nvmlDeviceGetMemoryInfo: Unknown Error")


@pytest.mark.parametrize("gpu", [Blind(), NoGpu()])
def test_an_observer_that_sees_nothing_says_so(gpu: GpuObserver) -> None:
    snapshot = asyncio.run(Telemetry("1.2.3", gpu, None, engines).snapshot())
    assert snapshot[m.GPU_OBSERVED] == [[[], 0]]
    assert not {m.GPU_USED, m.GPU_TOTAL, m.GPU_ENGINES} & snapshot.keys()


class Images:
    async def images(self) -> list[Image]:
        return [Image(name, f"/i/{name}", {}, {}, 0.0, 0.0, 1, 9, 7) for name in ("a", "gone")]


def test_images_are_shown_of_the_models_that_there_are() -> None:
    telemetry = Telemetry("1.2.3", NoGpu(), cast(Checkpointer, Images()), engines)
    shown = asyncio.run(telemetry.snapshot()).get(m.IMAGE_BYTES)
    assert shown == [[["a"], 7], [["gone"], 7]], "before the models are known"
    telemetry.published(*RUN[:2])
    assert asyncio.run(telemetry.snapshot())[m.IMAGE_BYTES] == [[["a"], 7]]


class NoImages:
    async def images(self) -> list[Image]:
        raise OSError(5, "Input/output error", "/var/lib/llmux/images")


def test_an_unreadable_images_directory_takes_nothing_else_away() -> None:
    telemetry = Telemetry("1.2.3", Gpu(), cast(Checkpointer, NoImages()), engines)
    telemetry.published(*RUN[:2])
    snapshot = asyncio.run(telemetry.snapshot())
    assert m.IMAGE_BYTES not in snapshot
    assert snapshot[m.GPU_USED] == [[["0"], 700]]
    assert [["a", "starting"], 1] in snapshot[m.MODEL_STATE]


# ---- several workers -----------------------------------------------------------------------------


def test_other_workers_are_asked_and_the_silent_not_waited_for() -> None:
    async def run() -> None:
        telemetry, _, watchers = scripted()
        took = Store()
        took.observe(m.REQUEST_SECONDS, "a", seconds=0.5)
        gone = {m.REQUESTS: [[["a", "200"], 5]], **took.snapshot()}
        counted = {**gone, m.IN_FLIGHT: [[["a"], 2]]}

        def ask(worker: str, number: int) -> None:
            if worker == "w2":
                watchers.collected("w2", Collected(number, counted))
                watchers.collected("w2", Collected(number + 99, counted))  # of no question

        workers = ["w1", "w2", "mute"]
        answer = await telemetry.answer({"worker": "w1"}, watchers, workers, ask)
        assert answer["workers"] == counted
        # it leaves: what it counted stays, what it had in flight does not
        answer = await telemetry.answer({"worker": "w1"}, watchers, ["w1"], ask)
        assert answer["workers"] == gone

    asyncio.run(run())


def test_what_a_worker_counted_when_it_asked_outlives_it() -> None:
    async def run() -> None:
        telemetry, _, watchers = scripted()
        own = {m.REQUESTS: [[["a", "200"], 7]]}
        args = {"worker": "w1", "snapshot": own}
        assert (await telemetry.answer(args, watchers, ["w1"], print))["workers"] == {}
        answer = await telemetry.answer({"worker": "w2"}, watchers, ["w2"], print)
        assert answer["workers"] == own

    asyncio.run(run())


def test_a_worker_decides_not_how_many_series_outlive_it() -> None:
    """The gateway's process may send any label, under any worker's name, and leave."""

    async def run() -> None:
        telemetry, _, watchers = scripted()
        real = {m.REQUESTS: [[["a", "200"], 7]]}
        await telemetry.answer({"worker": "w0", "snapshot": real}, watchers, [], print)
        for number in range(3):
            invented = [[[f"{number}.{one}", "200"], 1] for one in range(MOST_KEPT // 2)]
            args = {"worker": f"w{number}", "snapshot": {m.REQUESTS: invented}}
            await telemetry.answer(args, watchers, [], print)
        await telemetry.answer({"worker": "w9", "snapshot": real}, watchers, [], print)
        kept = (await telemetry.answer({}, watchers, [], print))["workers"][m.REQUESTS]
        assert len(kept) == MOST_KEPT
        assert [["a", "200"], 14] in kept

    asyncio.run(run())

"""Every Prometheus metric of llmux, defined once, and the numbers behind them.

A ``Store`` is plain data: its owner adds to it from one event loop, others get a ``snapshot``,
which is JSON, travels over the control socket and is summed with those of other processes. Nothing
is registered anywhere and nothing locks. prometheus_client's own counters would cost a request
several microseconds, and its multiprocess mode a file per process; its families, encoders and
process collector are used when a scrape comes.

Label values come from the configuration, from fixed tables, or are an HTTP status; never from a
client. Names are llmux_<noun>_<unit>, in base units.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric

# To 600 s: a switch may be a cold start of a large model.
SECONDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
)  # fmt: skip
SHORTEST: Final = SECONDS[0]  # most waits are shorter
LARGEST: Final = 2**63  # of numbers from other processes: their sums are numbers, too
LONGEST_LABEL: Final = 256  # characters: a model's name has 200 at most
PORTION: Final = 240  # samples that are made and written without a pause: 1 to 3 ms


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Definition:
    """``least``: of several processes' numbers the smallest is shown, not their sum."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    least: bool = False

    def family(self) -> Metric:
        name, unit = self.name, ""
        if self.kind is Kind.COUNTER:
            name = name.removesuffix("_total")
        for ending in ("seconds", "bytes"):
            if name.endswith(f"_{ending}"):
                unit = ending
        return Metric(name, self.text, self.kind.value, unit)


METRICS: Final[dict[str, Definition]] = {}


def _define(kind: Kind, name: str, text: str, *labels: str, least: bool = False) -> str:
    METRICS[name] = Definition(name, kind, text, labels, least)
    return name


def _counter(name: str, text: str, *labels: str) -> str:
    return _define(Kind.COUNTER, name, text, *labels)


def _gauge(name: str, text: str, *labels: str) -> str:
    return _define(Kind.GAUGE, name, text, *labels)


def _histogram(name: str, text: str, *labels: str) -> str:
    return _define(Kind.HISTOGRAM, name, text, *labels)


# ---- the gateway's ------------------------------------------------------------------------------

REQUESTS = _counter(
    "llmux_requests_total",
    'HTTP responses by status; model="" for unknown models.',
    "model",
    "code",
)
REQUEST_SECONDS = _histogram(
    "llmux_request_duration_seconds",
    "Time from a request's arrival to the last byte of its response.",
    "model",
)
QUEUE_WAIT = _histogram(
    "llmux_request_queue_wait_seconds",
    "Time a request waited for its model, including requests that timed out.",
    "model",
)
FIRST_TOKEN = _histogram(
    "llmux_time_to_first_token_seconds",
    "Time from a request's arrival to the first byte of the response body.",
    "model",
)
CHUNKS = _counter(
    "llmux_response_chunks_total",
    "Chunks of responses passed on; about one per token of a stream.",
    "model",
)
BROKEN = _counter(
    "llmux_responses_broken_total", "Responses that ended in an error midway.", "model"
)
ABANDONED = _counter(
    "llmux_requests_abandoned_total", "Requests whose client disconnected before the end.", "model"
)
RETRIED = _counter(
    "llmux_requests_retried_total", "Requests queued again after an engine's death.", "model"
)
IN_FLIGHT = _gauge("llmux_in_flight", "Requests in progress at an engine.", "model")
QUEUE_DEPTH = _gauge("llmux_queue_depth", "Requests waiting for their model.", "model")
CONNECTIONS = _gauge("llmux_gateway_connections", "Open client connections.")
WORKERS = _gauge("llmux_gateway_workers", "Gateway workers included in this scrape.")
SUPERVISOR_UP = _gauge("llmux_supervisor_up", "Whether the supervisor answered this scrape.")
SUPERVISOR_SILENT = _gauge(
    "llmux_supervisor_silent_seconds",
    "Time since the gateway heard of the supervisor, which is at most 5 s while that works.",
)
ENGINE_SAMPLES_DROPPED = _gauge(
    "llmux_engine_samples_dropped",
    "Malformed or excess samples of an engine's own metrics, left out of this scrape.",
    "model",
)
RECONNECTS = _counter(
    "llmux_supervisor_connections_total",
    "Connections made by gateway workers to the supervisor.",
)

# ---- the supervisor's ---------------------------------------------------------------------------

BUILD_INFO = _gauge("llmux_build_info", "Version of llmux, as a label; the value is 1.", "version")
MODEL_STATE = _gauge("llmux_model_state", "State of a model (1: current).", "model", "state")
SWITCHES = _counter(
    "llmux_switches_total",
    'Models made resident, by result (ok, failed); "from" made room.',
    "from",
    "to",
    "result",
)
SWITCH_SECONDS = _histogram(
    "llmux_switch_total_seconds",
    "Time from the decision for a model until it serves, by kind (cold, wake).",
    "to",
    "kind",
)
SWITCH_PHASE = _histogram(
    "llmux_switch_phase_seconds",
    "Time of each phase of a switch: drain, sleep, then wake or start.",
    "phase",
    "to",
)
STEP_SECONDS = _histogram(
    "llmux_step_seconds",
    "Time of each step of starting, parking and waking, by result (ok, failed, timeout).",
    "step",
    "result",
)
PARK_FAILURES = _counter(
    "llmux_parking_failures_total",
    "Parkings that failed, by outcome: stopped, or stuck with memory possibly held.",
    "model",
    "outcome",
)
ESCALATIONS = _counter(
    "llmux_escalations_total",
    "Parks that became a stop and wakes that became a cold start.",
    "model",
    "operation",
)
ENGINE_DEATHS = _counter("llmux_engine_deaths_total", "Unexpected engine exits.", "model")
MODEL_FAILURES = _gauge(
    "llmux_model_failures", "Failed starts of a model since its last good one.", "model"
)
MAX_WAIT = _gauge("llmux_max_wait_seconds", "Bound of a wait by policy.max_wait_secs.")
QUARANTINED = _counter(
    "llmux_images_quarantined_total", "Checkpoint images put into quarantine.", "model"
)
IMAGES_BUDGET = _gauge(
    "llmux_images_budget_bytes", "Disk space for all checkpoint images by checkpoint.max_bytes."
)
GPU_OBSERVED = _gauge("llmux_gpu_observed", "Whether GPU memory was read in this scrape.")
GPU_ENGINES = _gauge("llmux_gpu_memory_engines_bytes", "GPU memory in use by engines.", "gpu")
IMAGE_BYTES = _gauge("llmux_image_bytes", "Size of a model's checkpoint image on disk.", "model")
GPU_USED = _gauge("llmux_gpu_memory_used_bytes", "GPU memory in use by all processes.", "gpu")
GPU_TOTAL = _gauge("llmux_gpu_memory_total_bytes", "Total GPU memory.", "gpu")


# ---- of processes --------------------------------------------------------------------------------

SUPERVISOR = "llmux_supervisor"  # the prefix of the supervisor's; the gateway's have none


def _define_process(prefix: str, whose: str) -> None:
    gauge, counter = Kind.GAUGE, Kind.COUNTER
    _define(gauge, f"{prefix}process_virtual_memory_bytes", f"Virtual memory size of {whose}.")
    _define(gauge, f"{prefix}process_resident_memory_bytes", f"Resident memory size of {whose}.")
    _define(gauge, f"{prefix}process_start_time_seconds",
            f"Start time of {whose} since the Unix epoch.", least=True)  # fmt: skip
    _define(counter, f"{prefix}process_cpu_seconds_total", f"CPU time of {whose}.")
    _define(gauge, f"{prefix}process_open_fds", f"Open file descriptors of {whose}.")
    _define(gauge, f"{prefix}process_max_fds", f"Limit of open file descriptors of {whose}.",
            least=True)  # fmt: skip


_define_process("", "the gateway, all workers")
_define_process(f"{SUPERVISOR}_", "the supervisor")


class ProcessNumbers:
    """What prometheus_client's collector reads in /proc of this process."""

    def __init__(self, namespace: str = "") -> None:
        self._collector = ProcessCollector(namespace, registry=None)

    def read_into(self, store: Store) -> None:
        for family in self._collector.collect():
            for sample in family.samples:
                store.set(sample.name, value=sample.value)


# ---- numbers ------------------------------------------------------------------------------------


class Histogram:
    """Counts per bucket of ``SECONDS``, not cumulated; the last is what is beyond."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[0 if seconds <= SHORTEST else bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def add(self, counts: Iterable[int], total: float) -> None:
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total


Labels = tuple[str, ...]
Snapshot = dict[str, list[list[Any]]]  # name → [labels, number or [counts, sum]]


class Store:
    """Series by name and label values. ``most``: when there are as many, those merged add to what
    is there and make none."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}

    def add(self, name: str, *labels: str, amount: float = 1) -> None:
        series = self._numbers.setdefault(name, {})
        series[labels] = series.get(labels, 0) + amount

    def set(self, name: str, *labels: str, value: float) -> None:
        self._numbers.setdefault(name, {})[labels] = value

    def observe(self, name: str, *labels: str, seconds: float) -> None:
        self.histogram(name, *labels).observe(seconds)

    def histogram(self, name: str, *labels: str) -> Histogram:
        series = self._histograms.setdefault(name, {})
        found = series.get(labels)
        if found is None:
            found = series[labels] = Histogram()
        return found

    def snapshot(self) -> Snapshot:
        numbers = {
            name: [[list(labels), value] for labels, value in series.items()]
            for name, series in self._numbers.items()
        }
        histograms = {
            name: [[list(labels), [h.counts, h.sum]] for labels, h in series.items()]
            for name, series in self._histograms.items()
        }
        return {**numbers, **histograms}

    def merge(self, snapshot: Mapping[str, Any], *, kinds: frozenset[Kind] | None = None) -> None:
        """Add another's numbers to these. What this version does not know is left out, and so is
        what is no number: one process must not take the others' numbers with it."""
        for name, series in snapshot.items():
            definition = METRICS.get(name)
            if definition is None or (kinds is not None and definition.kind not in kinds):
                continue
            for labels, value in _pairs(series):
                if not _are_labels(labels, definition) or self._is_full(name, tuple(labels)):
                    continue
                if definition.kind is Kind.HISTOGRAM:
                    if _is_histogram(value):
                        self.histogram(name, *labels).add(*value)
                elif _is_number(value):
                    self._merge_number(definition, tuple(labels), value)

    def _is_full(self, name: str, labels: Labels) -> bool:
        """Is there no room for this series, which is not among these?"""
        if self._most is None or any(
            labels in of_kind.get(name, {}) for of_kind in (self._numbers, self._histograms)
        ):
            return False
        numbers = sum(len(series) for series in self._numbers.values())
        return numbers + sum(len(series) for series in self._histograms.values()) >= self._most

    def _merge_number(self, definition: Definition, labels: Labels, value: float) -> None:
        series = self._numbers.setdefault(definition.name, {})
        if definition.least:
            series[labels] = min(value, series.get(labels, value))
        else:
            series[labels] = series.get(labels, 0) + value

    # ---- for an encoder of prometheus_client ----------------------------------------------------

    def families(self) -> Iterator[Metric]:
        """All series in the order of the definitions, in portions: a large family comes as several
        of the same name."""
        for definition in METRICS.values():
            if definition.kind is Kind.HISTOGRAM:
                yield from self._histogram_families(definition)
                continue
            series = sorted(self._numbers.get(definition.name, {}).items())
            for start in range(0, len(series), PORTION):
                family = definition.family()
                for labels, value in series[start : start + PORTION]:
                    named = dict(zip(definition.labels, labels, strict=True))
                    family.add_sample(definition.name, named, value)
                yield family

    def _histogram_families(self, definition: Definition) -> Iterator[Metric]:
        name = definition.name
        family = definition.family()
        for labels, histogram in sorted(self._histograms.get(name, {}).items()):
            named = dict(zip(definition.labels, labels, strict=True))
            so_far = 0
            for bound, count in zip(_BOUNDS, histogram.counts, strict=True):
                so_far += count
                family.add_sample(f"{name}_bucket", named | {"le": bound}, so_far)
            family.add_sample(f"{name}_count", named, so_far)
            family.add_sample(f"{name}_sum", named, histogram.sum)
            if len(family.samples) >= PORTION:
                yield family
                family = definition.family()
        if family.samples:
            yield family


_BOUNDS: Final = (*map(str, SECONDS), "+Inf")


def _pairs(series: object) -> list[Any]:
    pairs = series if isinstance(series, list) else []
    return [one for one in pairs if isinstance(one, list) and len(one) == 2]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[arg-type]


def _are_labels(labels: object, definition: Definition) -> bool:
    return (
        isinstance(labels, list)
        and len(labels) == len(definition.labels)
        and all(isinstance(label, str) and len(label) <= LONGEST_LABEL for label in labels)
    )


def _is_histogram(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    counts, total = value
    return (
        isinstance(counts, list)
        and len(counts) == len(_BOUNDS)
        and all(type(count) is int and 0 <= count <= LARGEST for count in counts)
        and _is_number(total)
    )

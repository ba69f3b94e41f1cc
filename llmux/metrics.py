"""Every Prometheus metric of llmux, defined once, and the numbers behind them.

A ``Store`` is plain data: its owner adds to it from one event loop, others get a ``snapshot``,
which is JSON, travels over the control socket and is summed with those of other processes. Nothing
is registered anywhere and nothing locks.

Label values come from the configuration, from fixed tables, or are an HTTP status; never from a
client. Names are llmux_<noun>_<unit>, in base units.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

# To 600 s: a switch may be a cold start of a large model.
SECONDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
)  # fmt: skip


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()


METRICS: Final[dict[str, Metric]] = {}


def _define(kind: Kind, name: str, text: str, *labels: str) -> str:
    METRICS[name] = Metric(name, kind, text, labels)
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
    'Requests answered, by HTTP status; model="" where none that is configured was meant.',
    "model",
    "code",
)
REQUEST_SECONDS = _histogram(
    "llmux_request_duration_seconds",
    "From a request's arrival to the last byte of its answer.",
    "model",
)
QUEUE_WAIT = _histogram(
    "llmux_request_queue_wait_seconds",
    "Time a request waited for its model; those that waited in vain as well.",
    "model",
)
FIRST_TOKEN = _histogram(
    "llmux_time_to_first_token_seconds",
    "From a request's arrival to the first byte of the answer's body.",
    "model",
)
CHUNKS = _counter(
    "llmux_response_chunks_total",
    "Pieces of answers passed on; of a stream about one per token.",
    "model",
)
BROKEN = _counter("llmux_responses_broken_total", "Answers that ended in an error midway.", "model")
ABANDONED = _counter(
    "llmux_requests_abandoned_total", "Requests whose client left before the end.", "model"
)
RETRIED = _counter(
    "llmux_requests_retried_total", "Requests that waited again after an engine's death.", "model"
)
IN_FLIGHT = _gauge("llmux_in_flight", "Requests that an engine works on.", "model")
QUEUE_DEPTH = _gauge("llmux_queue_depth", "Requests that wait for their model.", "model")
CONNECTIONS = _gauge("llmux_gateway_connections", "Clients' connections.")
WORKERS = _gauge("llmux_gateway_workers", "Gateway workers that this answer speaks for.")
SUPERVISOR_UP = _gauge("llmux_supervisor_up", "1 when the supervisor answered this scrape.")
RECONNECTS = _counter(
    "llmux_supervisor_connections_total", "Times a worker connected to the supervisor."
)

# ---- the supervisor's ---------------------------------------------------------------------------

BUILD_INFO = _gauge("llmux_build_info", "1, with the version.", "version")
MODEL_STATE = _gauge("llmux_model_state", "1 for the state a model is in.", "model", "state")
SWITCHES = _counter(
    "llmux_switches_total",
    'Models made resident: "from" had to make room; result ok or failed.',
    "from",
    "to",
    "result",
)
SWITCH_SECONDS = _histogram(
    "llmux_switch_total_seconds",
    "From the decision for a model until it serves; kind cold or wake.",
    "to",
    "kind",
)
SWITCH_PHASE = _histogram(
    "llmux_switch_phase_seconds",
    "The parts of that: drain, sleep, and wake or start.",
    "phase",
    "to",
)
STEP_SECONDS = _histogram(
    "llmux_step_seconds",
    "Single steps of starting, parking and waking, by result ok, failed or timeout.",
    "step",
    "result",
)
PARK_FAILURES = _counter(
    "llmux_parking_failures_total",
    "Parkings that ended otherwise than asked: stopped, or stuck with memory perhaps held.",
    "model",
    "outcome",
)
ESCALATIONS = _counter(
    "llmux_escalations_total",
    "Times a park ended as a stop, or a wake as a cold start.",
    "model",
    "operation",
)
ENGINE_DEATHS = _counter("llmux_engine_deaths_total", "Engines that ended unasked.", "model")
IMAGE_BYTES = _gauge("llmux_image_bytes", "Checkpoint image on disk.", "model")
GPU_USED = _gauge("llmux_gpu_memory_used_bytes", "GPU memory in use, by anybody.", "gpu")
GPU_TOTAL = _gauge("llmux_gpu_memory_total_bytes", "GPU memory there is.", "gpu")


# ---- numbers ------------------------------------------------------------------------------------


class Histogram:
    """Counts per bucket of ``SECONDS``, not cumulated; the last is what is beyond."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def add(self, counts: Iterable[int], total: float) -> None:
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total


Labels = tuple[str, ...]
Snapshot = dict[str, list[list[Any]]]  # name → [labels, number or [counts, sum]]


class Store:
    """Series by name and label values."""

    def __init__(self) -> None:
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
        """Add another's numbers to these. What this version does not know is left out."""
        for name, series in snapshot.items():
            metric = METRICS.get(name)
            if metric is None or (kinds is not None and metric.kind not in kinds):
                continue
            for labels, value in series:
                if metric.kind is Kind.HISTOGRAM:
                    self.histogram(name, *labels).add(*value)
                else:
                    self.add(name, *labels, amount=value)

    # ---- Prometheus' text format ----------------------------------------------------------------

    def render(self) -> str:
        """All series in the order of the definitions. Our own writer: prometheus_client's takes
        5 µs a line, and fifty models have ten thousand."""
        lines: list[str] = []
        for metric in METRICS.values():
            name = metric.name
            if metric.kind is Kind.HISTOGRAM:
                body = list(self._histogram_lines(metric))
            else:
                series = self._numbers.get(name, {})
                body = [
                    f"{name}{braced(metric.labels, labels)} {value}"
                    for labels, value in sorted(series.items())
                ]
            if body:
                lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}", *body]
        return "\n".join([*lines, ""])

    def _histogram_lines(self, metric: Metric) -> Iterator[str]:
        for labels, histogram in sorted(self._histograms.get(metric.name, {}).items()):
            inner = braced(metric.labels, labels)[:-1]
            so_far = 0
            for bound, count in zip(_BOUNDS, histogram.counts, strict=True):
                so_far += count
                yield f'{metric.name}_bucket{inner},le="{bound}"}} {so_far}'
            yield f"{metric.name}_count{inner}}} {so_far}"
            yield f"{metric.name}_sum{inner}}} {histogram.sum}"


_BOUNDS: Final = (*map(str, SECONDS), "+Inf")


def braced(names: tuple[str, ...], values: Labels) -> str:
    if not names:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join([f'{name}="{escape(value)}"' for name, value in pairs]) + "}"


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

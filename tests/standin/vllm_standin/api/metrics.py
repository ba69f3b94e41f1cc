"""/metrics, with vLLM's names and labels."""

from __future__ import annotations

import time
from bisect import bisect_left

from ..options import Options

_TTFT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
_LATENCY_BUCKETS = (0.05, 0.3, 1.0, 5.0, 10.0, 30.0, 60.0, 240.0)
FINISHED_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts per bucket, not yet cumulated."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        lines = []
        total = 0
        bounds = [*map(str, self._buckets), "+Inf"]
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {float(total)}')
        return [
            *lines,
            f"{name}_count{{{labels}}} {float(total)}",
            f"{name}_sum{{{labels}}} {self._sum}",
        ]


class Metrics:
    """What the API server counts."""

    def __init__(self, options: Options) -> None:
        self._name = options.name
        self._more = ""
        if options.metrics_file is not None:
            with open(options.metrics_file, encoding="utf-8") as file:
                self._more = file.read()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.time_to_first_token = Histogram(_TTFT_BUCKETS)
        self.latency = Histogram(_LATENCY_BUCKETS)
        self.asleep = False
        self.sleep_level = 0

    def watch(self, prompt_tokens: int) -> Watch:
        self.prompt_tokens += prompt_tokens
        return Watch(self)

    def render(self, running: int, waiting: int) -> str:
        escaped = self._name.replace("\\", "\\\\").replace('"', '\\"')
        labels = f'engine="0",model_name="{escaped}"'
        states = {
            "awake": not self.asleep,
            "weights_offloaded": self.asleep and self.sleep_level == 1,
            "discard_all": self.asleep and self.sleep_level == 2,
        }
        groups: list[tuple[str, str, list[str]]] = [
            _single("num_requests_running", "gauge", labels, running),
            _single("num_requests_waiting", "gauge", labels, waiting),
            (
                "vllm:engine_sleep_state",
                "gauge",
                [
                    f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {float(on)}'
                    for state, on in states.items()
                ],
            ),
            _single("kv_cache_usage_perc", "gauge", labels, min(running / 256, 1.0)),
            _single("num_preemptions_total", "counter", labels, 0),
            _single("prompt_tokens_total", "counter", labels, self.prompt_tokens),
            _single("generation_tokens_total", "counter", labels, self.generation_tokens),
            (
                "vllm:request_success_total",
                "counter",
                [
                    f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {float(n)}'
                    for reason, n in self.finished.items()
                ],
            ),
        ]
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", self.time_to_first_token),
            ("vllm:e2e_request_latency_seconds", self.latency),
        ):
            groups.append((name, "histogram", histogram.lines(name, labels)))
        lines = []
        for name, kind, samples in groups:
            family = name.removesuffix("_total")
            lines += [f"# HELP {family} vLLM's.", f"# TYPE {family} {kind}", *samples]
        return "\n".join(lines) + "\n" + self._more


class Watch:
    """One sequence on its way, for the counters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun = time.monotonic()
        self._first = True

    def tokens(self, count: int) -> None:
        self._metrics.generation_tokens += count
        if self._first and count:
            self._first = False
            self._metrics.time_to_first_token.observe(time.monotonic() - self._begun)

    def finish(self, reason: str) -> None:
        self._metrics.finished[reason] += 1
        self._metrics.latency.observe(time.monotonic() - self._begun)


def _single(name: str, kind: str, labels: str, value: float) -> tuple[str, str, list[str]]:
    return f"vllm:{name}", kind, [f"vllm:{name}{{{labels}}} {float(value)}"]

"""What a simulation says: waits, switches, use of the GPUs, fairness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmux.sim.world import Request, Result, Span

MOVING = ("draining", "parking", "starting", "waking", "stopping")


def waits_of(requests: Iterable[Request]) -> dict[str, float]:
    waits = sorted(r.wait for r in requests if r.wait is not None and not r.refused)
    if not waits:
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0, "max": 0.0}
    return {
        "mean": sum(waits) / len(waits),
        "p50": quantile(waits, 0.5),
        "p95": quantile(waits, 0.95),
        "p99": quantile(waits, 0.99),
        "max": waits[-1],
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 = all alike, 1/n = one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def speed(requests: Sequence[Request]) -> float:
    """Of a model: the part of its requests' time that was not spent waiting."""
    service = sum(r.arrival.service for r in requests)
    wait = sum(r.wait or 0.0 for r in requests)
    return service / (service + wait) if service + wait else 1.0


def report(result: Result) -> dict[str, Any]:
    """Everything as JSON. Times in seconds; ``busy_share`` and ``switching_share`` are of the
    makespan, of all GPUs together (with spans recorded)."""
    served: dict[str, list[Request]] = {}
    for request in result.requests:
        served.setdefault(request.arrival.model, []).append(request)
    answered = {m: [r for r in rs if not r.refused] for m, rs in served.items()}
    switches = [s for s in result.switches if s.victims]
    makespan = result.ended - min((r.arrival.at for r in result.requests), default=0.0)
    whole = max(makespan, 1e-9) * result.gpu_count
    return {
        "requests": len(result.requests),
        "unserved": sum(bool(r.refused) for r in result.requests),
        "cuts": sum(r.cuts for r in result.requests),
        "makespan_s": round(makespan, 3),
        "switches": len(switches),
        "starts": len(result.switches) - len(switches),
        "switch_s": round(sum(s.serving_at - s.decided_at for s in switches), 3),
        "switching_share": round(_covered(result.spans, MOVING) / whole, 4),
        "busy_share": round(sum(_served_time(rs) for rs in answered.values()) / whole, 4),
        "wait_s": _rounded(waits_of(result.requests)),
        "jain": round(jain([speed(rs) for rs in answered.values()]), 4),
        "models": {
            model: {
                "requests": len(requests),
                "unserved": sum(bool(r.refused) for r in requests),
                "wait_s": _rounded(waits_of(requests)),
            }
            for model, requests in sorted(served.items())
        },
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


def _served_time(requests: Sequence[Request]) -> float:
    """Seconds in which at least one of the model's requests is in service."""
    total, until = 0.0, 0.0
    spans = sorted((r.began, r.ended) for r in requests if r.began is not None and r.ended)
    for began, ended in spans:
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def _covered(spans: Sequence[Span], states: Sequence[str]) -> float:
    """GPU-seconds in which a model in one of the states is on a GPU."""
    by_gpu: dict[int, list[tuple[float, float]]] = {}
    for span in spans:
        if span.state in states:
            for gpu in span.gpus:
                by_gpu.setdefault(gpu, []).append((span.began, span.ended))
    total = 0.0
    for pieces in by_gpu.values():
        until = 0.0
        for began, ended in sorted(pieces):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
    return total

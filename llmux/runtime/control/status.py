"""What llmux says of itself: /control/status (the earlier system's JSON, and more), ps, STATUS=."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from time import monotonic, time
from typing import Any

from llmux.core.effects import SwitchFinished
from llmux.core.records import (
    Draining,
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
    coming,
    leaving,
)
from llmux.core.why import explain
from llmux.phases import counted, phase_text
from llmux.protocol import Catalog, ModelInfo
from llmux.runtime.control.holdings import NOTHING, Gpu, Held
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.instance import Instance

LONGEST_MESSAGE = 4000  # characters


def process_state(record: ModelRecord) -> str:
    """The earlier system's word for it."""
    match record.phase:
        case Stopped() | Stopping():
            return "not_started"
        case Starting():
            return "starting"
        case Parked(eviction=eviction) | Waking(eviction=eviction):
            return f"sleeping:{_camel(eviction.weights)}+{_camel(eviction.process)}"
        case Failed(message=message):
            return f"failed:{_bounded(message)}"
        case _:
            return "running"


def _bounded(message: str) -> str:
    """An engine's last lines may be long; `llmux logs` has them whole."""
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} …"


def _camel(word: str) -> str:
    return "".join(part.capitalize() for part in word.split("_"))


def overall(state: State) -> str:
    """idle, active:M, or switching:F->T; with several awake the one that served longest."""
    for target, reservation in state.reservations.items():
        origin = reservation.victims[0] if reservation.victims else "none"
        return f"switching:{origin}->{target}"
    active = active_models(state)
    return f"active:{active[0]}" if active else "idle"


def active_models(state: State) -> list[str]:
    serving = [
        (record.phase.since, name)
        for name, record in state.models.items()
        if isinstance(record.phase, Serving)
    ]
    return [name for _, name in sorted(serving)]


def status(
    state: State,
    executor: Executor,
    switches: Mapping[str, SwitchFinished],
    observer: str | None = None,
    held: Mapping[str, Held] = NOTHING,
    orders: Sequence[Mapping[str, Any]] = (),
    gpus: Sequence[Gpu] = (),
) -> dict[str, Any]:
    """``observer``: why GPU memory cannot be seen now; None when it can. ``held``: memory of the
    engines, by model. ``orders``: those under way. ``gpus``: of the devices that can be seen."""
    active = active_models(state)
    mode: dict[str, Any] = {"mode": "manual" if state.manual else "auto"}
    if state.pinned is not None:
        mode["pinned"] = state.pinned
    if pins := [name for name, until in state.pins.items() if until > monotonic()]:
        mode["pins"] = sorted(pins)
    return {
        "state": overall(state),
        "active_model": active[0] if active else None,
        "active_models": active,
        "mode": mode,
        "generation": state.generation,
        "gpu_count": state.gpu_count,
        "gpu_observer": observer or "ok",
        "gpus": [asdict(gpu) for gpu in gpus],
        "workers": len(state.workers),
        "orders": list(orders),
        "models": {
            name: _model(name, state, executor)
            | _activity(name, state, executor.instances.get(name), monotonic())
            | _memory(held.get(name, Held()))
            | {"last_switch": _switch(switches.get(name))}
            for name in state.models
        },
    }


def _switch(switch: SwitchFinished | None) -> dict[str, Any] | None:
    """How the model last became resident; seconds."""
    if switch is None:
        return None
    return {
        "victims": list(switch.victims),
        "cold": switch.cold,
        "drain_secs": round(switch.drained_at - switch.decided_at, 4),
        "park_secs": round(switch.room_at - switch.drained_at, 4),
        "start_secs" if switch.cold else "wake_secs": round(switch.serving_at - switch.room_at, 4),
        "total_secs": round(switch.serving_at - switch.decided_at, 4),
    }


def _model(name: str, state: State, executor: Executor) -> dict[str, Any]:
    record = state.models[name]
    phase = record.phase
    instance = executor.instances.get(name)
    handle = instance.handle if instance else None
    facts = instance.facts if instance and handle else None
    oldest = state.oldest_since(name)
    return {
        "in_flight": state.in_flight(name),
        "queue_depth": state.waiting(name),
        "oldest_wait_secs": None if oldest is None else round(monotonic() - oldest, 3),
        "process_state": process_state(record),
        "state": record.state.value,
        "since_secs": round(monotonic() - phase.since, 3),
        "eviction": str(record.eviction),
        "parked_as": str(phase.eviction) if isinstance(phase, Parked) else None,
        "writing_image": isinstance(phase, Parking) and phase.released_at is not None,
        "epoch": phase.epoch if isinstance(phase, (Serving, Draining)) else None,
        "wanted_by": phase.wanted_by if isinstance(phase, (Draining, Parking)) else None,
        "failures": record.failures,
        "message": _bounded(phase.message) if isinstance(phase, Failed) else None,
        "retry_in_secs": (
            round(max(0.0, phase.until - monotonic()), 3) if isinstance(phase, Failed) else None
        ),
        "gpus": list(record.gpus),
        "gpu_memory": record.config.gpu_memory,
        "pid": handle.pid if handle else None,
        "unit": handle.unit if handle else None,
        "address": str(facts.address) if facts and facts.address else None,
        "stale": executor.stale(record),
        "engine_version": facts.version if facts else None,
        "last_phases": dict(instance.phases) if instance else {},
    }


def _activity(name: str, state: State, instance: Instance | None, now: float) -> dict[str, Any]:
    """Why the model is where it is, how far its operation has come, when it was last used."""
    record = state.models[name]
    why = explain(state, name, now)
    step = instance.step if instance else None
    usual = _usual(state, record)
    left = None if usual is None else usual - (now - record.phase.since)
    return {
        "why": why.text or None,
        "waits_for": list(why.waits_for),
        "wait_at_most_secs": _rounded(why.at_most_secs),
        "phase": step.name if step else None,
        "phase_text": phase_text(step.name) if step else None,
        "phase_secs": _rounded(now - step.since) if step else None,
        "progress": (
            {"done": step.done, "total": step.total, "unit": counted(step.name)}
            if step and (step.done or step.total)
            else None
        ),
        "usual_secs": _rounded(usual),
        "left_secs": _rounded(left) if left is not None and left >= 0.001 else None,
        "usual_start_secs": _rounded(state.costs.get((name, coming(None)))),
        "idle_secs": _idle(name, state, now),
        "pinned": name == state.pinned or state.pins.get(name, now) > now,
        "pinned_secs": _pinned_secs(state, name, now),
        "image": None if record.image is None else str(record.image),
    }


def _usual(state: State, record: ModelRecord) -> float | None:
    """Seconds that the operation under way took on average before."""
    match record.phase:
        case Starting():
            operation = coming(None)
        case Waking(eviction=eviction):
            operation = coming(eviction)
        case Parking(eviction=eviction):
            operation = leaving(eviction)
        case _:
            return None
    return state.costs.get((record.config.name, operation))


def _idle(name: str, state: State, now: float) -> float | None:
    if state.in_flight(name) or state.waiting(name):
        return 0.0
    last = state.models[name].last_active
    return _rounded(now - last) if last else None


def _pinned_secs(state: State, name: str, now: float) -> float | None:
    """What is left of a pin that ends; None for others."""
    left = state.pins.get(name, now) - now
    return round(left, 3) if 0 < left < math.inf else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _memory(held: Held) -> dict[str, Any]:
    return {"gpu_bytes": held.gpu, "ram_bytes": held.ram}


def catalog(
    state: State, executor: Executor, switches: Mapping[str, SwitchFinished], started: float
) -> Catalog:
    """For /v1/models and Retry-After. ``started``: wall-clock seconds, every model's `created`."""
    infos = []
    for name, record in state.models.items():
        if record.removed:
            continue
        instance = executor.instances.get(name)
        longest = instance.facts.max_model_len if instance else None
        switch = switches.get(name)
        infos.append(
            ModelInfo(
                name,
                record.state.value,
                int(started or time()),
                longest or record.config.max_model_len,
                list(record.config.aliases),
                round(switch.serving_at - switch.decided_at, 3) if switch else None,
                adapters=list(record.config.adapters),
                stale=executor.stale(record),
            )
        )
    config = state.config
    return Catalog.of(
        infos,
        request_timeout_secs=config.policy.request_timeout_secs,
        min_active_secs=config.policy.min_active_secs,
        startup_timeout_secs=max(
            map(config.startup_timeout, config.models.values()),
            default=config.startup_timeout_secs,
        ),
    )


def one_line(state: State) -> str:
    """STATUS= of the unit: ASCII, since sdnotify loses messages with anything else."""
    active = active_models(state)
    parked = sum(isinstance(r.phase, Parked) for r in state.models.values())
    failed = [n for n, r in state.models.items() if isinstance(r.phase, Failed)]
    parts = [f"serving {', '.join(active)}" if active else "no model active"]
    if state.reservations:
        parts.append(overall(state))
    if parked:
        parts.append(f"{parked} parked")
    if failed:
        parts.append(f"failed: {', '.join(failed)}")
    return "; ".join(parts)

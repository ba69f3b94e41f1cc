"""What llmux says of itself: /control/status (the earlier system's JSON, and more), ps, STATUS=."""

from __future__ import annotations

from collections.abc import Mapping
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
)
from llmux.protocol import Catalog, ModelInfo
from llmux.runtime.executor import Executor


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
            return f"failed:{message}"
        case _:
            return "running"


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
    state: State, executor: Executor, switches: Mapping[str, SwitchFinished]
) -> dict[str, Any]:
    active = active_models(state)
    mode: dict[str, Any] = {"mode": "manual" if state.manual else "auto"}
    if state.pinned is not None:
        mode["pinned"] = state.pinned
    return {
        "state": overall(state),
        "active_model": active[0] if active else None,
        "active_models": active,
        "mode": mode,
        "generation": state.generation,
        "gpu_count": state.gpu_count,
        "workers": len(state.workers),
        "models": {
            name: _model(name, state, executor) | {"last_switch": _switch(switches.get(name))}
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
        "epoch": phase.epoch if isinstance(phase, (Serving, Draining)) else None,
        "wanted_by": phase.wanted_by if isinstance(phase, (Draining, Parking)) else None,
        "failures": record.failures,
        "message": phase.message if isinstance(phase, Failed) else None,
        "retry_in_secs": (
            round(max(0.0, phase.until - monotonic()), 3) if isinstance(phase, Failed) else None
        ),
        "gpus": list(record.gpus),
        "gpu_memory": record.config.gpu_memory,
        "pid": handle.pid if handle else None,
        "unit": handle.unit if handle else None,
        "address": str(instance.address) if handle and instance and instance.address else None,
        "engine_version": instance.version if handle and instance else None,
        "last_phases": dict(instance.phases) if instance else {},
    }


def catalog(
    state: State, executor: Executor, switches: Mapping[str, SwitchFinished], started: float
) -> Catalog:
    """For /v1/models and Retry-After. ``started``: wall-clock seconds, every model's `created`."""
    infos = []
    for name, record in state.models.items():
        if record.removed:
            continue
        instance = executor.instances.get(name)
        longest = instance.max_model_len if instance else None
        switch = switches.get(name)
        infos.append(
            ModelInfo(
                name,
                record.state.value,
                int(started or time()),
                longest or record.config.max_model_len,
                list(record.config.aliases),
                round(switch.serving_at - switch.decided_at, 3) if switch else None,
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

"""At start: look at what runs, match it with the former supervisor's notes, go on from there."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from types import MappingProxyType
from typing import Any

from llmux.config.schema import Config, ModelConfig
from llmux.core.adopt import ASLEEP, Note, Observation, adopt, placement
from llmux.core.effects import Effect
from llmux.core.records import State, parked_share
from llmux.core.reducer import initial
from llmux.core.states import ModelState
from llmux.errors import DriverError, LlmuxError
from llmux.ports import UnitHandle
from llmux.protocol import Address
from llmux.runtime.drivers import Drivers
from llmux.runtime.executor import Executor
from llmux.runtime.instance import Instance
from llmux.runtime.launch import engine_address
from llmux.runtime.notes import models_in, note_from
from llmux.runtime.release import holds_more
from llmux.runtime.words import address_from, canary_from, parse_eviction

log = logging.getLogger("llmux")

THAW_SECS = 10.0
CUDA_SECS = 60.0  # the driver's start takes seconds on a host with many GPUs
PROBE_SECS = 2.0  # an engine that is busy or asleep still answers /health


async def first_state(config: Config, drivers: Drivers) -> State:
    """Nothing adopted yet; epochs of this life differ from those of every other."""
    count = config.gpu_count
    if count is None:
        # without a GPU the claims still say who may run beside whom, on an imagined one
        count = max(1, await drivers.gpu.gpu_count()) if drivers.gpu.available else 1
    prefix = secrets.token_hex(4)
    return initial(config, gpu_count=count, epoch_prefix=prefix, now=monotonic())


async def adopt_engines(
    state: State, executor: Executor, drivers: Drivers, document: Mapping[str, Any]
) -> tuple[State, tuple[Effect, ...]]:
    """Every engine that lives is in the returned state, or about to be stopped by its effects."""
    notes = models_in(document)
    await executor.imaging.recover()
    images = await executor.imaging.known(state.config.models)
    state = restore_orders(state, document)
    handles = await drivers.units.observe()
    observations = await asyncio.gather(
        *(_observe(state, executor, drivers, h, notes.get(h.model, {})) for h in handles)
    )
    for seen in observations:
        log.info(
            "found %s: %s%s%s",
            seen.model,
            "frozen" if seen.frozen else "healthy" if seen.healthy else "not answering",
            ", asleep" if seen.sleeping else "",
            f", was {seen.note.state}" if seen.note.state else ", no note of it",
            extra={"model": seen.model},
        )
    return adopt(state, observations, images, monotonic())


def restore_orders(state: State, document: Mapping[str, Any]) -> State:
    """What operators ordered at run time outlives the supervisor: mode, pin, eviction."""
    models = dict(state.models)
    for name, note in models_in(document).items():
        with suppress(ValueError):
            if name in models and "override" in note:
                override = parse_eviction(str(note["override"]))
                models[name] = replace(models[name], eviction_override=override)
    pinned = document.get("pinned")
    return replace(
        state,
        models=MappingProxyType(models),
        manual=document.get("manual") is True,
        pinned=pinned if pinned in models else None,
    )


async def _observe(
    state: State,
    executor: Executor,
    drivers: Drivers,
    handle: UnitHandle,
    document: Mapping[str, Any],
) -> Observation:
    record = state.models.get(handle.model)
    config = record.config if record else ModelConfig(handle.model, "-")
    same = (document.get("pid"), document.get("start_ticks")) == (handle.pid, handle.start_ticks)
    # notes written while the engine was being started may not know its pid yet
    note = note_from(document) if same or document.get("pid") is None else Note()
    address = (address_from(document) if same else None) or engine_address(config, drivers.places)
    instance = executor.adopt(config, handle, address)
    instance.gpus = note.gpus
    if same:
        instance.canary = canary_from(document)
        instance.max_model_len = document.get("max_model_len")
        instance.version = document.get("version")
        instance.identity = dict(document.get("identity") or {})
        instance.cold_seconds = float(document.get("cold_seconds") or instance.cold_seconds)
        instance.cuda_pids = tuple(document.get("cuda_pids") or ())
    try:
        return await _look(drivers, instance, note, handle, address)
    except DriverError as error:
        log.warning("cannot observe %s: %s", handle.model, error, extra={"model": handle.model})
    except LlmuxError as error:
        log.warning("cannot read of %s: %s", handle.model, error, extra={"model": handle.model})
    return Observation(handle.model, False, False, None, note)


async def _look(
    drivers: Drivers, instance: Instance, note: Note, handle: UnitHandle, address: Address
) -> Observation:
    """What the engine can be asked, in the order in which it can answer."""
    name, config = handle.model, instance.config
    if await drivers.freezer.frozen(handle):
        if note.state is not None:
            return Observation(name, True, False, None, note)
        # nobody says how it was parked, and only one that runs can be asked
        await drivers.freezer.thaw(handle, THAW_SECS)
    if note.state in (None, ModelState.PARKING) and drivers.cuda is not None:
        pids = await drivers.units.pids(handle)
        instance.cuda_pids = tuple(await drivers.cuda.suspended(pids, CUDA_SECS))
        if instance.cuda_pids:
            return Observation(name, False, False, None, note, suspended=True)
    if not await drivers.engine.healthy(address, PROBE_SECS):
        return Observation(name, False, False, None, note)
    sleeping = await drivers.engine.sleeping(address, PROBE_SECS)
    half_awake = False
    if sleeping and note.state is None:
        share = parked_share(config, ASLEEP)
        half_awake = await holds_more(drivers, handle, placement(config, note), share)
    return Observation(name, False, True, sleeping, note, half_awake=half_awake)

"""At start: observe what runs, match it with the former supervisor's notes, adopt it."""

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

from llmux.config.schema import Config, Eviction, ModelConfig
from llmux.core.adopt import ASLEEP, Note, Observation, adopt, placement
from llmux.core.effects import Effect
from llmux.core.records import State, parked_share
from llmux.core.reducer import initial
from llmux.core.states import ModelState
from llmux.errors import DriverError, LlmuxError
from llmux.ports import UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.gpu_memory import holds_more
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.launch import engine_address
from llmux.runtime.host import Drivers
from llmux.runtime.notes import models_in, note_from, pins_in
from llmux.typed_json import BadJson

log = logging.getLogger("llmux")

THAW_SECS = 10.0
CUDA_SECS = 60.0  # the driver's start takes seconds on a host with many GPUs
PROBE_SECS = 2.0  # an engine that is busy or asleep still answers /health


async def first_state(config: Config, drivers: Drivers) -> State:
    """Nothing adopted yet; the epochs differ from those of every other supervisor."""
    count = config.gpu_count
    if count is None:
        # without a GPU the claims still decide which models fit together, on an imagined one
        count = await _gpu_count(config, drivers)
    prefix = secrets.token_hex(4)
    return initial(config, gpu_count=count, epoch_prefix=prefix, now=monotonic())


async def _gpu_count(config: Config, drivers: Drivers) -> int:
    """As many as there are; as many as the models need when the driver does not say."""
    if not drivers.gpu.available:
        return 1
    try:
        return max(1, await drivers.gpu.gpu_count())
    except DriverError as error:
        wanted = (model.gpus for model in config.models.values())
        count = max((w if isinstance(w, int) else max(w) + 1 for w in wanted), default=1)
        log.error("%s; going on with %d, which the models name", error, count)
        return count


async def adopt_engines(
    state: State,
    executor: Executor,
    images: ImageLifecycle,
    drivers: Drivers,
    document: Mapping[str, Any],
) -> tuple[State, tuple[Effect, ...]]:
    """Every engine that lives is in the returned state, or about to be stopped by its effects."""
    notes = models_in(document)
    await images.recover()
    known = await images.known(state.config.models)
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
            f", was {seen.note.state}" if seen.note.state else ", without a note",
            extra={"model": seen.model},
        )
    noted = {name: note_from(note) for name, note in notes.items()}
    return adopt(state, observations, known, monotonic(), noted)


def restore_orders(state: State, document: Mapping[str, Any]) -> State:
    """What operators ordered at run time outlives the supervisor (mode, pin, eviction), and so does
    what was learned of the models."""
    models = dict(state.models)
    for name, note in models_in(document).items():
        with suppress(ValueError):
            if name in models and "override" in note:
                override = Eviction.parse(str(note["override"]))
                models[name] = replace(models[name], eviction_override=override)
        residue = note.get("residue")
        if name in models and isinstance(residue, float) and 0 < residue <= 1:
            models[name] = replace(models[name], residue=residue)
    pinned = document.get("pinned")
    pins = {name: until for name, until in pins_in(document).items() if name in models}
    return replace(
        state,
        models=MappingProxyType(models),
        manual=document.get("manual") is True,
        pinned=pinned if isinstance(pinned, str) and pinned in models else None,
        pins=MappingProxyType(pins),
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
    facts = _facts(handle.model, document) if same else EngineFacts()
    address = facts.address or engine_address(config, drivers.places)
    facts = replace(facts, address=address, gpus=note.gpus)
    instance = executor.adopt(config, handle, facts)
    try:
        residue = record.residue if record else None
        return await _look(drivers, instance, note, handle, address, residue)
    except DriverError as error:
        log.warning("cannot observe %s: %s", handle.model, error, extra={"model": handle.model})
    except LlmuxError as error:
        log.warning("cannot read of %s: %s", handle.model, error, extra={"model": handle.model})
    return Observation(handle.model, False, False, None, note)


def _facts(model: str, document: Mapping[str, Any]) -> EngineFacts:
    """What the former supervisor noted of the engine; a damaged note says nothing."""
    try:
        return EngineFacts.from_json(document)
    except BadJson as error:
        log.warning(
            "cannot use the note of %s: %s; going by what is observed",
            model,
            error,
            extra={"model": model},
        )
        return EngineFacts()


async def _look(
    drivers: Drivers,
    instance: Instance,
    note: Note,
    handle: UnitHandle,
    address: Address,
    residue: float | None,
) -> Observation:
    """Ask the engine what it can answer, in the order in which it can."""
    name, config = handle.model, instance.config
    if await drivers.freezer.frozen(handle):
        if note.state is not None:
            return Observation(name, True, False, None, note)
        # no note says how it was parked, and only a running engine can be asked
        await drivers.freezer.thaw(handle, THAW_SECS)
    asked = note.state in (None, ModelState.PARKING, ModelState.WAKING)
    if asked and drivers.cuda is not None:
        pids = await drivers.units.pids(handle)
        suspended = tuple(await drivers.cuda.suspended(pids, CUDA_SECS))
        # a wake that was under way notes nothing of its steps: some of it may be back already
        back = note.state is ModelState.WAKING
        resumed = instance.facts.resumed or back or note.state is None
        known = () if back else suspended
        # nor does a park: a cache that may have been discarded is returned, once more if need be
        lost = config.engine_type.cache_apart(config.extra_args) and bool(suspended)
        instance.facts = replace(
            instance.facts,
            cuda_pids=known,
            resumed=resumed,
            cache_discarded=instance.facts.cache_discarded or lost,
        )
        if suspended and not back:
            return Observation(name, False, False, None, note, suspended=True)
    if (stranger := await drivers.units.stranger(address, handle)) is not None:
        log.warning("%s listens at %s of %s", stranger, address, name, extra={"model": name})
        return Observation(name, False, False, None, note, stranger=True)
    if not await drivers.engine.healthy(address, PROBE_SECS):
        return Observation(name, False, False, None, note)
    sleeping = await drivers.engine.sleeping(address, PROBE_SECS)
    half_awake = False
    if sleeping and note.state is None:
        share = parked_share(config, ASLEEP, residue)
        half_awake = await holds_more(drivers, handle, placement(config, note), share)
    return Observation(name, False, True, sleeping, note, half_awake=half_awake)

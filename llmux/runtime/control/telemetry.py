"""The supervisor's own numbers: a listener of the loop and of the executor's steps.

It has no port. Gateways ask for a snapshot over the control socket (the verb ``metrics``), which
includes those of the other workers, so that a scrape of one worker covers all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from llmux.config.schema import Process
from llmux.core.effects import SwitchFinished
from llmux.core.plans import StepKind
from llmux.core.records import Failed, ModelRecord, Parking, State, Stopping
from llmux.core.states import ModelState
from llmux.errors import LlmuxError
from llmux.image_ports import Checkpointer
from llmux.metrics import (
    BUILD_INFO,
    ENGINE_DEATHS,
    ESCALATIONS,
    GPU_ENGINES,
    GPU_OBSERVED,
    GPU_TOTAL,
    GPU_USED,
    IMAGE_BYTES,
    IMAGES_BUDGET,
    MAX_WAIT,
    MODEL_FAILURES,
    MODEL_STATE,
    PARK_FAILURES,
    QUARANTINED,
    STEP_SECONDS,
    SUPERVISOR,
    SWITCH_PHASE,
    SWITCH_SECONDS,
    SWITCHES,
    Kind,
    ProcessNumbers,
    Snapshot,
    Store,
)
from llmux.ports import GpuObserver
from llmux.runtime.control.watchers import Watchers

log = logging.getLogger("llmux")

MOST_KEPT = 20_000  # series of workers that have left
SUMMED = frozenset({Kind.COUNTER, Kind.HISTOGRAM})
_COMING_UP = (ModelState.STARTING, ModelState.WAKING)


class Telemetry:
    """``gpu``, ``checkpointer`` and ``engines`` (the pids of all engines) are read on each scrape
    only."""

    def __init__(
        self,
        version: str,
        gpu: GpuObserver,
        checkpointer: Checkpointer | None,
        engines: Callable[[], Awaitable[Collection[int]]],
    ) -> None:
        self._version = version
        self._gpu = gpu
        self._checkpointer = checkpointer
        self._engines = engines
        self._process = ProcessNumbers(SUPERVISOR)
        self._store = Store()
        self._state: State | None = None
        self._last: dict[str, Snapshot] = {}  # of each worker, its newest
        self._gone = Store(MOST_KEPT)  # counts of workers that have left

    # ---- from the loop and the executor ---------------------------------------------------------

    def published(self, old: State, new: State) -> None:
        self._state = new
        if old.models is new.models:
            return
        for name, record in new.models.items():
            before = old.models.get(name)
            if before is not None and before.state is not record.state:
                self._moved(name, before, record)

    def _moved(self, name: str, before: ModelRecord, after: ModelRecord) -> None:
        phase = before.phase
        failed = isinstance(after.phase, Failed)
        if before.state in _COMING_UP and failed:
            self._store.add(SWITCHES, "", name, "failed")
        elif before.state is ModelState.WAKING and after.state is ModelState.STARTING:
            self._store.add(ESCALATIONS, name, "wake")
        elif isinstance(phase, Parking) and failed:
            self._store.add(PARK_FAILURES, name, "stuck")
        elif isinstance(phase, Parking) and after.state is ModelState.STOPPED:
            if phase.eviction.process is not Process.STOP:
                self._store.add(PARK_FAILURES, name, "stopped")
                self._store.add(ESCALATIONS, name, "park")
        elif isinstance(after.phase, Stopping) and after.phase.crashed:
            self._store.add(ENGINE_DEATHS, name)

    def switched(self, switch: SwitchFinished) -> None:
        to = switch.model
        for victim in switch.victims or ("",):
            self._store.add(SWITCHES, victim, to, "ok")
        total = switch.serving_at - switch.decided_at
        kind = "cold" if switch.cold else "wake"
        self._store.observe(SWITCH_SECONDS, to, kind, seconds=total)
        for phase, seconds in (
            ("drain", switch.drained_at - switch.decided_at),
            ("sleep", switch.room_at - switch.drained_at),
            ("start" if switch.cold else "wake", switch.serving_at - switch.room_at),
        ):
            self._store.observe(SWITCH_PHASE, phase, to, seconds=max(0.0, seconds))

    def stepped(self, model: str, step: StepKind, seconds: float, result: str) -> None:
        self._store.observe(STEP_SECONDS, step.value, result, seconds=seconds)

    def quarantined(self, model: str) -> None:
        self._store.add(QUARANTINED, model)

    # ---- asked by a gateway ---------------------------------------------------------------------

    async def answer(
        self,
        args: Mapping[str, Any],
        watchers: Watchers,
        workers: list[str],
        ask: Callable[[str, int], None],
    ) -> dict[str, Snapshot]:
        """``args["worker"]`` asks; ``args["snapshot"]`` has its own numbers, kept after it left."""
        asker = str(args.get("worker", ""))
        others = [worker for worker in workers if worker != asker]
        heard = await watchers.collect(others, ask)
        own = args.get("snapshot")
        self._note(heard | ({asker: own} if isinstance(own, dict) else {}), workers)
        summed = Store()
        for snapshot in heard.values():
            summed.merge(snapshot)
        summed.merge(self._gone.snapshot())
        return {"supervisor": await self.snapshot(), "workers": summed.snapshot()}

    def _note(self, heard: Mapping[str, Snapshot], present: list[str]) -> None:
        """Counters never go back: what a worker had counted outlives it."""
        self._last.update(heard)
        for worker in self._last.keys() - set(present):
            self._gone.merge(self._last.pop(worker), kinds=SUMMED)

    async def snapshot(self) -> Snapshot:
        store = Store()
        store.merge(self._store.snapshot())
        store.set(BUILD_INFO, self._version, value=1)
        for name, record in (self._state.models if self._state else {}).items():
            for state in ModelState:
                store.set(MODEL_STATE, name, state.value, value=int(record.state is state))
            store.set(MODEL_FAILURES, name, value=record.failures)
            for counter in (ENGINE_DEATHS, QUARANTINED):
                store.add(counter, name, amount=0)  # else increase() misses the first one
            for operation in ("park", "wake"):
                store.add(ESCALATIONS, name, operation, amount=0)
        if self._state is not None:
            store.set(MAX_WAIT, value=self._state.config.policy.max_wait_secs)
            if (budget := self._state.config.checkpoint.max_bytes) is not None:
                store.set(IMAGES_BUDGET, value=budget)
        store.set(GPU_OBSERVED, value=0)
        self._process.read_into(store)
        try:
            await self._look(store)
        except (LlmuxError, OSError, TimeoutError) as error:
            log.debug("cannot measure: %s", error)
        return store.snapshot()

    async def _look(self, store: Store) -> None:
        async with asyncio.timeout(0.5):
            if self._gpu.available:
                await self._look_at_gpus(store)
            if self._checkpointer is not None:
                for image in await self._checkpointer.images():
                    if self._state is None or image.model in self._state.models:
                        store.set(IMAGE_BYTES, image.model, value=image.disk_bytes)

    async def _look_at_gpus(self, store: Store) -> None:
        processes = await self._gpu.processes()
        engines = await self._engines()  # after them: one that starts in between is ours
        for gpu, total in (await self._gpu.totals()).items():
            held = [process for process in processes if process.gpu == gpu]
            of_engines = [process for process in held if process.pid in engines]
            store.set(GPU_TOTAL, str(gpu), value=total)
            store.set(GPU_USED, str(gpu), value=sum(process.used_bytes for process in held))
            store.set(
                GPU_ENGINES, str(gpu), value=sum(process.used_bytes for process in of_engines)
            )
        store.set(GPU_OBSERVED, value=1)

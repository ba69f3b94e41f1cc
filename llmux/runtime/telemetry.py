"""The supervisor's own numbers: a listener of the loop and of the executor's steps.

It has no port. Gateways ask for a snapshot over the control socket (the verb ``metrics``), which
also has those of the other workers, so that whichever worker is scraped speaks for all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from llmux.config.schema import Process
from llmux.core.effects import SwitchFinished
from llmux.core.plans import StepKind
from llmux.core.records import Failed, ModelRecord, Parking, State, Stopping
from llmux.core.states import ModelState
from llmux.errors import LlmuxError
from llmux.metrics import (
    BUILD_INFO,
    ENGINE_DEATHS,
    ESCALATIONS,
    GPU_TOTAL,
    GPU_USED,
    IMAGE_BYTES,
    MODEL_STATE,
    PARK_FAILURES,
    STEP_SECONDS,
    SWITCH_PHASE,
    SWITCH_SECONDS,
    SWITCHES,
    Kind,
    Snapshot,
    Store,
)
from llmux.ports import Dumper, GpuObserver
from llmux.runtime.events import Feeds

log = logging.getLogger("llmux")

SUMMED = frozenset({Kind.COUNTER, Kind.HISTOGRAM})
_COMING_UP = (ModelState.STARTING, ModelState.WAKING)


class Telemetry:
    """``gpu`` and ``dumper`` are looked at only when somebody asks."""

    def __init__(self, version: str, gpu: GpuObserver, dumper: Dumper | None) -> None:
        self._version = version
        self._gpu = gpu
        self._dumper = dumper
        self._store = Store()
        self._state: State | None = None
        self._last: dict[str, Snapshot] = {}  # of each worker, as it was last heard
        self._gone = Store()  # what workers counted that have left

    # ---- told by loop and executor --------------------------------------------------------------

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

    # ---- asked by a gateway ---------------------------------------------------------------------

    async def answer(
        self,
        args: Mapping[str, Any],
        feeds: Feeds,
        workers: list[str],
        ask: Callable[[str, int], None],
    ) -> dict[str, Snapshot]:
        """``args["worker"]`` is who asks; its own numbers come along, to be remembered."""
        asker = str(args.get("worker", ""))
        others = [worker for worker in workers if worker != asker]
        heard = await feeds.collect(others, ask)
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
        try:
            await self._look(store)
        except (LlmuxError, OSError, TimeoutError) as error:
            log.debug("cannot measure: %s", error)
        return store.snapshot()

    async def _look(self, store: Store) -> None:
        async with asyncio.timeout(0.5):
            if self._gpu.available:
                totals = await self._gpu.totals()
                used = dict.fromkeys(totals, 0)
                for process in await self._gpu.processes():
                    used[process.gpu] = used.get(process.gpu, 0) + process.used_bytes
                for gpu, total in totals.items():
                    store.set(GPU_TOTAL, str(gpu), value=total)
                for gpu, value in used.items():
                    store.set(GPU_USED, str(gpu), value=value)
            if self._dumper is not None:
                for image in await self._dumper.images():
                    if self._state is None or image.model in self._state.models:
                        store.set(IMAGE_BYTES, image.model, value=image.disk_bytes)

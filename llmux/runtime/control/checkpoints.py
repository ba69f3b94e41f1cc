"""Operators' orders on images: make one ahead of time, restore from one, list them all."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic, time
from typing import Any, Final

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.events import ImageKnown
from llmux.core.plans import CANARY_SECS
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
    Waking,
)
from llmux.errors import LlmuxError, Reason, Refused
from llmux.image_ports import Checkpointer, Image, NoImage
from llmux.ports import Canary
from llmux.protocol import ProgressCallback
from llmux.runtime.control.orders import bring_down, bring_up, followed, record_of
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import eviction_of
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.host import Drivers
from llmux.runtime.loop import Loop

VALID: Final = "valid"
DISCARDED_KEEPS: Final = 0.1  # of an engine's host memory, at the least


class Checkpoints:
    """Looks at images directly, and acts through the loop's events."""

    def __init__(
        self,
        loop: Loop,
        executor: Executor,
        images: ImageLifecycle,
        drivers: Drivers,
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._images = images
        self._checkpointer = drivers.checkpointer
        self._units = drivers.units

    # ---- making ---------------------------------------------------------------------------------

    async def make(
        self, name: str, eviction: Eviction | None, *, warm_up: bool, report: ProgressCallback
    ) -> dict[str, Any]:
        """Make an image of the model, parked by ``eviction``; reuse the one that is there."""
        record = record_of(self._loop, name)
        wanted = eviction or record.eviction
        self._check(record, wanted)
        served = isinstance(record.phase, Serving)
        began = monotonic()
        found = await self._find(record)
        if isinstance(found, Image) and eviction_of(found.recipe) == wanted:
            return self._made(found, wanted, 0.0, 0.0, reused=True)
        await self._check_means(name)
        async with followed(self._loop, self._executor, name, report):
            await bring_up(self._loop, name)
            await self.check_room(name, wanted)
            if warm_up:
                await ask_canary(self._loop, self._executor, name)
            started = monotonic() - began
            parked = await bring_down(self._loop, name, wanted)
        if (
            parked is None
            or not isinstance(parked.phase, Parked)
            or parked.phase.eviction != wanted
        ):
            if served and parked is not None and isinstance(parked.phase, Parked):
                await bring_up(self._loop, name)  # no image was made: it serves on
            raise LlmuxError(f"cannot checkpoint {name}: {_why_not(parked)}")
        image = await self._find(parked)
        if isinstance(image, NoImage):
            raise LlmuxError(f"cannot checkpoint {name}: {image.reason}")
        return self._made(image, wanted, started, monotonic() - began - started, reused=False)

    async def _check_means(self, name: str) -> None:
        """Before an engine is started for an image that cannot be made."""
        if self._checkpointer is None:
            return  # the step of parking says so
        if problems := (await self._checkpointer.check()).problems:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot checkpoint {name}: {problems[0]}",
                hint="llmux doctor",
            )

    async def check_room(self, name: str, wanted: Eviction) -> None:
        """Before anything is drained: raises where the disk cannot take what the image holds at
        the least. Discarded weights are in none; how much that is shows after the sleep only."""
        handle = self._executor.instance(record_of(self._loop, name).config).handle
        if self._checkpointer is None or handle is None:
            return
        resident = await self._units.memory_bytes(handle)
        kept = DISCARDED_KEEPS if wanted.weights is Weights.DISCARD else 1.0
        await self._checkpointer.check_room(name, int(resident * kept))

    def _check(self, record: ModelRecord, wanted: Eviction) -> None:
        name = record.config.name
        if wanted.process is not Process.CHECKPOINT:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot checkpoint {name}: its eviction is {wanted}, which makes no image",
                hint="set eviction to discard+checkpoint (or offload, retain), or give --eviction",
            )
        if not self._started_alike(record.engine, wanted):
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot checkpoint {name} by {wanted}: for its eviction {record.config.eviction}"
                " the engine is started otherwise, and an image fits only the engine it is of",
                hint=f"set eviction to {wanted} in the configuration and reload",
            )

    def _started_alike(self, config: ModelConfig, wanted: Eviction) -> bool:
        """Would the engine be started with the same arguments and environment?"""
        ours = self._images.spec(config, ())
        theirs = self._images.spec(replace(config, eviction=wanted), ())
        return (ours.argv, ours.env) == (theirs.argv, theirs.env)

    @staticmethod
    def _made(
        image: Image, eviction: Eviction, started: float, seconds: float, *, reused: bool
    ) -> dict[str, Any]:
        return {
            "message": f"Model {image.model} has an image in {image.path}",
            "model": image.model,
            "eviction": str(eviction),
            "reused": reused,
            "start_secs": round(started, 3),
            "checkpoint_secs": round(seconds, 3),
            "dump_secs": round(image.dump_seconds, 3),
            "path": image.path,
            "apparent_bytes": image.apparent_bytes,
            "disk_bytes": image.disk_bytes,
        }

    # ---- restoring ------------------------------------------------------------------------------

    async def restore(self, name: str, *, report: ProgressCallback) -> dict[str, Any]:
        """Wake the model from its image. Raises when it was started cold instead."""
        loop = self._loop
        record = record_of(loop, name)
        if isinstance(record.phase, Serving):
            raise Refused(
                Reason.ALREADY_RUNNING,
                f"cannot restore {name}: it is serving",
                hint=f"llmux sleep {name} --eviction W+checkpoint makes an image of it",
            )
        parked_otherwise = isinstance(record.phase, Parked) and (
            record.phase.eviction.process is not Process.CHECKPOINT
        )
        if parked_otherwise:
            raise Refused(
                Reason.ALREADY_RUNNING,
                f"cannot restore {name}: its processes are there, parked by another way",
                hint=f"llmux load {name} wakes it, llmux unload {name} ends it",
            )
        image = await self._find(record)
        if isinstance(image, NoImage):
            raise Refused(Reason.NOT_FOUND, f"cannot restore {name}: {image.reason}")
        if (eviction := eviction_of(image.recipe)) is not None:
            # the supervisor looked for images when it started: this one may be newer
            loop.post(ImageKnown(name, eviction, image.disk_bytes))
        began = monotonic()
        cold = self._executor.instance(record.config).facts.cold_seconds
        reasons: list[str] = []
        async with followed(loop, self._executor, name, report):
            watching = asyncio.create_task(self._see_cold_start(name, reasons))
            try:
                await bring_up(loop, name)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            if reasons:
                raise LlmuxError(f"cannot restore {name}: {reasons[0]}; it was started cold")
            answer = await ask_canary(loop, self._executor, name)
        instance = self._executor.instance(record.config)
        return {
            "message": f"Model {name} serves, restored from {image.path}",
            "model": name,
            "restore_secs": round(monotonic() - began, 3),
            "cold_secs": round(instance.facts.cold_seconds or cold, 3),
            "answer": answer.text,
            "unit": instance.handle.unit if instance.handle else None,
            "pid": instance.handle.pid if instance.handle else None,
            "address": str(instance.facts.address),
            "path": image.path,
        }

    async def _see_cold_start(self, name: str, reasons: list[str]) -> None:
        """A restore that fails goes on as a cold start: good for clients, a failure here."""

        def starting(state: State) -> bool:
            record = state.models.get(name)
            return record is not None and isinstance(record.phase, Starting)

        state = await self._loop.wait_for(starting, 24 * 3600.0)
        phase = state.models[name].phase
        assert isinstance(phase, Starting)
        reasons.append(phase.reason or "its image was not used")

    # ---- listing --------------------------------------------------------------------------------

    async def listing(self) -> list[dict[str, Any]]:
        """All images, and whether each could be restored now."""
        checkpointer = self._checkpointer
        records = self._loop.state.models
        rows: dict[str, dict[str, Any]] = {}
        for image in await checkpointer.images() if checkpointer is not None else ():
            rows[image.path] = _row(image, "the model is not configured")
        for record in records.values() if checkpointer is not None else ():
            own = [path for path, row in rows.items() if row["model"] == record.config.name]
            found = await self._find(record)
            if isinstance(found, Image):
                rows[found.path] = _row(found, VALID)
            for path in own:
                if isinstance(found, NoImage):
                    rows[path]["state"] = found.reason
            if isinstance(found, NoImage) and not own and (where := record.config.checkpoint_path):
                rows[where] = _nothing(record.config.name, where, found.reason)
        return sorted(rows.values(), key=lambda row: (row["model"], row["path"]))

    # ---- removing -------------------------------------------------------------------------------

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove the model's own image. A model that is parked in it is stopped."""
        checkpointer = self._required()
        record = record_of(self._loop, name)
        if isinstance(record.phase, (Draining, Parking, Waking)):
            raise Refused(
                Reason.ALREADY_RUNNING,
                f"cannot remove the image of {name}: the model is {record.state}",
                hint="try again when it serves or is parked",
            )
        own = [image for image in await checkpointer.images() if image.model == name]
        if not any(image.managed for image in own):
            raise Refused(
                Reason.NOT_FOUND,
                f"cannot remove the image of {name}: there is none in checkpoint.images_dir",
                hint="llmux images ls",
            )
        await checkpointer.discard(name)
        self._loop.post(ImageKnown(name, None))
        phase = record.phase
        if isinstance(phase, Parked) and phase.eviction.process is Process.CHECKPOINT:
            await bring_down(self._loop, name, Eviction(process=Process.STOP))
        freed = sum(image.disk_bytes for image in own if image.managed)
        return {"message": f"The image of {name} is removed", "freed_bytes": freed}

    async def prune(self) -> dict[str, Any]:
        """Remove llmux's own images that can be restored no more."""
        checkpointer = self._required()
        moving = {
            name
            for name, record in self._loop.state.models.items()
            if isinstance(record.phase, (Draining, Parking, Waking))
        }
        rows = await self.listing()
        valid = {row["model"] for row in rows if row["state"] == VALID}
        stale = [
            row
            for row in rows
            if row["managed"] and row["state"] != VALID and row["model"] not in moving
        ]
        for row in stale:
            await checkpointer.discard(row["model"])
            if row["model"] not in valid:
                self._loop.post(ImageKnown(row["model"], None))
        freed = sum(row["disk_bytes"] for row in stale)
        count = f"{len(stale)} image{'s' if len(stale) != 1 else ''}"
        return {"message": f"removed {count}", "removed": stale, "freed_bytes": freed}

    def _required(self) -> Checkpointer:
        if self._checkpointer is None:
            raise LlmuxError("cannot keep images: engines are not in systemd scopes here")
        return self._checkpointer

    async def _find(self, record: ModelRecord) -> Image | NoImage:
        config = record.engine
        gpus = record.gpus
        if not gpus:
            gpus = config.gpus if isinstance(config.gpus, tuple) else tuple(range(config.gpus))
        return await self._images.find(config, gpus)


async def ask_canary(loop: Loop, executor: Executor, name: str) -> Canary:
    """One short inference by the engine itself."""
    instance = executor.instance(record_of(loop, name).config)
    instance.report("inference")
    return await executor.steps.ask_canary(instance, CANARY_SECS)


def _why_not(record: ModelRecord | None) -> str:
    match record.phase if record is not None else None:
        case None:
            return "it is not configured any more"
        case Parked(eviction=eviction, reason=reason):
            return reason or f"it was parked by {eviction} meanwhile"
        case Stopped(reason=reason):
            return reason or "it was stopped instead"
        case Failed(message=message):
            return message
        case _:
            return "it was woken again by a request"


def _row(image: Image, state: str) -> dict[str, Any]:
    return {
        "model": image.model,
        "path": image.path,
        "eviction": str(image.recipe.get("eviction") or "unknown"),
        "apparent_bytes": image.apparent_bytes,
        "disk_bytes": image.disk_bytes,
        "created": image.created,
        "age_secs": round(max(0.0, time() - image.created), 1),
        "last_used_secs": round(max(0.0, time() - image.last_used), 1),
        "dump_secs": image.dump_seconds,
        "managed": image.managed,
        "state": state,
    }


def _nothing(model: str, path: str, reason: str) -> dict[str, Any]:
    empty = ("eviction", "apparent_bytes", "disk_bytes", "created", "age_secs", "last_used_secs")
    return {
        "model": model,
        "path": path,
        **dict.fromkeys(empty),
        "dump_secs": None,
        "managed": False,
        "state": reason,
    }

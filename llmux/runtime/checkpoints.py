"""Operators' orders on images: make one ahead of time, restore from one, list them all."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from time import monotonic, time
from typing import Any

from llmux.config.schema import Eviction, ModelConfig, Process
from llmux.core.events import ImageKnown
from llmux.core.plans import CANARY_SECS
from llmux.core.records import Failed, ModelRecord, Parked, Serving, Starting, State, Stopped
from llmux.errors import LlmuxError, Reason, Refused
from llmux.ports import Canary, Image, NoImage
from llmux.protocol import Tell
from llmux.runtime.loop import Loop
from llmux.runtime.orders import bring_down, bring_up, followed
from llmux.runtime.words import parse_eviction


class Checkpoints:
    """Uses the loop's executor to look, and its events to act."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    # ---- making ---------------------------------------------------------------------------------

    async def make(
        self, name: str, eviction: Eviction | None, *, warm_up: bool, tell: Tell
    ) -> dict[str, Any]:
        """The model has an image of this eviction: one that was there, or one made now."""
        record = self._loop.state.models[name]
        wanted = eviction or record.eviction
        self._check(record, wanted)
        began = monotonic()
        found = await self._find(record)
        if isinstance(found, Image) and found.recipe.get("eviction") == str(wanted):
            return self._made(found, wanted, 0.0, 0.0, reused=True)
        async with followed(self._loop, name, tell):
            await bring_up(self._loop, name)
            if warm_up:
                await ask_canary(self._loop, name)
            started = monotonic() - began
            parked = await bring_down(self._loop, name, wanted)
        if (
            parked is None
            or not isinstance(parked.phase, Parked)
            or parked.phase.eviction != wanted
        ):
            raise LlmuxError(f"cannot checkpoint {name}: {_why_not(parked)}")
        image = await self._find(parked)
        if isinstance(image, NoImage):
            raise LlmuxError(f"cannot checkpoint {name}: {image.reason}")
        return self._made(image, wanted, started, monotonic() - began - started, reused=False)

    def _check(self, record: ModelRecord, wanted: Eviction) -> None:
        name = record.config.name
        if wanted.process is not Process.CHECKPOINT:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot checkpoint {name}: its eviction is {wanted}, which makes no image",
                hint="set eviction to discard+checkpoint (or offload, retain), or give --eviction",
            )
        if not self._started_alike(record.config, wanted):
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot checkpoint {name} by {wanted}: for its eviction {record.config.eviction}"
                " the engine is started otherwise, and an image fits only the engine it is of",
                hint=f"set eviction to {wanted} in the configuration and reload",
            )

    def _started_alike(self, config: ModelConfig, wanted: Eviction) -> bool:
        """Would the engine be started with the same arguments and environment?"""
        imaging = self._loop.executor.imaging
        ours = imaging.spec(config, ())
        theirs = imaging.spec(replace(config, eviction=wanted), ())
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

    async def restore(self, name: str, *, tell: Tell) -> dict[str, Any]:
        """The model serves, brought back from its image and not started cold."""
        loop = self._loop
        record = loop.state.models[name]
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
        with suppress(ValueError):
            # what the supervisor knows of images is of its start: this one may be newer
            loop.post(ImageKnown(name, parse_eviction(str(image.recipe.get("eviction")))))
        began = monotonic()
        cold = loop.executor.instance(record.config).cold_seconds
        reasons: list[str] = []
        async with followed(loop, name, tell):
            watching = asyncio.create_task(self._see_cold_start(name, reasons))
            try:
                await bring_up(loop, name)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            if reasons:
                raise LlmuxError(f"cannot restore {name}: {reasons[0]}; it was started cold")
            answer = await ask_canary(loop, name)
        instance = loop.executor.instance(record.config)
        return {
            "message": f"Model {name} serves, restored from {image.path}",
            "model": name,
            "restore_secs": round(monotonic() - began, 3),
            "cold_secs": round(instance.cold_seconds or cold, 3),
            "answer": answer.text,
            "unit": instance.handle.unit if instance.handle else None,
            "pid": instance.handle.pid if instance.handle else None,
            "address": str(instance.address),
            "path": image.path,
        }

    async def _see_cold_start(self, name: str, reasons: list[str]) -> None:
        """A restore that fails goes on as a cold start, which is right for clients only."""

        def starting(state: State) -> bool:
            record = state.models.get(name)
            return record is not None and isinstance(record.phase, Starting)

        state = await self._loop.wait_for(starting, 24 * 3600.0)
        phase = state.models[name].phase
        assert isinstance(phase, Starting)
        reasons.append(phase.reason or "its image was not used")

    # ---- listing --------------------------------------------------------------------------------

    async def listing(self) -> list[dict[str, Any]]:
        """Every image there is, and whether it could be restored now."""
        dumper = self._loop.executor.dumper
        records = self._loop.state.models
        rows: dict[str, dict[str, Any]] = {}
        for image in await dumper.images() if dumper is not None else ():
            rows[image.path] = _row(image, "the model is not configured")
        for record in records.values() if dumper is not None else ():
            own = [path for path, row in rows.items() if row["model"] == record.config.name]
            found = await self._find(record)
            if isinstance(found, Image):
                rows[found.path] = _row(found, "valid")
            for path in own:
                if isinstance(found, NoImage):
                    rows[path]["state"] = found.reason
            if isinstance(found, NoImage) and not own and (where := record.config.checkpoint_path):
                rows[where] = _nothing(record.config.name, where, found.reason)
        return sorted(rows.values(), key=lambda row: (row["model"], row["path"]))

    async def _find(self, record: ModelRecord) -> Image | NoImage:
        config = record.config
        gpus = record.gpus
        if not gpus:
            gpus = config.gpus if isinstance(config.gpus, tuple) else tuple(range(config.gpus))
        return await self._loop.executor.imaging.find(config, gpus)


async def ask_canary(loop: Loop, name: str) -> Canary:
    """One short inference by the engine itself."""
    executor = loop.executor
    instance = executor.instance(loop.state.models[name].config)
    instance.tell("inference")
    return await executor.ask_canary(instance, CANARY_SECS)


def _why_not(record: ModelRecord | None) -> str:
    match record.phase if record is not None else None:
        case None:
            return "it is not configured any more"
        case Parked(eviction=eviction):
            return f"it was parked by {eviction} meanwhile"
        case Stopped(reason=reason):
            return reason or "it was stopped instead"
        case Failed(message=message):
            return message
        case _:
            return "it is awake again: somebody asks for it"


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

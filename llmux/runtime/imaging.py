"""Checkpoint images as the executor uses them: when one is made, reused, restored, distrusted.

Never decides that a model is parked this way; that is in the plan. An image that failed is
quarantined here, since only here it is known that it was the image's fault.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from llmux.config.schema import Eviction, ModelConfig
from llmux.core.events import Event, ImageKnown
from llmux.core.plans import Plan, StepKind, reuse_plan
from llmux.errors import CheckpointFailed, LlmuxError, Unsupported
from llmux.ports import Dumper, DumpPhase, DumpSpec, Image, LaunchSpec, NoImage, UnitHandle
from llmux.runtime.drivers import Drivers
from llmux.runtime.instance import Instance
from llmux.runtime.launch import engine_address, launch_spec
from llmux.runtime.words import address_from, canary_from, parse_eviction

log = logging.getLogger("llmux")

Take = Callable[[Image, LaunchSpec], Awaitable[UnitHandle | None]]

# A CRIU that hangs must not keep the GPU for as long as the largest engine's dump may take: the
# deadline grows with the size. Measured 0.3 to 1 GB/s; a slow shared disk writes 50 MB/s.
LEAST_SECS = 60.0
SLOWEST_BYTES_PER_SEC = 50e6


def patience(deadline: float, size: int) -> float:
    """Seconds for a dump or a restore of ``size`` bytes, at most ``deadline``."""
    return min(deadline, LEAST_SECS + size / SLOWEST_BYTES_PER_SEC)


def _tell_restored(instance: Instance, _phase: DumpPhase, done: int, total: int) -> None:
    instance.tell(StepKind.RESTORE, done, total)


class Imaging:
    """``post`` tells the core what images there are."""

    def __init__(self, drivers: Drivers, post: Callable[[Event], None]) -> None:
        self._drivers = drivers
        self._post = post
        self._reading: dict[str, asyncio.Task[None]] = {}

    @property
    def _dumper(self) -> Dumper:
        if self._drivers.dumper is None:
            raise Unsupported("checkpoint", "engines", "they are not in systemd scopes here")
        return self._drivers.dumper

    def spec(self, config: ModelConfig, gpus: tuple[int, ...]) -> LaunchSpec:
        address = engine_address(config, self._drivers.places)
        return launch_spec(config, address, gpus, self._drivers)

    def identity(self, config: ModelConfig, gpus: tuple[int, ...]) -> Mapping[str, str]:
        """What an image of this engine would be made for, as configured now."""
        return self._drivers.identity(config, self.spec(config, gpus))

    async def find(self, config: ModelConfig, gpus: tuple[int, ...]) -> Image | NoImage:
        identity = await asyncio.to_thread(self.identity, config, gpus)
        return await self._dumper.find(config.name, identity, config.checkpoint_path)

    # ---- parking --------------------------------------------------------------------------------

    async def shorten(self, plan: Plan, instance: Instance) -> Plan:
        """The plan, or a shorter one when an image of just this engine is on disk already."""
        eviction = plan.eviction
        dumps = any(step.kind is StepKind.DUMP for step in plan.steps)
        if not dumps or eviction is None or not self._drivers.keep_images:
            return plan
        config = instance.config
        found = await self._dumper.find(config.name, instance.identity, config.checkpoint_path)
        if isinstance(found, NoImage) or found.recipe.get("eviction") != str(eviction):
            return plan
        log.info("%s: its image is reused", config.name, extra={"model": config.name})
        self._post(ImageKnown(config.name, eviction))
        return reuse_plan(config, eviction)

    async def dump(self, instance: Instance, eviction: Eviction, deadline: float) -> None:
        handle, config = instance.handle, instance.config
        if handle is None:
            raise CheckpointFailed("checkpoint", f'model "{config.name}"', "it has no engine")
        spec = DumpSpec(
            launch=self.spec(config, instance.gpus),
            identity=instance.identity,
            recipe=self._recipe(instance, eviction),
            cold_seconds=instance.cold_seconds,
        )
        size = await self._dumper.precheck(handle)
        limit = patience(deadline, size)
        image = await self._dumper.dump(handle, spec, limit, instance.tell)
        self._drivers.units.unwatch(handle)
        self._drivers.output.detach(config.name)
        instance.handle = None
        log.info(
            "%s: image of %.2f GiB (%.2f GiB on disk) made in %.1f s",
            config.name,
            image.apparent_bytes / 2**30,
            image.disk_bytes / 2**30,
            image.dump_seconds,
            extra={"model": config.name, "duration_ms": round(image.dump_seconds * 1000)},
        )
        self._post(ImageKnown(config.name, eviction))

    @staticmethod
    def _recipe(instance: Instance, eviction: Eviction) -> dict[str, Any]:
        address, canary = instance.address, instance.canary
        return {
            "eviction": str(eviction),
            "uds": address.uds if address else None,
            "port": address.port if address else None,
            "canary": [canary.text, list(canary.logprobs)] if canary else None,
            "cuda_pids": list(instance.cuda_pids),
            "max_model_len": instance.max_model_len,
            "version": instance.version,
            "cold_seconds": instance.cold_seconds,
            "gpus": list(instance.gpus),
        }

    # ---- waking ---------------------------------------------------------------------------------

    def read_ahead(self, config: ModelConfig, gpus: tuple[int, ...]) -> None:
        """Begin to read the image; a restore takes over what was read and verified."""
        if config.name not in self._reading and self._drivers.dumper is not None:
            task = asyncio.create_task(self._read(config, gpus))
            self._reading[config.name] = task
            task.add_done_callback(lambda _: self._reading.pop(config.name, None))

    async def _read(self, config: ModelConfig, gpus: tuple[int, ...]) -> None:
        # a damaged image is met again, and dealt with, by the restore
        with suppress(LlmuxError, OSError):
            found = await self.find(config, gpus)
            if isinstance(found, Image):
                await self._dumper.read_ahead(found)

    async def restore(
        self, instance: Instance, gpus: tuple[int, ...], deadline: float, take: Take
    ) -> Image:
        """The instance lives again as it was dumped; still asleep, if it was. ``take`` gives the
        engine when it was restored ahead."""
        config = instance.config
        found = await self.find(config, gpus)
        if isinstance(found, NoImage):
            self._post(ImageKnown(config.name, None))
            raise CheckpointFailed("restore", f'model "{config.name}"', found.reason)
        log.info("Restoring %s from checkpoint", config.name, extra={"model": config.name})
        instance.forget()
        self._drivers.output.paths(config.name)
        spec = self.spec(config, gpus)
        instance.handle = await take(found, spec)
        if instance.handle is None:
            try:
                limit = patience(deadline, found.apparent_bytes)
                instance.handle = await self._dumper.restore(
                    found, spec, limit, progress=partial(_tell_restored, instance)
                )
            except CheckpointFailed as error:
                await self.blamed(found, error)
                raise
        self._remember(instance, found)
        await self._dumper.settle(config.name)
        log.info("criu restore: success", extra={"model": config.name})
        return found

    def _remember(self, instance: Instance, image: Image) -> None:
        recipe = image.recipe
        instance.address = address_from(recipe) or engine_address(
            instance.config, self._drivers.places
        )
        instance.canary = canary_from(recipe)
        instance.cuda_pids = tuple(int(pid) for pid in recipe.get("cuda_pids") or ())
        instance.max_model_len = recipe.get("max_model_len")
        instance.version = recipe.get("version")
        instance.cold_seconds = float(recipe.get("cold_seconds") or instance.cold_seconds)
        instance.identity = image.identity

    async def served(self, image: Image) -> None:
        """The engine that came from ``image`` was verified: the image may go, if so configured."""
        if not self._drivers.keep_images and image.managed:
            await self._dumper.discard(image.model)
            self._post(ImageKnown(image.model, None))

    async def blamed(self, image: Image | None, error: CheckpointFailed) -> bool:
        """Was the image at fault? Then it is not used again."""
        if image is None or error.fields.get("blame") != "image":
            return False
        await self.distrust(image, str(error))
        return True

    async def distrust(self, image: Image, reason: str) -> None:
        """Never again from this image."""
        self._post(ImageKnown(image.model, None))
        where = await self._dumper.quarantine(image, reason)
        log.warning(
            "image of %s quarantined in %s: %s",
            image.model,
            where,
            reason,
            extra={"model": image.model, "reason": reason},
        )

    # ---- at start -------------------------------------------------------------------------------

    async def known(self, configs: Mapping[str, ModelConfig]) -> dict[str, Eviction]:
        """Models that can be restored from an image on disk, and how each was parked."""
        images: dict[str, Eviction] = {}
        if self._drivers.dumper is None:
            return images
        for config in configs.values():
            gpus = config.gpus if isinstance(config.gpus, tuple) else tuple(range(config.gpus))
            try:
                found = await self.find(config, gpus)
            except (LlmuxError, OSError) as error:
                log.warning("cannot look for an image of %s: %s", config.name, error)
                continue
            if isinstance(found, Image):
                with suppress(ValueError):
                    images[config.name] = parse_eviction(str(found.recipe.get("eviction")))
            elif found.reason:
                log.info("%s: %s", config.name, found.reason, extra={"model": config.name})
        return images

    async def recover(self) -> None:
        """End what a former supervisor was dumping or restoring when it ended."""
        if self._drivers.dumper is None:
            return
        interrupted = {found.unit: found for found in await self._dumper.recover()}
        for handle in await self._drivers.units.observe():
            if handle.unit in interrupted:
                log.warning(
                    "%s: its %s was interrupted: engine ended",
                    handle.model,
                    interrupted[handle.unit].operation,
                    extra={"model": handle.model},
                )
                await self._drivers.units.kill(handle, 15.0)
        for found in interrupted.values():
            await self._dumper.remove_shm(found.shm)
            if found.operation == "restore":
                await self._dumper.settle(found.model)

"""Checkpoint images as the executor uses them: made, reused, restored, quarantined.

Never decides that a model is parked by an image; that is in the plan. Quarantines an image that
failed, since only this module knows that the image was at fault.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from llmux.config.schema import Eviction, ModelConfig
from llmux.core.effects import ReadAhead, ReadWeights
from llmux.core.events import Event, ImageKnown
from llmux.core.plans import Plan, StepKind, reuse_plan
from llmux.errors import Blame, CheckpointFailed, LlmuxError, Unsupported
from llmux.image_ports import NONE_MADE, Checkpointer, DumpPhase, DumpSpec, Image, NoImage
from llmux.ports import LaunchSpec, UnitHandle, WeightReader
from llmux.runtime.engines.facts import Recipe, eviction_of
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.launch import engine_address, launch_spec
from llmux.runtime.host import Drivers
from llmux.typed_json import BadJson

log = logging.getLogger("llmux")

# The engine that was restored ahead from just this image; None: there is none.
TakeOver = Callable[[Image, LaunchSpec], Awaitable[UnitHandle | None]]

# A CRIU that hangs must not keep the GPU for as long as the largest engine's dump may take: the
# deadline grows with the size. Measured 0.3 to 1 GB/s; a slow shared disk writes 50 MB/s.
LEAST_SECS = 60.0
SLOWEST_BYTES_PER_SEC = 50e6


def patience(deadline: float, size: int) -> float:
    """Seconds for a dump or a restore of ``size`` bytes, at most ``deadline``."""
    return min(deadline, LEAST_SECS + size / SLOWEST_BYTES_PER_SEC)


def _report_restored(instance: Instance, _phase: DumpPhase, done: int, total: int) -> None:
    instance.report(StepKind.RESTORE, done, total)


class ImageLifecycle:
    """``post`` reports to the core which images exist; ``quarantined`` hears of models whose image
    was not to be trusted."""

    def __init__(
        self,
        drivers: Drivers,
        post: Callable[[Event], None],
        quarantined: Callable[[str], None],
    ) -> None:
        self._drivers = drivers
        self._post = post
        self._quarantined = quarantined
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._weights: dict[str, asyncio.Task[None]] = {}  # of weights, by model
        self._readers: set[asyncio.Task[None]] = set()  # those that are ending, too
        self._why_cold: dict[str, str] = {}  # what became of the last image of a model

    @property
    def _checkpointer(self) -> Checkpointer:
        if self._drivers.checkpointer is None:
            raise Unsupported("checkpoint", "engines", "they are not in systemd scopes here")
        return self._drivers.checkpointer

    def spec(self, config: ModelConfig, gpus: tuple[int, ...]) -> LaunchSpec:
        address = engine_address(config, self._drivers.places)
        return launch_spec(config, address, gpus, self._drivers)

    def identity(self, config: ModelConfig, gpus: tuple[int, ...]) -> Mapping[str, str]:
        """The identity that an image of this engine must have, as configured now."""
        return self._drivers.identity(config, self.spec(config, gpus))

    async def find(self, config: ModelConfig, gpus: tuple[int, ...]) -> Image | NoImage:
        identity = await asyncio.to_thread(self.identity, config, gpus)
        found = await self._checkpointer.find(config.name, identity, config.checkpoint_path)
        if isinstance(found, NoImage):
            if found.reason != NONE_MADE:
                self._why_cold[config.name] = found.reason
        else:
            self._why_cold.pop(config.name, None)
        return found

    def why_cold(self, config: ModelConfig) -> str:
        """Why a start restores no image."""
        if config.checkpoint_path is None and not config.makes_images:
            return f"it is parked by {config.eviction}, which makes no image"
        return self._why_cold.get(config.name, NONE_MADE)

    # ---- parking --------------------------------------------------------------------------------

    async def shorten(self, plan: Plan, instance: Instance) -> Plan:
        """Return ``plan``, or a shorter one when an image of this engine is on disk already."""
        eviction = plan.eviction
        if not plan.dumps or eviction is None or not self._drivers.keep_images:
            return plan
        config = instance.config
        found = await self._checkpointer.find(
            config.name, instance.facts.identity, config.checkpoint_path
        )
        if isinstance(found, NoImage) or eviction_of(found.recipe) != eviction:
            return plan
        log.info("%s: its image is reused", config.name, extra={"model": config.name})
        self._post(ImageKnown(config.name, eviction, found.disk_bytes))
        return reuse_plan(config, eviction)

    async def dump(self, instance: Instance, eviction: Eviction, deadline: float) -> None:
        handle, config = instance.handle, instance.config
        if handle is None:
            raise CheckpointFailed("checkpoint", f'model "{config.name}"', "it has no engine")
        spec = DumpSpec(
            launch=self.spec(config, instance.facts.gpus),
            identity=instance.facts.identity,
            recipe=Recipe(eviction, instance.facts).to_json(),
            cold_seconds=instance.facts.cold_seconds,
        )
        size = await self._checkpointer.precheck(handle)
        limit = patience(deadline, size)
        try:
            image = await self._checkpointer.dump(handle, spec, limit, instance.report)
        finally:
            for model in self._checkpointer.take_removed():
                self._post(ImageKnown(model, None))
                self._why_cold[model] = "its image was removed to make room for another"
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
        self._why_cold.pop(config.name, None)
        self._post(ImageKnown(config.name, eviction, image.disk_bytes))

    # ---- waking ---------------------------------------------------------------------------------

    def read_ahead(self, effect: ReadAhead) -> None:
        """Begin to read the image; a restore takes over what was read and verified."""
        name = effect.model
        if name not in self._reading and self._drivers.checkpointer is not None:
            task = asyncio.create_task(self._read(effect.config, effect.gpus))
            self._reading[name] = task
            task.add_done_callback(lambda _: self._reading.pop(name, None))

    def read_weights(self, effect: ReadWeights) -> None:
        """Begin to read them, until ``end_reading``."""
        self.end_reading(effect.model)
        if self._drivers.weights is not None:
            work = self._read_weights(self._drivers.weights, effect.config, effect.gpus)
            task = self._weights[effect.model] = asyncio.create_task(work)
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    def end_reading(self, model: str) -> None:
        if (task := self._weights.pop(model, None)) is not None:
            task.cancel()

    async def close(self) -> None:
        for model in list(self._weights):
            self.end_reading(model)
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read_weights(
        self, reader: WeightReader, config: ModelConfig, gpus: tuple[int, ...]
    ) -> None:
        with suppress(LlmuxError, OSError):  # the start meets it again, and says it
            spec = await asyncio.to_thread(self.spec, config, gpus)
            await reader.read(config.name, config.model_path, spec.env, spec.user)

    async def _read(self, config: ModelConfig, gpus: tuple[int, ...]) -> None:
        # the restore meets a damaged image again and quarantines it
        with suppress(LlmuxError, OSError):
            found = await self.find(config, gpus)
            if isinstance(found, Image):
                await self._checkpointer.read_ahead(found)

    async def restore(
        self, instance: Instance, gpus: tuple[int, ...], deadline: float, take_over: TakeOver
    ) -> Image:
        """The instance runs again as it was dumped; still asleep, if it was."""
        config = instance.config
        found = await self.find(config, gpus)
        if isinstance(found, NoImage):
            self._post(ImageKnown(config.name, None))
            raise CheckpointFailed("restore", f'model "{config.name}"', found.reason)
        try:
            recipe = Recipe.from_json(found.recipe)
        except BadJson as error:
            await self.distrust(found, f"its recipe is damaged: {error}")
            raise CheckpointFailed(
                "restore", f'model "{config.name}"', str(error), blame=Blame.IMAGE
            ) from error
        log.info("Restoring %s from checkpoint", config.name, extra={"model": config.name})
        instance.forget()
        self._drivers.output.paths(config.name)
        spec = self.spec(config, gpus)
        instance.handle = await take_over(found, spec)
        if instance.handle is None:
            try:
                limit = patience(deadline, found.apparent_bytes)
                instance.handle = await self._checkpointer.restore(
                    found, spec, limit, progress=partial(_report_restored, instance)
                )
            except CheckpointFailed as error:
                await self.blamed(found, error)
                raise
        address = recipe.facts.address or engine_address(config, self._drivers.places)
        instance.facts = replace(
            recipe.facts, address=address, identity=found.identity, gpus=gpus or recipe.facts.gpus
        )
        await self._checkpointer.confirm_restore(config.name)
        log.info("criu restore: success", extra={"model": config.name})
        return found

    async def served(self, image: Image) -> None:
        """The engine restored from ``image`` was verified: remove the image, if so configured."""
        if not self._drivers.keep_images and image.managed:
            await self._checkpointer.discard(image.model)
            self._post(ImageKnown(image.model, None))

    async def blamed(self, image: Image | None, error: CheckpointFailed) -> bool:
        """Return whether the image was at fault; if so, quarantine it."""
        if image is None or error.blame is not Blame.IMAGE:
            return False
        await self.distrust(image, str(error))
        return True

    async def distrust(self, image: Image, reason: str) -> None:
        """Quarantine the image."""
        self._post(ImageKnown(image.model, None))
        self._why_cold[image.model] = f"its image failed: {reason}"
        where = await self._checkpointer.quarantine(image, reason)
        self._quarantined(image.model)
        log.warning(
            "image of %s quarantined in %s: %s",
            image.model,
            where,
            reason,
            extra={"model": image.model, "reason": reason},
        )

    # ---- at start -------------------------------------------------------------------------------

    async def known(self, configs: Mapping[str, ModelConfig]) -> list[ImageKnown]:
        """The images on disk that can be restored."""
        images: list[ImageKnown] = []
        if self._drivers.checkpointer is None:
            return images
        for config in configs.values():
            gpus = config.gpus if isinstance(config.gpus, tuple) else tuple(range(config.gpus))
            try:
                found = await self.find(config, gpus)
            except (LlmuxError, OSError) as error:
                log.warning("cannot look for an image of %s: %s", config.name, error)
                continue
            if isinstance(found, Image):
                if (eviction := eviction_of(found.recipe)) is not None:
                    images.append(ImageKnown(config.name, eviction, found.disk_bytes))
            elif found.reason:
                log.info("%s: %s", config.name, found.reason, extra={"model": config.name})
        return images

    async def recover(self) -> None:
        """End the engines that the former supervisor was dumping or restoring when it ended."""
        if self._drivers.checkpointer is None:
            return
        interrupted = {found.unit: found for found in await self._checkpointer.recover()}
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
            await self._checkpointer.remove_shm(found.model, found.shm)
            if found.operation == "restore":
                await self._checkpointer.confirm_restore(found.model)

"""Engines restored ahead: the part of a restore that needs no GPU, while room is being made.

Owner of each such engine from the order until a wake takes it over or it is dropped. It has no GPU
memory (its CUDA state comes back in a later step of the wake) and no client; a supervisor that
dies leaves the checkpointer's note, by which the next one ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from llmux.core.effects import RestoreAhead
from llmux.core.plans import KILL_SECS
from llmux.errors import CheckpointFailed, DriverTimeout, LlmuxError
from llmux.image_ports import Image
from llmux.ports import LaunchSpec, UnitHandle
from llmux.runtime.engines.facts import Recipe
from llmux.runtime.engines.gpu_memory import held_by
from llmux.runtime.engines.images import ImageLifecycle, patience
from llmux.runtime.host import Drivers
from llmux.typed_json import BadJson

log = logging.getLogger("llmux")

# Left beside it and what the leaving models need: the dump's and the checksums' buffers, and the
# growth of everything else on the host for the seconds that it takes.
HEADROOM_BYTES = 1 << 30
END_SECS = 2 * KILL_SECS  # for a restore under way to undo itself, or a kill
BACKSTOP_SECS = 2.0  # a driver keeps the deadline itself; this much later it is taken to hang


@dataclass(slots=True, eq=False)
class _Engine:
    """One order. ``handle`` is set once it lives; ``shm``: its names in /dev/shm."""

    order: RestoreAhead
    task: asyncio.Task[UnitHandle | None] | None = None
    timer: asyncio.TimerHandle | None = None
    image: Image | None = None
    spec: LaunchSpec | None = None
    handle: UnitHandle | None = None
    shm: set[str] = field(default_factory=set)

    def is_of(self, image: Image, spec: LaunchSpec) -> bool:
        mine = self.image
        return (
            mine is not None
            and (mine.path, mine.created) == (image.path, image.created)
            and self.spec == spec
        )


def _suspends(image: Image) -> bool:
    """Whether the engine in the image has its CUDA state in host memory."""
    try:
        return bool(Recipe.from_json(image.recipe).facts.cuda_pids)
    except BadJson:
        return False  # the wake's own restore reports it


async def _result(task: asyncio.Task[UnitHandle | None]) -> UnitHandle | None:
    """None when another task cancelled it; cancelled with this one."""
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        raise
    return None if task.cancelled() else task.result()


class AheadRestorer:
    """At most one engine per model."""

    def __init__(self, drivers: Drivers, images: ImageLifecycle) -> None:
        self._drivers = drivers
        self._images = images
        self._engines: dict[str, _Engine] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._left: dict[str, _Engine] = {}  # not seen gone yet

    # ---- begin ----------------------------------------------------------------------------------

    def begin(self, order: RestoreAhead, leaving: Sequence[UnitHandle]) -> None:
        """``leaving``: units whose GPU memory goes into host memory meanwhile."""
        if self._drivers.checkpointer is None or order.model in self._engines:
            return
        engine = self._engines[order.model] = _Engine(order)
        loop = asyncio.get_running_loop()
        engine.timer = loop.call_later(order.deadline, self._expire, engine)
        engine.task = asyncio.create_task(self._prepare(engine, leaving))
        # retrieve the exception so asyncio does not log it
        engine.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _prepare(self, engine: _Engine, leaving: Sequence[UnitHandle]) -> UnitHandle | None:
        """The engine; None when the wake has to restore it. CheckpointFailed when it cannot."""
        name = engine.order.model
        try:
            await self._gone(name)  # a former one
            return await self._restore(engine, leaving)
        except (LlmuxError, OSError) as error:
            log.info("%s is not restored ahead: %s", name, error, extra={"model": name})
            if isinstance(error, CheckpointFailed) and await self._images.blamed(
                engine.image, error
            ):
                raise
            return None
        finally:
            if engine.handle is None:
                self._forget(engine)

    async def _restore(self, engine: _Engine, leaving: Sequence[UnitHandle]) -> UnitHandle | None:
        order, drivers = engine.order, self._drivers
        found = await self._images.find(order.config, order.gpus)
        # without suspended CUDA state CRIU, or the engine itself, would take GPU memory at once
        if not isinstance(found, Image) or not _suspends(found):
            return None
        assert drivers.checkpointer is not None
        began = monotonic()
        engine.spec = self._images.spec(order.config, order.gpus)
        engine.image = found
        drivers.output.paths(order.model)
        limit = patience(order.config.checkpoint_timeout_secs, found.apparent_bytes)
        leaving_bytes = sum((await held_by(drivers, *leaving)).values())
        reserve = HEADROOM_BYTES + leaving_bytes + self._promised(engine)
        try:
            async with asyncio.timeout(limit + BACKSTOP_SECS):
                handle = await drivers.checkpointer.restore(found, engine.spec, limit, reserve)
        except TimeoutError:
            message = f"not done after {limit:g} s"
            raise DriverTimeout("restore", f'model "{order.model}"', message) from None
        engine.handle = handle  # from here on it is ours to end
        drivers.output.attach(handle)
        drivers.units.watch(handle, self._died)
        seconds = monotonic() - began
        log.info(
            "%s: restored ahead in %.3f s (GPU memory follows)",
            order.model,
            seconds,
            extra={"model": order.model, "duration_ms": round(seconds * 1000)},
        )
        with suppress(LlmuxError, OSError):  # now: after its death they cannot be seen
            engine.shm.update(await drivers.checkpointer.shm_names(handle))
        return handle

    def _promised(self, engine: _Engine) -> int:
        """Memory that other engines are about to take: MemAvailable does not show it yet."""
        return sum(
            other.image.apparent_bytes
            for other in self._engines.values()
            if other is not engine and other.handle is None and other.image is not None
        )

    # ---- take over ------------------------------------------------------------------------------

    async def take(self, image: Image, spec: LaunchSpec) -> UnitHandle | None:
        """The engine restored from just this, the caller's from now on; waited for when it is
        under way, and cancelled with the caller. None: there is none, and nothing is left of any.
        Raises CheckpointFailed when the image was found to be bad."""
        engine = self._engines.get(image.model)
        if engine is not None and engine.task is not None:
            self._disarm(engine)
            handle = await _result(engine.task)
            if handle is not None and engine.is_of(image, spec) and self._forget(engine):
                self._drivers.units.unwatch(handle)
                return handle
        await self.dropped(image.model)
        return None

    # ---- drop -----------------------------------------------------------------------------------

    def drop(self, model: str) -> None:
        """Begin to end what was restored ahead, if anything was."""
        engine = self._engines.get(model)
        if engine is None or not self._forget(engine):
            return
        ending = asyncio.create_task(self._end(engine, self._ending.get(model)))
        self._ending[model] = ending
        ending.add_done_callback(
            lambda task: self._ending.pop(model) if self._ending.get(model) is task else None
        )

    async def dropped(self, model: str) -> None:
        """Return once the engine restored ahead is gone. Raises DriverError when that cannot be
        seen."""
        self.drop(model)
        await self._gone(model)

    async def close(self) -> None:
        """End all: the next supervisor adopts none, since their restore is not confirmed."""
        for model in list(self._engines):
            self.drop(model)
        if self._ending:
            await asyncio.wait(self._ending.values(), timeout=END_SECS)

    async def _gone(self, model: str) -> None:
        if (ending := self._ending.get(model)) is not None:
            await asyncio.wait([ending], timeout=END_SECS)
            if not ending.done():
                raise DriverTimeout(
                    "end",
                    f'model "{model}", restored ahead',
                    f"not done after {END_SECS:g} s",
                    hint="is the disk of its image stuck?",
                )
        if model in self._left:
            await self._kill(self._left[model])

    async def _end(self, engine: _Engine, former: asyncio.Task[None] | None) -> None:
        name = engine.order.model
        assert engine.task is not None
        engine.task.cancel()
        await asyncio.wait([engine.task, former] if former else [engine.task])
        if engine.handle is not None:  # else the restore, if it had begun, has undone itself
            self._left[name] = engine
            try:
                await self._kill(engine)
            except (LlmuxError, OSError) as error:
                log.error("cannot end %s, restored ahead: %s", name, error, extra={"model": name})
                return
        if engine.image is not None:
            log.info("%s: what was restored ahead is dropped", name, extra={"model": name})

    async def _kill(self, engine: _Engine) -> None:
        drivers, handle = self._drivers, engine.handle
        assert drivers.checkpointer is not None
        assert handle is not None
        drivers.units.unwatch(handle)
        engine.shm.update(await drivers.checkpointer.shm_names(handle))
        await drivers.units.kill(handle, KILL_SECS)
        await drivers.checkpointer.remove_shm(handle.model, tuple(sorted(engine.shm)))
        await drivers.checkpointer.confirm_restore(handle.model)
        drivers.output.detach(handle.model)
        self._left.pop(handle.model, None)

    # ---- small things ---------------------------------------------------------------------------

    def _forget(self, engine: _Engine) -> bool:
        """False when it was not ours any more: being dropped, or dead."""
        self._disarm(engine)
        if self._engines.get(engine.order.model) is not engine:
            return False
        del self._engines[engine.order.model]
        return True

    @staticmethod
    def _disarm(engine: _Engine) -> None:
        if engine.timer is not None:
            engine.timer.cancel()
            engine.timer = None

    def _expire(self, engine: _Engine) -> None:
        name = engine.order.model
        log.info(
            "%s, restored ahead, was not taken over in %g s",
            name,
            engine.order.deadline,
            extra={"model": name},
        )
        self.drop(name)

    def _died(self, handle: UnitHandle, description: str) -> None:
        engine = self._engines.get(handle.model)
        if engine is not None and engine.handle == handle:
            log.warning(
                "%s ended while it waited for its GPU, restored ahead: %s",
                handle.model,
                description,
                extra={"model": handle.model, "reason": description},
            )
            self.drop(handle.model)

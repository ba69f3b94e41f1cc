"""A supervisor's verbs on the twins, some of whose drivers may be missing or do otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from runtime_harness import Life, begin_life, config_of, model

from llmux.config.schema import Config
from llmux.errors import CheckpointFailed, Refused, TreeState
from llmux.protocol import Ask
from llmux.runtime.control.verbs import Verbs
from llmux.runtime.host import Drivers
from tests.twins.disk import MemoryStore
from tests.twins.world import World


class Desk:
    def __init__(self, life: Life, world: World, drivers: Drivers) -> None:
        self.life, self.world = life, world
        self.verbs = Verbs(life.loop, life.executor, life.images, drivers, self._reload)

    async def _reload(self, **args: Any) -> dict[str, Any]:
        return args

    async def ask(self, verb: str, **args: Any) -> Any:
        return await self.verbs.answer(Ask(1, verb, args))

    async def refusal(self, verb: str, **args: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            await self.ask(verb, **args)
        return caught.value

    def fail_dump_unharmed(self, name: str) -> None:
        error = CheckpointFailed("dump", name, "the disk is full", tree=TreeState.RUNNING)
        self.world.fail("checkpointer.dump", error)

    def vanish_after_dump(self, name: str) -> None:
        """The image is gone when it is looked for after the dump."""
        find = self.life.images.find

        async def found(*args: Any) -> Any:
            self.world.images.pop(name, None)
            return await find(*args)

        self.life.images.find = found  # type: ignore[assignment,method-assign]


@asynccontextmanager
async def desk(config: Config | None = None, **drivers: Any) -> AsyncIterator[Desk]:
    """``drivers`` replace the twins of these names where the verbs use them."""
    world = World()
    with tempfile.TemporaryDirectory() as runtime:
        config = config or config_of(model("a"), model("b"))
        life = await begin_life(config, world, runtime, MemoryStore())
        try:
            yield Desk(life, world, replace(life.drivers, **drivers))
        finally:
            await life.drop()

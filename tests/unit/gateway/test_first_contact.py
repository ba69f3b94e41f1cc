"""A gateway is ready when the supervisor is there or does not come; a stop ends the wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from llmux.gateway.link import Link
from llmux.gateway.server import _first_contact


@pytest.mark.parametrize("which", ["here", "stop", "timeout"])
def test_one_of_them_is_enough(which: str) -> None:
    async def body() -> None:
        link = SimpleNamespace(here=asyncio.Event())
        stop = asyncio.Event()
        waiting = asyncio.create_task(
            _first_contact(cast(Link, link), stop, 0.01 if which == "timeout" else 3600.0)
        )
        await asyncio.sleep(0)
        {"here": link.here, "stop": stop, "timeout": asyncio.Event()}[which].set()
        await asyncio.wait_for(waiting, 60)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing goes on waiting"

    asyncio.run(body())

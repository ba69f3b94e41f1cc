"""What a dump and a restore share: where CRIU and its surroundings are, how a failure is built."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from llmux.errors import Blame, CheckpointFailed, TreeState

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths on this host. ``libdir``: the directory of CRIU's plugins, empty unless configured."""

    criu: str
    version: str
    libdir: str
    proc: str
    shm: str
    cgroup_root: str


async def finish_despite_cancellation(work: Coroutine[Any, Any, T]) -> T:
    """Let ``work`` finish even when the caller is cancelled; then the cancellation is raised."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)
        raise


def failed(
    operation: str,
    model: str,
    message: str,
    hint: str | None,
    *,
    tree: TreeState = TreeState.GONE,
    blame: Blame = Blame.HOST,
) -> CheckpointFailed:
    return CheckpointFailed(
        operation, f'model "{model}"', message, hint=hint, tree=tree, blame=blame
    )

"""What a dump and a restore share: where CRIU and its surroundings are, how a failure is built."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from llmux.drivers.criu.held_names import HeldNames
from llmux.errors import Blame, CheckpointFailed, TreeState

log = logging.getLogger(__name__)

T = TypeVar("T")

_END_TIMEOUT: Final = 5.0  # seconds from SIGKILL to the end of a CRIU that writes to a slow disk


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths on this host. ``libdir``: the directory of CRIU's plugins, empty unless configured."""

    criu: str
    version: str
    libdir: str
    proc: str
    shm: str
    held: HeldNames
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


def end_dump(path: str, proc: str) -> None:
    """Kill a CRIU that still dumps into ``path``: its supervisor is gone, the image is lost."""
    for name in filter(str.isdigit, os.listdir(proc)):
        with suppress(OSError):
            with open(f"{proc}/{name}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
            if os.fsencode(path) not in arguments or b"dump" not in arguments:
                continue
            pidfd = os.pidfd_open(int(name))
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _END_TIMEOUT)
            finally:
                os.close(pidfd)


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

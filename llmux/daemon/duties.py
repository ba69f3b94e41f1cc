"""What goes on beside the supervisor's loop: signals, reload, readiness, warm-up; its users."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from llmux.config.advice import WITHOUT_KEYS
from llmux.config.load import MarkedConfig
from llmux.daemon.process import on_hangup
from llmux.daemon.supervisor import Supervisor
from llmux.errors import LlmuxError
from llmux.ports import Notifier
from llmux.runtime.control.warmup import warm_up
from llmux.runtime.watchdog import announce_ready

log = logging.getLogger("llmux")


class Notes:
    """What is valid and may not be meant: each note is logged once until it changes."""

    def __init__(self) -> None:
        self._said: frozenset[tuple[str, ...]] = frozenset()

    def say(self, marked: MarkedConfig) -> None:
        # A line that only moved says nothing new.
        notes: dict[tuple[str, ...], str] = {
            (note.file, note.path, note.message): str(note) for note in marked.notes
        }
        if marked.config.gateway.keys_file is None:
            notes[(WITHOUT_KEYS,)] = WITHOUT_KEYS
        for key, text in notes.items():
            if key not in self._said:  # as installed there are no keys, and nobody else comes in
                log.log(logging.INFO if text is WITHOUT_KEYS else logging.WARNING, "%s", text)
        self._said = frozenset(notes)


def stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def until(stop: asyncio.Event, *works: Coroutine[Any, Any, None]) -> None:
    """Run the works until ``stop``. A work that ends earlier is an error and ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)


async def announce(supervisor: Supervisor, notifier: Notifier, stop: asyncio.Event) -> None:
    await announce_ready(supervisor.loop, notifier)
    await warm(supervisor, stop)


async def warm(supervisor: Supervisor, stop: asyncio.Event) -> None:
    if supervisor.loop.state.config.warmup:
        await warm_up(supervisor.loop)
    await stop.wait()


def reload_on_hangup(
    supervisor: Supervisor, notifier: Notifier, also: Sequence[Callable[[], None]] = ()
) -> None:
    async def reload() -> None:
        notifier.reloading()
        for part in also:
            part()
        try:
            await supervisor.reload()
        except LlmuxError:
            notifier.status("configuration not reloaded: see the journal")
        finally:
            notifier.ready()

    on_hangup(reload)


def uids_of(user: str) -> frozenset[int]:
    try:
        return frozenset({pwd.getpwnam(user).pw_uid})
    except KeyError:
        log.warning("there is no user %s: only root may use the control socket", user)
        return frozenset()


def gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def environment() -> dict[str, str]:
    return dict(os.environ)

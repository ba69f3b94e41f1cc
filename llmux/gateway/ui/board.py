"""What all open pages of a worker see: fetched once, encoded once, sent to each.

While pages listen, the status is fetched once a second and what changed is broadcast, together with
the events of that second, as one frame. A page that was cut off names its last frame and gets those
after it, or everything when they are not kept any more. Nothing is fetched while no page listens.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import time
from typing import Any, Final

from llmux import __version__
from llmux.errors import Refused
from llmux.gateway.control.observation import events_after
from llmux.gateway.ui.rows import JSON, changed_rows, changes, head, row
from llmux.gateway.worker import Worker

logger = logging.getLogger(__name__)

REFRESH_SECS: Final = 1.0
ASK_SECS: Final = 10.0
KEEP_ALIVE_SECS: Final = 15.0  # below the idle timeouts of proxies
KEEP_SECS: Final = 3600.0  # of events, for the timeline
KEEP_EVENTS: Final = 10_000  # as many as the supervisor keeps
KEEP_FRAMES: Final = 120  # for pages that come back
MAX_UNREAD: Final = 1024 * 1024  # bytes

Frame = bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """An event, encoded once: an hour of them is asked for by all pages at once after a cut."""

    time: float
    id: int
    text: bytes


class Page:
    """An open page. ``ended`` is set when nothing more will be written."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self.ended = asyncio.Event()

    def write(self, chunk: bytes) -> None:
        """Without a task or a queue per page: 100 of them cost a system call each. A page that
        reads too slowly is cut off; it comes back and names its last frame."""
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._transport.abort()
        elif not self._transport.is_closing():
            self._transport.write(chunk)


class Board:
    def __init__(self, worker: Worker[Any]) -> None:
        self._worker = worker
        self._name = os.urandom(4).hex()  # frames of another worker are not ours to continue
        self._number = 0
        self._frames: deque[tuple[int, Frame]] = deque(maxlen=KEEP_FRAMES)
        self._head: JSON = {}
        self._rows: dict[str, JSON] = {}
        self._events: deque[Kept] = deque(maxlen=KEEP_EVENTS)
        self._unsent: list[JSON] = []
        self._loaded = (-1, 0)  # (the link's connects, last number) that the events go up to
        self._pages: set[Page] = set()
        self._written = 0.0  # when pages last got anything, by the loop's clock
        self._running: asyncio.Task[None] | None = None

    # ---- pages ----------------------------------------------------------------------------------

    async def attach(self, last: str, transport: asyncio.WriteTransport) -> Page:
        """Write the frames after ``last``, an id of ours or anything else, and all that follow. The
        head of the response is written already, and is chunked."""
        if self._running is None:
            await self._refresh()  # what is kept is of the time when a page was last open
        page = Page(transport)
        for missed in self._missed(last):
            page.write(_chunk(missed))
        self._pages.add(page)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
            self._running.add_done_callback(self._stopped)
        return page

    def detach(self, page: Page) -> None:
        self._pages.discard(page)

    def _missed(self, last: str) -> list[Frame]:
        board, _, number = last.partition(".")
        if board == self._name and number.isascii() and number.isdigit() and len(number) < 18:
            seen = int(number)
            first = self._frames[0][0] if self._frames else self._number + 1
            if first - 1 <= seen <= self._number:
                return [frame for at, frame in self._frames if at > seen] or [self._beat()]
        full = {"now": round(time(), 3), "full": True, "head": self._head, "models": self._rows}
        return [self._encode(full)]

    def _beat(self) -> Frame:
        """For a page that missed nothing: it is connected again."""
        return self._encode({"now": round(time(), 3)})

    def _encode(self, body: JSON) -> Frame:
        return b"id: %b.%d\ndata: %b\n\n" % (self._name.encode(), self._number, _json(body))

    # ---- the timeline ---------------------------------------------------------------------------

    async def history(self) -> bytes:
        """All events of the last hour, as JSON. Raises Refused."""
        if self._running is None:
            await self._load_events()
        events = b",".join(event.text for event in self._events)
        return b'{"now":%.3f,"events":[%b]}' % (time(), events)

    async def _load_events(self) -> None:
        """A supervisor that restarted numbers from 1: what was seen of the former one is kept."""
        connects, last = self._loaded
        if connects != self._worker.link.connects:
            last = 0
        connects = self._worker.link.connects
        fetched = await events_after(self._worker, last, queues=True)
        # Another call may have added some of them meanwhile.
        known = {(event.time, event.id) for event in self._events}
        self._add([event for event in fetched if (event["time"], event["id"]) not in known])
        last = fetched[-1]["id"] if fetched else last
        self._loaded = (connects, last)
        self._unsent = [event for event in self._unsent if event["id"] > last]

    def _add(self, events: list[JSON]) -> None:
        self._events.extend(Kept(event["time"], event["id"], _json(event)) for event in events)
        since = time() - KEEP_SECS
        while self._events and self._events[0].time < since:
            self._events.popleft()

    # ---- while pages listen ---------------------------------------------------------------------

    async def _run(self) -> None:
        worker = self._worker
        with worker.subscriptions.subscribe("timeline") as subscription:
            reading = asyncio.create_task(self._read(subscription.items))
            try:
                while self._pages and not reading.done():
                    if await self._refresh() and worker.link.connects != self._loaded[0]:
                        await self._reload_history()
                    if asyncio.get_running_loop().time() - self._written >= KEEP_ALIVE_SECS:
                        self._write(b": still here\n\n")
                    await asyncio.wait({reading}, timeout=REFRESH_SECS)
            finally:
                self._loaded = (-1, 0)  # events from here on are missed
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """No task feeds a page that is still open, one that came at the very end or all of them
        after an error: they end, and come back."""
        self._running = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("cannot tell the open pages the status: %r; they connect again", error,
                         exc_info=error)  # fmt: skip
        for page in self._pages:
            page.ended.set()

    async def _read(self, items: Callable[[float], AsyncIterator[Any]]) -> None:
        """Until the worker stops, or was too slow; the pages come back then."""
        async for event in items(KEEP_SECS):
            if event is not None and event["id"] > self._loaded[1]:
                self._loaded = (self._loaded[0], event["id"])
                self._unsent.append(event)
        for page in self._pages:
            page.ended.set()

    async def _reload_history(self) -> None:
        """After a (re)connect: pages that show the timeline fetch it once more."""
        self._unsent = []
        try:
            await self._load_events()
        except Refused as problem:
            logger.debug("cannot load the events: %s", problem)
        else:
            self._publish({"history": True})

    async def _refresh(self) -> bool:
        """Fetch the status and publish what changed. False when the supervisor does not answer."""
        worker = self._worker
        try:
            status = await worker.link.ask("status", {}, ASK_SECS)
        except Refused as problem:
            self._change(self._head | self._own() | {"supervisor": str(problem)}, self._rows)
            return False
        now = time()
        rows = {
            name: row(model, now, self._rows.get(name)) for name, model in status["models"].items()
        }
        top = head(status, now, self._head) | self._own() | {"supervisor": "up"}
        self._change(top, rows)
        return True

    def _own(self) -> JSON:
        """What the worker itself knows. ``may_order``: whether a page can give orders."""
        worker = self._worker
        return {
            "version": __version__,
            "host": socket.gethostname(),
            "worker": worker.name,
            "may_order": worker.guard is not None,
            "drain_timeout_secs": worker.config.policy.drain_timeout_secs,
        }

    def _change(self, top: JSON, rows: dict[str, JSON]) -> None:
        events, self._unsent = self._unsent, []
        self._add(events)
        body: JSON = {}
        if difference := changes(self._head, top):
            body["head"] = difference
        if models := changed_rows(self._rows, rows):
            body["models"] = models
        if events:
            body["events"] = events
        self._head, self._rows = top, rows
        if body:
            self._publish(body)

    def _publish(self, body: JSON) -> None:
        self._number += 1
        frame = self._encode({"now": round(time(), 3)} | body)
        self._frames.append((self._number, frame))
        self._write(frame)

    def _write(self, data: bytes) -> None:
        self._written = asyncio.get_running_loop().time()
        chunk = _chunk(data)
        for page in self._pages:
            page.write(chunk)


def _json(value: JSON) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)

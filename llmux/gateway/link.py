"""The worker's connection to the supervisor: hello, demand, grants, verbs. Reconnects forever.

The supervisor may disappear at any time (restart, upgrade, crash). Nothing is queued for it then:
epochs held and demand are sent again after every hello. Messages are handled in the order of their
arrival, each completely before the next.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from llmux.errors import ControlError, Reason, Refused
from llmux.gateway.http.problems import reason_of
from llmux.protocol import MAX_ANSWER, OF_CONNECTION, Answer, Ask, Demand, Hello, Message, decode

logger = logging.getLogger(__name__)

COALESCE_SECS = 0.005  # at most one demand per model in this time
PROGRESS_SECS = 1.0  # how often progress alone (no change of counts) is reported
ALIVE_SECS = 5.0  # how often the supervisor is asked for a sign of life
RECONNECT_FIRST_SECS = 0.02
RECONNECT_MAX_SECS = 1.0

LinkTarget = str | Path | socket.socket


class LinkDownError(Refused):
    """The supervisor is not connected."""

    def __init__(self, message: str) -> None:
        super().__init__(
            Reason.SUPERVISOR_UNREACHABLE, message, hint="systemctl status llmux", retry_after=1.0
        )


class _LineProtocol(asyncio.Protocol):
    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = bytearray()
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if b"\n" in data:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                self._on_line(line)
        if len(self._rest) > MAX_ANSWER:
            logger.error(
                "the supervisor sent a line of more than %d bytes; reconnecting", MAX_ANSWER
            )
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Link:
    """``run`` keeps it connected. ``attach`` sets the callbacks that produce its messages."""

    def __init__(self, target: LinkTarget, *, alive_secs: float = ALIVE_SECS) -> None:
        self._target = target
        self._alive_secs = alive_secs
        self._loop = asyncio.get_running_loop()
        self._protocol: _LineProtocol | None = None
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._dirty: dict[str, None] = {}
        self._flush_handle: asyncio.TimerHandle | None = None
        self._flushed_at = -COALESCE_SECS
        self._progress_sent: dict[str, int] = {}
        self.here = asyncio.Event()  # set while connected
        self.away = asyncio.Event()  # set while not connected
        self.away.set()
        self.connects = 0
        self._refusal: str | None = None  # of the connection; None once anything else was heard
        self._heard_at = self._loop.time()
        self._hello: Callable[[], Hello] = lambda: Hello(role="gateway")
        self._demand: Callable[[str], Demand] = Demand
        self._active: Callable[[], list[str]] = list
        self._on_message: Callable[[Message], None] = lambda _message: None
        self._greetings: Callable[[], Sequence[Message]] = tuple

    def attach(
        self,
        *,
        hello: Callable[[], Hello],
        demand: Callable[[str], Demand],
        active: Callable[[], list[str]],
        on_message: Callable[[Message], None],
        greetings: Callable[[], Sequence[Message]] = tuple,
    ) -> None:
        """``greetings`` are sent after every hello."""
        self._greetings = greetings
        self._hello, self._demand, self._active = hello, demand, active
        self._on_message = on_message

    @property
    def up(self) -> bool:
        return self._protocol is not None

    @property
    def silent_secs(self) -> float:
        """Since the last message of the supervisor, or since there is this link. One that lives
        answers every ``ALIVE_SECS``; a connection alone is kept by one that is stopped, too."""
        return self._loop.time() - self._heard_at

    # ---- staying connected ----------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and reconnect when lost. Returns only when a socket passed in is lost."""
        delay = RECONNECT_FIRST_SECS
        reported = False
        while True:
            began = self._loop.time()
            why = await self._connected()
            if isinstance(self._target, socket.socket):
                return
            if why is None:
                logger.warning("lost the supervisor; grants stay in use, reconnecting")
                reported = False
            elif not reported:
                logger.warning("%s; trying again", why)
                reported = True
            # One that is there and sends us away at once is not asked again without a pause.
            if why is None and self._loop.time() - began > RECONNECT_MAX_SECS:
                delay = RECONNECT_FIRST_SECS
                continue
            await asyncio.sleep(delay)
            delay = min(delay * 2, RECONNECT_MAX_SECS)

    async def _connected(self) -> str | None:
        """Returns when the connection is lost, or why there was none that could be used."""
        try:
            protocol = await self._connect()
        except OSError as error:
            return f"cannot reach the supervisor at {self._target}: {error.strerror or error}"
        await self._stay(protocol)
        if self._refusal is None:
            return None
        return f"cannot use the supervisor at {self._target}: {self._refusal}"

    async def _connect(self) -> _LineProtocol:
        def factory() -> _LineProtocol:
            return _LineProtocol(self._on_line)

        if isinstance(self._target, socket.socket):
            _, protocol = await self._loop.create_unix_connection(factory, sock=self._target)
        else:
            _, protocol = await self._loop.create_unix_connection(factory, str(self._target))
        self._refusal = "it ended the connection without a word"
        return protocol

    async def _stay(self, protocol: _LineProtocol) -> None:
        self._protocol = protocol
        self.here.set()
        self.away.clear()
        self.connects += 1
        own = [self._loop.create_task(work()) for work in (self._report_progress, self._sound)]
        try:
            for message in (self._hello(), *self._greetings()):
                self.send(message)
            self._dirty = dict.fromkeys(self._active())
            self._flush()
            await asyncio.shield(protocol.lost)
        finally:
            for task in own:
                task.cancel()
            self._protocol = None
            self.here.clear()
            self.away.set()
            protocol.close()
            asked, self._asked = self._asked, {}
            for future in asked.values():
                if not future.done():
                    future.set_exception(LinkDownError("the supervisor went away while asked"))

    async def gone_for(self, seconds: float) -> None:
        """Returns when the supervisor has been away for ``seconds`` without interruption."""
        while True:
            await self.away.wait()
            try:
                async with asyncio.timeout(seconds):
                    await self.here.wait()
            except TimeoutError:
                return

    # ---- from the supervisor --------------------------------------------------------------------

    def _on_line(self, line: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            message = decode(line)
        except ControlError as error:
            # A newer supervisor may send types unknown here; the other messages must still work.
            logger.warning("%s", error)
            return
        if isinstance(message, Answer) and message.id == OF_CONNECTION:
            self._refusal = message.message
            return
        self._refusal = None
        if isinstance(message, Answer):
            future = self._asked.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)
            return
        self._on_message(message)

    # ---- to the supervisor ----------------------------------------------------------------------

    def send(self, message: Message) -> bool:
        """Returns False when the supervisor is away: the message is dropped (see the module)."""
        protocol = self._protocol
        if protocol is None or protocol.transport is None or protocol.transport.is_closing():
            return False
        protocol.transport.write(message.encode())
        return True

    def demand_changed(self, model: str) -> None:
        """Report at once if nothing was reported lately, else together with other changes."""
        if model in self._dirty:
            return
        self._dirty[model] = None
        if self._flush_handle is not None:
            return
        due = self._flushed_at + COALESCE_SECS
        # Never synchronously: the caller may be in the middle of a change.
        self._flush_handle = self._loop.call_at(max(due, self._loop.time()), self._flush)

    def _flush(self) -> None:
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        dirty, self._dirty = self._dirty, {}
        self._flushed_at = self._loop.time()
        for model in dirty:
            demand = self._demand(model)
            self._progress_sent[model] = demand.progress
            self.send(demand)

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECS)
            for model in self._active():
                demand = self._demand(model)
                if demand.progress != self._progress_sent.get(model):
                    self.demand_changed(model)

    async def _sound(self) -> None:
        while True:
            await asyncio.sleep(self._alive_secs)
            self.send(Ask(next(self._ids), "alive"))  # any answer will do

    async def ask(self, verb: str, args: dict[str, Any], timeout: float) -> Any:
        """Returns a control verb's result. Raises Refused with the supervisor's reason and text."""
        number = next(self._ids)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._asked[number] = future
        try:
            if not self.send(Ask(number, verb, args)):
                raise LinkDownError(f"cannot ask the supervisor for {verb}: it is not connected")
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            raise LinkDownError(
                f"the supervisor did not answer {verb} within {timeout:g} seconds"
            ) from None
        finally:
            self._asked.pop(number, None)
        if answer.ok:
            return answer.result
        code = reason_of(answer.code or Reason.INTERNAL)
        message = answer.message or f"the supervisor refused {verb}"
        raise Refused(code, message, retry_after=answer.retry_after)

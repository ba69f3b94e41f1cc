"""The supervisor's control socket: gateway workers and the command line.

Owns the connections. Turns messages into events for the loop and sends what the loop says. Who may
speak is decided by the peer's credentials (SO_PEERCRED), once, when it connects.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

from llmux.core.events import (
    DemandChanged,
    EngineSuspect,
    Event,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.errors import ControlError, LlmuxError, Reason, Refused, UnknownMessage
from llmux.protocol import (
    MAX_LINE,
    PROTOCOL_VERSION,
    Answer,
    Ask,
    Catalog,
    Collected,
    Demand,
    Drained,
    EngineLost,
    Hello,
    Kept,
    Message,
    Progress,
    Tell,
    Watch,
    decode,
)
from llmux.responses import ResponseModels
from llmux.runtime.events import Feeds

log = logging.getLogger("llmux")

# A peer that reads nothing for so much is broken: it reconnects and is told everything anew.
MAX_UNSENT = 4 * MAX_LINE

# How long a worker that lives may be away. Its link's longest pause between two tries is 1 s.
RECONNECT_SECS = 3.0

Verb = Callable[[Ask, Tell], Awaitable[object]]


class Hub:
    """``ask`` answers the verbs; ``allowed_uids`` may connect besides root and ourselves."""

    def __init__(
        self,
        *,
        post: Callable[[Event], None],
        ask: Verb,
        catalog: Callable[[], Catalog],
        allowed_uids: frozenset[int] = frozenset(),
        feeds: Feeds | None = None,
    ) -> None:
        self._post = post
        self._ask = ask
        self._catalog = catalog
        self._feeds = feeds or Feeds()
        self.responses = ResponseModels()
        self._uids = allowed_uids | {0, os.getuid()}
        self._workers: dict[str, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._path: str | None = None
        self._closing = False

    async def listen(self, path: str, group: int | None) -> None:
        """Bind ``path`` anew. ``group`` may connect; without one only our own user."""
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._connected, path, limit=MAX_LINE)
        self._path = path
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, 0o660 if group is not None else 0o600)

    async def join(self, sock: socket.socket) -> None:
        """Serve one end of a socket pair: the embedded gateway, already trusted."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        self._track(self._serve(reader, writer))

    async def close(self) -> None:
        self._closing = True
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    # ---- sending --------------------------------------------------------------------------------

    def send(self, worker: str, message: Message) -> None:
        """To one worker; one that is gone meanwhile has lost its grants anyway."""
        writer = self._workers.get(worker)
        if writer is not None:
            self._write(writer, message)

    def broadcast(self, message: Message) -> None:
        for writer in list(self._workers.values()):
            self._write(writer, message)

    def workers(self) -> list[str]:
        """Those connected now."""
        return list(self._workers)

    def _write(self, writer: asyncio.StreamWriter, message: Message) -> None:
        if writer.transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("a peer of the control socket reads nothing: connection dropped")
            writer.transport.abort()
            return
        writer.write(message.encode())

    # ---- receiving ------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = _peer(writer)[1]
        if uid not in self._uids:
            log.warning("user %s may not use the control socket", _user_name(uid))
            writer.close()
            return
        self._track(self._serve(reader, writer))

    def _track(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker: str | None = None
        pid = _peer(writer)[0]
        try:
            hello = await self._hello(reader)
            if hello.role == "gateway":
                worker = self._joined(hello, writer)
            await self._listen_to(worker, reader, writer)
        except ControlError as error:
            log.warning("control connection dropped: %s", error)
        except (ConnectionError, asyncio.LimitOverrunError, ValueError) as error:
            log.debug("control connection ended: %s", error)
        finally:
            writer.close()
            self._feeds.left(writer)
            # a worker that came back on a new connection has replaced this one already
            if worker is not None and self._workers.get(worker) is writer:
                del self._workers[worker]
                await self._see_off(worker, pid)

    async def _listen_to(
        self, worker: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """To the end of the connection. A newer peer may say more than we know; what we do know
        must still be heard."""
        unknown: set[str] = set()
        while line := await reader.readline():
            try:
                self._received(worker, decode(line), writer)
            except UnknownMessage as error:
                if str(error) not in unknown:
                    unknown.add(str(error))
                    log.warning("%s: ignored", error)

    async def _see_off(self, worker: str, pid: int) -> None:
        """Its requests end with its process; one that lives goes on with them and comes back."""
        if pid != os.getpid() and not self._closing:
            await _ended(pid, RECONNECT_SECS)
        if worker not in self._workers:
            self._post(WorkerLeft(worker))

    async def _hello(self, reader: asyncio.StreamReader) -> Hello:
        line = await reader.readline()
        message = decode(line) if line else None
        if not isinstance(message, Hello):
            raise ControlError("cannot serve a control connection that does not begin with hello")
        if message.version != PROTOCOL_VERSION:
            raise ControlError(
                f"cannot talk to a peer of protocol version {message.version},"
                f" this is {PROTOCOL_VERSION}",
                hint="restart the older of llmux.service and llmux-gateway.service",
            )
        return message

    def _joined(self, hello: Hello, writer: asyncio.StreamWriter) -> str:
        if (former := self._workers.pop(hello.worker, None)) is not None:
            former.transport.abort()
        self._workers[hello.worker] = writer
        self._write(writer, self._catalog())
        self._post(WorkerJoined(hello.worker, hello.holds))
        return hello.worker

    def _received(self, worker: str | None, message: Message, writer: asyncio.StreamWriter) -> None:
        match message:
            case Ask():
                self._track(self._answer(message, writer))
            case Demand() if worker is not None:
                self._post(
                    DemandChanged(
                        worker,
                        message.model,
                        message.waiting,
                        message.oldest_age,
                        message.in_flight,
                        message.progress,
                    )
                )
            case Drained() if worker is not None:
                self._post(WorkerDrained(worker, message.model, message.epoch))
            case EngineLost() if worker is not None:
                self._post(EngineSuspect(message.model, message.epoch, message.error))
            case Watch():
                self._feeds.watch(writer, message, lambda news: self._write(writer, news))
            case Kept() if worker is not None:
                self.responses.keep(message.responses)
            case Collected() if worker is not None:
                self._feeds.collected(worker, message)
            case _:
                raise ControlError(f"cannot accept a {message.kind} message from this peer")

    async def _answer(self, ask: Ask, writer: asyncio.StreamWriter) -> None:
        def tell(phase: str, seconds: float, done: int, total: int) -> None:
            if not writer.is_closing():
                self._write(writer, Progress(ask.id, phase, seconds, done, total))

        try:
            answer = Answer(ask.id, True, await self._ask(ask, tell))
        except Refused as refusal:
            answer = Answer(
                ask.id, False, None, refusal.reason.value, str(refusal), refusal.retry_after
            )
        except LlmuxError as error:
            answer = Answer(ask.id, False, None, Reason.INTERNAL.value, str(error))
        if not writer.is_closing():
            self._write(writer, answer)


def _peer(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """(pid, uid) of whoever connected, as the kernel noted them."""
    sock = writer.get_extra_info("socket")
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid), int(uid)


async def _ended(pid: int, seconds: float) -> None:
    """Until the process has ended, but no longer than ``seconds``. A killed one is still there for
    a moment after its connection broke."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        pass
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

"""The supervisor's control socket: gateway workers and the command line.

Owns the connections. Turns messages into events for the loop and sends the loop's messages. A peer
is authorized by its credentials (SO_PEERCRED), once, when it connects.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any

from llmux.core.events import (
    DemandChanged,
    EngineSuspect,
    Event,
    KeepAliveSet,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.errors import ControlError, LlmuxError, Reason, Refused, UnknownMessage
from llmux.peers import ADMINS, Exits, admit_group, caller_of, peer_groups, peer_of, user_name
from llmux.protocol import (
    MAX_ANSWER,
    MAX_LINE,
    OF_CONNECTION,
    PROTOCOL_VERSION,
    Answer,
    Ask,
    Catalog,
    Collected,
    Demand,
    Drained,
    EngineLost,
    Hello,
    KeepAliveHint,
    Message,
    Progress,
    ProgressCallback,
    ResponseOwners,
    Watch,
    decode,
)
from llmux.responses import ResponseModels
from llmux.runtime.connections import Complaints, Connections, Peer, socket_of
from llmux.runtime.control.watchers import Watchers
from llmux.small_files import make_way

log = logging.getLogger("llmux")

# A peer with this much unread is broken: it reconnects and gets the catalogue and its grants again.
MAX_UNSENT = MAX_ANSWER + 4 * MAX_LINE

# Of gateways' asks that are not answered yet: bytes of their lines, some 25 times that in memory.
MAX_UNANSWERED = 8 * MAX_LINE

# How soon a removed socket is missed: well before a gateway's start gives up.
LOOK_SECS = 2.0

# How long a worker that lives may be away. Its link's longest pause between two tries is 1 s.
RECONNECT_SECS = 3.0

Verb = Callable[[Ask, ProgressCallback], Awaitable[object]]

# The gateway parses HTTP from outside: it gets the verbs that its routes offer, and no others.
GATEWAY_VERBS = frozenset(
    {
        *("status", "eviction_get", "eviction_set", "mode", "pin", "unpin", "switch"),
        *("sleep", "wake", "unload", "restart", "checkpoint", "cancel"),
        *("logs", "events", "response", "metrics", "alive"),
    }
)


class ControlSocket:
    """``ask`` answers the verbs; ``allowed_uids`` may connect besides root and ourselves, and use
    the gateway's verbs; members of the group ``admins`` may use all."""

    def __init__(
        self,
        *,
        post: Callable[[Event], None],
        ask: Verb,
        catalog: Callable[[], Catalog],
        allowed_uids: frozenset[int] = frozenset(),
        admins: int | None = None,
        watchers: Watchers | None = None,
        connections: Connections | None = None,
    ) -> None:
        self._exits = Exits()
        self._post = post
        self._ask = ask
        self._catalog = catalog
        self._watchers = watchers or Watchers()
        self._connections = connections or Connections()
        self._complaints = Complaints()
        self.responses = ResponseModels()
        self._uids = allowed_uids
        self._admins = admins
        self._workers: dict[str, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._path: str | None = None
        self._ours, self._inode = False, 0  # of the socket's file
        self._closing = False
        self._unanswered = 0

    async def listen(
        self, path: str, group: int | None, *, ours: bool = False, look_secs: float = LOOK_SECS
    ) -> None:
        """Bind ``path``, replacing a former socket, and again whenever it was removed, which is
        looked for every ``look_secs``. ``group`` may connect; None: only our user. A directory
        there is moved aside where the path is ``ours``, and not named by mistake."""
        self._path, self._ours = path, ours
        await self._bind(path, group)
        self._track(self._keep_bound(path, group, look_secs))

    async def _bind(self, path: str, group: int | None) -> None:
        if aside := make_way(path, aside=self._ours):
            log.warning("a directory was in the place of the control socket: it is now %s", aside)
        self._server = await asyncio.start_unix_server(self._connected, path, limit=MAX_LINE)
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, 0o660 if group is not None else 0o600)
        if self._admins is not None:
            try:
                admit_group(path, self._admins)
            except OSError as error:
                log.warning("only root may give orders: no access control list: %s", error)
        self._inode = os.stat(path).st_ino

    async def _keep_bound(self, path: str, group: int | None, look_secs: float) -> None:
        """Without its file the socket reaches no gateway that starts later, and no operator."""
        said = False
        while True:
            await asyncio.sleep(look_secs)
            with suppress(OSError):
                if os.stat(path).st_ino == self._inode:
                    continue
            if not said:
                log.warning("the control socket %s was removed or replaced; making it again", path)
            former = self._server
            try:
                await self._bind(path, group)
            except OSError as error:
                if not said:
                    log.error("cannot make the control socket %s again: %s", path, error)
                said = True
            else:
                said = False
                if former is not None:
                    former.close()  # its connections go on

    async def join(self, sock: socket.socket) -> None:
        """Serve one end of a socket pair: the embedded gateway, already trusted."""
        pid, uid = peer_of(sock)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        self._track(self._serve(reader, writer, pid, uid, verbs=None))

    async def close(self) -> None:
        self._closing = True
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._path is not None:
            with suppress(OSError):  # what else is there is not ours
                os.unlink(self._path)

    # ---- sending --------------------------------------------------------------------------------

    def send(self, worker: str, message: Message) -> None:
        """Send to one worker; without a connection it has lost its grants already."""
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
        if writer.is_closing():  # its reader will see that; uvloop raises when it is written to
            return
        if writer.transport.get_write_buffer_size() > MAX_UNSENT:
            self._complaints.warn("a peer of the control socket reads nothing: connection dropped")
            writer.transport.abort()
            return
        try:
            data = message.encode()
        except (TypeError, ValueError, RecursionError) as error:
            self._complaints.warn("cannot send a message of kind %s: %s", message.kind, error)
            if not isinstance(message, Answer):
                return
            why = f"the answer cannot be encoded: {error}"
            data = Answer(message.id, False, None, Reason.INTERNAL.value, why).encode()
        if len(data) >= MAX_ANSWER and isinstance(message, Answer):
            log.warning("an answer of %d bytes is too long for the control socket", len(data))
            data = Answer(
                message.id,
                ok=False,
                code=Reason.INTERNAL.value,
                message=f"the answer has {len(data)} bytes, more than {MAX_ANSWER}",
            ).encode()
        writer.write(data)

    # ---- receiving ------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            pid, uid = peer_of(socket_of(writer))
            is_admin = self._is_admin(writer)
        except ConnectionError:  # gone already
            writer.close()
            return
        if not is_admin and uid not in self._uids:
            self._complaints.warn("user %s may not use the control socket", user_name(uid))
            writer.close()
            return
        if (why := self._connections.admit(uid)) is not None:
            refusal = Answer(OF_CONNECTION, False, None, Reason.RATE_LIMITED.value, why)
            writer.write(refusal.encode())
            writer.close()
            return
        verbs = None if is_admin else GATEWAY_VERBS
        serving = self._track(self._serve(reader, writer, pid, uid, verbs=verbs))
        serving.add_done_callback(lambda _: self._connections.left(uid))

    def _track(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int, uid: int,
        *, verbs: frozenset[str] | None,
    ) -> None:  # fmt: skip
        worker: str | None = None
        asking: set[asyncio.Task[None]] = set()
        try:
            hello = await self._hello(reader)
            if hello.role == "gateway":
                worker = self._joined(hello, writer)
            caller = None if worker is not None else caller_of(pid, uid)
            peer = Peer(worker, caller, verbs, writer, asking)
            await self._listen_to(peer, reader)
        except ControlError as error:
            self._complaints.warn("control connection dropped: %s", error)
        except (ConnectionError, asyncio.LimitOverrunError, ValueError) as error:
            log.debug("control connection ended: %s", error)
        except Exception:  # a peer may end its own connection, never the supervisor
            log.exception("control connection dropped")
        finally:
            writer.close()
            self._watchers.left(writer)
            if worker is None:  # an operator's orders end with the command that gave them
                for task in list(asking):
                    task.cancel()
            # a worker that came back on a new connection has replaced this one already
            if worker is not None and self._workers.get(worker) is writer:
                del self._workers[worker]
                await self._see_off(worker, pid)

    async def _listen_to(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        """Read until the connection ends. Messages that only a newer version knows are skipped."""
        unknown: set[str] = set()
        while line := await reader.readline():
            try:
                message = decode(line)
                if isinstance(message, Ask):
                    self._asked(peer, message, len(line))
                else:
                    self._received(peer, message)
            except UnknownMessage as error:
                if str(error) not in unknown:
                    unknown.add(str(error))
                    self._complaints.warn("%s: ignored", error)

    def _is_admin(self, writer: asyncio.StreamWriter) -> bool:
        """May the peer use all verbs? The gateway's user never, whatever its groups."""
        uid = peer_of(socket_of(writer))[1]
        if uid in (0, os.getuid()) or uid in self._uids:
            return uid not in self._uids
        return self._admins is not None and self._admins in peer_groups(socket_of(writer))

    async def _see_off(self, worker: str, pid: int) -> None:
        """A worker's requests live as long as its process: wait for its exit or reconnect before
        dropping its demand."""
        if pid != os.getpid() and not self._closing:
            await self._exits.wait(pid, RECONNECT_SECS)
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

    def _asked(self, peer: Peer, ask: Ask, line_bytes: int) -> None:
        if peer.verbs is not None and ask.verb not in peer.verbs:
            why = f"only root and members of group {ADMINS} may"
            return self._write(peer.writer, _refusal(ask, Reason.FORBIDDEN, why))
        if peer.caller is not None and peer.verbs is None:
            line_bytes = 0  # an operator's
        elif self._unanswered + line_bytes > MAX_UNANSWERED:
            why = "too much that was asked before is not answered yet"
            return self._write(peer.writer, _refusal(ask, Reason.RATE_LIMITED, why))
        self._unanswered += line_bytes

        def answered(task: asyncio.Task[None]) -> None:
            peer.asking.discard(task)
            self._unanswered -= line_bytes

        task = self._track(self._answer(peer.signed(ask), peer.writer))
        peer.asking.add(task)
        task.add_done_callback(answered)

    def _received(self, peer: Peer, message: Message) -> None:
        worker, writer = peer.worker, peer.writer
        match message:
            case Demand() if worker is not None:
                self._post(
                    DemandChanged(
                        worker,
                        message.model,
                        message.waiting,
                        # now: the event may be handled later
                        None if message.oldest_age is None else monotonic() - message.oldest_age,
                        message.in_flight,
                        message.progress,
                        message.completed,
                        message.repeated,
                    )
                )
            case Drained() if worker is not None:
                self._post(WorkerDrained(worker, message.model, message.epoch))
            case EngineLost() if worker is not None:
                self._post(EngineSuspect(message.model, message.epoch, message.error))
            case KeepAliveHint() if worker is not None:
                seconds = math.inf if message.seconds is None else max(0.0, message.seconds)
                self._post(KeepAliveSet(message.model, seconds))
            case Watch():
                self._watchers.watch(writer, message, lambda news: self._write(writer, news))
            case ResponseOwners() if worker is not None:
                self.responses.keep(message.responses, message.keys)
            case Collected() if worker is not None:
                self._watchers.collected(worker, message)
            case _:
                raise ControlError(f"cannot accept a {message.kind} message from this peer")

    async def _answer(self, ask: Ask, writer: asyncio.StreamWriter) -> None:
        def report(phase: str, seconds: float, done: int, total: int) -> None:
            self._write(writer, Progress(ask.id, phase, seconds, done, total))

        try:
            answer = Answer(ask.id, True, await self._ask(ask, report))
        except Refused as refusal:
            answer = Answer(
                ask.id, False, None, refusal.reason.value, str(refusal), refusal.retry_after
            )
        except LlmuxError as error:
            answer = Answer(ask.id, False, None, Reason.INTERNAL.value, str(error))
        except Exception as error:
            log.exception("cannot answer %s", ask.verb)
            text = f"cannot {ask.verb}: internal error: {str(error) or type(error).__name__}"
            answer = Answer(ask.id, False, None, Reason.INTERNAL.value, text)
        self._write(writer, answer)


def _refusal(ask: Ask, reason: Reason, why: str) -> Answer:
    return Answer(ask.id, False, None, reason.value, f"cannot {ask.verb}: {why}")

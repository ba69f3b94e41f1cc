"""The control socket: who may speak, what is understood, who is dropped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from runtime_harness import in_loop

from llmux.core.events import DemandChanged, EngineSuspect, Event, WorkerDrained, WorkerJoined
from llmux.errors import DriverError, Reason, Refused
from llmux.protocol import (
    MAX_LINE,
    Answer,
    Ask,
    Catalog,
    Demand,
    Drained,
    EngineLost,
    Grant,
    Hello,
    Message,
    ModelInfo,
    decode,
)
from llmux.runtime.hub import MAX_UNSENT, Hub

CATALOG = Catalog.of([ModelInfo("a", "serving")])
GATEWAY = Hello(role="gateway", worker="w", holds={"a": "t.1"})


class Peer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.writer.write(message.encode() if isinstance(message, Message) else message)

    async def hear(self) -> Message | None:
        """None: the hub has ended the connection."""
        try:
            line = await self.reader.readline()
        except ConnectionError:
            return None
        return decode(line) if line else None


class Stage:
    def __init__(self, path: str) -> None:
        self.path = path
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.hub = Hub(post=self.events.put_nowait, ask=self._ask, catalog=lambda: CATALOG)
        self.peers: list[Peer] = []

    async def _ask(self, ask: Ask, *_: object) -> object:
        match ask.verb:
            case "refuse":
                raise Refused(Reason.BACKING_OFF, "not now", retry_after=7.0)
            case "fail":
                raise DriverError("do", "it", "because")
            case _:
                return {"did": ask.verb, **ask.args}

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_unix_connection(self.path))
        self.peers.append(peer)
        return peer

    async def worker(self) -> Peer:
        peer = await self.connect()
        peer.say(GATEWAY)
        assert await peer.hear() == CATALOG
        assert await self.events.get() == WorkerJoined("w", {"a": "t.1"})
        return peer


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(str(tmp_path / "hub.sock"))
    await made.hub.listen(made.path, None)
    try:
        yield made
    finally:
        for peer in made.peers:
            peer.writer.close()
        await made.hub.close()
        with pytest.raises(FileNotFoundError):  # the socket went with the hub
            await asyncio.open_unix_connection(made.path)


@in_loop
async def test_a_worker_says_hello_and_what_it_says_becomes_events(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(Demand("a", 2, 1.5, 3, 9), Drained("a", "t.1"), EngineLost("a", "t.1", "refused"))
        assert await s.events.get() == DemandChanged("w", "a", 2, 1.5, 3, 9)
        assert await s.events.get() == WorkerDrained("w", "a", "t.1")
        assert await s.events.get() == EngineSuspect("a", "t.1", "refused")


@in_loop
async def test_what_only_a_newer_worker_says_is_ignored_and_the_rest_is_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(*[b'{"type": "mood", "of": "a"}\n'] * 3, Drained("a", "t.1"))
        assert await s.events.get() == WorkerDrained("w", "a", "t.1")
    assert caplog.messages == ["cannot read a control message: unknown type 'mood': ignored"]


@in_loop
async def test_messages_reach_the_worker_they_are_for(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        s.hub.send("nobody", Grant("a", "t.2"))
        s.hub.send("w", Grant("a", "t.3"))
        assert await peer.hear() == Grant("a", "t.3")
        s.hub.broadcast(CATALOG)
        assert await peer.hear() == CATALOG


@pytest.mark.parametrize(
    "first",
    [
        Demand("a"),
        b"not json\n",
        b"[]\n",
        b'{"type": "nonsense"}\n',
        b'{"type": "hello"}\n',
        Hello(role="gateway", worker="w", version=999),
    ],
    ids=str,
)
@in_loop
async def test_whoever_does_not_begin_with_a_hello_of_our_version_is_dropped(
    tmp_path: Path, first: Message | bytes
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(first)
        assert await peer.hear() is None
        assert s.events.empty()


@in_loop
async def test_a_command_line_asks_and_may_not_speak_for_a_worker(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), Ask(4, "load", {"model": "a"}))
        assert await peer.hear() == Answer(4, True, {"did": "load", "model": "a"})
        peer.say(Demand("a", 1))
        assert await peer.hear() is None
        assert s.events.empty()


@in_loop
async def test_refusals_and_failures_are_answers_too(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), Ask(1, "refuse"))
        refused = await peer.hear()
        assert isinstance(refused, Answer)
        assert (refused.code, refused.retry_after) == ("model_backing_off", 7.0)
        peer.say(Ask(2, "fail"))
        failed = await peer.hear()
        assert isinstance(failed, Answer)
        assert (failed.ok, failed.code) == (False, "internal_error")
        assert failed.message == "cannot do it: because"


@in_loop
async def test_a_line_without_end_is_not_collected_for_ever(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(b"x" * (MAX_LINE * 2))
        assert await peer.hear() is None


@in_loop
async def test_a_peer_that_reads_nothing_is_dropped(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # both ways on a socket
        heavy = Catalog.of([ModelInfo("a" * 1000, "serving")] * 500)
        count = MAX_UNSENT // len(heavy.encode()) + 3
        for _ in range(count):
            s.hub.broadcast(heavy)
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above
        received = len(await peer.reader.read())  # to the end, which is not that of what was said
        assert received < count * len(heavy.encode())


@in_loop
async def test_a_worker_that_comes_back_replaces_its_former_connection(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        former = await s.worker()
        peer = await s.connect()
        peer.say(GATEWAY)
        assert await peer.hear() == CATALOG
        assert await former.hear() is None
        s.hub.send("w", Grant("a", "t.9"))
        assert await peer.hear() == Grant("a", "t.9")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: a peer of another user")
@in_loop
async def test_a_user_who_may_not_is_dropped_unheard(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        os.chmod(s.path, 0o666)
        # pytest's own directories are closed to others; how many there are depends on its plugins
        base = next(p for p in tmp_path.parents if p.name.startswith("pytest-of-"))
        for directory in (tmp_path, *tmp_path.parents):
            os.chmod(directory, 0o755)
            if directory == base:
                break
        os.seteuid(65534)
        try:
            peer = await s.connect()
        finally:
            os.seteuid(0)
        peer.say(GATEWAY)
        assert await peer.hear() is None
        assert s.events.empty()


@in_loop
async def test_the_socket_is_for_our_own_user_only_without_a_group(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        assert os.stat(s.path).st_mode & 0o777 == 0o600

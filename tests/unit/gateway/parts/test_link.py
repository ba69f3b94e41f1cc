"""The worker's line to the supervisor: what is sent when, what is answered, how it comes back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway import link as link_module
from llmux.gateway.link import (
    COALESCE_SECS,
    RECONNECT_FIRST_SECS,
    RECONNECT_MAX_SECS,
    Link,
    LinkDownError,
    _LineProtocol,
)
from llmux.protocol import (
    OF_CONNECTION,
    Answer,
    Ask,
    Collect,
    Demand,
    Hello,
    Message,
    Watch,
    decode,
)


class Wire:
    def __init__(self) -> None:
        self.written = b""
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def take(self) -> list[Message]:
        lines, self.written = self.written.splitlines(), b""
        return [decode(line) for line in lines]


class Ends:
    """A link, and the supervisor's end of it."""

    def __init__(self, **settings: Any) -> None:
        self.link = Link("/nowhere", **({"alive_secs": 3600.0} | settings))
        self.progress = {"a": 0, "b": 0}
        self.active = ["a"]
        self.heard: list[Message] = []
        self.link.attach(
            hello=lambda: Hello("gateway", "w1"),
            demand=lambda model: Demand(model, progress=self.progress[model]),
            active=lambda: list(self.active),
            on_message=self.heard.append,
            greetings=lambda: [Watch("events")],
        )

    def connect(self) -> asyncio.Task[None]:
        self.protocol = _LineProtocol(self.link._on_line)
        self.wire = Wire()
        self.protocol.connection_made(self.wire)  # type: ignore[arg-type]
        return asyncio.get_running_loop().create_task(self.link._stay(self.protocol))

    def say(self, message: Message) -> None:
        self.protocol.data_received(message.encode())


async def passes(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)


def test_who_connects_says_all_that_is_so_and_who_is_lost_is_away() -> None:
    async def run() -> None:
        ends = Ends()
        link = ends.link
        for number in (1, 2):
            assert (link.up, link.here.is_set(), link.away.is_set()) == (False, False, True)
            assert not link.send(Watch("logs"))
            staying = ends.connect()
            await passes()
            assert (link.up, link.here.is_set(), link.away.is_set()) == (True, True, False)
            assert link.connects == number
            assert ends.wire.take() == [Hello("gateway", "w1"), Watch("events"), Demand("a")]
            assert link.send(Watch("logs"))
            assert ends.wire.take() == [Watch("logs")]
            asking = asyncio.get_running_loop().create_task(link.ask("status", {}, 3600.0))
            await passes()
            ends.protocol.connection_lost(None)
            await staying
            assert ends.wire.closing
            with pytest.raises(LinkDownError, match="went away while asked"):
                await asking
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_line_that_closes_takes_nothing() -> None:
    async def run() -> None:
        ends = Ends()
        staying = ends.connect()
        await passes()
        ends.wire.take()
        ends.wire.closing = True
        assert not ends.link.send(Watch("logs"))
        with pytest.raises(LinkDownError, match="cannot ask the supervisor for status"):
            await ends.link.ask("status", {}, 1.0)
        assert ends.wire.take() == []
        staying.cancel()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "reason", "message", "retry_after"),
    [
        (Answer(0, ok=True, result={"x": 1}), None, None, None),
        (Answer(0, ok=True), None, None, None),
        (
            Answer(0, ok=False, code=Reason.PINNED.value, message="no", retry_after=3.0),
            Reason.PINNED, "no", 3.0,
        ),
        (Answer(0, ok=False, code="of_tomorrow", message="no"), Reason.INTERNAL, "no", None),
        (Answer(0, ok=False), Reason.INTERNAL, "the supervisor refused pin", None),
    ],
)  # fmt: skip
def test_each_answer_reaches_who_asked(
    answer: Answer, reason: Reason | None, message: str | None, retry_after: float | None
) -> None:
    async def run() -> None:
        ends = Ends()
        ends.connect()
        await passes()
        ends.wire.take()
        loop = asyncio.get_running_loop()
        other = loop.create_task(ends.link.ask("status", {}, 3600.0))
        asking = loop.create_task(ends.link.ask("pin", {"model": "a"}, 3600.0))
        await passes()
        first, second = ends.wire.take()
        assert isinstance(first, Ask) and isinstance(second, Ask)
        assert (second.verb, second.args, first.verb) == ("pin", {"model": "a"}, "status")
        assert first.id != second.id
        ends.say(Answer(9999, ok=True))
        ends.say(Answer(second.id, answer.ok, answer.result, answer.code, answer.message,
                        answer.retry_after))  # fmt: skip
        if reason is None:
            assert await asking == answer.result
        else:
            with pytest.raises(Refused) as refused:
                await asking
            assert (refused.value.reason, refused.value.retry_after) == (reason, retry_after)
            assert str(refused.value) == message
        assert not other.done()
        ends.say(Answer(first.id, ok=True, result=7))
        assert await other == 7
        assert (ends.link._asked, ends.heard) == ({}, [])

    asyncio.run(run())


def test_who_is_not_answered_in_time_is_told_so_and_a_late_answer_is_nobodys() -> None:
    async def run() -> None:
        ends = Ends()
        staying = ends.connect()
        await passes()
        with pytest.raises(LinkDownError, match="did not answer status within 0 seconds") as down:
            await ends.link.ask("status", {}, 0.0)
        assert (down.value.reason, down.value.retry_after) == (Reason.SUPERVISOR_UNREACHABLE, 1.0)
        ends.say(Answer(1, ok=True))
        staying.cancel()

    asyncio.run(run())


def test_changes_of_demand_are_sent_together_and_never_at_once() -> None:
    async def run() -> None:
        ends = Ends()
        ends.connect()
        await passes()
        ends.wire.take()
        link, now = ends.link, asyncio.get_running_loop().time()
        for flushed, due in ((now + 3600.0, now + 3600.0 + COALESCE_SECS), (-1.0, None)):
            link._flushed_at = flushed
            for _ in range(3):
                link.demand_changed("a")
                link.demand_changed("b")
            assert ends.wire.take() == [], "the caller may be in the middle of a change"
            handle = link._flush_handle
            assert handle is not None
            if due is None:
                await until(lambda: link._flush_handle is None)
            else:
                assert handle.when() == due
                link._flush()
            assert ends.wire.take() == [Demand("a"), Demand("b")]
            assert link._flushed_at >= now

    asyncio.run(run())


def test_progress_alone_is_told_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PROGRESS_SECS", 0.0)

    async def run() -> None:
        ends = Ends()
        staying = ends.connect()
        await passes(20)
        ends.wire.take()
        ends.active = ["a", "b"]
        ends.progress["a"] = 5
        await until(lambda: b'"a"' in ends.wire.written and b'"b"' in ends.wire.written)
        assert Demand("a", progress=5) in ends.wire.take()
        await passes(20)
        assert ends.wire.take() == [], "nothing moved"
        staying.cancel()

    asyncio.run(run())


def test_the_supervisor_is_asked_whether_it_lives() -> None:
    async def run() -> None:
        ends = Ends(alive_secs=0.0)
        staying = ends.connect()
        await until(lambda: ends.wire.written.count(b"alive") >= 2)
        asked = [one for one in ends.wire.take() if isinstance(one, Ask)]
        assert {one.verb for one in asked} == {"alive"}
        assert len({one.id for one in asked}) == len(asked)
        ends.link._heard_at -= 100.0
        assert ends.link.silent_secs >= 100.0
        ends.say(Answer(asked[0].id, ok=True))
        assert ends.link.silent_secs < 100.0
        staying.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
def test_lines_are_read_in_whatever_pieces_they_come(size: int) -> None:
    async def run() -> None:
        ends = Ends()
        ends.connect().cancel()
        lines = Collect(1).encode() + b'{"type":"of tomorrow"}\n' + b"junk\n" + Collect(2).encode()
        for at in range(0, len(lines), size):
            ends.protocol.data_received(lines[at : at + size])
        assert ends.heard == [Collect(1), Collect(2)]
        assert not ends.wire.closing

    asyncio.run(run())


def test_a_line_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_ANSWER", 100)

    async def run() -> None:
        ends = Ends()
        ends.connect().cancel()
        ends.protocol.data_received(b"x" * 100)
        assert not ends.wire.closing
        ends.protocol.data_received(b"x")
        assert ends.wire.closing

    asyncio.run(run())


class Proxy:
    """asyncio, whose sleeps are counted and end at once."""

    def __init__(self, slept: list[float]) -> None:
        self.slept = slept

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def test_it_comes_back_at_growing_intervals_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(link_module, "asyncio", Proxy(slept))
    first, lost = RECONNECT_FIRST_SECS, "lost the supervisor"

    async def run() -> None:
        link = Link("/nowhere")
        now = 100.0
        monkeypatch.setattr(link._loop, "time", lambda: now)
        outcomes: list[tuple[str | None, float]] = [
            *[("cannot reach it", 0.0)] * 8,
            (None, RECONNECT_MAX_SECS + 0.1),  # it was there for a while
            ("cannot reach it", RECONNECT_MAX_SECS + 0.1),  # it took long to say so
            (None, RECONNECT_MAX_SECS),  # it sends us away
            (None, 0.0),
        ]

        async def connected() -> str | None:
            nonlocal now
            if not outcomes:
                raise EOFError
            why, stayed = outcomes.pop(0)
            now += stayed
            return why

        monkeypatch.setattr(link, "_connected", connected)
        with pytest.raises(EOFError):
            await link.run()

    asyncio.run(run())
    growing = [min(first * 2**n, RECONNECT_MAX_SECS) for n in range(8)]
    assert slept == pytest.approx([*growing, first, 2 * first, 4 * first])
    said = [message.partition(";")[0] for message in caplog.messages]
    assert said == ["cannot reach it", lost, "cannot reach it", lost, lost]


def test_why_there_is_none_is_said(tmp_path: Path) -> None:
    async def run() -> None:
        link = Link(tmp_path / "none.sock")
        assert await link._connected() == (
            f"cannot reach the supervisor at {tmp_path}/none.sock: No such file or directory"
        )
        spoken: list[bytes] = []

        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for line in spoken:
                writer.write(line)
            writer.close()

        path = tmp_path / "s"
        server = await asyncio.start_unix_server(serve, path)
        link = Link(path)
        begins = f"cannot use the supervisor at {path}: "
        assert await link._connected() == begins + "it ended the connection without a word"
        refusal = Answer(OF_CONNECTION, ok=False, message="too many")
        spoken.append(refusal.encode())
        assert await link._connected() == begins + "too many"
        spoken.append(Collect(1).encode())
        assert await link._connected() is None
        server.close()

    asyncio.run(run())


def test_an_absence_counts_when_it_lasts() -> None:
    async def run() -> None:
        link = Link("/nowhere")
        await link.gone_for(0.0)
        link.away.clear()
        link.here.set()
        loop = asyncio.get_running_loop()
        short, long = loop.create_task(link.gone_for(0.0)), loop.create_task(link.gone_for(3600.0))
        await passes()
        assert not short.done()
        link.here.clear()
        link.away.set()
        await short
        for lost, found in ((link.away, link.here), (link.here, link.away)) * 2:
            lost.clear()
            found.set()
            await passes()
        assert not long.done()
        long.cancel()

    asyncio.run(run())


def test_a_socket_that_was_handed_over_is_not_connected_again() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        link = Link(ours)
        running = asyncio.get_running_loop().create_task(link.run())
        await link.here.wait()
        assert json.loads(theirs.recv(4096).splitlines()[0])["type"] == "hello"
        theirs.close()
        await running
        assert not link.up

    asyncio.run(run())

"""What a chat client is told while it waits: the words, when they are news, what is asked when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import Stage, Ticket
from llmux.gateway.exchange.keep_alive import MAX_ERROR, PING, KeepAlive
from llmux.gateway.exchange.loading_text import (
    ASK_SECS,
    LOOK_SECS,
    MAX_WORDS,
    OLD_SECS,
    ChatText,
    Standing,
)


class World:
    """The supervisor, admission and the switches, as they are asked."""

    def __init__(self) -> None:
        self.now = 100.0
        self.status: Any = {"models": {}}
        self.asked: list[tuple[str, dict[str, Any], float]] = []
        self.is_usable = False
        self.ahead = 0
        self.secs = 0.0
        self.standing = Standing(self, self, self, lambda: self.now)

    async def ask(self, verb: str, args: dict[str, Any], timeout: float) -> Any:
        self.asked.append((verb, args, timeout))
        if isinstance(self.status, Exception):
            raise self.status
        return self.status

    def usable(self, model: str) -> bool:
        assert model == "a"
        return self.is_usable

    def ahead_of(self, _ticket: Ticket) -> int:
        return self.ahead

    def wanted(self) -> list[str]:
        return ["a", "b"]

    def secs_until(self, model: str, wanted: Any) -> float:
        assert (model, wanted) == ("a", ["a", "b"])
        return self.secs

    async def look(self) -> bool:
        known = self.standing.look()
        while self.standing._asking is not None:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
        return known


def a_step(**more: Any) -> dict[str, Any]:
    return {"models": {"a": {"phase_text": "reading its weights", **more}}}


def progress(done: int, total: int, unit: str) -> dict[str, Any]:
    return a_step(progress={"done": done, "total": total, "unit": unit})


ROOM = "waiting for room on a GPU"
WEIGHTS = "reading its weights"


@pytest.mark.parametrize(
    ("status", "state", "expected"),
    [
        ({"models": {}}, {}, ROOM),
        ({"models": {"b": a_step()["models"]["a"]}}, {}, ROOM),
        (a_step(phase_text=None), {}, ROOM),
        (a_step(phase_text=""), {}, ROOM),
        ({"models": {}}, {"secs": 0.9}, ROOM),
        ({"models": {}}, {"secs": 1.0}, f"{ROOM}, about 1 s left"),
        ({"models": {}}, {"secs": 89.4}, f"{ROOM}, about 89 s left"),
        ({"models": {}}, {"secs": 90.0}, f"{ROOM}, about 2 min left"),
        ({"models": {}}, {"secs": 600.0}, f"{ROOM}, about 10 min left"),
        (a_step(), {"secs": 50.0}, WEIGHTS),
        (a_step(left_secs=20.0), {"secs": 50.0}, f"{WEIGHTS}, about 20 s left"),
        (progress(3, 0, "shards"), {}, f"{WEIGHTS} (3 shards)"),
        (progress(3, 8, "shards"), {}, f"{WEIGHTS} (3 of 8 shards)"),
        (progress(3, 8, "bytes"), {}, WEIGHTS),
        (a_step(phase_text="x" * 500), {}, "x" * MAX_WORDS),
        ({"models": {}}, {"ahead": 1}, f"{ROOM}; 1 request before this one"),
        (
            {"models": {}},
            {"ahead": 2, "secs": 5.0},
            f"{ROOM}, about 5 s left; 2 requests before this one",
        ),
        (a_step(), {"is_usable": True, "secs": 9.0}, "waiting for a place at its engine"),
        (a_step(), {"in_flight": True, "is_usable": True}, "its engine has the request"),
    ],
)
def test_where_a_request_stands_in_words(
    status: dict[str, Any], state: dict[str, Any], expected: str
) -> None:
    async def run() -> None:
        world = World()
        world.status = status
        await world.look()
        ticket = Ticket("a", 0.0, 1.0)
        if state.pop("in_flight", False):
            ticket.stage = Stage.IN_FLIGHT
        for name, value in state.items():
            setattr(world, name, value)
        told, words = world.standing.of(ticket)
        assert words == expected
        what = expected.partition(", about")[0].partition(";")[0]
        assert told == f"{what}, {world.ahead}"

    asyncio.run(run())


def test_the_supervisor_is_asked_at_intervals_and_one_answer_serves_all() -> None:
    async def run() -> None:
        world = World()
        world.status = a_step()
        assert not await world.look(), "nothing is known yet"
        assert await world.look()
        assert world.asked == [("status", {}, ASK_SECS)]
        world.now += LOOK_SECS - 0.1
        assert await world.look()
        assert len(world.asked) == 1
        world.now += 0.1
        assert await world.look()
        assert len(world.asked) == 2
        world.now += OLD_SECS
        assert not world.standing.look(), "of long ago"
        assert not world.standing.look(), "it is asked once at a time"
        world.now += LOOK_SECS
        assert not await world.look()
        assert len(world.asked) == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    "status",
    [
        Refused(Reason.SUPERVISOR_UNREACHABLE, "away"),
        {"models": {"a": {"phase_text": 7}}},
        {"models": []},
        {},
        None,
    ],
    ids=["away", "odd text", "a list", "empty", "nothing"],
)
def test_without_an_answer_only_what_is_known_here_is_told(status: Any) -> None:
    async def run() -> None:
        world = World()
        world.status = a_step()
        await world.look()
        world.now += LOOK_SECS
        world.status = status
        await world.look()
        assert world.standing.of(Ticket("a", 0.0, 1.0))[1] == ROOM
        assert await world.look(), "that there is none is known, too"
        world.now += LOOK_SECS
        world.status = a_step()
        await world.look()
        assert world.standing.of(Ticket("a", 0.0, 1.0))[1] == WEIGHTS

    asyncio.run(run())


@pytest.mark.parametrize("odd", [{"phase_text": 7}, {"left_secs": "soon"}, [], None])
def test_a_row_that_cannot_be_read_costs_its_own_model_only(odd: Any) -> None:
    async def run() -> None:
        world = World()
        world.status = {"models": {"b": odd} | a_step()["models"] | {"c": odd}}
        await world.look()
        assert world.standing.of(Ticket("a", 0.0, 1.0))[1] == WEIGHTS
        world.now += LOOK_SECS
        world.status = {"models": {"a": odd, "b": a_step()["models"]["a"]}}
        await world.look()
        assert world.standing.of(Ticket("a", 0.0, 1.0))[1] == ROOM, "not what was known before"

    asyncio.run(run())


def words_of(event: bytes) -> str:
    head, _, rest = event.partition(b"data: ")
    assert head == b""
    assert rest.endswith(b"\n\n")
    chunk = json.loads(rest)
    assert abs(chunk.pop("created")) > 10**9
    (choice,) = chunk.pop("choices")
    words: str = choice["delta"].pop("reasoning_content")
    assert choice == {
        "index": 0,
        "delta": {"role": "assistant", "content": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert chunk == {"id": "chatcmpl-77", "object": "chat.completion.chunk", "model": "chat"}
    assert words.endswith("\n")
    return words[:-1]


@pytest.mark.parametrize("interval", [0.0, 30.0])
def test_only_news_are_told_and_the_rest_at_intervals(interval: float) -> None:
    async def run() -> None:
        world = World()
        text = ChatText(world.standing, "chat", "77", interval)
        ticket = Ticket("a", 0.0, 1.0)

        async def event() -> str:
            told = text.event(ticket, world.now)
            await world.look()
            return words_of(told) if told else ""

        assert await event() == "", "at the next look more is known"
        assert await event() == f"chat: {ROOM}"
        assert await event() == ""
        world.ahead = 1
        assert await event() == f"chat: {ROOM}; 1 request before this one"
        world.secs = 7.0
        assert await event() == "", "the time that is left is no news"
        world.now += 29.9
        assert await event() == ""
        world.now += 0.1
        again = f"chat: {ROOM}, about 7 s left; 1 request before this one"
        assert await event() == (again if interval else "")
        assert await event() == ""

    asyncio.run(run())


def test_one_that_comes_when_all_is_known_is_told_at_once() -> None:
    async def run() -> None:
        world = World()
        await world.look()
        text = ChatText(world.standing, "chat", "77", 0.0)
        assert words_of(text.event(Ticket("a", 0.0, 1.0), world.now)) == f"chat: {ROOM}"
        # Long without an answer: it is told what is known here.
        world = World()
        text = ChatText(world.standing, "chat", "77", 0.0)
        assert text.event(Ticket("a", 0.0, 1.0), world.now) == b""
        assert text.event(Ticket("a", 0.0, 1.0), world.now) != b""

    asyncio.run(run())


def test_signs_of_life_are_comments_pings_or_that_text() -> None:
    ticket = Ticket("a", 0.0, 1.0)
    comment = KeepAlive("a", 5.0, anthropic=False)
    assert (comment.pause, comment.started, comment.error) == (5.0, False, None)
    said = b": waiting for a\n\n"
    assert comment.chunk(ticket, 0.0) == b"%x\r\n%b\r\n" % (len(said), said)
    ping = KeepAlive("a", 5.0, anthropic=True)
    assert ping.chunk(ticket, 0.0) == b"%x\r\n%b\r\n" % (len(PING), PING)
    texts: list[bytes] = [b"data: x\n\n", b""]
    told: Callable[[Ticket, float], bytes] = lambda *_: texts.pop(0)  # noqa: E731
    text = KeepAlive("a", 5.0, anthropic=False, text=type("T", (), {"event": staticmethod(told)})())
    assert text.pause == LOOK_SECS
    assert [text.chunk(ticket, 0.0), text.chunk(ticket, 0.0)] == [b"9\r\ndata: x\n\n\r\n", b""]


def test_what_an_engine_refuses_with_is_kept_up_to_a_bound() -> None:
    keep_alive = KeepAlive("a", 5.0, anthropic=False)
    keep_alive.error = bytearray()
    for _ in range(3):
        keep_alive.collect(b"x" * MAX_ERROR)
    assert len(keep_alive.error) == 2 * MAX_ERROR


@pytest.mark.parametrize("status", [None, {}, {"models": {"a": {"phase_text": 7}}}, {"models": []}])
def test_a_status_that_cannot_be_read_is_as_none(status: Any) -> None:
    async def run() -> None:
        world = World()
        world.status = a_step()
        await world.look()
        ticket = Ticket("a", 0.0, 1.0)
        assert world.standing.of(ticket)[1] == WEIGHTS
        world.now += LOOK_SECS
        world.status = status
        await world.look()
        assert world.standing.of(ticket)[1] == ROOM

    asyncio.run(run())

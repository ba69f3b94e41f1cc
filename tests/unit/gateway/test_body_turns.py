"""Connections with long bodies are read a few at a time, each in its turn, unless held."""

from __future__ import annotations

import asyncio
from typing import Any

from llmux.gateway.client.turns import AT_ONCE, SLICE, SLICES_SECS, Reading, Turns


class Client:
    """A transport that has always more to read, until ``left`` pieces are read."""

    def __init__(self, turns: Turns, read: list[Any], left: int) -> None:
        self.read, self.left = read, left
        self.closing = False
        self.paused = False
        self.reading = Reading(turns, self)

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert not self.closing
        self.paused = True

    def resume_reading(self) -> None:
        assert not self.closing
        assert self.paused
        self.paused = False
        self.read.append(self)
        self.left -= 1
        if self.left:
            self.reading.wait_turn()


async def one_pass() -> None:
    await asyncio.sleep(0)


def test_a_pass_of_the_loop_reads_a_few_and_each_gets_its_turn() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        clients = [Client(turns, read, 3) for _ in range(10 * AT_ONCE)]
        for client in clients:
            client.reading.wait_turn()
        while any(client.left for client in clients):
            before = len(read)
            await one_pass()
            assert len(read) - before <= AT_ONCE
        assert read == clients * 3, "in the order in which they came"

    asyncio.run(body())


def test_who_leaves_is_passed_over() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        gone, stays = (Client(turns, read, 1) for _ in range(2))
        gone.reading.wait_turn()
        stays.reading.wait_turn()
        gone.closing = True
        gone.reading.wait_turn()
        await one_pass()
        gone.reading.wait_turn()
        gone.reading.hold()
        gone.reading.release()
        await one_pass()
        assert read == [stays]

    asyncio.run(body())


def test_a_connection_has_one_place_in_the_line() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        first, second = (Client(turns, read, 1) for _ in range(2))
        first.reading.wait_turn()
        first.reading.wait_turn()
        second.reading.wait_turn()
        await one_pass()
        await one_pass()
        assert read == [first, second]

    asyncio.run(body())


def test_what_is_held_is_not_read_in_its_turn() -> None:
    """Its turn came between the pause for its pipeline and the answer, and read one piece more."""

    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        held, other = (Client(turns, read, 2) for _ in range(2))
        for client in (held, other):
            client.reading.wait_turn()
        held.reading.hold()
        for _ in range(5):
            await one_pass()
        assert read == [other, other]
        assert held.paused
        held.reading.release()
        assert read == [other, other, held]

    asyncio.run(body())


def test_what_is_released_still_waits_for_its_turn() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        client = Client(turns, read, 1)
        client.reading.hold()
        client.reading.wait_turn()
        client.reading.release()
        assert read == []
        await one_pass()
        assert read == [client]

    asyncio.run(body())


class Parsing:
    """A client whose every slice takes ``secs`` of the turns' clock; ``order`` is what happened."""

    def __init__(self, turns: Turns, secs: float) -> None:
        self.now, self.secs = 0.0, secs
        turns.clock = lambda: self.now
        self.client = Client(turns, [], 1)
        self.order: list[Any] = []

    def parse(self, piece: Any) -> None:
        assert len(piece) <= SLICE
        self.order.append(bytes(piece[:1]))
        self.now += self.secs


PIECE = b"".join(bytes([65 + at]) * SLICE for at in range(5)) + b"Z"
ALL = [b"A", b"B", b"C", b"D", b"E", b"Z"]


def test_what_is_parsed_slowly_lets_others_have_their_turn() -> None:
    """A piece of tiny members or parts took 0.1 s and more, in which nobody else got anything."""

    async def body() -> None:
        turns = Turns()
        slow = Parsing(turns, SLICES_SECS / 2)
        slow.client.reading.in_slices(PIECE, slow.parse)
        assert (slow.order, slow.client.paused) == ([b"A", b"B"], True)
        asyncio.get_running_loop().call_soon(slow.order.append, "another")
        for _ in range(5):
            await one_pass()
        assert slow.order == [b"A", b"B", b"C", b"D", "another", b"E", b"Z"]
        assert slow.client.read == [slow.client], "read on once all is parsed"

    asyncio.run(body())


def test_what_is_parsed_fast_waits_for_nobody() -> None:
    async def body() -> None:
        fast = Parsing(Turns(), 0.0)
        fast.client.reading.in_slices(PIECE, fast.parse)
        assert (fast.order, fast.client.paused) == (ALL, False)

    asyncio.run(body())


def test_who_leaves_is_parsed_no_further() -> None:
    async def body() -> None:
        gone = Parsing(Turns(), SLICES_SECS)
        gone.client.reading.in_slices(PIECE, gone.parse)
        gone.client.closing = True
        await one_pass()
        assert gone.order == [b"A"]

    asyncio.run(body())

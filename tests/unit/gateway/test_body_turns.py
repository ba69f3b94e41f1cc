"""Connections with long bodies are read a few at a time, each in its turn, unless held."""

from __future__ import annotations

import asyncio
from typing import Any

from llmux.gateway.client.turns import AT_ONCE, Reading, Turns


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

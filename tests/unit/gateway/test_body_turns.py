"""Connections with long bodies are read a few at a time, each in its turn."""

from __future__ import annotations

import asyncio
from typing import Any

from llmux.gateway.client.turns import AT_ONCE, Turns


class Reader:
    """A transport that has always more to read, until ``left`` pieces are read."""

    def __init__(self, turns: Turns, read: list[Any], left: int) -> None:
        self.turns, self.read, self.left = turns, read, left
        self.closing = False
        self.paused = False

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
            self.turns.wait(self)


async def one_pass() -> None:
    await asyncio.sleep(0)


def test_a_pass_of_the_loop_reads_a_few_and_each_gets_its_turn() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        readers = [Reader(turns, read, 3) for _ in range(10 * AT_ONCE)]
        for reader in readers:
            turns.wait(reader)
        while any(reader.left for reader in readers):
            before = len(read)
            await one_pass()
            assert len(read) - before <= AT_ONCE
        assert read == readers * 3, "in the order in which they came"

    asyncio.run(body())


def test_who_leaves_is_passed_over() -> None:
    async def body() -> None:
        turns = Turns()
        read: list[Any] = []
        gone, stays = (Reader(turns, read, 1) for _ in range(2))
        turns.wait(gone)
        turns.wait(stays)
        gone.closing = True
        turns.wait(gone)
        turns.wait(None)
        await one_pass()
        assert read == [stays]

    asyncio.run(body())

"""What a worker passes on of the supervisor's news, and what it says of itself when asked."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway_harness import FakeSupervisor, Stage, in_loop, soon, stage, until

from llmux.gateway.control_feeds import MAX_UNREAD
from llmux.protocol import Collect, Collected, News, Watch

EVENT = {"id": 1, "type": "transition", "model": "alpha", "from": "stopped", "to": "starting"}


async def watching(running: Stage, path: str = "/events") -> Any:
    client = await running.client()
    client.send(path, method="GET")
    head = await client.head()
    assert head.status == 200
    await client.chunk()  # the first line, or comment: from here on it is watched
    return client


@in_loop
async def test_one_subscription_for_all_who_watch_and_none_when_they_left() -> None:
    async with stage() as running:
        first = await watching(running)
        assert await running.supervisor.hear(Watch) == Watch("events")
        second = await watching(running)
        running.supervisor.say(News("events", "", EVENT))
        for client in (first, second):
            chunk = await client.chunk()
            assert chunk.startswith(b"id: 1\nevent: transition\ndata: {") and chunk.endswith(
                b"\n\n"
            )
        first.leave()
        second.leave()
        assert await running.supervisor.hear(Watch) == Watch("events", on=False)


@in_loop
async def test_lines_go_to_those_who_watch_that_model() -> None:
    async with stage() as running:
        running.supervisor.answer = lambda _ask: {"ok": True, "result": {"lines": ["old"]}}
        client = await running.client()
        client.send("/logs/stream/alpha", method="GET")
        assert (await client.head()).headers["content-type"].startswith("text/plain")
        assert await client.chunk() == b"old\n"
        running.supervisor.say(News("logs", "beta", "not this"), News("logs", "alpha", "new"))
        assert await client.chunk() == b"new\n"


@in_loop
async def test_watching_goes_on_when_the_supervisor_comes_back() -> None:
    async with stage() as running:
        client = await watching(running)
        await running.supervisor.hear(Watch)
        await running.supervisor.stop()
        again = FakeSupervisor(running.supervisor.path)
        await again.start()
        try:
            assert await again.hear(Watch) == Watch("events")
            again.say(News("events", "", EVENT))
            assert b"transition" in await client.chunk()
        finally:
            await again.stop()


@in_loop
async def test_who_reads_too_slowly_is_dropped_and_hurts_nobody() -> None:
    async with stage() as running:
        feeds = running.gateway.feeds
        with feeds.subscribe("events") as slow, feeds.subscribe("events") as quick:
            seen: list[Any] = []

            async def read() -> None:
                async for item in quick.items(60):
                    seen.append(item)  # noqa: PERF401  # looked at while it grows

            reading = asyncio.ensure_future(read())
            for number in range(MAX_UNREAD + 1):
                feeds.heard(News("events", "", number))
                await asyncio.sleep(0)
            items = [item async for item in slow.items(60)]
            assert items == list(range(MAX_UNREAD)), "what it had, and then the end"
            await until(lambda: len(seen) == MAX_UNREAD + 1)
            reading.cancel()
            await soon(asyncio.gather(reading, return_exceptions=True))


@in_loop
async def test_a_worker_says_its_numbers_when_asked() -> None:
    async with stage() as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        client.chat()
        assert (await client.answer()).status == 200
        running.supervisor.say(Collect(7))
        answer = await running.supervisor.hear(Collected)
        assert answer.id == 7
        assert answer.snapshot["llmux_requests_total"] == [[["alpha", "200"], 1]]
        assert [["alpha"], 0] in answer.snapshot["llmux_in_flight"]


@in_loop
async def test_metrics_are_answered_without_a_supervisor() -> None:
    async with stage() as running:
        await running.supervisor.stop()
        await until(lambda: not running.gateway.link.up)
        client = await running.client()
        client.send("/metrics", method="GET")
        answer = await client.answer()
        assert answer.status == 200 and b"llmux_supervisor_up 0" in answer.body

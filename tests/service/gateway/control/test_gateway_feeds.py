"""What a worker passes on of the supervisor's news, and what it says of itself when asked."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import pytest
from gateway_harness import ADMIN, ADMINS, FakeSupervisor, Stage, in_loop, soon, stage, until

from llmux.gateway.link import Link
from llmux.gateway.metrics import TIMEOUT_HEADER, _seconds
from llmux.gateway.subscriptions import MAX_UNREAD
from llmux.protocol import Collect, Collected, News, Progress, Watch

SILENT = "llmux_supervisor_silent_seconds"
EVENT: dict[str, Any] = {
    "id": 1, "time": 1.5, "type": "transition", "model": "alpha", "from": "stopped",
    "to": "starting",
}  # fmt: skip
ODD_EVENTS: tuple[Any, ...] = (
    EVENT | {"id": "1"}, EVENT | {"id": None}, EVENT | {"id": True}, EVENT | {"time": "now"},
    EVENT | {"type": []}, {"type": "transition", "time": 1.5}, "1", None, [EVENT],
)  # fmt: skip


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
    async with stage(keys=lambda: ADMINS) as running:
        running.supervisor.answer = lambda _ask: {"ok": True, "result": {"lines": ["old"]}}
        client = await running.client()
        client.send("/logs/stream/alpha", method="GET", headers=(ADMIN,))
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
        feeds = running.gateway.subscriptions
        with feeds.subscribe("events") as slow, feeds.subscribe("events") as quick:
            seen: list[Any] = []

            async def read() -> None:
                async for item in quick.items(60):
                    seen.append(item)  # noqa: PERF401  # looked at while it grows

            reading = asyncio.ensure_future(read())
            for number in range(MAX_UNREAD + 1):
                feeds.publish(News("events", "", EVENT | {"id": number}))
                await asyncio.sleep(0)
            items = [item async for item in slow.items(60)]
            numbers = [item["id"] for item in items]
            assert numbers == list(range(MAX_UNREAD)), "what it had, and then the end"
            await until(lambda: len(seen) == MAX_UNREAD + 1)
            reading.cancel()
            await soon(asyncio.gather(reading, return_exceptions=True))


@in_loop
async def test_a_feed_outlives_any_number_of_silences() -> None:
    async with stage() as running:
        feeds = running.gateway.subscriptions
        with feeds.subscribe("events") as feed:
            items = feed.items(0)
            for number in (1, 2):
                assert [await anext(items) for _ in range(3)] == [None] * 3
                feeds.publish(News("events", "", EVENT | {"id": number}))
                assert (await anext(items))["id"] == number


@in_loop
async def test_a_worker_says_its_numbers_when_asked() -> None:
    async with stage() as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        for _ in range(3):
            client.chat()
            assert (await client.answer()).status == 200
        running.supervisor.say(Collect(7))
        answer = await running.supervisor.hear(Collected)
        assert answer.id == 7
        assert answer.snapshot["llmux_requests_total"] == [[["alpha", "200"], 3]]
        assert [["alpha"], 0] in answer.snapshot["llmux_in_flight"]
        # What has not happened yet is 0 and not absent: increase() would miss the first one.
        for name in ("responses_broken", "abandoned", "retried"):
            (found,) = [v for k, v in answer.snapshot.items() if name in k]
            assert sorted(found) == [[["alpha"], 0], [["beta"], 0]]


@in_loop
async def test_metrics_are_answered_without_a_supervisor() -> None:
    async with stage() as running:
        await running.supervisor.stop()
        await until(lambda: not running.gateway.link.up)
        client = await running.client()
        client.send("/metrics", method="GET")
        answer = await client.answer()
        assert answer.status == 200 and b"llmux_supervisor_up 0" in answer.body


@in_loop
async def test_a_supervisor_that_says_nothing_is_seen_in_metrics_in_time() -> None:
    """As one that is stopped: its connections stay, and Prometheus waits no longer than it says."""
    async with stage() as running:
        running.supervisor.answers = False
        client = await running.client()

        async def silent_secs() -> float:
            client.send("/metrics", method="GET", headers=(f"{TIMEOUT_HEADER}: 0.2",))
            answer = await client.answer()
            assert answer.status == 200 and b"llmux_supervisor_up 0" in answer.body
            lines = answer.body.decode().splitlines()
            return next(float(x.split()[1]) for x in lines if x.startswith(f"{SILENT} "))

        assert await silent_secs() >= 0.09, "half of the time was waited"
        assert await silent_secs() >= 0.18, "since the last message, not the last page"
        now = asyncio.get_running_loop().time
        before = now()
        running.supervisor.say(Collect(1))
        await running.supervisor.hear(Collected)
        assert await silent_secs() <= now() - before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0.2", 0.2), ("1", 1.0), ("9.5", 9.5), ("", inf), ("0", inf), ("-3", inf), ("soon", inf)],
)
def test_how_long_prometheus_waits_is_what_it_says(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@in_loop
async def test_a_supervisor_that_lives_is_heard_though_nothing_happens() -> None:
    async with stage() as running:
        link = Link(running.supervisor.path, alive_secs=0.01)
        work = asyncio.create_task(link.run())
        try:
            signs = running.supervisor.signs
            await until(lambda: running.supervisor.signs > signs + 2)
            now = asyncio.get_running_loop().time
            after = now()
            await until(lambda: link.silent_secs < now() - after)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@in_loop
async def test_only_what_is_known_is_subscribed_to() -> None:
    """A name of 15 kB that no model has was kept for ever, here and by the supervisor."""
    async with stage(keys=lambda: ADMINS) as running:
        for path in ("/logs/stream/" + "x" * 5000, "/logs/" + "x" * 5000):
            client = await running.client()
            client.send(path, method="GET", headers=(ADMIN,))
            assert (await client.answer()).status == 404
        assert running.gateway.subscriptions.greetings() == []
        assert not [message for message in running.supervisor.heard if message.kind == "watch"]


@in_loop
async def test_numbers_of_any_length_are_no_fault() -> None:
    digits = "1" * 5000
    async with stage(keys=lambda: ADMINS) as running:
        running.supervisor.answer = lambda _ask: {"ok": True, "result": {"events": []}}
        client = await running.client()
        client.send(f"/logs/alpha?lines={digits}", method="GET", headers=(ADMIN,))
        assert (await client.answer()).status == 400
        client.send("/events", method="GET", headers=(ADMIN, f"Last-Event-ID: {digits}"))
        assert (await client.head()).status == 200


@in_loop
async def test_events_of_other_types_are_refused_by_name() -> None:
    """The id was compared as it came: a text ended in a TypeError, and so in a traceback."""
    pages: list[Any] = [{"events": [EVENT, odd]} for odd in ODD_EVENTS]
    pages += [[], None, {"events": {}}, {"events": [EVENT], "more": "yes"}]
    async with stage(keys=lambda: ADMINS) as running:
        for page in pages:
            running.supervisor.answer = lambda _ask, page=page: {"ok": True, "result": page}  # type: ignore[misc]  # bound here
            client = await running.client()
            client.send("/events", method="GET", headers=(ADMIN, "Last-Event-ID: 0"))
            answer = await client.answer()
            assert answer.status == 500, page
            assert "cannot read the supervisor's events" in answer.json()["error"]["message"]


@in_loop
async def test_news_of_other_types_are_dropped_and_the_feed_goes_on() -> None:
    async with stage() as running:
        client = await watching(running)
        await running.supervisor.hear(Watch)
        running.supervisor.say(*(News("events", "", odd) for odd in ODD_EVENTS))
        running.supervisor.say(News("events", "", EVENT | {"id": 7}))
        assert (await client.chunk()).startswith(b"id: 7\n")


def test_the_progress_of_a_long_order_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint over HTTP: the supervisor tells its progress several times a second."""

    @in_loop
    async def order() -> None:
        async with stage(keys=lambda: ADMINS) as running:

            def answer(ask: Any) -> dict[str, Any]:
                running.supervisor.say(Progress(ask.id, "dump", 0.5, 1, 2))
                return {"ok": True, "result": {"message": "made"}}

            running.supervisor.answer = answer
            client = await running.client()
            client.send("/control/checkpoint", {"model": "alpha"}, headers=(ADMIN,))
            assert (await client.answer()).json() == {"message": "made"}

    order()
    assert "unexpected" not in caplog.text

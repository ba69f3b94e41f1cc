"""What clients watch: one subscription at the supervisor for all, an end for who is slow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway import subscriptions as subscriptions_module
from llmux.gateway.event_feed import check_news, read_page
from llmux.gateway.subscriptions import Subscription, Subscriptions
from llmux.protocol import Message, News, Watch
from llmux.typed_json import BadJson


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> bool:
        self.sent.append(message)
        return True


def an_event(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "type": "transition", "time": 1.5} | more


def all_of(link: FakeLink) -> Subscriptions:
    return Subscriptions(link)  # type: ignore[arg-type]


async def read(subscription: Subscription, count: int = 1000) -> list[Any]:
    """What is there; "end" where it ends."""
    found: list[Any] = []
    items = subscription.items(1e-9)
    while len(found) < count:
        try:
            item = await anext(items)
        except StopAsyncIteration:
            return [*found, "end"]
        if item is None:
            return found
        found.append(item)
    return found


def test_all_readers_of_a_topic_share_one_watch() -> None:
    async def run() -> None:
        link = FakeLink()
        all_ = all_of(link)
        with all_.subscribe("logs", "a") as first:
            with all_.subscribe("logs", "a") as second, all_.subscribe("logs", "b") as other:
                assert link.sent == [Watch("logs", "a"), Watch("logs", "b")]
                assert all_.greetings() == link.sent
                all_.publish(News("logs", "a", "one"))
                all_.publish(News("logs", "b", "two"))
                all_.publish(News("logs", "c", "nobody's"))
                all_.publish(News("logs", "a", "three"))
                assert await read(first) == ["one", "three"]
                assert await read(second) == ["one", "three"]
                assert await read(other) == ["two"]
            assert link.sent[2:] == [Watch("logs", "b", on=False)]
            all_.publish(News("logs", "a", "four"))
            assert await read(first) == ["four"]
            assert await read(second) == []
        assert link.sent[3:] == [Watch("logs", "a", on=False)]
        assert all_.greetings() == []
        with all_.subscribe("logs", "a"):
            assert link.sent[4:] == [Watch("logs", "a")]

    asyncio.run(run())


def test_who_does_not_read_gets_an_end_and_the_others_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions_module, "MAX_UNREAD", 3)

    async def run() -> None:
        link = FakeLink()
        all_ = all_of(link)
        with all_.subscribe("events") as slow, all_.subscribe("events") as quick:
            for number in range(1, 7):
                all_.publish(News("events", "", an_event(number)))
                assert await read(quick) == [an_event(number)]
            assert await read(slow) == [*(an_event(number) for number in (1, 2, 3)), "end"]
            assert link.sent == [Watch("events")], "quick still watches"
        assert link.sent == [Watch("events"), Watch("events", on=False)]
        with all_.subscribe("events") as alone:
            for number in range(5):
                all_.publish(News("events", "", an_event(number)))
            assert link.sent[2:] == [Watch("events"), Watch("events", on=False)]
            assert (await read(alone))[-1] == "end"
        assert len(link.sent) == 4

    asyncio.run(run())


def test_all_end_when_the_worker_stops_and_none_begins() -> None:
    async def run() -> None:
        link = FakeLink()
        all_ = all_of(link)
        with all_.subscribe("events") as one, all_.subscribe("logs", "a") as two:
            all_.publish(News("events", "", an_event(1)))
            all_.close()
            assert await read(one) == [an_event(1), "end"]
            assert await read(two) == ["end"]
            sent = len(link.sent)
            with all_.subscribe("logs", "b") as late:
                assert await read(late) == ["end"]
            assert len(link.sent) == sent

    asyncio.run(run())


def test_who_waits_is_told_that_nothing_came_and_waits_on() -> None:
    async def run() -> None:
        all_ = all_of(FakeLink())
        with all_.subscribe("logs", "a") as subscription:
            items = subscription.items(1e-9)
            assert [await anext(items), await anext(items)] == [None, None]
            all_.publish(News("logs", "a", "line"))
            assert await anext(items) == "line"
            assert await anext(items) is None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("topic", "item", "good"),
    [
        ("events", an_event(1), True),
        ("timeline", an_event(1, to="serving"), True),
        ("events", {"id": 1, "type": "x"}, False),
        ("events", {"id": 1, "time": 1.0}, False),
        ("timeline", {"type": "x", "time": 1.0}, False),
        ("events", an_event(1, id="1"), False),
        ("timeline", an_event(1, type=None), False),
        ("events", "a line", False),
        ("events", None, False),
        ("logs", "a line", True),
        ("logs", "", True),
        ("logs", an_event(1), False),
        ("logs", None, False),
    ],
)
def test_news_that_cannot_be_read_are_named_and_left_out(
    topic: str, item: Any, good: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> list[Any]:
        all_ = all_of(FakeLink())
        with all_.subscribe(topic, "a") as subscription:
            all_.publish(News(topic, "a", item))
            return await read(subscription)

    assert asyncio.run(run()) == [item] * good
    assert (f'ignoring news of "{topic}"' in caplog.text) is not good
    if good:
        check_news(News(topic, "a", item))
    else:
        with pytest.raises(BadJson):
            check_news(News(topic, "a", item))


def test_a_fault_of_ours_is_not_called_the_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_news: News) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(subscriptions_module, "check_news", broken)

    async def run() -> None:
        with pytest.raises(KeyError):
            all_of(FakeLink()).publish(News("logs", "a", "line"))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"events": []}, ([], False)),
        ({"events": [], "more": True}, ([], True)),
        ({"events": [an_event(1, x=2)], "more": False}, ([an_event(1, x=2)], False)),
        ({"events": [an_event(1), {}]}, None),
        ({"events": {}}, None),
        ({"events": ["x"]}, None),
        ({}, None),
        ([], None),
        (None, None),
        ({"events": [], "more": "yes"}, None),
    ],
)
def test_a_page_of_events_is_checked_whole(result: Any, expected: Any) -> None:
    if expected is not None:
        assert read_page(result) == expected
        return
    with pytest.raises(Refused, match="cannot read the supervisor's events") as refused:
        read_page(result)
    assert refused.value.reason is Reason.INTERNAL
    assert refused.value.hint is not None

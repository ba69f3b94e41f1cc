"""Topics that clients of this worker watch: one subscription at the supervisor per topic.

A client that reads too slowly loses its subscription; all of them end when the worker stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from llmux.gateway.event_feed import check_news
from llmux.gateway.link import Link
from llmux.protocol import Message, News, Watch
from llmux.typed_json import BadJson

logger = logging.getLogger(__name__)

MAX_UNREAD: Final = 1000
_END: Final = object()

Topic = tuple[str, str]  # topic, model


class Subscriptions:
    """``publish`` takes all News of the link; ``greetings`` are sent after every reconnect."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._readers: dict[Topic, set[asyncio.Queue[Any]]] = {}
        self._closed = False

    def greetings(self) -> list[Message]:
        return [Watch(topic, model) for topic, model in self._readers]

    def publish(self, news: News) -> None:
        try:
            check_news(news)
        except BadJson as error:
            logger.warning('ignoring news of "%s": %s', news.topic, error)
            return
        for queue in list(self._readers.get((news.topic, news.model), ())):
            if queue.qsize() >= MAX_UNREAD:
                self._drop((news.topic, news.model), queue)
                queue.put_nowait(_END)
            else:
                queue.put_nowait(news.item)

    def subscribe(self, topic: str, model: str = "") -> Subscription:
        """Subscribe before asking for past items, so that none is missed in between."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        key = (topic, model)
        if self._closed:
            queue.put_nowait(_END)
        elif key not in self._readers:
            self._readers[key] = {queue}
            self._link.send(Watch(topic, model))
        else:
            self._readers[key].add(queue)
        return Subscription(self, key, queue)

    def _drop(self, key: Topic, queue: asyncio.Queue[Any]) -> None:
        readers = self._readers.get(key)
        if readers is None:
            return
        readers.discard(queue)
        if not readers:
            del self._readers[key]
            self._link.send(Watch(*key, on=False))

    def close(self) -> None:
        self._closed = True
        for readers in self._readers.values():
            for queue in readers:
                queue.put_nowait(_END)


class Subscription:
    """A context manager; iterate over ``items`` until the subscription ends."""

    def __init__(self, owner: Subscriptions, key: Topic, queue: asyncio.Queue[Any]) -> None:
        self._owner = owner
        self._key = key
        self._queue = queue

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._owner._drop(self._key, self._queue)

    async def items(self, idle_secs: float) -> AsyncIterator[Any]:
        """Each item as it arrives; None after ``idle_secs`` without one."""
        while True:
            try:
                async with asyncio.timeout(idle_secs):
                    item = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if item is _END:
                return
            yield item

"""What clients of this worker watch: one subscription at the supervisor for all who want the same.

A client that reads too slowly loses its subscription; everybody's ends when the worker stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from llmux.gateway.link import Link
from llmux.protocol import Message, News, Watch

MAX_UNREAD: Final = 1000
_END: Final = object()

Topic = tuple[str, str]  # topic, model


class Feeds:
    """``heard`` gets all News of the link; ``greetings`` is said anew after every reconnect."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._readers: dict[Topic, set[asyncio.Queue[Any]]] = {}
        self._closed = False

    def greetings(self) -> list[Message]:
        return [Watch(topic, model) for topic, model in self._readers]

    def heard(self, news: News) -> None:
        for queue in list(self._readers.get((news.topic, news.model), ())):
            if queue.qsize() >= MAX_UNREAD:
                self._drop((news.topic, news.model), queue)
                queue.put_nowait(_END)
            else:
                queue.put_nowait(news.item)

    def subscribe(self, topic: str, model: str = "") -> Subscription:
        """From now on; before anything else is asked, so that nothing is missed in between."""
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
    """A context; iterate for the items, until the subscription is lost or the worker stops."""

    def __init__(self, feeds: Feeds, key: Topic, queue: asyncio.Queue[Any]) -> None:
        self._feeds = feeds
        self._key = key
        self._queue = queue

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._feeds._drop(self._key, self._queue)

    async def items(self, idle_secs: float) -> AsyncIterator[Any]:
        """Each item as it comes; None when nothing came for so long."""
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

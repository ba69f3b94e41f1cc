"""Events of the supervisor, checked where they come in: their number, time and type are used here.

What else an event says is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmux import typed_json
from llmux.errors import Reason, Refused
from llmux.protocol import News

EVENT_TOPICS = frozenset({"events", "timeline"})


@dataclass(frozen=True, slots=True)
class _Event:
    id: int
    type: str
    time: float


@dataclass(frozen=True, slots=True)
class _Page:
    events: list[Mapping[str, Any]]
    more: bool = False


def read_page(result: Any) -> tuple[list[dict[str, Any]], bool]:
    """The answer to the verb ``events``: (events, whether there are more). Raises Refused."""
    try:
        page = typed_json.read(_Page, result)
        for event in page.events:
            typed_json.read(_Event, event)
    except typed_json.BadJson as error:
        raise Refused(
            Reason.INTERNAL,
            f"cannot read the supervisor's events: {error}",
            hint="llmux version; restart both services after an upgrade",
        ) from error
    return [dict(event) for event in page.events], page.more


def check_news(news: News) -> None:
    """Raises BadJson for an event without number, time and type, or a line that is no string."""
    if news.topic in EVENT_TOPICS:
        typed_json.read(_Event, news.item)
    elif not isinstance(news.item, str):
        raise typed_json.BadJson(f"expected a string, got {type(news.item).__name__}")

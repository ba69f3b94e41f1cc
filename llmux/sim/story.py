"""From events, in the form that the supervisor publishes them, to spans, waits and failures. Pure.

The page does the same (`gateway/ui/static/history.js`), and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

NOT_RESIDENT: Final = frozenset({"stopped", "parked"})
SAME_SECS: Final = 0.5  # between a model's transition to serving and its switch
LAST_WAIT_SECS: Final = 1.0  # of a wait whose end was not noted

Event = Mapping[str, Any]


@dataclass(slots=True)
class Stay:
    """A model in one state. ``change``: the switch that made it resident."""

    model: str
    state: str
    gpus: Sequence[int]
    began: float
    end: float
    reason: str
    change: Event | None = None


@dataclass(slots=True)
class Wait:
    """Requests of a model, from the first one that waited to the last. ``steps``: (time, how many
    wait from then on)."""

    model: str
    began: float
    end: float
    most: int
    steps: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Failure:
    model: str
    began: float
    reason: str


@dataclass(slots=True)
class Story:
    models: list[str]
    spans: list[Stay] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def most(self, model: str) -> int:
        """The most requests of the model that waited at once."""
        return max((wait.most for wait in self.waits if wait.model == model), default=0)


def story_of(events: Sequence[Event], since: float, now: float) -> Story:
    """Of the events from ``since`` to ``now``, which are in the order of time."""
    own: dict[str, list[Event]] = {}
    for event in events:
        if event["type"] != "order":
            own.setdefault(event["model"], []).append(event)
    story = Story(sorted(own))
    for name in story.models:
        story.spans += _spans(name, own[name], since, now)
        story.waits += _waits(name, own[name], since)
        story.failures += [
            Failure(name, event["time"], event["reason"])
            for event in own[name]
            if event["type"] == "transition" and event["to"] == "failed"
        ]
    return story


def _spans(name: str, events: Sequence[Event], since: float, now: float) -> list[Stay]:
    moves = [event for event in events if event["type"] in ("transition", "removed")]
    if not moves:
        return []
    first = moves[0]
    spans: list[Stay] = []
    if first.get("from"):
        began = first["time"] - (first.get("duration_secs") or 0.0)
        spans.append(Stay(name, first["from"], first["gpus"], began, first["time"], ""))
    ends = [move["time"] for move in moves[1:]] + [now]
    for move, end in zip(moves, ends, strict=True):
        if move["type"] == "transition":
            gpus, reason = move["gpus"], move["reason"]
            spans.append(Stay(name, move["to"], gpus, move["time"], end, reason))
    spans = [span for span in spans if span.end > since and span.state not in NOT_RESIDENT]
    for span in spans:
        span.began = max(since, span.began)
    at = 0
    for change in (event for event in events if event["type"] == "switch"):
        while at < len(spans) and (
            spans[at].state != "serving" or spans[at].began <= change["time"] - SAME_SECS
        ):
            at += 1
        if at < len(spans) and spans[at].began < change["time"] + SAME_SECS:
            spans[at].change = change
    return spans


def _waits(name: str, events: Sequence[Event], since: float) -> list[Wait]:
    waits: list[Wait] = []
    wait: Wait | None = None
    for event in events:
        if event["type"] != "queue":
            continue
        time, waiting = event["time"], event["waiting"]
        if waiting == 0:
            if wait is not None:
                wait.end = time
            wait = None
            continue
        if wait is None:
            wait = Wait(name, max(since, time), time, 0, [])
            waits.append(wait)
        wait.steps.append((time, waiting))
        wait.most = max(wait.most, waiting)
        wait.end = time + LAST_WAIT_SECS
    return [wait for wait in waits if wait.end > since]

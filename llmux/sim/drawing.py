"""The drawing of the timeline as plain values: what is where, how wide, in which colour. Pure.

The page makes the same of the same events (`gateway/ui/static/drawing.js`); what both look like is
in `look.js` there, and a test compares the two.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Final

from llmux.sim.story import Event, Failure, Stay, Story, Wait

LOOK: Final = Path(__file__).parents[1] / "gateway/ui/static/look.js"

Shape = dict[str, Any]
Clock = Callable[[float], str]  # a time in words


@functools.cache
def look() -> Any:
    """Sizes in px, colours as (fill, ink of words on it), opacity by state."""
    return json.loads(LOOK.read_text("utf-8").partition("export default ")[2].rstrip("; \n"))


@dataclass(frozen=True, slots=True)
class Placed:
    """A stay on one of its GPUs, in one of the slots of that GPU's lane."""

    stay: Stay
    gpu: int
    slot: int
    slots: int


Item = Placed | Wait | Failure


def items_of(story: Story, gpus: int) -> list[Item]:
    items: list[Item] = []
    shown = (stay for stay in story.spans if stay.state in look()["shades"])
    by_time = sorted(shown, key=lambda stay: stay.began)
    for gpu in range(gpus):
        ends: list[tuple[str, float]] = []  # of each slot; several models may be on one GPU
        own: list[tuple[Stay, int]] = []
        for stay in by_time:
            if gpu not in stay.gpus:
                continue
            slot = _slot(stay, ends)
            ends[slot : slot + 1] = [(stay.model, stay.end)]
            own.append((stay, slot))
        items += [Placed(stay, gpu, slot, len(ends)) for stay, slot in own]
    return [*items, *story.waits, *story.failures]


def _slot(stay: Stay, ends: Sequence[tuple[str, float]]) -> int:
    for slot, (model, until) in enumerate(ends):
        if model == stay.model or until <= stay.began + 0.1:
            return slot
    return len(ends)


@dataclass(frozen=True, slots=True)
class Size:
    """``width`` in px, ``unit``: px of a look's px."""

    width: float
    unit: float
    gpus: int


class Drawing:
    """``shapes``: each with its kind and its numbers in px; ``height`` of them all."""

    def __init__(
        self, story: Story, items: Sequence[Item], window: tuple[float, float], size: Size,
        clock: Clock,
    ) -> None:  # fmt: skip
        self._story = story
        self._items = items
        self._from, self._to = window
        self._size = size
        self._clock = clock
        self._place()
        self.colours = self._choose_colours()
        self.shapes: list[Shape] = [*self._lanes_and_labels(), *self._all_items(), *self._axis()]

    def _place(self) -> None:
        style, unit, width = look(), self._size.unit, self._size.width
        narrow = width / unit < style["left"]["from"]
        self._left: float = style["left"]["narrow" if narrow else "wide"] * unit
        self._right: float = width - style["right"] * unit
        slots = [1] * self._size.gpus
        waiting: set[str] = set()
        for item in self._items:
            if isinstance(item, Placed):
                slots[item.gpu] = item.slots
            else:
                waiting.add(item.model)
        self._lanes = [name for name in self._story.models if name in waiting]
        self._heights = [max(style["lane"], style["slot"] * count) * unit for count in slots]
        y = style["gap"] * unit
        self._tops: list[float] = []
        for height in self._heights:
            self._tops.append(y)
            y += height + style["gap"] * unit
        self._at: dict[str, float] = {}
        for name in self._lanes:
            self._at[name] = y
            y += (style["thin"] + style["gap"]) * unit
        self._axis_y = y + 4 * unit
        self.height = y + style["axis"] * unit

    def _choose_colours(self) -> dict[str, tuple[str, str]]:
        """Only what is drawn takes a colour: of fifty models few are."""
        models = {item.stay.model for item in self._items if isinstance(item, Placed)}
        models |= {item.model for item in self._items if isinstance(item, Wait)}
        colours = look()["colours"]
        return {name: colours[at % len(colours)] for at, name in enumerate(sorted(models))}

    def _x(self, time: float) -> float:
        scale = (self._right - self._left) / max(self._to - self._from, 1e-9)
        return self._left + (min(self._to, max(self._from, time)) - self._from) * scale

    # ---- lanes and the axis ---------------------------------------------------------------------

    def _lanes_and_labels(self) -> Iterator[Shape]:
        style, unit = look(), self._size.unit
        for gpu, (y, height) in enumerate(zip(self._tops, self._heights, strict=True)):
            yield self._label(f"GPU {gpu}", "", y + style["lane"] * unit * 0.7)
            yield self._rail(y, height)
        for name in self._lanes:
            y = self._at[name]
            most = self._story.most(name)
            yield self._label(name, str(most or ""), y + style["thin"] * unit * 0.75)
            yield self._rail(y, style["thin"] * unit)

    def _label(self, text: str, most: str, y: float) -> Shape:
        letter, unit = look()["letter"], self._size.unit
        room = max(3, int((self._left - (4 + letter * len(most)) * unit) / (letter * unit)) - 1)
        return {
            "kind": "label", "x": 2 * unit, "y": y, "title": text, "most": most,
            "text": f"{text[: room - 1]}…" if len(text) > room else text,
            "mostX": self._left - 4 * unit,
        }  # fmt: skip

    def _rail(self, y: float, height: float) -> Shape:
        width = max(0.0, self._right - self._left)
        return {"kind": "rail", "x": self._left, "y": y, "width": width, "height": height}

    def _axis(self) -> Iterator[Shape]:
        steps, unit, width = look()["steps"], self._size.unit, self._size.width
        most = max(2, int((width - self._left) / (90 * unit)))
        length = self._to - self._from
        every = next((step for step in steps if length / step <= most), steps[-1])
        for number in range(math.ceil(self._from / every), math.floor(self._to / every) + 1):
            x = self._x(number * every)
            if width - x >= 40 * unit:  # else its text would be cut
                yield {
                    "kind": "tick", "time": number * every, "x": x, "y": self._axis_y,
                    "text": self._clock(number * every), "textY": self._axis_y + 14 * unit,
                }  # fmt: skip

    # ---- what happened --------------------------------------------------------------------------

    def _all_items(self) -> Iterator[Shape]:
        edges: dict[tuple[int, int], float] = {}  # of each slot: where the last span ends
        for item in self._items:
            stay = item.stay if isinstance(item, Placed) else item
            end = stay.began if isinstance(stay, Failure) else stay.end
            if end < self._from or stay.began > self._to:
                continue
            if isinstance(item, Placed):
                yield from self._span(item, edges)
            elif isinstance(item, Wait):
                yield self._wait(item)
            else:
                yield self._failure(item)

    def _span(self, item: Placed, edges: dict[tuple[int, int], float]) -> Iterator[Shape]:
        """Nothing where it would lie on the px of another: an hour of switches is more than there
        are px."""
        style, unit, stay = look(), self._size.unit, item.stay
        height = self._heights[item.gpu] / item.slots
        x, end, slot = self._x(stay.began), self._x(stay.end), (item.gpu, item.slot)
        if end < edges.get(slot, -1.0):
            return
        width = max(1.0, end - x)
        edges[slot] = x + width
        fill, ink = self.colours[stay.model]
        room = (style["letter"] * len(stay.model) + 8) * unit
        fits = stay.state == "serving" and width > room and height > 11 * unit
        yield {
            "kind": "span", "title": describe(item, self._clock), "x": x, "width": width,
            "y": self._tops[item.gpu] + item.slot * height, "fill": fill, "ink": ink,
            "height": max(2.0, height - (1 if item.slots > 1 else 0)),
            "opacity": style["shades"][stay.state], "inside": stay.model if fits else "",
        }  # fmt: skip

    def _wait(self, item: Wait) -> Shape:
        thin = look()["thin"] * self._size.unit
        base, most = self._at[item.model] + thin, max(1, self._story.most(item.model))
        points = [(self._x(item.began), base)]
        untils = [time for time, _ in item.steps[1:]] + [item.end]
        for (time, waiting), until in zip(item.steps, untils, strict=True):
            if until >= self._from and time <= self._to:
                y = base - thin * waiting / most
                points += [(self._x(time), y), (self._x(until), y)]
        points.append((max(self._x(item.end), points[0][0] + 1), base))
        return {
            "kind": "wait", "title": describe(item, self._clock), "points": _thinned(points),
            "fill": self.colours[item.model][0], "opacity": look()["wait"],
        }  # fmt: skip

    def _failure(self, item: Failure) -> Shape:
        unit = self._size.unit
        return {
            "kind": "failure", "title": describe(item, self._clock), "x": self._x(item.began),
            "y": self._at[item.model] + look()["thin"] * unit / 2, "arm": 5 * unit,
        }  # fmt: skip


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many steps within a px the highest is drawn."""
    kept: list[tuple[float, float]] = []
    for x, y in points:
        if len(kept) > 2 and x - kept[-2][0] < 0.5:
            kept[-1] = (x, min(kept[-1][1], y))
        else:
            kept.append((x, y))
    kept[-1] = points[-1]
    return kept


# ---- in words -----------------------------------------------------------------------------------


def describe(item: Item, clock: Clock) -> str:
    if isinstance(item, Wait):
        requests = f"{item.most} request{'' if item.most == 1 else 's'}"
        lasted = duration(item.end - item.began)
        return f"{item.model}: up to {requests} waited {lasted}, from {clock(item.began)}"
    if isinstance(item, Failure):
        return f"{item.model} failed at {clock(item.began)}: {item.reason}"
    stay = item.stay
    gpus = ", ".join(map(str, stay.gpus))
    why = f" ({stay.reason})" if stay.reason else ""
    return (
        f"{stay.model} {stay.state} on GPU {gpus}, {duration(stay.end - stay.began)}"
        f" from {clock(stay.began)}{why}{_phases(stay.change)}"
    )


def _phases(change: Event | None) -> str:
    if change is None:
        return ""
    up = "start" if change["cold"] else "wake"
    return (
        f"; switch of {duration(change['duration_secs'])}: drain {duration(change['drain_secs'])},"
        f" park {duration(change['park_secs'])}, {up} {duration(change['up_secs'])}"
    )


def duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    whole = int(seconds)
    if seconds < 1:
        return f"{math.floor(seconds * 1000 + 0.5)} ms"
    if seconds < 10:
        return f"{Decimal(seconds).quantize(Decimal('0.1'), ROUND_HALF_UP)} s"  # as toFixed
    if seconds < 60:
        return f"{math.floor(seconds + 0.5)} s"
    if seconds < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if seconds < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"

"""The page's timeline and that of `llmux sim --plot` are the same drawing of the same events."""

from __future__ import annotations

import json
import random
from types import MappingProxyType
from typing import Any

import pytest
from page_browser import Browser
from page_server import Daemon

from llmux.config.schema import Config, ModelConfig
from llmux.sim.costs import Costs, ModelCosts
from llmux.sim.drawing import Drawing, Size, items_of
from llmux.sim.story import story_of
from llmux.sim.trace import Arrival
from llmux.sim.world import Result, Simulation

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

JSON = dict[str, Any]
Server = tuple[Daemon, int]
STATES = ("stopped", "starting", "serving", "draining", "parking", "parked", "waking", "failed")
NAMES = ("a", "Qwen/Qwen3-8B", "<b>", "long-" * 6, "zz")

DRAWN_BY_THE_PAGE = """async (cases) => {
  const { draw, itemsOf } = await import(new URL("static/drawing.js", location.href).href);
  const { history } = await import(new URL("static/history.js", location.href).href);
  return cases.map(({ events, since, now, window, size }) => {
    const story = history(events, new Map(), since, now);
    return draw(story, itemsOf(story, size.gpus), window, size, (time) => `${time.toFixed(4)} s`);
  });
}"""


def drawn_by_the_simulator(case: JSON) -> JSON:
    story = story_of(case["events"], case["since"], case["now"])
    window = (case["window"]["from"], case["window"]["to"])
    size = Size(**case["size"])
    drawing = Drawing(story, items_of(story, size.gpus), window, size, "{:.4f} s".format)
    return {"height": drawing.height, "shapes": drawing.shapes}


def same(page: Any, simulator: Any, where: str) -> None:
    """``id`` is the page's own, for its elements."""
    if isinstance(page, dict):
        assert page.keys() - {"id"} == simulator.keys(), where
        for key, value in simulator.items():
            same(page[key], value, f"{where}.{key}")
    elif isinstance(page, list):
        assert len(page) == len(simulator), f"{where}: {page} and {simulator}"
        for number, (ours, theirs) in enumerate(zip(page, simulator, strict=True)):
            same(ours, theirs, f"{where}[{number}]")
    elif isinstance(page, int | float):
        assert page == pytest.approx(simulator, abs=1e-6), where
    else:
        assert page == simulator, where


# ---- what is drawn -------------------------------------------------------------------------------


def case_of(events: list[JSON], choose: random.Random, gpus: int) -> JSON:
    """An hour or a part of it, on a small screen or a large one."""
    now = (events[-1]["time"] if events else 1000.0) + 5
    since = choose.choice([0.0, 1005.0])
    begin = choose.uniform(1000.0, now)
    windows = [(since or 1000.0, now), (begin, begin + choose.uniform(0.5, 100))]
    start, end = choose.choice(windows)
    size = {
        "width": choose.choice([320, 1200, 3800]),
        "unit": choose.choice([1, 1.4]),
        "gpus": gpus,
    }
    window = {"from": start, "to": end}
    return {"events": events, "since": since, "now": now, "window": window, "size": size}


def random_events(choose: random.Random, count: int, gpus: int) -> list[JSON]:
    """Any order of states: supervisors restart, events are lost."""
    time = 1000.0
    events: list[JSON] = []
    for _ in range(count):
        time = round(time + choose.choice([0, 0.01, 0.3, 2, 30]) * choose.random(), 3)
        for facts in random_facts(choose, gpus):
            event = {"id": len(events) + 1, "time": time, "model": choose.choice(NAMES)} | facts
            events.append(event)
    return events


def random_facts(choose: random.Random, gpus: int) -> list[JSON]:
    kind = choose.random()
    if kind < 0.3:
        return [{"type": "queue", "waiting": choose.randint(0, 3)}]
    if kind < 0.4:
        return [{"type": choose.choice(["removed", "order"])}]
    move = {
        "type": "transition", "from": choose.choice([None, *STATES]), "to": choose.choice(STATES),
        "reason": choose.choice(["", 'no <room> "here"']),
        "gpus": choose.sample(range(gpus), choose.randint(1, gpus)),
        "duration_secs": choose.choice([None, 1.5]),
    }  # fmt: skip
    if kind < 0.7:
        return [move]
    name = choose.choice(NAMES)
    switch = {
        "type": "switch", "victims": [], "cold": choose.random() < 0.5, "drain_secs": 0.01,
        "park_secs": 0.25, "up_secs": 3.25, "duration_secs": choose.choice([9.95, 61.5, 7200.0]),
    }  # fmt: skip
    return [move | {"to": "serving", "model": name}, switch | {"model": name}]


def simulated() -> Result:
    """Two models on one GPU, a third on another, and starts that fail."""
    models = {name: ModelConfig(name, name, gpus=1) for name in ("a", "b", "c")}
    config = Config(models=MappingProxyType(models))
    trace = [Arrival(float(at), "abac"[at % 4], 3.0) for at in range(0, 200, 7)]
    costs = Costs(ModelCosts(start=10.0, wake=4.0, park=1.0, failures=0.3))
    return Simulation(config, trace, costs, gpu_count=2, record=True).run()


def test_both_draw_the_same(browser: Browser, server: Server) -> None:
    choose = random.Random(16)  # the same histories each time
    cases = []
    for count in (0, 1, 3, 40, 40, 40, 900, 900):
        gpus = choose.randint(1, 4)
        cases.append(case_of(random_events(choose, count, gpus), choose, gpus))
    result = simulated()
    size = {"width": 1200, "unit": 1, "gpus": 2}
    window = {"from": 0.0, "to": result.ended}
    cases.append({"events": result.events, "since": 0.0, "now": result.ended, "window": window,
                  "size": size})  # fmt: skip
    with browser.page(server[1]) as page:
        page.open()
        page.row("alpha", "stopped")
        drawn = page.tab.evaluate(DRAWN_BY_THE_PAGE, cases)
    for number, (case, ours) in enumerate(zip(cases, drawn, strict=True)):
        same(ours, json.loads(json.dumps(drawn_by_the_simulator(case))), f"case {number}")
    kinds = {shape["kind"] for shape in drawn[-1]["shapes"]}
    assert kinds == {"label", "rail", "span", "wait", "failure", "tick"}


def test_an_hour_of_fifty_models_is_drawn_in_bounds(browser: Browser, server: Server) -> None:
    """A switch a second: more spans than there are px. What is drawn is bounded by the screen."""
    now = 1_700_000_000.0
    events: list[JSON] = []
    for second in range(1600):  # some 10,000 events, as many as are kept
        name, former = f"model-{second % 50:02}", f"model-{(second - 1) % 50:02}"
        time = now - 3600 + second * 2.2
        for at, model, before, to in (
            (0.0, former, "serving", "draining"), (0.1, former, "draining", "parking"),
            (0.4, former, "parking", "parked"), (0.4, name, "parked", "waking"),
            (0.9, name, "waking", "serving"),
        ):  # fmt: skip
            events.append({"type": "transition", "model": model, "time": time + at, "from": before,
                           "to": to, "reason": "", "gpus": [0], "duration_secs": 0.1,
                           "id": len(events) + 1})  # fmt: skip
    row = server[0].model("alpha") | {"since": now}
    head = {"version": "1", "host": "h", "gpu_count": 1, "mode": {"mode": "auto"}}
    full = {"now": now, "full": True, "head": head, "models": {"alpha": row}}
    with browser.page(server[1], refusals=True) as page:
        page.feed(full)
        history = json.dumps({"now": now, "events": events})
        page.answer("**/ui/history", "application/json", history)
        page.open("timeline")
        page.see(".drawing .item")
        assert 300 < page.tab.locator(".drawing .item").count() < 3000

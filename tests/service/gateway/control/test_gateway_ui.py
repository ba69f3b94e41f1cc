"""The page's files, and the board that all open pages share."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from gateway_harness import (
    ADMIN,
    ADMINS,
    Client,
    FakeSupervisor,
    Stage,
    a_config,
    in_loop,
    soon,
    stage,
)

from llmux.gateway.ui import board
from llmux.gateway.ui.pages import STATIC
from llmux.protocol import News, Watch

JSON = dict[str, Any]


class State:
    """What the supervisor answers; a test changes it as time goes by."""

    def __init__(self, running: Stage) -> None:
        self.models: JSON = {"alpha": {"state": "stopped", "since_secs": 5.0}}
        self.events: list[JSON] = []
        self.asked: list[str] = []
        self.began = time.monotonic()
        running.supervisor.answer = self.answer

    def answer(self, ask: Any) -> JSON:
        self.asked.append(ask.verb)
        if ask.verb == "events":
            kept = [e for e in self.events if e["type"] != "queue" or ask.args["queues"] is True]
            newer = [event for event in kept if event["id"] > ask.args["after"]]
            return {"ok": True, "result": {"events": newer[:2], "more": len(newer) > 2}}
        passed = time.monotonic() - self.began
        models = {
            name: model | {"since_secs": model["since_secs"] + passed}
            for name, model in self.models.items()
        }
        return {"ok": True, "result": {"models": models, "generation": len(self.asked)}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "REFRESH_SECS", 0.01)


async def page(running: Stage, last: str = "", *headers: str) -> Client:
    client = await running.client()
    more = (*headers, *([f"Last-Event-ID: {last}"] if last else []))
    client.send("/ui/feed", method="GET", headers=more)
    head = await client.head()
    assert head.status == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    return client


async def frame(client: Client) -> tuple[str, JSON]:
    """The next (id, body); comments are skipped."""
    while True:
        lines = (await client.chunk()).decode().splitlines()
        if lines[0].startswith("id: "):
            assert lines[1].startswith("data: ") and lines[2:] == [""]
            return lines[0][4:], json.loads(lines[1][6:])


async def frame_with(client: Client, key: str) -> tuple[str, JSON]:
    while True:
        number, body = await frame(client)
        if key in body:
            return number, body


def event(number: int, **facts: Any) -> JSON:
    return {"id": number, "time": time.time(), "model": "alpha", "type": "transition"} | facts


@in_loop
async def test_a_page_gets_everything_and_then_only_what_changes() -> None:
    async with stage() as running:
        state = State(running)
        client = await page(running)
        _, first = await frame(client)
        assert first["full"] is True
        assert first["models"]["alpha"]["state"] == "stopped"
        assert abs(first["models"]["alpha"]["since"] - (first["now"] - 5)) < 0.5
        assert first["head"]["may_order"] is False, "without keys nobody gives orders over TCP"
        state.models = {"alpha": {"state": "starting", "since_secs": 0.0}, "beta": {
            "state": "stopped", "since_secs": 1.0}}  # fmt: skip
        state.began = time.monotonic()
        _, change = await frame_with(client, "models")
        assert change["models"]["alpha"].keys() == {"state", "since"}
        assert change["models"]["beta"]["state"] == "stopped"
        state.models = {"beta": state.models["beta"]}
        _, change = await frame_with(client, "models")
        assert change["models"] == {"alpha": None}


@in_loop
async def test_time_that_passes_is_no_change() -> None:
    async with stage() as running:
        state = State(running)
        client = await page(running)
        await frame(client)
        _, history = await frame(client)
        assert history.keys() == {"now", "history"}, "nothing but the mark of the loaded history"
        asked = len(state.asked)
        while len(state.asked) < asked + 5:  # five looks at the status
            await running.supervisor.hear(type(running.supervisor.heard[-1]))
        state.models["alpha"]["state"] = "starting"
        _, change = await frame(client)
        assert change["models"] == {"alpha": {"state": "starting"}}


@in_loop
async def test_nothing_is_asked_while_no_page_listens_and_one_status_serves_all() -> None:
    async with stage() as running:
        state = State(running)
        first, second = await page(running), await page(running)
        assert (await frame(first))[1]["models"] == (await frame(second))[1]["models"]
        assert await running.supervisor.hear(Watch) == Watch("timeline")
        first.leave()
        second.leave()
        assert await running.supervisor.hear(Watch) == Watch("timeline", on=False)
        asked = len(state.asked)
        await page(running)
        assert len(state.asked) - asked <= 3, "asked when the pages had left"


@in_loop
async def test_a_page_that_was_cut_off_gets_what_it_missed() -> None:
    async with stage() as running:
        state = State(running)
        stays, cut = await page(running), await page(running)
        await frame(stays)
        await frame(cut)
        last, _ = await frame(cut)
        cut.leave()
        state.models["alpha"]["state"] = "starting"
        await frame_with(stays, "models")
        back = await page(running, last)
        _, missed = await frame(back)
        assert "full" not in missed
        assert missed["models"]["alpha"]["state"] == "starting"
        other = await page(running, "0badf00d.3")
        assert (await frame(other))[1]["full"] is True, "the frames of another worker"


@in_loop
async def test_events_reach_the_page_and_its_history() -> None:
    async with stage() as running:
        state = State(running)
        state.events = [event(number) for number in range(1, 6)]
        client = await page(running)
        await frame_with(client, "history")
        running.supervisor.say(News("timeline", "", event(5)), News("timeline", "", event(6)))
        _, news = await frame_with(client, "events")
        assert [one["id"] for one in news["events"]] == [6], "5 was in the history already"
        asking = await running.client()
        asking.send("/ui/history", method="GET")
        history = (await asking.answer()).json()
        assert [one["id"] for one in history["events"]] == [1, 2, 3, 4, 5, 6]


@in_loop
async def test_the_history_has_the_lengths_of_queues() -> None:
    async with stage() as running:
        state = State(running)
        state.events = [event(1), event(2, type="queue", waiting=3)]
        client = await page(running)
        await frame_with(client, "history")
        asking = await running.client()
        asking.send("/ui/history", method="GET")
        assert [one["id"] for one in (await asking.answer()).json()["events"]] == [1, 2]


@in_loop
async def test_the_history_outlasts_the_supervisor() -> None:
    async with stage() as running:
        state = State(running)
        state.events = [event(7, time=time.time() - 60)]
        client = await page(running)
        await frame_with(client, "history")
        await running.supervisor.stop()
        _, away = await frame_with(client, "head")
        assert "supervisor" in away["head"]
        again = FakeSupervisor(running.supervisor.path)
        again.answer = state.answer
        state.events = [event(1, to="serving")]  # it numbers from 1
        await again.start()
        try:
            await frame_with(client, "history")
            asking = await running.client()
            asking.send("/ui/history", method="GET")
            events = (await asking.answer()).json()["events"]
            assert [one["id"] for one in events] == [7, 1]
        finally:
            await again.stop()


@in_loop
async def test_the_feed_ends_when_the_worker_stops() -> None:
    async with stage() as running:
        State(running)
        client = await page(running)
        await frame(client)
        running.stop.set()
        while await client.chunk():
            pass
        await soon(running.served)


@in_loop
async def test_the_files_are_for_everyone_and_the_state_is_not() -> None:
    async with stage(keys=lambda: ADMINS) as running:
        State(running)
        asking = await running.client()
        for path in ("/ui/", *(f"/ui/static/{file.name}" for file in STATIC.iterdir())):
            asking.send(path, method="GET")
            found = await asking.answer()
            assert found.status == 200, path
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert found.headers["x-frame-options"] == "DENY"
        asking.send("/ui", method="GET")
        assert (await asking.answer()).headers["location"] == "ui/"
        for path in ("/ui/static/pages.py", "/ui/static/..%2fpages.py", "/ui/static/none"):
            asking.send(path, method="GET")
            assert (await asking.answer()).status == 404, path
        for method, path in (("GET", "/ui/feed"), ("GET", "/ui/history"), ("POST", "/ui/")):
            asking = await running.client()
            asking.send(path, method=method)
            assert (await asking.answer()).status == 401
        client = await page(running, "", ADMIN)
        assert (await frame(client))[1]["head"]["may_order"] is True


@in_loop
async def test_an_unchanged_file_is_not_sent_twice() -> None:
    async with stage() as running:
        asking = await running.client()
        asking.send("/ui/static/main.js", method="GET")
        first = await asking.answer()
        asking.send("/ui/static/main.js", method="GET", headers=(
            f"If-None-Match: {first.headers['etag']}",))  # fmt: skip
        assert (await asking.head()).status == 304
        asking.send("/health", method="GET")
        assert (await asking.answer()).json() == {"status": "ok"}, "a 304 has no body"


@in_loop
async def test_a_page_of_another_site_reads_nothing_without_keys() -> None:
    async with stage() as running:
        State(running)
        for path in ("/ui/feed", "/ui/history"):
            for header in ("Origin: https://evil.example", "Sec-Fetch-Site: cross-site"):
                asking = await running.client()
                asking.send(path, method="GET", headers=(header,))
                assert (await asking.answer()).status == 403, (path, header)


@in_loop
async def test_switched_off_there_is_no_page() -> None:
    async with stage(a_config(ui=False)) as running:
        asking = await running.client()
        for path in ("/ui", "/ui/", "/ui/feed", "/ui/static/main.js"):
            asking.send(path, method="GET")
            assert (await asking.answer()).status == 404, path


def test_the_whole_page_is_small_and_names_no_other_host() -> None:
    files = {file.name: file.read_text() for file in STATIC.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) < 150_000
    for name, text in files.items():
        named = set(re.findall(r"(?:https?|wss?):/+[^\s\"'`]+", text))
        assert named <= {"http://www.w3.org/2000/svg"}, f"{name} names another host"
        assert "innerHTML" not in text and "eval(" not in text and " style=" not in text


@in_loop
async def test_pages_come_back_when_the_board_cannot_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They stayed open, and showed for ever what had been before."""
    async with stage() as running:
        state = State(running)
        client = await page(running)
        await frame(client)
        running.supervisor.answer = lambda _ask: {"ok": True, "result": {"models": {"alpha": 7}}}
        while await client.chunk():
            pass  # until the last, empty one
        assert "cannot tell the open pages the status" in caplog.text
        running.supervisor.answer = state.answer
        state.models["alpha"]["state"] = "starting"
        again = await page(running)
        _, full = await frame(again)
        assert full["models"]["alpha"]["state"] == "starting"


@in_loop
async def test_a_page_begins_with_what_is_so_now() -> None:
    """It began with what the last page had seen, models included that were removed since."""
    async with stage() as running:
        state = State(running)
        first = await page(running)
        await frame(first)
        first.leave()
        await running.supervisor.hear(Watch, lambda watch: not watch.on)
        state.models = {"beta": {"state": "stopped", "since_secs": 1.0}}
        _, full = await frame(await page(running))
        assert list(full["models"]) == ["beta"]

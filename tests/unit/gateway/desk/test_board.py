"""The board that all open pages share: frames and who missed which, events, what is sent when."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from engine_wire import Wire
from gateway_desk import Desk, in_a_loop

from llmux.errors import Reason, Refused
from llmux.gateway.ui import board as board_module
from llmux.gateway.ui.board import ASK_SECS, KEEP_EVENTS, KEEP_SECS, MAX_UNREAD, Board, Page
from llmux.gateway.ui.rows import STEP_BYTES, changes, head, row
from llmux.protocol import News, Watch

JSON = dict[str, Any]
AWAY = Refused(Reason.SUPERVISOR_UNREACHABLE, "it is away")


class Hall:
    """A board and the supervisor that it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setattr(board_module, "REFRESH_SECS", 0.0)
        self.desk = Desk(monkeypatch, **settings)
        self.board = Board(self.desk.worker)
        self.models: JSON = {"alpha": {"state": "stopped"}}
        self.events: list[JSON] = []
        self.down = False
        self.desk.link.answer = self.answer

    def answer(self, verb: str, args: JSON) -> Any:
        if self.down:
            return AWAY
        if verb == "events":
            return {"events": [one for one in self.events if one["id"] > args["after"]]}
        return {"models": dict(self.models), "mode": "auto"}

    async def page(self, last: str = "") -> tuple[Page, Wire]:
        wire = Wire()
        return await self.board.attach(last, wire), wire  # type: ignore[arg-type]

    async def passes(self, count: int = 30) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def end(self, *pages: Page) -> None:
        for page in pages:
            self.board.detach(page)
        while self.board._running is not None:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)


def an_event(number: int, **more: Any) -> JSON:
    return {"id": number, "type": "transition", "time": time.time()} | more


def frames(wire: Wire) -> list[tuple[str, JSON]]:
    """(id, body) of each frame; a comment has neither."""
    found: list[tuple[str, JSON]] = []
    for chunk in wire.written:
        size, _, rest = chunk.partition(b"\r\n")
        data = rest.removesuffix(b"\r\n")
        assert len(data) == int(size, 16)
        if data.startswith(b":"):
            found.append((data.decode(), {}))
            continue
        number, body, *end = data.split(b"\n")
        assert end == [b"", b""]
        found.append((number[4:].decode(), json.loads(body[6:])))
        assert abs(found[-1][1].pop("now") - time.time()) < 3600
    wire.written.clear()
    return found


@in_a_loop
async def test_the_first_frame_has_everything_and_the_next_what_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hall = Hall(monkeypatch)
    page, wire = await hall.page()
    await hall.passes()
    (_, first), *rest = frames(wire)
    assert (first["full"], first["models"]) == (True, {"alpha": {"state": "stopped"}})
    top = first["head"]
    assert (top["supervisor"], top["worker"], top["mode"]) == ("up", "w1", "auto")
    assert top["may_order"] is False
    assert top["drain_timeout_secs"] == hall.desk.config.policy.drain_timeout_secs
    assert [body for _, body in rest] == [{"history": True}]
    assert ("status", {}, ASK_SECS) in hall.desk.link.asked
    hall.models = {"alpha": {"state": "starting"}, "beta": {"state": "stopped"}}
    await hall.passes()
    ((number, change),) = frames(wire)
    assert change == {"models": {"alpha": {"state": "starting"}, "beta": {"state": "stopped"}}}
    hall.down = True
    await hall.passes()
    ((next_number, change),) = frames(wire)
    assert change == {"head": {"supervisor": str(AWAY)}}
    assert int(next_number.split(".")[1]) == int(number.split(".")[1]) + 1
    await hall.end(page)
    asked = len(hall.desk.link.asked)
    await hall.passes()
    assert len(hall.desk.link.asked) == asked, "nothing is asked while no page listens"
    assert hall.desk.link.sent == [Watch("timeline"), Watch("timeline", on=False)]


@in_a_loop
async def test_who_comes_back_gets_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "KEEP_FRAMES", 3)
    hall = Hall(monkeypatch)
    page, wire = await hall.page()
    for number in range(6):
        hall.models["alpha"] = {"state": f"s{number}"}
        await hall.passes()
    sent = frames(wire)
    last = [number for number, _ in sent]
    for seen, missed in ((-1, 0), (-2, 1), (-3, 2), (-4, 3)):
        again, other = await hall.page(last[seen])
        got = frames(other)
        assert got == (sent[seen + 1 :] if missed else [(last[-1], {})])
        hall.board.detach(again)
    name = last[0].split(".")[0]
    others = (
        "",
        f"{name}.",
        f"{name}.x",
        f"{name}.99",
        f"{name}.\u0663",
        f"{name}.{'9' * 20}",
        f"{name}.{'9' * 5000}",
    )
    for unknown in (last[-5], "0badf00d.7", *others):
        again, other = await hall.page(unknown)
        ((_, body),) = frames(other)
        assert body["full"] is True, unknown
        hall.board.detach(again)
    await hall.end(page)


@in_a_loop
async def test_events_go_to_the_pages_and_into_the_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hall = Hall(monkeypatch)
    hall.events = [an_event(1), an_event(2)]
    assert json.loads(await hall.board.history())["events"] == hall.events
    assert ("events", {"after": 0, "queues": True}, 10.0) in hall.desk.link.asked
    page, wire = await hall.page()
    await hall.passes()
    frames(wire)
    for number in (2, 3, 3, 4, 3):
        hall.desk.worker.subscriptions.publish(News("timeline", "", an_event(number)))
    await hall.passes()
    news = [one["id"] for _, body in frames(wire) for one in body.get("events", ())]
    assert news == [3, 4], "2 was in the history already, and none comes twice"
    history = json.loads(await hall.board.history())
    assert [one["id"] for one in history["events"]] == [1, 2, 3, 4]
    hall.events = [an_event(1, model="new")]
    hall.desk.link.connects += 1
    await hall.passes()
    assert {"history": True} in [body for _, body in frames(wire)], "the supervisor was restarted"
    history = json.loads(await hall.board.history())
    assert [one["id"] for one in history["events"]] == [1, 2, 3, 4, 1]
    hall.desk.worker.subscriptions.publish(News("timeline", "", an_event(2, model="new")))
    await hall.passes()
    assert [one["id"] for _, body in frames(wire) for one in body.get("events", ())] == [2]
    await hall.end(page)


@in_a_loop
async def test_events_are_kept_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(monkeypatch)
    now = time.time()
    hall.events = [
        an_event(1, time=now - KEEP_SECS - 60), an_event(2, time=now - KEEP_SECS + 60), an_event(3),
    ]  # fmt: skip
    assert [one["id"] for one in json.loads(await hall.board.history())["events"]] == [2, 3]
    assert hall.board._events.maxlen == KEEP_EVENTS


@in_a_loop
async def test_a_history_that_cannot_be_had_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hall = Hall(monkeypatch)
    refuses = True

    def answer(verb: str, args: JSON) -> Any:
        return AWAY if verb == "events" and refuses else hall.answer(verb, args)

    hall.desk.link.answer = answer
    page, wire = await hall.page()
    await hall.passes()
    assert [body for _, body in frames(wire)[1:]] == []
    refuses = False
    await hall.passes()
    assert [body for _, body in frames(wire)] == [{"history": True}]
    await hall.end(page)


@in_a_loop
async def test_a_history_that_fails_of_itself_ends_the_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hall = Hall(monkeypatch)
    hall.desk.link.answer = lambda verb, args: (
        KeyError("ours") if verb == "events" else hall.answer(verb, args)
    )
    page, _ = await hall.page()
    await hall.passes()
    assert page.ended.is_set()
    assert "cannot tell the open pages the status: KeyError('ours')" in caplog.text


@in_a_loop
async def test_pages_that_hear_nothing_get_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(monkeypatch)
    page, wire = await hall.page()
    await hall.passes()
    frames(wire)
    hall.desk.now += 14.0
    await hall.passes()
    assert frames(wire) == []
    hall.desk.now += 1.0
    await hall.passes()
    assert frames(wire) == [(": still here\n\n", {})]
    await hall.end(page)


@in_a_loop
async def test_an_hour_without_an_event_ends_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(monkeypatch)
    page, wire = await hall.page()
    await hall.passes()
    for number in (1, 2):
        hall.desk.now += KEEP_SECS + 1.0
        await hall.passes()
        assert not page.ended.is_set()
        frames(wire)
        hall.desk.worker.subscriptions.publish(News("timeline", "", an_event(number)))
        await hall.passes()
        assert [one["id"] for _, body in frames(wire) for one in body["events"]] == [number]
    await hall.end(page)


@in_a_loop
async def test_pages_end_with_the_worker_and_when_the_board_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hall = Hall(monkeypatch)
    page, _ = await hall.page()
    await hall.passes()
    assert not page.ended.is_set()
    hall.models = {"alpha": 7}
    await hall.passes()
    assert page.ended.is_set()
    assert "cannot tell the open pages the status" in caplog.text
    caplog.clear()
    hall.board.detach(page)
    hall.models = {}
    again, _ = await hall.page()
    await hall.passes()
    hall.desk.worker.subscriptions.close()
    await hall.passes()
    assert again.ended.is_set()
    assert hall.board._running is None, "it does not go on for a page that has not left yet"
    assert caplog.text == ""


@in_a_loop
async def test_a_fault_of_ours_is_not_the_supervisors_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hall = Hall(monkeypatch)
    hall.desk.link.answer = lambda _verb, _args: KeyError("ours")
    with pytest.raises(KeyError):
        await hall.page()


@pytest.mark.parametrize(
    ("unread", "closing", "written", "aborted"),
    [
        (0, False, True, False),
        (MAX_UNREAD, False, True, False),
        (MAX_UNREAD + 1, False, False, True),
        (0, True, False, True),
    ],
)
@in_a_loop
async def test_a_page_that_does_not_read_is_cut_off(
    unread: int, closing: bool, written: bool, aborted: bool
) -> None:
    assert MAX_UNREAD == 2**20
    wire = Wire()
    wire.buffered, wire.closing = unread, closing
    Page(wire).write(b"x")  # type: ignore[arg-type]
    assert (wire.written, wire.closing) == ([b"x"] * written, aborted)


@pytest.mark.parametrize(
    ("name", "before", "now", "same"),
    [
        ("gpu_bytes", 10**9, 10**9 + STEP_BYTES - 1, True),
        ("gpu_bytes", 10**9, 10**9 + STEP_BYTES, False),
        ("ram_bytes", 10**9, 10**9 - STEP_BYTES + 1, True),
        ("used_bytes", 10**9, 0, False),
        ("other_bytes", 10**9, 10**9 + 1, False),
        ("engines_bytes", None, 5, False),
        ("gpu_bytes", "x", 5, False),
        ("warm", True, False, False),
        ("warm", 1, True, False),
    ],
)
def test_memory_moves_in_steps(name: str, before: Any, now: Any, same: bool) -> None:
    made = row({name: now}, 0.0, {name: before})[name]
    assert made is (before if same else now) or made == (before if same else now)
    assert (changes({name: before}, {name: made}) == {}) is (same or before == now)


@pytest.mark.parametrize(
    ("field", "name", "sign"),
    [
        ("since_secs", "since", -1), ("oldest_wait_secs", "oldest_since", -1),
        ("idle_secs", "idle_since", -1), ("phase_secs", "phase_since", -1),
        ("retry_in_secs", "retry_at", 1), ("wait_at_most_secs", "wait_until", 1),
        ("left_secs", "done_at", 1), ("pinned_secs", "pinned_until", 1),
    ],
)  # fmt: skip
def test_every_time_is_a_point_and_stays_one(field: str, name: str, sign: int) -> None:
    first = row({field: 10.04}, 1000.0, None)
    assert first == {name: round(1000.0 + sign * 10.04, 1)}
    near = row({field: 10.04}, 1000.7, first)
    assert near == first
    assert row({field: 10.04}, 1000.8, first)[name] == round(1000.8 + sign * 10.04, 1)
    assert row({field: None}, 1000.0, first) == {name: None}
    assert row({field: 0}, 1000.0, None) == {name: None if field == "idle_secs" else 1000.0}


def test_rows_of_lists_are_found_by_their_key() -> None:
    status = {
        "models": {}, "generation": 7, "mode": "auto", "gpus": [{"index": 1, "used_bytes": 10**9}],
        "orders": [{"id": 1, "since_secs": 1.0}, {"id": 2, "since_secs": 5.0}],
    }  # fmt: skip
    first = head(status, 100.0, {})
    assert first == {
        "mode": "auto", "gpus": [{"index": 1, "used_bytes": 10**9}],
        "orders": [{"id": 1, "since": 99.0}, {"id": 2, "since": 95.0}],
    }  # fmt: skip
    later: JSON = {
        "mode": "auto", "gpus": [{"index": 1, "used_bytes": 10**9 + 7}],
        "orders": [{"id": 2, "since_secs": 6.5}],
    }  # fmt: skip
    assert head(later, 101.0, first) == first | {"orders": [{"id": 2, "since": 95.0}]}
    assert head({"orders": None}, 0.0, first) == {"orders": None}

"""How a worker drains: at a stop, and beside a successor that accepts already."""

from __future__ import annotations

import asyncio

import pytest
from gateway_desk import Desk, FakeClient, in_a_loop, retry_after, told

from llmux.gateway.stopping import ABORT_SECS, DrainLimits, Handover, drain
from llmux.protocol import ModelInfo


class Hall:
    """A server with its connections. ``accepted``: made in the turn after it was closed."""

    def __init__(self, desk: Desk, *guests: Guest) -> None:
        self.desk = desk
        self.closed = 0
        self.connections = list(guests)
        self.accepted: list[Guest] = []
        for guest in guests:
            guest.hall = self

    def close(self) -> None:
        self.closed += 1
        asyncio.get_running_loop().call_soon(self.connections.extend, self.accepted)


class Guest:
    hall: Hall

    def __init__(self, *, idle: bool) -> None:
        self.idle = idle
        self.asked_to_leave = 0

    def close_if_idle(self) -> bool:
        self.asked_to_leave += 1
        if self.idle:
            self.leave()
        return self.idle

    def leave(self) -> None:
        self.hall.connections.remove(self)
        self.hall.desk.worker.client_left.set()


async def turns() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


def waits(desk: Desk, model: str = "alpha") -> FakeClient:
    client, _ = desk.asks(desk.incoming(b'{"model":"%b"}' % model.encode()))
    return client


@in_a_loop
async def test_at_a_stop_the_idle_go_and_the_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    busy, idle, late = Guest(idle=False), Guest(idle=True), Guest(idle=True)
    halls = [Hall(desk, busy, idle), Hall(desk, late)]
    client = waits(desk)
    task = asyncio.create_task(drain(desk.dispatch, halls, DrainLimits()))
    await turns()
    assert [hall.closed for hall in halls] == [1, 1]
    assert (halls[0].connections, halls[1].connections) == ([busy], [])
    assert (busy.asked_to_leave, desk.worker.draining, desk.worker.closing) == (1, True, True)
    assert not client.got, "its model may come"
    desk.link.away.set()
    await turns()
    assert told(client)[:2] == (503, "shutting_down"), "none comes without a supervisor"
    assert not task.done()
    busy.leave()
    await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_a_loop
async def test_who_was_accepted_as_the_stop_came_is_asked_to_leave_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    idle, busy = Guest(idle=True), Guest(idle=False)
    hall = Hall(desk, idle, busy)
    hall.connections.clear()
    hall.accepted = [idle, busy]
    task = asyncio.create_task(drain(desk.dispatch, [hall], DrainLimits()))
    await turns()
    assert (idle.asked_to_leave, busy.asked_to_leave, hall.connections) == (1, 1, [busy])
    busy.leave()
    await task


@pytest.mark.parametrize("waiters", [True, False])
@in_a_loop
async def test_those_whose_model_cannot_come_in_time_are_told_at_once(
    waiters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(
        ModelInfo("alpha", "waking", switch_secs=30.0),
        ModelInfo("beta", "waking", switch_secs=31.0),
    )
    near, far = waits(desk, "alpha"), waits(desk, "beta")
    guest = Guest(idle=False)
    limits = DrainLimits(30.0, waiters=waiters)
    task = asyncio.create_task(drain(desk.dispatch, [Hall(desk, guest)], limits))
    await turns()
    assert (told(far)[:2], retry_after(far)) == ((503, "shutting_down"), 31)
    assert bool(near.got) is not waiters
    guest.leave()
    await task
    assert near.got, "nobody waits for ever"


@pytest.mark.parametrize("begun", [True, False])
@in_a_loop
async def test_those_who_stay_too_long_are_cut(
    begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(ModelInfo("alpha", "waking", switch_secs=2.0))
    client = waits(desk)
    handover = Handover(5.0)
    handover.begun = begun
    halls = [Hall(desk, Guest(idle=False)), Hall(desk, Guest(idle=False))]
    limits = DrainLimits(300.0 if begun else 5.0)
    task = asyncio.create_task(drain(desk.dispatch, halls, limits, handover))
    await turns()
    desk.now += 4.5
    await turns()
    assert (caplog.messages, client.got) == ([], b"")
    desk.now += 1.0
    await turns()
    (line,) = caplog.messages
    assert line == "2 requests were still open 5 seconds after the stop; cutting them"
    assert told(client)[:2] == (503, "shutting_down")
    assert desk.worker.closing
    assert not task.done(), "what they are told is sent yet"
    desk.now += ABORT_SECS + 0.5
    await task


@pytest.mark.parametrize("begun", [True, False])
@in_a_loop
async def test_beside_a_successor_who_is_idle_stays(
    begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(monkeypatch)
    idle, other = Guest(idle=False), Guest(idle=False)
    handover = Handover(300.0)
    assert not handover.begun
    handover.begun = begun
    hall = Hall(desk, idle, other)
    task = asyncio.create_task(drain(desk.dispatch, [hall], DrainLimits(300.0), handover))
    await turns()
    assert hall.closed == 1
    assert (desk.worker.draining, desk.worker.closing) == (True, not begun)
    assert idle.asked_to_leave == (0 if begun else 1)
    idle.leave()
    other.leave()
    await task
    assert desk.worker.closing, "it is at its end"
    assert caplog.messages == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_a_loop
async def test_a_stop_ends_a_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(ModelInfo("alpha", "waking", switch_secs=100.0))
    client, guest = waits(desk), Guest(idle=False)
    handover = Handover(300.0)
    handover.begun = True
    task = asyncio.create_task(
        drain(desk.dispatch, [Hall(desk, guest)], DrainLimits(50.0), handover)
    )
    await turns()
    assert not client.got
    handover.hurried.set()
    await turns()
    assert (guest.asked_to_leave, desk.worker.closing) == (1, True)
    assert told(client)[:2] == (503, "shutting_down"), "there is less time now"
    assert not task.done()
    guest.leave()
    await task

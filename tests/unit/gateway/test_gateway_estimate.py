"""What Retry-After is computed from."""

from __future__ import annotations

import random

import pytest

from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.queue import Ticket
from llmux.gateway.admission.retry_after import UNKNOWN_SWITCH_SECS, Switches, Throughput
from llmux.protocol import Address, ModelInfo


def test_a_line_that_moves_tells_how_fast() -> None:
    throughput = Throughput()
    assert throughput.secs_each(0) is None
    throughput.becomes_nonempty(0)
    for step in range(1, 2001):
        throughput.served(step * 0.1, 1)
    assert throughput.secs_each(200) == pytest.approx(0.1)
    for step in range(2000):
        throughput.served(200 + step * 0.4, 1)
    assert throughput.secs_each(1000) == pytest.approx(0.4, rel=0.15)
    throughput.becomes_nonempty(2000)  # a new line is taken to be as fast until it moves
    assert throughput.secs_each(2100) == pytest.approx(0.4, rel=0.15)
    assert not throughput.measured


def test_the_pace_of_a_line_has_its_models_absences_in_it() -> None:
    throughput = Throughput()
    throughput.becomes_nonempty(0)
    for turn in range(20):  # 9 s away, then ten served in one
        throughput.served(turn * 10 + 9, 4)
        throughput.served(turn * 10 + 10, 6)
    assert throughput.secs_each(200) == pytest.approx(1.0)


def test_a_model_waits_for_its_own_switch_and_for_those_before_it() -> None:
    now = 0.0
    switches = Switches(lambda: now, min_active_secs=5)
    assert switches.secs_until("a", []) == UNKNOWN_SWITCH_SECS

    def see(state: str) -> None:
        switches.see(
            [ModelInfo("a", state, switch_secs=20), ModelInfo("b", "parked", switch_secs=4)]
        )

    see("stopped")
    assert switches.secs_until("a", ["a"]) == 20
    assert switches.secs_until("a", ["a", "b"]) == 20 + 4 + 5
    see("starting")
    now = 15.0
    see("starting")
    assert switches.secs_until("a", ["a", "b"]) == 5
    now = 100.0
    assert switches.secs_until("a", []) == 1
    assert switches.granted("a") == b"cold"
    assert switches.granted("a") == b"none"


def test_a_switch_lasts_from_its_own_beginning() -> None:
    now = 0.0
    switches = Switches(lambda: now, min_active_secs=5)
    for seen_at, state, secs in (
        (0.0, "stopped", 20.0), (10.0, "starting", 20.0), (14.0, "starting", 16.0),
        (15.0, "waking", 20.0), (16.0, "waking", 19.0), (20.0, "parked", 20.0),
    ):  # fmt: skip
        now = seen_at
        switches.see([ModelInfo("a", state, switch_secs=20)])
        assert switches.secs_until("a", []) == secs


def test_five_times_the_capacity_the_estimate_is_near_the_real_wait() -> None:
    """Open loop, simulated: 4 places, 1 s each; 20 arrivals a second for a minute."""
    now = 0.0
    begun: dict[Ticket, float] = {}
    done: list[tuple[float, Ticket]] = []
    chance = random.Random(1)

    def begin(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            begun[ticket] = now
            done.append((now + chance.uniform(0.5, 1.5), ticket))

    admission = Admission(
        clock=lambda: now, max_waiting=40, wait_secs=1000, max_in_flight=4, models=("a",),
        on_room=begin,
    )  # fmt: skip
    admission.grant("a", "e", Address(uds="/a"))
    errors: list[float] = []
    told: list[tuple[Ticket, float]] = []
    for step in range(1200):
        now = step / 20
        while done and min(done, key=lambda one: one[0])[0] <= now:
            ended = min(done, key=lambda one: one[0])
            done.remove(ended)
            admission.leave(ended[1], completed=True)
        ticket = Ticket("a", now, now + 1000)
        secs = admission.secs_to_place("a")
        try:
            lease = admission.submit(ticket)
        except Exception:  # noqa: BLE001  # turned away: nothing to compare with
            continue
        if lease is not None:
            begin([ticket])
        elif secs is not None:
            told.append((ticket, secs))
    for ticket, secs in told:
        if ticket in begun:
            errors.append(abs(secs - (begun[ticket] - ticket.arrived)) / max(1, secs))
    assert len(errors) > 100
    assert sorted(errors)[len(errors) // 2] < 0.25


def test_what_an_empty_line_once_waited_for_says_nothing_of_a_model_that_serves() -> None:
    now = 0.0
    admission: Admission[Ticket] = Admission(
        clock=lambda: now, max_waiting=1, wait_secs=1000, models=("a",)
    )
    admission.submit(Ticket("a", now, now + 1000))
    now = 80.0  # a cold start
    admission.grant("a", "e", Address(uds="/a"))
    admission.admit_waiting("a")
    now = 1000.0  # a key's own limit is asked about
    assert admission.secs_to_place("a") is None

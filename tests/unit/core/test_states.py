"""Every pair of states: the legal steps succeed, all others are bugs that end the process."""

from __future__ import annotations

import itertools

import pytest
from core_harness import Core, model

from llmux.config.schema import Eviction
from llmux.core.records import (
    Draining,
    Failed,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    Stopped,
    Stopping,
    Waking,
)
from llmux.core.states import ALIVE, MOVING, TRANSITIONS, ModelState, diagram
from llmux.core.transaction import Transaction
from llmux.errors import InvariantError

PHASES: dict[ModelState, Phase] = {
    phase.state: phase
    for phase in (
        Stopped(),
        Starting(op=1, since=0),
        Serving(epoch="t.1", since=0),
        Draining("t.1", 0, 0, 0, Eviction(), None),
        Parking(op=1, since=0, eviction=Eviction()),
        Parked(Eviction(), since=0),
        Waking(op=1, since=0, eviction=Eviction()),
        Stopping(op=1, since=0, reason="", share=0.9),
        Failed(since=0, until=0, message=""),
    )
}
PAIRS = list(itertools.product(ModelState, ModelState))


def transaction_in(state: ModelState) -> Transaction:
    tx = Transaction(Core(model("a")).state, 0.0)
    tx.found("a", PHASES[state])
    return tx


def test_every_state_has_a_phase_and_a_way_out() -> None:
    assert set(PHASES) == set(ModelState) == set(TRANSITIONS)
    assert all(TRANSITIONS.values())


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_a_step_is_legal_or_an_invariant_error(old: ModelState, new: ModelState) -> None:
    tx = transaction_in(old)
    if new is old or new in TRANSITIONS[old]:
        tx.move("a", PHASES[new])
        assert tx.models["a"].state is new
    else:
        with pytest.raises(InvariantError, match=f"a cannot go {old} → {new}"):
            tx.move("a", PHASES[new])
        assert tx.models["a"].state is old


def test_every_state_can_be_reached_and_left_for_stopped_again() -> None:
    def reachable(start: ModelState) -> set[ModelState]:
        found: set[ModelState] = set()
        pending = [start]
        while pending:
            state = pending.pop()
            if state not in found:
                found.add(state)
                pending += TRANSITIONS[state]
        return found

    assert reachable(ModelState.STOPPED) == set(ModelState)
    for state in ModelState:
        assert ModelState.STOPPED in reachable(state)


def test_what_moves_is_alive_and_what_serves_rests() -> None:
    assert MOVING < ALIVE
    assert {ModelState.SERVING, ModelState.PARKED} == ALIVE - MOVING


def test_the_diagram_shows_every_transition_once() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> stopped"]
    drawn = {tuple(line.split(" --> ")) for line in map(str.strip, lines[2:])}
    assert len(drawn) == len(lines) - 2
    assert drawn == {(str(a), str(b)) for a, after in TRANSITIONS.items() for b in after}

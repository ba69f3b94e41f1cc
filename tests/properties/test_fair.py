"""The bound of ``fair``: from when on a model may be sent away, whatever is measured."""

from __future__ import annotations

from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.config.schema import PolicyConfig
from llmux.core.demand.usage import Usage
from llmux.core.policies.base import Resident, Waiting, drained_in
from llmux.core.policies.fair import DRAINS, OVERHEAD, TURN, Fair

SECONDS = st.floats(0, 600, allow_nan=False)
NOW = 10_000.0


@st.composite
def waiting_models(draw: st.DrawFn) -> list[Waiting]:
    return [
        Waiting(
            f"m{number}",
            draw(st.integers(0, 5000)),
            NOW - draw(SECONDS),
            draw(SECONDS),
            Usage(NOW, draw(st.floats(0, 1000)), work=draw(st.floats(0.001, 600))),
            draw(st.integers(1, 256)),
            away_since=NOW - draw(SECONDS),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


@st.composite
def residents(draw: st.DrawFn) -> Resident:
    since = NOW - draw(SECONDS)
    return Resident(
        "served",
        since,
        draw(st.integers(0, 5000)),
        since,
        draw(SECONDS),
        draw(SECONDS),
        draw(st.floats(0, 1000)),
        draw(st.floats(0.001, 600)),
        draw(st.integers(1, 256)),
    )


@settings(max_examples=examples(500), deadline=None)
@given(waiting=waiting_models(), victim=residents(), limit=st.floats(0, 600))
def test_a_model_stays_no_longer_than_the_bound(
    waiting: list[Waiting], victim: Resident, limit: float
) -> None:
    """With no queue of its own: the maximum wait, or half its own way out and back and one and a
    half drains. With one: eight times the switches that wait."""
    policy = Fair(PolicyConfig(max_wait_secs=limit))
    oldest = min(one.oldest_since for one in waiting)
    drain = drained_in(victim.service, min(victim.in_flight, victim.places))
    turn = TURN * (victim.leave + victim.back) + DRAINS * drain
    if victim.queued:
        each = (one.cost + victim.leave + one.drain for one in waiting)
        turn = OVERHEAD * (drain + victim.back + sum(each))
    bound = max(oldest + limit, victim.serving_since + turn)
    for target in waiting:
        earliest = policy.earliest(target, victim, waiting, NOW)
        assert oldest <= earliest <= bound + 1e-6
        if not victim.in_flight:
            assert earliest <= NOW, "an idle model leaves at once"


@settings(max_examples=examples(200), deadline=None)
@given(waiting=waiting_models())
def test_a_model_is_overtaken_only_by_those_that_were_away_all_the_time(
    waiting: list[Waiting],
) -> None:
    order = list(Fair(PolicyConfig()).order(waiting, NOW))
    models = {one.model: one for one in waiting}
    assert sorted(order) == sorted(models)
    for place, name in enumerate(order):
        late = models[name]
        for former in order[:place]:
            early = models[former]
            if early.oldest_since > late.oldest_since:
                assert early.away_since <= late.oldest_since


FEW = st.integers(0, 4)  # so that ties are drawn


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(st.tuples(FEW, FEW, FEW, FEW, st.integers(0, 1)), max_size=12))
def test_the_order_is_the_rule_word_by_word(facts: list[tuple[int, int, int, int, int]]) -> None:
    waiting = [
        Waiting(f"m{number}", requests, since, cost, priority=priority, away_since=away)
        for number, (requests, since, cost, away, priority) in enumerate(facts)
    ]
    left = sorted(waiting, key=lambda one: (-one.priority, one.oldest_since, one.model))
    expected: list[str] = []
    while left:
        first = left[0]
        may_come = [
            one
            for one in left
            if one.priority == first.priority and one.away_since <= first.oldest_since
        ]
        best = max((first, *may_come), key=lambda one: one.pace)
        left.remove(best)
        expected.append(best.model)
    assert list(Fair(PolicyConfig()).order(waiting, NOW)) == expected

"""Placement: what must hold of its prices, and of parked engines that start elsewhere."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from endless import Endless
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_endless import FROZEN, OFFLOAD, PLACES, STEPS, TURNS, streams

from llmux.config.schema import Config, GatewayConfig, ModelConfig, PolicyConfig, PolicyType
from llmux.core.placement.prices import Absent
from llmux.core.records import ROUNDING, Parked, State, Stopping, share_now

SHARE = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 1.0])
WORTH = st.floats(0, 100)


@settings(max_examples=examples(200), deadline=None)
@given(models=st.lists(st.tuples(SHARE, WORTH)), free=SHARE, taken=SHARE, which=st.integers(0, 9))
def test_what_loses_its_place_is_what_fitted_before_and_does_not_after(
    models: list[tuple[float, float]], free: float, taken: float, which: int
) -> None:
    lost = [
        (share, worth)
        for share, worth in models
        if share <= free + ROUNDING and share > free - taken + ROUNDING
    ]
    absent = Absent(models)
    assert absent.displaced(free, taken, 0.0) == pytest.approx(sum(w for _, w in lost), abs=1e-6)
    own = [worth for share, worth in lost if share == taken]
    if own:
        worth = own[which % len(own)]
        rest = sum(w for _, w in lost) - worth
        assert absent.displaced(free, taken, worth) == pytest.approx(max(0.0, rest), abs=1e-6)


@st.composite
def hosts(draw: st.DrawFn) -> Endless:
    """Small and large models that may live on any of two or three GPUs; starts may be dear."""
    found = draw(streams(most=20, answer=30.0, least_models=2))
    gpu_count = draw(st.integers(2, 3))
    models = {
        name: ModelConfig(
            name,
            name,
            eviction=draw(st.sampled_from([OFFLOAD, FROZEN])),
            gpus=draw(st.sampled_from([1, 1, 2])),
            gpu_memory=draw(st.sampled_from([0.3, 0.45, 0.9])),
            gpu_memory_parked=0.01,
            canary=False,
            stall_timeout_secs=0.0,
        )
        for name in found
    }
    policy = PolicyConfig(
        policy_type=draw(st.sampled_from(PolicyType)),
        min_active_secs=draw(st.sampled_from([0.0, 5.0])),
        max_wait_secs=draw(st.floats(0, 60)),
        drain_timeout_secs=draw(st.floats(20, 120)),
    )
    config = Config(
        models=MappingProxyType(models),
        policy=policy,
        gateway=GatewayConfig(max_in_flight=PLACES),
    )
    return Endless(config, found, gpu_count)


def load(state: State, gpu: int) -> float:
    return sum(share_now(one) for one in state.models.values() if gpu in one.gpus)


@settings(max_examples=examples(20), deadline=None)
@given(world=hosts())
def test_a_parked_engine_is_given_up_only_for_room_that_is_there(world: Endless) -> None:
    """Whatever the streams are: claims hold, all get their turns, the same again gives the same."""
    for _ in range(STEPS):
        if all(line.grants >= TURNS for line in world.lines.values()) or not world.step():
            break
    assert all(line.grants for line in world.lines.values())

    def moves_only_where_there_is_room(before: State, state: State) -> None:
        for name, record in state.models.items():
            former = before.models[name]
            if record is former or not isinstance(former.phase, Parked):
                continue
            if not isinstance(record.phase, Stopping):
                continue
            if not record.phase.reason.startswith("moves to GPUs"):
                continue
            wanted = record.config.gpus
            assert isinstance(wanted, int)
            elsewhere = [
                gpu
                for gpu in range(world.gpu_count)
                if gpu not in record.gpus
                and load(before, gpu) + record.config.gpu_memory <= 1.0 + ROUNDING
            ]
            assert len(elsewhere) >= wanted

    world.check_replay(moves_only_where_there_is_room)

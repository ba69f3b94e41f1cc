"""What holds however long the streams last: every model gets its turn and answers something in it,
claims and budgets hold, and the same events make the same decisions.

An illegal transition raises in the core, so that every test here would fail by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from endless import Endless, Stream
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.demand.usage import UNKNOWN_COST_SECS
from llmux.core.policies.base import drained_in
from llmux.core.policies.fair import DRAINS, TURN
from llmux.core.schedule import LOOK_AGAIN_SECS

OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
FROZEN = Eviction(Weights.OFFLOAD, Process.FREEZE)
IMAGE = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
STOP = Eviction(Weights.RETAIN, Process.STOP)
LADDERS = ((), (STOP,), (FROZEN, STOP), (IMAGE, STOP), (FROZEN, IMAGE, STOP))
STEPS = 400
TURNS = 2
PLACES = 8
SECONDS = st.floats(0.1, 60)


@st.composite
def streams(draw: st.DrawFn, most: int, answer: float, least_models: int = 1) -> dict[str, Stream]:
    return {
        f"m{number}": Stream(
            draw(st.integers(1, most)),
            draw(st.floats(0.1, answer)),
            draw(SECONDS),
            draw(SECONDS),
            draw(st.integers(1, 10)),
            draw(st.integers(1, 10)),
        )
        for number in range(draw(st.integers(least_models, 4)))
    }


@st.composite
def worlds(draw: st.DrawFn) -> Endless:
    """Any policy, from one to three GPUs, ladders, budgets, answers that outlast a drain."""
    found = draw(streams(most=40, answer=150.0))
    gpu_count = draw(st.integers(1, 3))
    share = st.sampled_from([0.4, 0.45, 0.9])
    where: list[tuple[int, ...] | int] = [(0,), 1, min(2, gpu_count)]
    gpus = st.sampled_from(where)
    models = {
        name: ModelConfig(
            name,
            name,
            eviction=draw(st.sampled_from([OFFLOAD, FROZEN])),
            gpus=draw(gpus),
            gpu_memory=draw(share),
            gpu_memory_parked=0.01,
            canary=False,
            ladder=draw(st.sampled_from(LADDERS)),
            stall_timeout_secs=0.0,
        )
        for name in found
    }
    policy = PolicyConfig(
        policy_type=draw(st.sampled_from(PolicyType)),
        min_active_secs=draw(st.sampled_from([0.0, 0.0, 5.0])),
        max_wait_secs=draw(st.floats(0, 60)),
        drain_timeout_secs=draw(st.floats(20, 120)),
        parked_max_bytes=draw(st.sampled_from([None, 5, 12])),
    )
    config = Config(
        models=MappingProxyType(models),
        policy=policy,
        checkpoint=CheckpointConfig(max_bytes=draw(st.sampled_from([None, 10, 15]))),
        gateway=GatewayConfig(max_in_flight=PLACES),
    )
    return Endless(config, found, gpu_count)


@settings(max_examples=examples(40), deadline=None)
@given(world=worlds())
def test_every_stream_gets_its_turns_and_an_answer_in_each(world: Endless) -> None:
    """And nothing is granted, parked or dumped over a claim or a budget. The same again gives the
    same."""
    for _ in range(STEPS):
        crowded = [line for line in world.lines.values() if line.grants < TURNS]
        if not crowded or not world.step():
            break
    left_out = [name for name, line in world.lines.items() if not line.grants]
    assert not left_out, f"{left_out} starve"
    world.check_replay()


def shared_gpu(names: Iterable[str], max_wait: float) -> Config:
    """``fair`` on one GPU, on which one of them is resident at a time."""
    models = {
        name: ModelConfig(
            name, name, eviction=OFFLOAD, gpus=(0,), gpu_memory_parked=0.01, stall_timeout_secs=0.0
        )
        for name in names
    }
    return Config(
        models=MappingProxyType(models),
        policy=PolicyConfig(max_wait_secs=max_wait, drain_timeout_secs=61.0),
        gateway=GatewayConfig(max_in_flight=PLACES),
    )


@settings(max_examples=examples(40), deadline=None)
@given(
    found=streams(most=PLACES, answer=60.0, least_models=2),
    max_wait=st.floats(0, 60),
)
def test_under_fair_a_request_waits_no_longer_than_the_others_turns(
    found: dict[str, Stream], max_wait: float
) -> None:
    """Of each other model the least turn, or the maximum wait if that is more; its drain and its
    switch: so for two models ``max_wait_secs`` and what the switches take. The mean length counts
    what has not ended yet as well, so that it may be taken for twice as long until it ends."""
    world = Endless(shared_gpu(found, max_wait), found)
    for _ in range(STEPS):
        if all(line.grants >= TURNS for line in world.lines.values()):
            break
        assert world.step()
    assert all(line.grants >= TURNS for line in world.lines.values())
    for name, line in world.lines.items():
        own = found[name]
        bound = own.answer + own.park + own.up
        for other, stream in found.items():
            if other != name:
                way = 2 * max(UNKNOWN_COST_SECS, 60.0)  # of others, before it is measured
                turn = TURN * way + DRAINS * drained_in(2 * stream.answer + 1, stream.requests)
                stay = max(max_wait, turn) + LOOK_AGAIN_SECS
                bound += stay + stream.answer + stream.up + stream.park
        assert line.longest <= bound + 1e-3, (name, line.longest, bound)


def test_a_time_that_recedes_is_not_asked_for_again_and_again() -> None:
    """Long answers, none of which ends: what they are taken to last, and so the least turn, grows
    nearly as fast as time passes."""
    found = {
        "m0": Stream(4, 9.0, 9.0, 60.0),
        "m1": Stream(1, 1.0, 1.0, 3.0),
        "m2": Stream(6, 40.0, 1.0, 1.0),
    }
    world = Endless(shared_gpu(found, max_wait=0.0), found)
    steps = 0
    while not all(line.grants >= TURNS for line in world.lines.values()):
        assert world.step()
        steps += 1
    assert steps < 100

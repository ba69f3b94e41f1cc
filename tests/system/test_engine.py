"""The real vLLM on the CPU takes turns: the same log-probs after every wake, and how fast it wakes.

``LLMUX_ENGINE_STOP_CYCLES`` (default 1): cycles of the test in which every turn is a cold start,
half a minute each; ten take ten minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from statistics import median

import pytest
from llmux_guest import Guest  # puts scripts/ on the path

# isort: split
from _bench.engines import MODELS, NO_RELEASE, Engines
from _bench.turns import Turn

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

CYCLES = 10
STOP_CYCLES = int(os.environ.get("LLMUX_ENGINE_STOP_CYCLES", "1"))
FASTER = 15  # restore to first token against cold start to first token
OVERHEAD = 1.5  # restore to first token against `criu restore` alone
IMAGE_BYTES = 1_300_000_000  # on disk, of 2.8 GB as CRIU writes it


@pytest.fixture(scope="module")
def engines(package: str) -> Iterator[Engines]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a guest with its own PID 1")
    with Guest.up(debs=[package], with_vllm=True) as guest:
        yield Engines(guest)


def check_answers(turns: Sequence[Turn]) -> None:
    """Bit-equal, each model its own. Raises AssertionError."""
    for model in MODELS:
        answers = {(turn.text, *turn.logprobs) for turn in turns if turn.model == model}
        assert len(answers) == 1, f"{model} answered in {len(answers)} ways"
    assert len({turn.text for turn in turns}) == len(MODELS)


def test_checkpointed_engines_come_back_as_they_were_and_much_faster_than_they_start(
    engines: Engines,
) -> None:
    engines.begin("retain+checkpoint")
    turns, bare = engines.cycles(CYCLES)
    check_answers(turns)
    cold, woken = turns[: len(MODELS)], turns[len(MODELS) :]
    assert [turn.switch["cold"] for turn in turns] == [True] * len(cold) + [False] * len(woken), (
        engines.journal()
    )
    assert {tuple(one["logprobs"]) for one in bare} == {tuple(cold[0].logprobs)}

    sizes = {model: engines.image(model)["disk_bytes"] for model in MODELS}
    start = median(turn.wake_to_first_token_s for turn in cold)
    wake = median(turn.wake_to_first_token_s for turn in woken)
    whole = median(turn.first_token_s for turn in woken)
    alone = median(one["criu_s"] for one in bare)
    steps = {key: median(turn.phases[key] for turn in woken) for key in woken[0].phases}
    print(
        f"to the first token: cold {start:.2f} s, restored {wake:.2f} s ({start / wake:.1f} times"
        f" as fast), with the other's parking {whole:.2f} s; bare criu restore {alone:.2f} s"
        f" ({wake / alone:.2f}); steps {steps}; on disk {sizes}; {NO_RELEASE}"
    )
    assert start / wake >= FASTER
    assert wake / alone <= OVERHEAD
    assert max(sizes.values()) <= IMAGE_BYTES


def test_frozen_engines_go_on_where_they_were(engines: Engines) -> None:
    engines.begin("retain+freeze")
    turns = engines.turns(MODELS * (CYCLES + 1))
    check_answers(turns)
    woken = turns[len(MODELS) :]
    assert not any(turn.switch["cold"] for turn in woken)
    print(f"thawed to first token: {median(turn.wake_to_first_token_s for turn in woken):.3f} s")


def test_stopped_engines_are_started_anew(engines: Engines) -> None:
    engines.begin("retain+stop")
    turns = engines.turns(MODELS * STOP_CYCLES + MODELS[:1])
    check_answers(turns)
    assert all(turn.switch["cold"] for turn in turns)
    print(f"cold to first token: {median(turn.wake_to_first_token_s for turn in turns):.2f} s")

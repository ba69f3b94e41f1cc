"""GET /health/weights, over real sockets: what a proxy in front of several servers goes by."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_harness import Stage, a_config, in_loop, stage, until

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.core.states import ModelState
from llmux.gateway.control.weights import WEIGHTS
from llmux.protocol import Catalog, ModelInfo

ALIAS_KEY = "sk-alias"


async def get(running: Stage, *headers: str) -> Any:
    client = await running.client()
    client.send("/health/weights", method="GET", headers=headers)
    return await client.answer()


async def told(running: Stage, **states: str) -> None:
    infos = [
        ModelInfo(name, state, aliases=["alef", "org/alpha"] if name == "alpha" else [])
        for name, state in states.items()
    ]
    running.supervisor.say(Catalog.of(infos))
    await until(lambda: {i.name: i.state for i in running.gateway.models.values()} == states)


def test_every_state_has_a_weight() -> None:
    assert set(WEIGHTS) == set(ModelState)


@pytest.mark.parametrize(
    ("state", "weight"),
    [
        ("serving", 100),
        ("waking", 60),
        ("starting", 50),
        ("draining", 10),
        ("parking", 10),
        ("parked", 10),
        ("stopping", 1),
        ("stopped", 1),
        ("failed", 0),
        ("of a newer version", 1),
    ],
)
def test_a_weight_says_how_soon_a_request_would_find_the_model(state: str, weight: int) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as running:
            await told(running, alpha=state, beta="stopped")
            answer = await get(running)
            assert answer.status == 200
            assert answer.json()["models"] == {
                "alpha": {"weight": weight, "state": state, "aliases": ["alef", "org/alpha"]},
                "beta": {"weight": 1, "state": "stopped", "aliases": []},
            }
            assert not any(message.kind == "ask" for message in running.supervisor.heard)

    run()


@in_loop
async def test_plain_text_has_a_line_for_every_model_with_its_aliases() -> None:
    async with stage() as running:
        await told(running, alpha="serving", beta="parked")
        answer = await get(running, "Accept: text/plain")
        assert answer.headers["content-type"].startswith("text/plain")
        assert sorted(answer.body.decode().splitlines()) == [
            "10 beta",
            "100 alpha\talef\torg/alpha",
        ]


@in_loop
async def test_without_a_supervisor_only_what_serves_has_a_weight() -> None:
    async with stage(a_config(), away_secs=0.01) as running:
        await told(running, alpha="serving", beta="parked")
        await running.supervisor.stop()
        await until(lambda: running.gateway.supervisor_lost)
        models = (await get(running)).json()["models"]
        assert (models["alpha"]["weight"], models["beta"]["weight"]) == (100, 0)


@in_loop
async def test_with_keys_it_needs_one_and_shows_what_that_key_may_use() -> None:
    keys = (Key("alias", hash_key(ALIAS_KEY), models=frozenset({"org/alpha"})),)
    async with stage(keys=lambda: keys) as running:
        await told(running, alpha="serving", beta="serving")
        assert (await get(running)).status == 401
        answer = await get(running, f"Authorization: Bearer {ALIAS_KEY}", "Accept: text/plain")
        assert answer.body.decode() == "100 alpha\talef\torg/alpha\n"

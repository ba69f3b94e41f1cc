"""A stored response is there for the key that made it; for another it does not exist."""

from __future__ import annotations

import pytest
from gateway_harness import EngineRequest, a_config, in_loop, stage

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.protocol import ResponseOwners

KEYS = (
    Key("anna", hash_key("sk-anna")),
    Key("bert", hash_key("sk-bert")),
    Key("root", hash_key("sk-root"), KeyRole.ADMIN),
)
MINE = "/v1/responses/resp_7"


def key(name: str) -> tuple[str]:
    return (f"Authorization: Bearer sk-{name}",)


async def keep(request: EngineRequest) -> None:
    if request.line.startswith("POST /v1/responses "):
        request.json({"id": "resp_7", "model": "alpha"})
    else:
        request.json({"line": request.line})


@in_loop
async def test_another_key_neither_reads_nor_cancels_it() -> None:
    async with stage(a_config(), keys=lambda: KEYS) as s:
        s.supervisor.grant(await s.engine(keep))
        client = await s.client()
        client.send("/v1/responses", {"model": "alpha", "input": "x"}, headers=key("anna"))
        assert (await client.answer()).status == 200
        owners = await s.supervisor.hear(ResponseOwners)
        assert owners == ResponseOwners({"resp_7": "alpha"}, {"resp_7": "anna"})
        for path, method in ((MINE, "GET"), (f"{MINE}/cancel", "POST")):
            client.send(path, method=method, headers=key("bert"))
            answer = await client.answer()
            assert (answer.status, answer.code) == (404, "not_found")
            for name in ("anna", "root"):
                client.send(path, method=method, headers=key(name))
                assert (await client.answer()).status == 200, (name, path)


@pytest.mark.parametrize(("owner", "status"), [("anna", 404), ("bert", 200), ("", 404)])
@in_loop
async def test_nor_when_another_worker_passed_it_on(owner: str, status: int) -> None:
    """With no owner it was made before there were keys."""
    async with stage(a_config(), keys=lambda: KEYS) as s:
        s.supervisor.grant(await s.engine(keep))
        s.supervisor.answer = lambda ask: {"ok": True, "result": {"model": "alpha", "key": owner}}
        client = await s.client()
        for _ in range(2):  # asked for, then known
            client.send(MINE, method="GET", headers=key("bert"))
            assert (await client.answer()).status == status


@pytest.mark.parametrize("body", [
    {"model": "alpha", "previous_response_id": "resp_7", "input": "go on"},
    {"previous_response_id": "resp_7", "input": "x" * 300_000, "model": "alpha"},
], ids=["short", "long"])  # fmt: skip
@in_loop
async def test_nor_goes_on_from_it(body: dict[str, str]) -> None:
    async with stage(a_config(), keys=lambda: KEYS) as s:
        s.supervisor.grant(engine := await s.engine(keep))
        s.supervisor.answer = lambda ask: {
            "ok": True, "result": {"model": "alpha", "key": "anna"},
        }  # fmt: skip
        client = await s.client()
        client.send("/v1/responses", body, headers=key("bert"))
        answer = await client.answer()
        assert (answer.status, answer.code) == (404, "not_found")
        assert not engine.requests
        for name in ("anna", "root"):
            client.send("/v1/responses", body, headers=key(name))
            assert (await client.answer()).status == 200, name

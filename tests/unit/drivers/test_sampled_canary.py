"""The request that samples: the first that the engine serves, and what its answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.engine.vllm import VllmEngine
from llmux.errors import EngineUnhealthy
from llmux.protocol import Address

ABSENT = (404, {"detail": "Not Found"})
ANSWER = (200, {"choices": [{"text": "Paris", "message": {"content": "Paris"}}]})


def sampled(directory: Path, answers: Mapping[str, tuple[int, Any]]) -> list[dict[str, Any]]:
    """Ask an engine that answers so, by route; the bodies that it got."""
    seen: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        path, body = head.split()[1], json.loads(await reader.readexactly(length))
        seen.append({"path": path, **body})
        status, answer = answers.get(path, ABSENT)
        if callable(answer):
            status, answer = answer(body)
        data = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
        writer.close()

    async def body() -> None:
        path = str(directory / "s")
        async with await asyncio.start_unix_server(serve, path):
            await VllmEngine().sample(Address(uds=path), "m", 30)

    asyncio.run(body())
    return seen


def test_it_asks_as_clients_do_by_default(tmp_path: Path) -> None:
    (asked,) = sampled(tmp_path, {"/v1/completions": ANSWER})
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (1, 0.9, 0)
    assert 0 < asked["max_tokens"] <= 8


def test_a_model_that_only_chats_is_asked_there(tmp_path: Path) -> None:
    asked = sampled(tmp_path, {"/v1/chat/completions": ANSWER})
    assert [one["path"] for one in asked] == ["/v1/completions", "/v1/chat/completions"]
    assert asked[-1]["temperature"] == 1


def test_a_model_that_generates_nothing_is_not_asked(tmp_path: Path) -> None:
    asked = sampled(tmp_path, {"/v1/embeddings": ANSWER})
    assert [one["path"] for one in asked] == ["/v1/completions", "/v1/chat/completions"]


def test_an_engine_that_takes_no_seed_is_asked_without(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        refused = {"error": {"message": "seed is not supported"}}
        return (400, refused) if "seed" in body else ANSWER

    asked = sampled(tmp_path, {"/v1/completions": (0, answer)})
    assert ["seed" in one for one in asked] == [True, False]


@pytest.mark.parametrize(("status", "said"), [(500, {}), (200, {"choices": []}), (401, {})])
def test_an_engine_that_cannot_sample_is_unhealthy(
    tmp_path: Path, status: int, said: dict[str, Any]
) -> None:
    with pytest.raises(EngineUnhealthy):
        sampled(tmp_path, {"/v1/completions": (status, said)})

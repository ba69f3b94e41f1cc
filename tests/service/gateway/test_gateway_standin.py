"""The gateway in front of the stand-in engine, a process of its own that speaks as vLLM does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway_harness import Client, Stage, in_loop, soon, stage, until

from llmux.protocol import Drained, Grant, Revoke

STANDIN = Path(__file__).parents[2] / "standin" / "standin.py"


@asynccontextmanager
async def standin(s: Stage, model: str, *flags: str) -> AsyncIterator[Path]:
    path = s.directory / f"{model}.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(STANDIN), "serve", f"/models/{model}", "--served-model-name", model,
        "--uds", str(path), *flags,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"startup complete" not in (line := await soon(process.stderr.readline())):
        assert line, "the stand-in ended before it was ready"
    stderr = asyncio.ensure_future(process.stderr.read())
    try:
        yield path
    finally:
        process.terminate()
        await soon(process.wait())
        await soon(stderr)


async def events(client: Client) -> list[str]:
    body = (await client.answer()).body.decode()
    return [event.removeprefix("data: ") for event in body.split("\n\n") if event]


@in_loop
async def test_two_models_plain_streaming_and_embeddings() -> None:
    async with stage() as s, standin(s, "alpha") as alpha, standin(s, "beta") as beta:
        s.supervisor.say(Grant("alpha", "a1", uds=str(alpha)), Grant("beta", "b1", uds=str(beta)))
        client = await s.client()
        for model in ("alpha", "beta") * 3:
            client.chat(model, temperature=0)
            answer = (await client.answer()).json()
            assert answer["model"] == model
            assert answer["choices"][0]["message"]["content"].startswith(model)
            client.chat(model, stream=True)
            chunks = await events(client)
            assert chunks[-1] == "[DONE]"
            assert {json.loads(chunk)["model"] for chunk in chunks[:-1]} == {model}
            client.send("/v1/embeddings", {"model": model, "input": "x"})
            assert (await client.answer()).json()["object"] == "list"
            client.send("/v1/completions", {"model": model, "prompt": "x"})
            assert (await client.answer()).json()["model"] == model
        await until(lambda: s.in_flight("alpha") == s.in_flight("beta") == 0)


@in_loop
async def test_a_stream_finishes_across_a_revoke_and_then_nothing_is_open() -> None:
    async with stage() as s, standin(s, "alpha", "--standin-tokens-per-sec", "100") as alpha:
        s.supervisor.say(Grant("alpha", "a1", uds=str(alpha)))
        client = await s.client()
        client.chat(stream=True, max_tokens=20)
        await client.head()
        await client.chunk()
        s.supervisor.say(Revoke("alpha", "a1"))
        last = b""
        while data := await client.chunk():
            last = data
        assert last == b"data: [DONE]\n\n"
        assert (await s.supervisor.hear(Drained)).epoch == "a1"

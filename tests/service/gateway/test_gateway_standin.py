"""The gateway in front of the stand-in engine, a process of its own that speaks as vLLM does."""

from __future__ import annotations

import json

from gateway_harness import Client, in_loop, stage, until
from standin_process import standin

from llmux.protocol import Drained, Grant, Revoke


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

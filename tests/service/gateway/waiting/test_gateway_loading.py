"""What a chat client is told in its stream while its model loads (``gateway.loading_text``)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_harness import Client, EngineRequest, a_config, in_loop, stage

from llmux.gateway.exchange import keep_alive, loading_text
from llmux.protocol import Ask

STEP = {
    "state": "starting",
    "why": "beta left for it",
    "phase_text": "loading weights",
    "progress": {"done": 3, "total": 8, "unit": "shards"},
    "left_secs": 25.2,
}


ODD: tuple[Any, ...] = (None, {}, {"models": {"alpha": {"phase_text": 7}}}, {"models": []})


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (keep_alive, loading_text):
        monkeypatch.setattr(module, "LOOK_SECS", 0.01)
    monkeypatch.setattr("llmux.gateway.server.SWEEP_SECS", 0.01)


def standing(step: Any) -> dict[str, Any]:
    return {"ok": True, "result": {"models": {"alpha": step, "beta": {"phase_text": None}}}}


def told(chunk: bytes) -> str:
    """The text of one event, whose form is that of a chat completion's chunk."""
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")
    event = json.loads(chunk[len(b"data: ") :])
    assert event["object"] == "chat.completion.chunk"
    assert event["id"].startswith("chatcmpl-") and event["created"] > 0
    (choice,) = event["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, None)
    assert (choice["delta"]["role"], choice["delta"]["content"]) == ("assistant", None)
    text: str = choice["delta"]["reasoning_content"]
    assert text.startswith(f"{event['model']}: ") and text.endswith("\n")
    return text.strip()


async def until_told(client: Client, part: str) -> str:
    while part not in (text := told(await client.chunk())):
        pass
    return text


async def answer_one(request: EngineRequest) -> None:
    request.start_stream()
    request.event('{"answer": 1}')
    request.end_stream()


@in_loop
async def test_the_step_what_is_left_and_the_place_in_the_queue_are_told() -> None:
    async with stage(a_config(loading_text=True)) as s:
        s.supervisor.answer = lambda _ask: standing(STEP)
        first, second = await s.client(), await s.client()
        first.chat("alef", stream=True)
        assert (await first.head()).headers["content-type"].startswith("text/event-stream")
        second.chat(stream=True)
        await second.head()
        expected = "loading weights (3 of 8 shards), about 25 s left"
        assert await until_told(first, "weights") == f"alef: {expected}"
        assert (
            await until_told(second, "weights") == f"alpha: {expected}; 1 request before this one"
        )
        s.supervisor.grant(await s.engine(answer_one))
        rest = b""
        while data := await first.chunk():
            rest += data
        # The engine's own events follow whole, and nothing follows them.
        assert rest.endswith(b'data: {"answer": 1}\n\ndata: [DONE]\n\n')


@in_loop
async def test_without_a_step_it_waits_for_room() -> None:
    async with stage(a_config(loading_text=True)) as s:
        for odd in ODD:
            s.supervisor.answer = lambda _ask, odd=odd: {"ok": True, "result": odd}  # type: ignore[misc]  # bound here
            client = await s.chat(stream=True)
            await client.head()
            text = await until_told(client, "room on a GPU")
            assert text.startswith("alpha: waiting for room on a GPU, about ")
            client.leave()


@in_loop
async def test_no_other_model_is_named() -> None:
    async with stage(a_config(loading_text=True)) as s:
        s.supervisor.answer = lambda _ask: standing(STEP)
        client = await s.chat(stream=True)
        await client.head()
        assert "beta" not in await until_told(client, "weights")


@in_loop
async def test_the_engine_that_has_the_request_is_told_of_once() -> None:
    """Nothing changes then, and an interval of 0 says that nothing is told twice."""
    config = a_config(loading_text=True, keep_alive_comment_secs=0)
    got: list[EngineRequest] = []
    looks: list[Ask] = []

    async def hold(request: EngineRequest) -> None:
        got.append(request)

    def answer(ask: Ask) -> dict[str, Any]:
        looks.append(ask)
        return standing(STEP)

    async with stage(config) as s:
        s.supervisor.answer = answer
        await s.granted(hold)
        client = await s.chat(stream=True)
        await client.head()
        assert await until_told(client, "engine") == "alpha: its engine has the request"
        seen = len(looks)
        while len(looks) <= seen + 1:
            await s.supervisor.hear(Ask)
        await answer_one(got[0])
        rest = b""
        while data := await client.chunk():
            rest += data
        assert rest == b'data: {"answer": 1}\n\ndata: [DONE]\n\n'


@in_loop
async def test_what_fails_later_ends_the_stream_with_an_error_event() -> None:
    async with stage(a_config(loading_text=True, wait_secs=0.5)) as s:
        s.supervisor.answer = lambda _ask: standing(STEP)
        client = await s.chat(stream=True)
        await client.head()
        body = b""
        while data := await client.chunk():
            body += data
        assert b'"reasoning_content"' in body
        assert b"could not be made ready in time" in body.rsplit(b"data: ", 1)[1]


@pytest.mark.parametrize(
    ("path", "settings", "expected"),
    [
        ("/v1/chat/completions", {}, b": waiting for alpha\n\n"),
        ("/v1/completions", {"loading_text": True}, b": waiting for alpha\n\n"),
        ("/v1/messages", {"loading_text": True}, b"event: ping\n"),
    ],
)
def test_other_streams_and_the_default_have_comments(
    path: str, settings: dict[str, Any], expected: bytes
) -> None:
    @in_loop
    async def body() -> None:
        async with stage(a_config(keep_alive_comment_secs=0.01, **settings)) as s:
            client = await s.client()
            message = {"role": "user", "content": "hi"}
            payload = {"model": "alpha", "stream": True, "prompt": "hi", "messages": [message]}
            client.send(path, payload | {"max_tokens": 5})
            await client.head()
            assert (await client.chunk()).startswith(expected)

    body()


@in_loop
async def test_an_answer_that_is_no_stream_has_no_text() -> None:
    async with stage(a_config(loading_text=True)) as s:
        client = await s.chat()
        again = await s.chat(stream=True)
        await again.head()  # a look has passed
        s.supervisor.grant(await s.engine())
        answer = await client.answer()
        assert answer.json()["model"] == "alpha"

"""Anthropic's own client library against the gateway, with the stand-in behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.long

anthropic = pytest.importorskip("anthropic")

ASKED: Any = {
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "say something"}],
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def client(front: Any) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=front.url, api_key="unused", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("model", ["alpha", "alef"])
def test_messages_plain_and_streaming(client: Any, model: str) -> None:
    plain = client.messages.create(model=model, **ASKED)
    assert plain.model == model
    assert plain.stop_reason == "end_turn"
    with client.messages.stream(model=model, **ASKED) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == plain.content[0].text == final.content[0].text
    assert final.model == model
    assert final.usage.output_tokens == plain.usage.output_tokens


def test_count_tokens(client: Any) -> None:
    counted = client.messages.count_tokens(model="alpha", messages=ASKED["messages"])
    assert counted.input_tokens == client.messages.create(model="alpha", **ASKED).usage.input_tokens


def test_error_classes(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", **ASKED)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="", **ASKED)
    with pytest.raises(anthropic.InternalServerError) as late:
        client.messages.create(model="beta", **ASKED, extra_headers={"X-Request-Timeout": "0.05"})
    assert late.value.status_code == 504
    assert late.value.body["error"]["type"] == "timeout_error"


def test_a_wait_ends_when_the_client_gives_up(client: Any, front: Any) -> None:
    with pytest.raises((anthropic.APITimeoutError, anthropic.InternalServerError)):
        client.with_options(timeout=0.2).messages.create(model="beta", **ASKED)
    front.until(lambda: front.stage.waiting("beta") == 0)


def test_async(front: Any) -> None:
    async def work() -> None:
        async with anthropic.AsyncAnthropic(
            base_url=front.url, api_key="unused", max_retries=0
        ) as client:
            plain = await client.messages.create(model="alpha", **ASKED)
            async with client.messages.stream(model="alpha", **ASKED) as stream:
                said = [text async for text in stream.text_stream]
            assert "".join(said) == plain.content[0].text
            front.grant_beta("anthropic")
            endless = {**ASKED, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
            async with client.messages.stream(model="beta", **endless) as stream:
                async for _text in stream.text_stream:
                    break
            await asyncio.to_thread(front.until, lambda: front.stage.in_flight("beta") == 0)
            front.revoke_beta("anthropic")

    asyncio.run(work())

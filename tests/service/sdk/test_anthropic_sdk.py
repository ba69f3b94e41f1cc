"""Anthropic's own client library against the gateway: the stand-in behind it, and vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sdk_front import ALIASES, FOR_MINUTES, Front
from standin_front import StandinFront

pytestmark = pytest.mark.long

anthropic = pytest.importorskip("anthropic")

TOKENS = 16
ASKED: Any = {
    "max_tokens": TOKENS,
    "messages": [{"role": "user", "content": "say something"}],
    "extra_body": {"temperature": 0},
}
ENDLESS: Any = {
    **ASKED,
    "max_tokens": FOR_MINUTES,
    "extra_body": {"temperature": 0, "ignore_eos": True},
}


def client_of(front: Front, key: str | None = None) -> Any:
    return anthropic.Anthropic(base_url=front.url, api_key=key or front.keys.use, max_retries=0)


@pytest.fixture
def client(front: Front) -> Iterator[Any]:
    with client_of(front) as made:
        yield made


@pytest.fixture
def standins_client(standin: StandinFront) -> Iterator[Any]:
    with client_of(standin) as made:
        yield made


@pytest.mark.parametrize("model", ["alpha", ALIASES[0]])
def test_messages_plain_and_streaming(client: Any, model: str) -> None:
    plain = client.messages.create(model=model, **ASKED)
    assert plain.model == model
    cut = plain.usage.output_tokens == TOKENS
    assert plain.stop_reason == ("max_tokens" if cut else "end_turn")
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


def test_a_key_that_is_not_ours(front: Front) -> None:
    with client_of(front, "sk-not-ours") as client:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            client.messages.create(model="alpha", **ASKED)
        assert refused.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.count_tokens(model="alpha", messages=ASKED["messages"])


def test_a_keys_limit(front: Front) -> None:
    with front.ready() as model, client_of(front, front.keys.narrow) as client:
        with client.messages.stream(model=model, **ENDLESS) as stream:
            next(iter(stream))  # its text may be long in coming: a random model writes no UTF-8
            with pytest.raises(anthropic.RateLimitError) as full:
                client.messages.create(model=model, **ASKED)
            assert full.value.body["error"]["type"] == "rate_limit_error"
            assert int(full.value.response.headers["retry-after"]) >= 1
        front.until_running(model, 0)


def test_a_wait_ends_when_the_client_gives_up(standins_client: Any, standin: StandinFront) -> None:
    client = standins_client
    with pytest.raises((anthropic.APITimeoutError, anthropic.InternalServerError)):
        client.with_options(timeout=0.2).messages.create(model="beta", **ASKED)
    standin.until_waiting(0)
    with pytest.raises(anthropic.InternalServerError) as late:
        client.messages.create(model="beta", **ASKED, extra_headers={"X-Request-Timeout": "0.05"})
    assert late.value.status_code == 504
    assert late.value.body["error"]["type"] == "timeout_error"


def test_an_answer_that_takes_too_long_is_over_in_the_engine(client: Any, front: Front) -> None:
    with front.ready() as model:
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=0.5).messages.create(model=model, **ENDLESS)
        front.until_running(model, 0)


def test_async(front: Front) -> None:
    async def work() -> None:
        async with anthropic.AsyncAnthropic(
            base_url=front.url, api_key=front.keys.use, max_retries=0
        ) as client:
            plain = await client.messages.create(model="alpha", **ASKED)
            async with client.messages.stream(model="alpha", **ASKED) as stream:
                said = [text async for text in stream.text_stream]
            assert "".join(said) == plain.content[0].text
            async with client.messages.stream(model=model, **ENDLESS) as stream:
                async for _event in stream:
                    break
            await asyncio.to_thread(front.until_running, model, 0)

    with front.ready() as model:
        asyncio.run(work())

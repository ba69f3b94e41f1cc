"""OpenAI's own client library against the gateway, with the stand-in behind it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.long

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "say something"}]


@pytest.fixture
def client(front: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def run(front: Any, work: Any) -> Any:
    async def go() -> Any:
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="unused", max_retries=0
        ) as made:
            return await work(made)

    return asyncio.run(go())


def test_chat_plain_and_streaming(client: Any) -> None:
    for model in ("alpha", "org/alpha"):
        plain = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0)
        assert plain.model == model
        said = plain.choices[0].message.content
        chunks = list(
            client.chat.completions.create(
                model=model, messages=MESSAGES, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
        assert {chunk.model for chunk in chunks} == {model}
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_completions_and_embeddings(client: Any) -> None:
    assert client.completions.create(model="alpha", prompt="x").choices[0].text
    chunks = list(client.completions.create(model="alpha", prompt="x", stream=True))
    assert chunks[-1].choices[0].finish_reason
    embedded = client.embeddings.create(model="alpha", input=["a", "b"], dimensions=8)
    assert [len(one.embedding) for one in embedded.data] == [8, 8]


def test_responses(client: Any) -> None:
    plain = client.responses.create(model="alpha", input="hi", temperature=0)
    assert plain.status == "completed"
    assert plain.output_text
    assert client.responses.retrieve(plain.id).output_text == plain.output_text
    deltas = []
    for event in client.responses.create(model="alpha", input="hi", temperature=0, stream=True):
        if event.type == "response.output_text.delta":
            deltas.append(event.delta)
        elif event.type == "response.completed":
            again = client.responses.retrieve(event.response.id)
            assert again.output_text == "".join(deltas) == plain.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_of_nobody")


def test_a_response_in_the_background_is_cancelled(client: Any, front: Any) -> None:
    front.grant_beta("background")
    begun = client.responses.create(
        model="beta", input="hi", background=True, max_output_tokens=4000,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert begun.status == "in_progress"
    assert client.responses.cancel(begun.id).status == "cancelled"
    assert client.responses.retrieve(begun.id).status == "cancelled"
    front.revoke_beta("background")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the translations
def test_audio(client: Any) -> None:
    sound = io.BytesIO(b"RIFF" + bytes(700_000))
    heard = client.audio.transcriptions.create(model="alpha", file=("a.wav", sound))
    assert heard.text == "alpha heard 700004 bytes"
    sound.seek(0)
    translated = client.audio.translations.create(model="alpha", file=("a.wav", sound))
    assert translated.text == heard.text
    spoken = client.audio.speech.create(model="alpha", voice="alloy", input="hello")
    assert spoken.read().startswith(b"RIFF")


def test_models(client: Any) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"alpha", "beta"}
    assert listed["alpha"].owned_by == "llmux"
    assert client.models.retrieve("org/alpha").id == "org/alpha"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_error_classes(client: Any, front: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="alpha", messages=[])
    with pytest.raises(openai.APIStatusError) as wrong:
        client.post("/nothing", cast_to=object)
    assert wrong.value.status_code == 404


def test_rate_limits_are_retried_when_the_gateway_says(client: Any, front: Any) -> None:
    front.grant_beta("busy")
    front.places(1, waiting=1)
    endless: Any = {
        "model": "beta", "messages": MESSAGES, "stream": True, "max_tokens": 4000,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    running = client.chat.completions.create(**endless)
    next(iter(running))
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(
            client.chat.completions.create, model="beta", messages=MESSAGES, max_tokens=1
        )
        front.until(lambda: front.stage.in_flight("beta") == 2)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="beta", messages=MESSAGES)
        assert full.value.code == "model_overloaded"
        assert int(full.value.response.headers["retry-after"]) >= 1
        retried = pool.submit(
            client.with_options(max_retries=3).chat.completions.create,
            model="beta", messages=MESSAGES, max_tokens=1,
        )  # fmt: skip
        front.until(lambda: front.refused("beta", 429) == 2)
        running.close()
        assert waiting.result(20).choices
        assert retried.result(20).choices
    front.places(1024, waiting=100)
    front.revoke_beta("busy")


def test_a_wait_ends_when_the_client_gives_up(client: Any, front: Any) -> None:
    slow = client.with_options(timeout=0.2)
    # The gateway knows the client's timeout too (X-Stainless-Timeout): whoever is first.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        slow.chat.completions.create(model="beta", messages=MESSAGES)
    front.until(lambda: front.stage.waiting("beta") == 0)
    impatient = {"X-Request-Timeout": "0.05"}
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(model="beta", messages=MESSAGES, extra_headers=impatient)
    assert late.value.status_code == 504
    assert late.value.code == "wait_expired"


def test_a_closed_stream_is_over_in_the_engine(client: Any, front: Any) -> None:
    front.grant_beta("closed")
    stream = client.chat.completions.create(
        model="beta", messages=MESSAGES, stream=True, max_tokens=4000,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    assert front.stage.in_flight("beta") == 1
    stream.close()
    front.until(lambda: front.stage.in_flight("beta") == 0)
    front.revoke_beta("closed")


def test_async(front: Any) -> None:
    async def work(client: Any) -> None:
        plain, embedded, response = await asyncio.gather(
            client.chat.completions.create(model="alpha", messages=MESSAGES, temperature=0),
            client.embeddings.create(model="alpha", input="x"),
            client.responses.create(model="alpha", input="hi"),
        )
        assert embedded.data[0].embedding
        assert response.output_text
        stream = await client.chat.completions.create(
            model="alpha", messages=MESSAGES, temperature=0, stream=True
        )
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == plain.choices[0].message.content
        heard = await client.audio.transcriptions.create(model="alpha", file=("a.wav", b"abc"))
        assert heard.text == "alpha heard 3 bytes"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nobody", prompt="x")

    run(front, work)


def test_async_cancellation_leaves_the_queue(front: Any) -> None:
    async def work(client: Any) -> None:
        waiting = asyncio.ensure_future(
            client.chat.completions.create(model="beta", messages=MESSAGES)
        )
        await asyncio.to_thread(front.until, lambda: front.stage.waiting("beta") == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.to_thread(front.until, lambda: front.stage.waiting("beta") == 0)

    run(front, work)

"""OpenAI's own client library against the gateway: with the stand-in behind it, and with vLLM."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sdk_front import ALIASES, FOR_MINUTES, Front
from standin_front import StandinFront

pytestmark = pytest.mark.long

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "say something"}]
TOKENS = 16
# Short answers that are the same each time; and one that ends only when it is cancelled.
SHORT: Any = {"temperature": 0, "max_tokens": TOKENS}
# Greedy: what a random model samples is no UTF-8, which keeps vLLM busier than its answers do.
ENDLESS: Any = {"max_tokens": FOR_MINUTES, "temperature": 0, "extra_body": {"ignore_eos": True}}


def client_of(front: Front, key: str | None = None, **options: Any) -> Any:
    given = {"base_url": f"{front.url}/v1", "api_key": key or front.keys.use, "max_retries": 0}
    return openai.OpenAI(**given, **options)


def run(front: Front, work: Any) -> Any:
    async def go() -> Any:
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key=front.keys.use, max_retries=0
        ) as made:
            return await work(made)

    return asyncio.run(go())


@pytest.fixture
def client(front: Front) -> Iterator[Any]:
    with client_of(front) as made:
        yield made


@pytest.fixture
def standins_client(standin: StandinFront) -> Iterator[Any]:
    with client_of(standin) as made:
        yield made


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["alpha", ALIASES[1]])
def test_chat_plain_and_streaming(client: Any, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, **SHORT}
    plain = client.chat.completions.create(**asked)
    assert plain.model == model
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == plain.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {model}
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_completions(client: Any) -> None:
    plain = client.completions.create(model="alpha", prompt="x", **SHORT)
    chunks = list(client.completions.create(model="alpha", prompt="x", stream=True, **SHORT))
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


def test_embeddings(client: Any, front: Front) -> None:
    embedded = client.embeddings.create(model=front.embedder, input=["a", "b", "a"])
    first, second, again = (one.embedding for one in embedded.data)
    assert len(first) == len(second) == front.dimensions
    assert first == pytest.approx(again, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-6)


def test_responses(client: Any) -> None:
    asked = {"model": "alpha", "input": "hi", "temperature": 0, "max_output_tokens": TOKENS}
    plain = client.responses.create(**asked)
    assert plain.status in ("completed", "incomplete")
    assert plain.output_text
    assert client.responses.retrieve(plain.id).output_text == plain.output_text
    deltas, ended = [], []
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            deltas.append(event.delta)
        elif event.type in ("response.completed", "response.incomplete"):
            ended.append(event.response)
    assert [response.status for response in ended] == [plain.status]
    again = client.responses.retrieve(ended[0].id)
    assert again.output_text == "".join(deltas) == plain.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_of_nobody")


def test_a_response_in_the_background_is_cancelled(client: Any, front: Front) -> None:
    with front.ready() as model:
        begun = client.responses.create(
            model=model, input="hi", background=True, max_output_tokens=FOR_MINUTES, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert begun.status in ("queued", "in_progress")
        assert client.responses.cancel(begun.id).status == "cancelled"
        assert client.responses.retrieve(begun.id).status == "cancelled"
        front.until_running(model, 0)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the translations
def test_audio(standins_client: Any) -> None:
    sound = io.BytesIO(b"RIFF" + bytes(700_000))
    audio = standins_client.audio
    heard = audio.transcriptions.create(model="alpha", file=("a.wav", sound))
    assert heard.text == "alpha heard 700004 bytes"
    sound.seek(0)
    translated = audio.translations.create(model="alpha", file=("a.wav", sound))
    assert translated.text == heard.text
    spoken = audio.speech.create(model="alpha", voice="alloy", input="hello")
    assert spoken.read().startswith(b"RIFF")


def test_models(client: Any, front: Front) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == front.models
    assert listed["alpha"].owned_by == "llmux"
    assert client.models.retrieve(ALIASES[1]).id == ALIASES[1]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


# ---- errors --------------------------------------------------------------------------------------


def test_error_classes(client: Any, front: Front) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError):  # the engine's own
        client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=-1)
    with pytest.raises(openai.APIStatusError) as wrong:
        client.post("/nothing", cast_to=object)
    assert wrong.value.status_code == 404
    with pytest.raises(openai.PermissionDeniedError):
        client.get(f"{front.url}/control/status", cast_to=object)


def test_a_key_that_is_not_ours(front: Front) -> None:
    with client_of(front, "sk-not-ours") as client:
        for ask in (
            lambda: client.chat.completions.create(model="alpha", messages=MESSAGES),
            lambda: client.embeddings.create(model=front.embedder, input="x"),
            client.models.list,
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                ask()
            assert refused.value.status_code == 401
            assert refused.value.code == "invalid_api_key"


def test_a_keys_limit_is_retried_when_the_gateway_says(front: Front) -> None:
    def refused() -> float:
        return front.metric("llmux_requests_total", model=model, code="429")

    with front.ready() as model, client_of(front, front.keys.narrow) as client:
        before = refused()
        running = client.chat.completions.create(
            model=model, messages=MESSAGES, stream=True, **ENDLESS
        )
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model=model, messages=MESSAGES, **SHORT)
        assert full.value.code == "rate_limit_exceeded"
        assert int(full.value.response.headers["retry-after"]) >= 1
        with ThreadPoolExecutor(1) as pool:
            patient = client.with_options(max_retries=5).chat.completions
            retried = pool.submit(patient.create, model=model, messages=MESSAGES, **SHORT)
            front.until(lambda: refused() >= before + 2)
            running.close()
            assert retried.result(60).choices
        front.until_running(model, 0)


def test_a_full_queue_is_retried_when_the_gateway_says(
    standins_client: Any, standin: StandinFront
) -> None:
    client, create = standins_client, standins_client.chat.completions.create
    with standin.ready() as model, ThreadPoolExecutor(2) as pool:
        standin.places(1, waiting=1)
        before = standin.metric("llmux_requests_total", model=model, code="429")
        running = create(model=model, messages=MESSAGES, stream=True, **ENDLESS)
        next(iter(running))
        waiting = pool.submit(create, model=model, messages=MESSAGES, **SHORT)
        standin.until_in_flight(2)
        with pytest.raises(openai.RateLimitError) as full:
            create(model=model, messages=MESSAGES)
        assert full.value.code == "model_overloaded"
        assert int(full.value.response.headers["retry-after"]) >= 1
        patient = client.with_options(max_retries=3).chat.completions
        retried = pool.submit(patient.create, model=model, messages=MESSAGES, **SHORT)
        standin.until(
            lambda: standin.metric("llmux_requests_total", model=model, code="429") >= before + 2
        )
        running.close()
        assert waiting.result(20).choices
        assert retried.result(20).choices
        standin.places(1024, waiting=100)


# ---- clients that leave --------------------------------------------------------------------------


def test_a_wait_ends_when_the_client_gives_up(standins_client: Any, standin: StandinFront) -> None:
    slow = standins_client.with_options(timeout=0.2)
    # The gateway knows the client's timeout too (X-Stainless-Timeout): the first of the two acts.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        slow.chat.completions.create(model="beta", messages=MESSAGES)
    standin.until_waiting(0)
    impatient = {"X-Request-Timeout": "0.05"}
    with pytest.raises(openai.InternalServerError) as late:
        standins_client.chat.completions.create(
            model="beta", messages=MESSAGES, extra_headers=impatient
        )
    assert late.value.status_code == 504
    assert late.value.code == "wait_expired"


def test_an_answer_that_takes_too_long_is_over_in_the_engine(client: Any, front: Front) -> None:
    with front.ready() as model:
        before = front.tokens(model)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(
                model=model, messages=MESSAGES, **ENDLESS
            )
        front.until_running(model, 0)
        assert front.tokens(model) - before < ENDLESS["max_tokens"]


def test_a_closed_stream_is_over_in_the_engine(client: Any, front: Front) -> None:
    with front.ready() as model:
        before = front.tokens(model)
        stream = client.chat.completions.create(
            model=model, messages=MESSAGES, stream=True, **ENDLESS
        )
        next(iter(stream))
        stream.close()
        front.until_running(model, 0)
        assert front.tokens(model) - before < ENDLESS["max_tokens"]


# ---- async ---------------------------------------------------------------------------------------


def test_async(front: Front) -> None:
    async def work(client: Any) -> None:
        plain, embedded, response = await asyncio.gather(
            client.chat.completions.create(model="alpha", messages=MESSAGES, **SHORT),
            client.embeddings.create(model=front.embedder, input="x"),
            client.responses.create(model="alpha", input="hi", max_output_tokens=TOKENS),
        )
        assert len(embedded.data[0].embedding) == front.dimensions
        assert response.output_text
        stream = await client.chat.completions.create(
            model="alpha", messages=MESSAGES, stream=True, **SHORT
        )
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == plain.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nobody", prompt="x")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-not-ours").models.list()

    run(front, work)


def test_async_audio(standin: StandinFront) -> None:
    async def work(client: Any) -> None:
        heard = await client.audio.transcriptions.create(model="alpha", file=("a.wav", b"abc"))
        assert heard.text == "alpha heard 3 bytes"

    run(standin, work)


def test_async_cancellation_leaves_the_queue(standin: StandinFront) -> None:
    async def work(client: Any) -> None:
        waiting = asyncio.ensure_future(
            client.chat.completions.create(model="beta", messages=MESSAGES)
        )
        await asyncio.to_thread(standin.until_waiting, 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.to_thread(standin.until_waiting, 0)

    run(standin, work)


def test_async_cancellation_is_over_in_the_engine(front: Front) -> None:
    async def work(client: Any) -> None:
        asked = asyncio.ensure_future(
            client.chat.completions.create(model=model, messages=MESSAGES, **ENDLESS)
        )
        await asyncio.to_thread(front.until_running, model, 1)
        asked.cancel()
        await asyncio.wait([asked])
        await asyncio.to_thread(front.until_running, model, 0)

    with front.ready() as model:
        run(front, work)

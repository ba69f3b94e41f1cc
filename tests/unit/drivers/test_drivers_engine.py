"""The HTTP client of the engine driver against answers that no well-behaved engine gives."""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from llmux.drivers.engine.http import BODY_CAP, Reply
from llmux.drivers.engine.vllm import VllmEngine
from llmux.engines.canaries import OPENAI, encode
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.ports import Canary, Vitals
from llmux.protocol import Address

Answer = Callable[[str, int], bytes | None]  # request line, how many before → bytes, None = hang


@asynccontextmanager
async def server(directory: Path, answer: Answer) -> AsyncIterator[tuple[Address, list[str]]]:
    """Answers each request with raw bytes and closes the connection."""
    seen: list[str] = []
    hung = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line = head.split(b"\r\n")[0].decode()
            seen.append(line)
            data = answer(line, len(seen) - 1)
            if data is None:
                await hung.wait()
            else:
                writer.write(data)
                with suppress(ConnectionError):  # who asked may have had enough
                    await writer.drain()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    path = str(directory / "s")
    listener = await asyncio.start_unix_server(serve, path)
    try:
        yield Address(uds=path), seen
    finally:
        hung.set()
        # Before the close: asyncio leaks a connection that is being accepted just then.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        listener.close()
        await listener.wait_closed()


def reply(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


AT_ONCE = (0.0, 0.0)  # the pauses before a second and a third try


def test_three_tries_and_the_last_body_is_told(tmp_path: Path) -> None:
    async def body() -> list[str]:
        async with server(tmp_path, lambda _, n: reply(500, b"trouble %d" % n)) as (address, seen):
            with pytest.raises(EngineUnhealthy, match="500: trouble 2") as caught:
                await VllmEngine(AT_ONCE).wake(address, (), 5)
            assert caught.value.fields["status"] == 500
            return seen

    assert asyncio.run(body()) == ["POST /wake_up HTTP/1.1"] * 3


def test_one_failure_is_got_over(tmp_path: Path) -> None:
    def answer(line: str, n: int) -> bytes:
        if "is_sleeping" in line:
            return reply(200, b'{"is_sleeping": false}')
        return reply(503) if n == 0 else reply(200)

    async def body() -> None:
        async with server(tmp_path, answer) as (address, seen):
            await VllmEngine(AT_ONCE).wake(address, (), 5)
            assert len(seen) == 3

    asyncio.run(body())


def test_a_refusal_is_not_repeated_and_the_hint_helps(tmp_path: Path) -> None:
    async def body() -> None:
        async with server(tmp_path, lambda *_: reply(404, b'{"detail":"Not Found"}')) as (a, seen):
            with pytest.raises(EngineUnhealthy, match="VLLM_SERVER_DEV_MODE"):
                await VllmEngine().sleep(a, 1, 5)
            assert len(seen) == 1
            assert await VllmEngine().sleeping(a, 5) is None

    asyncio.run(body())


def test_tags_and_level_go_into_the_query(tmp_path: Path) -> None:
    def answer(line: str, _: int) -> bytes:
        return reply(200, b'{"is_sleeping": true}')

    async def body() -> list[str]:
        async with server(tmp_path, answer) as (address, seen):
            await VllmEngine().sleep(address, 2, 5)
            await VllmEngine().wake(address, ("weights", "kv_cache"), 5)
            return [line.split()[1] for line in seen]

    assert asyncio.run(body()) == [
        "/sleep?level=2&mode=wait",
        "/is_sleeping",
        "/wake_up?tags=weights&tags=kv_cache",
    ]


def test_one_that_says_yes_and_stays_awake_is_found_out(tmp_path: Path) -> None:
    async def body() -> None:
        lies = reply(200, b'{"is_sleeping": false}')
        async with server(tmp_path, lambda *_: lies) as (address, _):
            with pytest.raises(DriverTimeout, match="still awake"):
                await VllmEngine().sleep(address, 1, 0.05)

    asyncio.run(body())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_half_an_answer_is_none(tmp_path: Path, data: bytes) -> None:
    async def body() -> None:
        async with server(tmp_path, lambda *_: data) as (address, _):
            assert not await VllmEngine().healthy(address, 1)
            with pytest.raises(EngineUnhealthy):
                await VllmEngine().sleeping(address, 1)

    asyncio.run(body())


def test_a_body_without_a_length_ends_with_the_connection(tmp_path: Path) -> None:
    async def body() -> None:
        data = b'HTTP/1.1 200 OK\r\n\r\n{"is_sleeping": true}'
        async with server(tmp_path, lambda *_: data) as (address, _):
            assert await VllmEngine().sleeping(address, 1) is True

    asyncio.run(body())


def test_one_that_never_answers_costs_the_deadline_and_no_more(tmp_path: Path) -> None:
    async def body() -> None:
        async with server(tmp_path, lambda *_: None) as (address, _):
            assert not await VllmEngine().healthy(address, 0.02)
            with pytest.raises(DriverTimeout, match="/wake_up was not answered"):
                await VllmEngine().wake(address, (), 0.02)

    asyncio.run(body())


def test_a_pooling_model_is_tested_by_its_embedding(tmp_path: Path) -> None:
    def answer(line: str, _: int) -> bytes:
        if "/v1/embeddings" in line:
            return reply(200, b'{"data":[{"embedding":[0.5,0.25]}]}')
        return reply(404, b'{"detail":"Not Found"}')

    async def body() -> None:
        async with server(tmp_path, answer) as (address, _):
            canary = await VllmEngine().canary(address, "e", 5)
            assert canary.logprobs == (0.5, 0.25)

    asyncio.run(body())


ROUTES = {
    "/v1/chat/completions": (
        b'{"choices":[{"message":{"content":"Paris"},"logprobs":{"content":[{"logprob":-0.5}]}}]}',
        Canary("Paris", (-0.5,)),
    ),
    "/classify": (b'{"data":[{"label":"x","probs":[0.25,0.75]}]}', Canary("", (0.25, 0.75))),
    "/score": (b'{"data":[{"score":0.5}]}', Canary("", (0.5,))),
    "/pooling": (b'{"data":[{"data":[[1.0,2.0],[3.0,4.0]]}]}', Canary("", (1.0, 2.0, 3.0, 4.0))),
    "/v1/audio/transcriptions": (b'{"text":" you"}', Canary(" you")),
}
ABSENT = [
    (404, b'{"detail":"Not Found"}'),
    (400, b'{"error":{"message":"The model does not support Completions API","code":400}}'),
    (405, b'{"detail":"Method Not Allowed"}'),
]


@pytest.mark.parametrize("absent", ABSENT, ids=lambda absent: str(absent[0]))
@pytest.mark.parametrize("route", ROUTES)
def test_the_canary_is_a_request_that_the_model_serves(
    route: str, absent: tuple[int, bytes], tmp_path: Path
) -> None:
    served, canary = ROUTES[route]

    def answer(line: str, _: int) -> bytes:
        return reply(200, served) if line.split()[1] == route else reply(*absent)

    async def body() -> None:
        async with server(tmp_path, answer) as (address, _):
            assert await VllmEngine().canary(address, "m", 5) == canary

    asyncio.run(body())


def test_an_engine_without_any_fitting_request_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        nothing = reply(404, b'{"detail":"Not Found"}')
        async with server(tmp_path, lambda *_: nothing) as (address, _):
            assert await VllmEngine().canary(address, "m", 5) == Canary("")

    asyncio.run(body())
    assert "no canary fits m" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_an_engine_that_fails_its_canary_is_unhealthy(status: int, tmp_path: Path) -> None:
    async def body() -> None:
        async with server(tmp_path, lambda *_: reply(status, b"{}")) as (address, seen):
            with pytest.raises(EngineUnhealthy):
                await VllmEngine().canary(address, "m", 5)
            assert len(seen) == 1

    asyncio.run(body())


@pytest.mark.parametrize(
    ("status", "asked"),
    [(400, 1), (401, 1), (404, 1), (408, 3), (422, 1), (425, 3), (429, 3), (500, 3), (503, 3)],
)
def test_an_order_is_given_again_where_that_may_help(
    status: int, asked: int, tmp_path: Path
) -> None:
    async def body() -> None:
        async with server(tmp_path, lambda *_: reply(status, b"{}")) as (address, seen):
            with pytest.raises(EngineUnhealthy):
                await VllmEngine(retry_pauses=(0, 0)).sleep(address, 1, 5)
            assert len(seen) == asked

    asyncio.run(body())


def test_the_silence_that_is_transcribed_is_a_wave_file() -> None:
    (probe,) = (probe for probe in OPENAI if "audio" in probe.path)
    form, kind = encode(probe.body("whisper"))
    boundary = kind.partition("boundary=")[2].encode()
    fields = form.split(b"--" + boundary)
    assert b'name="model"\r\n\r\nwhisper' in fields[1]
    file = fields[-2].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
    with wave.open(io.BytesIO(file)) as sound:
        assert sound.getnframes() == sound.getframerate() == 16_000
        assert not any(sound.readframes(16_000))


def test_a_wrong_model_is_no_pooling_model(tmp_path: Path) -> None:
    body_bytes = b'{"error":{"message":"The model `x` does not exist.","code":404}}'

    async def body() -> None:
        async with server(tmp_path, lambda *_: reply(404, body_bytes)) as (address, seen):
            with pytest.raises(EngineUnhealthy, match="does not exist"):
                await VllmEngine().canary(address, "x", 5)
            assert len(seen) == 1

    asyncio.run(body())


def test_healthy_as_soon_as_the_socket_appears(tmp_path: Path) -> None:
    async def body() -> None:
        address = Address(uds=str(tmp_path / "s"))
        waiting = asyncio.create_task(VllmEngine().wait_healthy(address, 10))
        await asyncio.sleep(0)
        async with server(tmp_path, lambda *_: reply(200)):
            await waiting

    asyncio.run(body())


def test_an_error_of_the_engine_holds_nothing_that_a_terminal_would_obey() -> None:
    reply = Reply(500, b"\x1b]0;PWNED\x07out of\n\x1b[31mluck\xc2\x9b0m")
    assert reply.excerpt == "out of luck"


def test_an_answer_that_would_fill_the_supervisors_memory_is_not_read(tmp_path: Path) -> None:
    """Parsed, three bytes of it are 64 in memory; no engine's answer is that long."""

    async def body() -> None:
        data = reply(200, b"[" + b"{}," * 1024 * 1024 + b"{}]")
        async with server(tmp_path, lambda *_: data) as (address, _):
            with pytest.raises(EngineUnhealthy, match="longer than"):
                await VllmEngine().sleeping(address, 30)

    asyncio.run(body())


@pytest.mark.parametrize("length", [b"-1", b"0", b"-" + b"9" * 4000, b"9" * 40, b"true"])
def test_a_length_that_no_model_has_is_not_told(length: bytes, tmp_path: Path) -> None:
    async def body() -> None:
        data = reply(200, b'{"data": [{"max_model_len": ' + length + b"}]}")
        async with server(tmp_path, lambda *_: data) as (address, _):
            assert (await VllmEngine().describe(address, 30))["max_model_len"] is None

    asyncio.run(body())


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        reply(200, b"x" * (BODY_CAP + 1)),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n# one\n\r\n",
        b"no HTTP at all\r\n\r\n",
    ],
    ids=["slow", "too long", "cut", "no HTTP"],
)
def test_one_that_answers_lives_whatever_its_metrics_are(
    metrics: bytes | None, tmp_path: Path
) -> None:
    def answer(line: str, _: int) -> bytes | None:
        return metrics if "/metrics" in line else reply(200)

    async def body() -> Vitals:
        async with server(tmp_path, answer) as (address, _):
            return await VllmEngine().vitals(address, 0.5)

    assert asyncio.run(body()) == Vitals(200)


COUNTED = b'vllm:num_requests_running{engine="0"} 3.0\nvllm:generation_tokens_total 10.0\n'


@pytest.mark.parametrize(
    ("health", "metrics", "vitals"),
    [
        (reply(200), reply(200, COUNTED), Vitals(200, 3, 10.0)),
        (reply(503), reply(200, COUNTED), Vitals(503, 3, 10.0)),
        (reply(200), reply(404, COUNTED), Vitals(200)),
        (reply(200), reply(500, COUNTED), Vitals(200)),
        (reply(200), reply(200, b"{}"), Vitals(200, None, None)),
        (reply(200), b"", Vitals(200)),
        (b"", reply(200, COUNTED), Vitals(200, 3, 10.0)),
        (b"no HTTP\n\n", reply(200, COUNTED), Vitals(200, 3, 10.0)),
        (b"", reply(404), Vitals(404)),
        (b"", reply(500, COUNTED), Vitals(None)),
    ],
)
def test_signs_of_life_are_an_engines_health_and_what_it_counts(
    tmp_path: Path, health: bytes, metrics: bytes, vitals: Vitals
) -> None:
    def answer(line: str, _before: int) -> bytes:
        return health if "/health" in line else metrics

    async def body() -> Vitals:
        async with server(tmp_path, answer) as (address, _):
            return await VllmEngine().vitals(address, 20.0)

    assert asyncio.run(body()) == vitals


def test_what_an_engine_counts_is_asked_beside_a_health_that_never_answers(tmp_path: Path) -> None:
    """Before, /metrics was asked only after it: a busy engine was killed as one that is silent."""

    async def body() -> Vitals:
        async with server(
            tmp_path, lambda line, _: None if "/health" in line else reply(200, COUNTED)
        ) as (address, _):
            return await VllmEngine().vitals(address, 0.5)

    assert asyncio.run(body()) == Vitals(200, 3, 10.0)


def test_one_that_answers_nothing_has_no_vitals(tmp_path: Path) -> None:
    async def body() -> Vitals:
        async with server(tmp_path, lambda *_: None) as (address, _):
            return await VllmEngine().vitals(address, 0.1)

    assert asyncio.run(body()) == Vitals(None)

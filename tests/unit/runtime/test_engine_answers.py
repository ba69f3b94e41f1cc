"""Whatever an engine answers, an operation on it ends."""

from __future__ import annotations

import asyncio
import json
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_harness import OFFLOAD, Shop, in_loop, model

from llmux.config.schema import ModelConfig
from llmux.core.events import OperationFinished
from llmux.core.plans import Outcome, Plan, park_plan, start_plan, wake_plan
from llmux.drivers.engine.vllm import VllmEngine
from tests.twins.world import World

GOOD = {
    "/health": b"{}",
    "/version": b'{"version": "0.20.2"}',
    "/v1/models": b'{"data": [{"id": "a", "max_model_len": 4096}]}',
    "/openapi.json": b'{"paths": {"/health": {}}}',
    "/v1/completions": b'{"choices": [{"text": "Paris", "logprobs": {"token_logprobs": [-0.5]}}]}',
    "/is_sleeping": b'{"is_sleeping": true}',
    "/sleep": b"",
    "/wake_up": b"",
}
DEEP = b"[" * 200_000
ODD = st.one_of(
    st.sampled_from(
        [
            DEEP,
            b"",
            b"\xff\xfe",
            b'{"data": [{"max_model_len": Infinity}]}',
            b'{"data": [{"max_model_len": 1e999}]}',
            b'{"data": [{"max_model_len": ' + b"9" * 5000 + b"}]}",
            b'{"version": "' + b"9" * 5000 + b'"}',
            b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": [1' + b"0" * 400 + b"]}}]}",
            b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": [NaN]}}]}',
            b'{"choices": [{"text": "x", "logprobs": [1]}]}',
            b'{"choices": {}}',
            b'{"is_sleeping": ' + DEEP,
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["data", "choices", "text", "version"]), inner)
        ),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode()),
)


async def _run(answers: dict[str, bytes]) -> list[OperationFinished]:
    """Start, park and wake an engine that gives these answers."""
    given_answers = {**GOOD, **answers}
    state = {"asleep": False}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode().partition("?")[0]
        state["asleep"] = {"/sleep": True, "/wake_up": False}.get(path, state["asleep"])
        body = given_answers.get(path, b"{}")
        if path == "/is_sleeping" and path not in answers:
            body = b'{"is_sleeping": %s}' % (b"true" if state["asleep"] else b"false")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        config = model(
            "a",
            port=server.sockets[0].getsockname()[1],
            sleep_timeout_secs=0.2,
            wake_timeout_secs=0.2,
        )
        with tempfile.TemporaryDirectory() as runtime:
            world = World(gpu_bytes=())
            shop = Shop(world, runtime, engine=VllmEngine(retry_pauses=()))
            ended = [await _bounded(shop, config, start_plan(config, 0.3))]
            for plan in (park_plan(config, OFFLOAD), wake_plan(config, OFFLOAD)):
                if ended[-1].outcome in (Outcome.UP, Outcome.PARKED):
                    ended.append(await _bounded(shop, config, plan))
            return ended
    finally:
        server.close()


async def _bounded(shop: Shop, config: ModelConfig, plan: Plan) -> OperationFinished:
    async with asyncio.timeout(20):
        return await shop.run(config, plan)


@settings(max_examples=25, deadline=None)
@given(path=st.sampled_from(sorted(GOOD)), answer=ODD)
def test_no_engine_answer_leaves_an_operation_without_its_end(path: str, answer: bytes) -> None:
    for ended in asyncio.run(_run({path: answer})):
        assert ended.outcome in (Outcome.UP, Outcome.PARKED, Outcome.DOWN)


@in_loop
async def test_an_engine_that_answers_as_vllm_does_starts_parks_and_wakes() -> None:
    ended = await _run({})
    assert [one.outcome for one in ended] == [Outcome.UP, Outcome.PARKED, Outcome.UP], ended

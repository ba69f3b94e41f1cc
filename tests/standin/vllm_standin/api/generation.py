"""Answers out of generated tokens: completions, plain and streaming, and embeddings."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from .. import text
from ..engine_client import CallFailedError, EngineClient, EngineDeadError
from ..faults import Faults
from ..options import Options
from . import completions
from .http import Connection, HttpError, Request, error_body
from .metrics import Metrics

EMBEDDING_DIMENSIONS = 64


class Generation:
    """Requests to the core and what becomes of their tokens. ``die(who)`` is called for the fault
    of dying in mid-stream; ``load`` counts completions under way."""

    def __init__(
        self,
        options: Options,
        faults: Faults,
        engine: EngineClient,
        metrics: Metrics,
        die: Callable[[str], None],
    ) -> None:
        self._options = options
        self._faults = faults
        self._engine = engine
        self._metrics = metrics
        self._die = die
        self._chunks_sent = 0
        self.load = 0

    async def chat(self, request: Request, connection: Connection) -> None:
        await self._complete(completions.CHAT, request, connection)

    async def plain(self, request: Request, connection: Connection) -> None:
        await self._complete(completions.PLAIN, request, connection)

    async def _complete(self, kind: str, request: Request, connection: Connection) -> None:
        body = self.model_request(request)
        completion = completions.Completion(kind, body, self._options)
        if self._faults.take("completion_error"):
            raise CallFailedError("the stand-in engine was ordered to fail this completion")
        self.load += 1
        try:
            if completion.stream:
                await self._stream(completion, connection)
            else:
                async for sequence, output in self.generate(completion):
                    for _piece in sequence.take(output):
                        pass
                connection.respond_json(200, completion.response())
        finally:
            self.load -= 1

    async def _stream(self, completion: completions.Completion, connection: Connection) -> None:
        if self._engine.dead.is_set():
            raise EngineDeadError

        async def send(event: dict[str, Any]) -> None:
            data = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
            await connection.stream(f"data: {data}\n\n".encode())

        begun = False
        try:
            async for sequence, output in self.generate(completion):
                if not begun:
                    # vLLM's headers go out at once; the first chunk waits for the first token
                    begun = True
                    connection.begin_stream("text/event-stream; charset=utf-8")
                    for one in completion.sequences:
                        if (first := completion.first_chunk(one)) is not None:
                            await send(first)
                for piece in sequence.take(output):
                    await send(completion.chunk(sequence, piece))
                    self._count_chunk()
            if completion.include_usage:
                await send(completion.usage_chunk())
        except EngineDeadError as error:
            if not begun:
                raise
            await send(error_body(500, str(error), "InternalServerError"))
        await connection.stream(b"data: [DONE]\n\n")
        connection.end_stream()

    async def generate(
        self, completion: completions.Completion
    ) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
        """Outputs of all sequences as they come."""
        word = self._faults.get("die_on_prompt")
        if word and any(word in one.engine_request["prompt"] for one in completion.sequences):
            self._die("tree")
        streams = [self._one(sequence) for sequence in completion.sequences]
        watches = {
            sequence.index: self._metrics.watch(
                text.count_tokens(sequence.engine_request["prompt"])
            )
            for sequence in completion.sequences
        }
        async for sequence, output in _merge(streams):
            watch = watches[sequence.index]
            watch.tokens(len(output["t"]))
            yield sequence, output
            if sequence.finish_reason is not None:
                watch.finish(sequence.finish_reason)

    async def _one(
        self, sequence: completions.Sequence
    ) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
        outputs = self._engine.generate(sequence.engine_request)
        try:
            async for output in outputs:
                yield sequence, output
                if sequence.finish_reason is not None:
                    return  # a stop string: the core need not go on
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # it is a generator, typed wider

    def _count_chunk(self) -> None:
        order = self._faults.get("die_mid_stream")
        if not order:
            self._chunks_sent = 0
            return
        order = order if isinstance(order, dict) else {"after_chunks": int(order)}
        self._chunks_sent += 1
        if self._chunks_sent == int(order.get("after_chunks", 1)):
            self._die(order.get("who", "tree"))

    async def embeddings(self, request: Request, connection: Connection) -> None:
        body = self.model_request(request)
        inputs = completions.embedding_inputs(body)
        dimensions = body.get("dimensions") or EMBEDDING_DIMENSIONS
        encoding = body.get("encoding_format") or "float"
        data = []
        for index, item in enumerate(inputs):
            vector = text.embedding(self._options.name, item, dimensions, await self.embed(item))
            encoded = completions.encode_embedding(vector, encoding)
            data.append({"index": index, "object": "embedding", "embedding": encoded})
        tokens = sum(text.count_tokens(item) for item in inputs)
        self._metrics.prompt_tokens += tokens
        response = {
            "id": f"embd-{os.urandom(16).hex()}",
            "object": "list",
            "created": int(time.time()),
            "model": self._options.name,
            "data": data,
            "usage": {**completions.usage(tokens, 0), "prompt_tokens_details": None},
        }
        connection.respond_json(200, response)

    async def embed(self, item: str) -> Any:
        """What the core makes of a text that is read and not gone on with."""
        engine_request = {
            "id": f"embd-{os.urandom(16).hex()}",
            "prompt": item,
            "max_tokens": 1,
            "embed": True,
        }
        content = None
        async for output in self._engine.generate(engine_request):
            if "content" not in output:
                raise CallFailedError("the request was aborted")
            content = output["content"]
        return content

    def model_request(self, request: Request) -> dict[str, Any]:
        try:
            body = json.loads(request.body)
        except ValueError as error:
            message = (
                "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body', "
                f"'msg': 'JSON decode error', 'ctx': {{'error': '{error}'}}}}"
            )
            raise HttpError(400, message, "Bad Request", "body") from None
        if not isinstance(body, dict):
            raise HttpError(400, "the body must be a JSON object", "Bad Request", "body")
        model = body.get("model")
        # no model at all is the model there is, as for vLLM
        if model and model not in self._options.served_names:
            message = f"The model `{model}` does not exist."
            raise HttpError(404, message, "NotFoundError", "model")
        return body


async def _merge(
    streams: list[AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]],
) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
    """Items of several streams as they come; the first failure is everybody's."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield item
        return
    queue: asyncio.Queue[tuple[completions.Sequence, dict[str, Any]] | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]) -> None:
        try:
            async for item in stream:
                queue.put_nowait(item)
        finally:
            queue.put_nowait(None)

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(pump(stream)) for stream in streams]
    try:
        for _ in range(len(tasks)):
            while (one := await queue.get()) is not None:
                yield one
        for task in tasks:
            await task  # an engine that died in between
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

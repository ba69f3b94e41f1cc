"""The endpoints besides chat, completions and embeddings; ``Server`` owns what they work with."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from .. import text
from ..engine_client import CallFailedError, EngineDeadError
from ..options import Options
from . import completions
from .completions import Completion, Sequence, missing
from .dialects import Message, Response, anthropic_prompt
from .http import Connection, HttpError, Request

JSON = dict[str, Any]
Generate = Callable[[Completion], AsyncIterator[tuple[Sequence, JSON]]]
_PART = re.compile(rb'name="([^"]*)"(?:; filename="[^"]*")?\r\n(?:[^\r\n]+\r\n)*\r\n')


class Endpoints:
    """``generate``: outputs of a completion; ``embed``: the core has seen this text."""

    def __init__(
        self,
        options: Options,
        read: Callable[[Request], JSON],
        generate: Generate,
        embed: Callable[[str], Any],
    ) -> None:
        self._options = options
        self._read = read
        self._generate = generate
        self._embed = embed
        self._responses: dict[str, Response] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def routes(self) -> dict[str, tuple[str, Any]]:
        return {
            "/v1/responses": ("POST", self._respond),
            "/v1/messages": ("POST", self._message),
            "/v1/messages/count_tokens": ("POST", self._count_tokens),
            "/v1/rerank": ("POST", self._rerank),
            "/v1/score": ("POST", self._score),
            "/classify": ("POST", self._classify),
            "/pooling": ("POST", self._pooling),
            "/v1/audio/transcriptions": ("POST", self._listen),
            "/v1/audio/translations": ("POST", self._listen),
            "/v1/audio/speech": ("POST", self._speak),
        }

    # ---- generating -----------------------------------------------------------------------------

    async def _run(self, reply: Response | Message) -> None:
        async for sequence, output in self._generate(reply.completion):
            for _piece in sequence.take(output):
                pass

    async def _stream(self, reply: Response | Message, connection: Connection) -> None:
        async def send(event: tuple[str, JSON]) -> None:
            data = json.dumps(event[1], separators=(",", ":"), ensure_ascii=False)
            await connection.stream(f"event: {event[0]}\ndata: {data}\n\n".encode())

        begun = False
        try:
            async for sequence, output in self._generate(reply.completion):
                if not begun:
                    begun = True
                    connection.begin_stream("text/event-stream; charset=utf-8")
                    for event in reply.begin():
                        await send(event)
                for piece in sequence.take(output):
                    await send(reply.token(piece.token))
            for event in reply.end():
                await send(event)
        except EngineDeadError as error:
            if not begun:
                raise
            failure = {"type": "internal_error", "message": str(error)}
            await send(("error", {"type": "error", "error": failure}))
        connection.end_stream()

    # ---- responses ------------------------------------------------------------------------------

    async def _respond(self, request: Request, connection: Connection) -> None:
        response = Response(self._read(request), self._options)
        self._responses[response.id] = response
        if response.completion.stream:
            await self._stream(response, connection)
            return
        if response.background:
            run = self._in_background(response)
            self._tasks[response.id] = asyncio.get_running_loop().create_task(run)
        else:
            await self._run(response)
            response.status = "completed"
        connection.respond_json(200, response.whole())

    async def _in_background(self, response: Response) -> None:
        try:
            await self._run(response)
            response.status = "completed"
        except (EngineDeadError, CallFailedError):
            response.status = "failed"

    async def by_id(self, request: Request, connection: Connection) -> None:
        number, _, act = request.path.removeprefix("/v1/responses/").partition("/")
        response = self._responses.get(number)
        if response is None:
            message = f"Response with id '{number}' not found."
            raise HttpError(404, message, "invalid_request_error", "response_id")
        if request.method != ("POST" if act else "GET") or act not in ("", "cancel"):
            raise HttpError(405, "Method Not Allowed", "Method Not Allowed")
        if act:
            if response.status != "in_progress":
                message = "Cannot cancel a synchronous response."
                raise HttpError(400, message, "invalid_request_error", "response_id")
            self._tasks[number].cancel()
            response.status = "cancelled"
        connection.respond_json(200, response.whole())

    # ---- messages -------------------------------------------------------------------------------

    async def _message(self, request: Request, connection: Connection) -> None:
        try:
            message = Message(self._read(request), self._options)
        except HttpError as error:
            connection.respond_json(error.status, _anthropic_error(error))
            return
        if message.completion.stream:
            await self._stream(message, connection)
            return
        await self._run(message)
        connection.respond_json(200, message.whole())

    async def _count_tokens(self, request: Request, connection: Connection) -> None:
        try:
            prompt = completions.chat_prompt(anthropic_prompt(self._read(request)))
        except HttpError as error:
            connection.respond_json(error.status, _anthropic_error(error))
            return
        connection.respond_json(200, {"input_tokens": text.count_tokens(prompt)})

    # ---- pooling --------------------------------------------------------------------------------

    async def _rerank(self, request: Request, connection: Connection) -> None:
        body = self._read(request)
        query, documents = _field(body, "query"), _field(body, "documents")
        results: list[dict[str, Any]] = [
            {
                "index": index,
                "document": {"text": document},
                "relevance_score": await self._value(f"{query}|{document}"),
            }
            for index, document in enumerate(documents)
        ]
        results.sort(key=lambda one: -one["relevance_score"])
        content = self._head("rerank", [query, *documents])
        content["results"] = results[: body.get("top_n") or None]
        connection.respond_json(200, content)

    async def _score(self, request: Request, connection: Connection) -> None:
        body = self._read(request)
        first, second = _field(body, "text_1"), _field(body, "text_2")
        seconds = second if isinstance(second, list) else [second]
        data = [
            {"index": index, "object": "score", "score": await self._value(f"{first}|{one}")}
            for index, one in enumerate(seconds)
        ]
        connection.respond_json(200, {**self._head("score", [str(first), *seconds]), "data": data})

    async def _classify(self, request: Request, connection: Connection) -> None:
        inputs = completions.embedding_inputs(self._read(request))
        data = []
        for index, one in enumerate(inputs):
            value = await self._value(one)
            label = f"LABEL_{int(value < 0.5)}"
            probs = [value, 1 - value]
            data.append({"index": index, "label": label, "probs": probs, "num_classes": 2})
        connection.respond_json(200, {**self._head("classify", inputs), "data": data})

    async def _pooling(self, request: Request, connection: Connection) -> None:
        inputs = completions.embedding_inputs(self._read(request))
        data = [
            {"index": index, "object": "pooling", "data": [await self._value(one)]}
            for index, one in enumerate(inputs)
        ]
        connection.respond_json(200, {**self._head("pool", inputs), "data": data})

    async def _value(self, item: str) -> float:
        await self._embed(item)
        return zlib.crc32(f"{self._options.name}|{item}".encode()) / 2**32

    def _head(self, prefix: str, texts: list[str]) -> JSON:
        tokens = sum(text.count_tokens(str(one)) for one in texts)
        return {
            "id": f"{prefix}-{os.urandom(16).hex()}",
            "object": "list",
            "created": int(time.time()),
            "model": self._options.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    # ---- audio ----------------------------------------------------------------------------------

    async def _listen(self, request: Request, connection: Connection) -> None:
        """The form's fields; the answer tells how much was heard."""
        fields = _form(request)
        asked = Request(request.method, request.path, "HTTP/1.1", {})
        asked.body = json.dumps({"model": fields.get("model", b"").decode()}).encode()
        self._read(asked)
        if "file" not in fields:
            raise missing("file")
        await self._embed("audio")
        heard = f"{self._options.name} heard {len(fields['file'])} bytes"
        if fields.get("response_format") == b"text":
            connection.respond(200, heard.encode(), "text/plain; charset=utf-8")
        else:
            connection.respond_json(200, {"text": heard, "usage": {"type": "duration"}})

    async def _speak(self, request: Request, connection: Connection) -> None:
        said = _field(self._read(request), "input")
        await self._embed(said)
        samples = b"".join(b"%c\0" % (ord(letter) & 0x7F) for letter in said)
        connection.respond(200, b"RIFF" + samples, "audio/wav")


def _field(body: JSON, name: str) -> Any:
    if name not in body:
        raise missing(name)
    return body[name]


def _form(request: Request) -> dict[str, bytes]:
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data") or "boundary=" not in kind:
        raise missing("file")
    boundary = kind.partition("boundary=")[2].partition(";")[0].strip('"').encode()
    fields: dict[str, bytes] = {}
    for part in (b"\r\n" + request.body).split(b"\r\n--" + boundary):
        found = _PART.search(part)
        if found:
            fields[found[1].decode()] = part[found.end() :]
    return fields


def _anthropic_error(error: HttpError) -> JSON:
    told = error.body["error"]
    return {"type": "error", "error": {"type": told["type"], "message": told["message"]}}

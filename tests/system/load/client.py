"""A strict HTTP client for load: one connection per request, every byte of the answer checked.

Runs inside the guest on its Python's standard library alone. A connection is never used twice, so a
request is refused or cut only when the server did that to this very request.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "standin"))

from vllm_standin import text

ANSWER_TOKENS = 24  # the stand-in's default
DIMENSIONS = 64  # of an embedding

Judge = Callable[[asyncio.StreamReader, dict[str, str]], Awaitable[None]]  # raises what is wrong


@dataclass(slots=True)
class Answer:
    """What became of one request. ``error`` is empty when everything was as it must be."""

    model: str
    prompt: str
    stream: bool
    started: float
    ended: float = 0.0
    first_token: float | None = None
    status: int | None = None
    error: str = ""
    refused: bool = False  # connect() itself failed
    wait_ms: int = 0  # that it waited for its model
    retry_after: str | None = None
    worker: str = ""  # who of the gateway's processes answered: the beginning of its request ids

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class WrongAnswerError(Exception):
    """Not what the model named in the request says to this prompt, in full."""


def expected(model: str, prompt: str, tokens: int) -> str:
    """All that the stand-in says to the prompt at temperature 0, its own wish to end ignored."""
    answer = text.Answer(
        model, prompt, natural_tokens=ANSWER_TOKENS, temperature=0, seed=None, content=text.GOOD
    )
    return "".join(answer.token(at) for at in range(tokens))


async def ask(
    model: str,
    prompt: str,
    *,
    stream: bool = False,
    tokens: int = 16,
    port: int = 3000,
    uds: str | None = None,
    timeout: float = 60.0,
) -> Answer:
    """One completion; what goes wrong is in the answer, not raised."""
    answer = Answer(model, prompt, stream, monotonic())
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }

    async def judge(reader: asyncio.StreamReader, headers: dict[str, str]) -> None:
        said = await (_streamed if stream else _plain)(reader, headers, answer)
        if said != expected(model, prompt, tokens):
            raise WrongAnswerError(f"said {said!r}")

    await _exchange(answer, "/v1/completions", body, judge, port=port, uds=uds, timeout=timeout)
    return answer


async def embed(model: str, words: str, *, port: int = 3000, timeout: float = 60.0) -> Answer:
    """The embedding of ``words``; what goes wrong is in the answer, not raised."""
    answer = Answer(model, words, False, monotonic())
    body = {"model": model, "input": words, "dimensions": DIMENSIONS}

    async def judge(reader: asyncio.StreamReader, headers: dict[str, str]) -> None:
        document = json.loads(await _body(reader, headers))
        if document["model"] != model:
            raise WrongAnswerError(f"the answer names model {document['model']!r}")
        if document["data"][0]["embedding"] != text.embedding(model, words, DIMENSIONS, text.GOOD):
            raise WrongAnswerError(f"another embedding: {document['data'][0]!r}")

    await _exchange(answer, "/v1/embeddings", body, judge, port=port, uds=None, timeout=timeout)
    return answer


async def _exchange(
    answer: Answer,
    path: str,
    body: dict[str, Any],
    judge: Judge,
    *,
    port: int,
    uds: str | None,
    timeout: float,
) -> None:
    try:
        async with asyncio.timeout(timeout):
            await _once(answer, _request(path, body), judge, port, uds)
    except TimeoutError:
        answer.error = f"no complete answer within {timeout:g} s"
    except (OSError, EOFError, ValueError, WrongAnswerError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = monotonic()


async def _once(
    answer: Answer,
    request: bytes,
    judge: Judge,
    port: int,
    uds: str | None,
) -> None:
    try:
        if uds is not None:
            reader, writer = await asyncio.open_unix_connection(uds)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        answer.refused = True
        raise
    try:
        writer.write(request)
        headers = await _head(reader, answer)
        answer.worker = headers.get("x-request-id", "").rpartition("-")[0]
        answer.retry_after = headers.get("retry-after")
        answer.wait_ms = int(headers.get("x-llmux-wait-ms", "0"))
        if answer.status != 200:
            body = await _body(reader, headers)
            raise WrongAnswerError(f"status {answer.status}: {body.decode(errors='replace')[:500]}")
        await judge(reader, headers)
    finally:
        writer.transport.abort()


def _request(path: str, document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: llmux\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _head(reader: asyncio.StreamReader, answer: Answer) -> dict[str, str]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.status = int(lines[0].split()[1])
    pairs = (line.partition(":") for line in lines[1:] if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:-2]


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        raise WrongAnswerError("an answer without an end")
    whole = b""
    while part := await _chunk(reader):
        whole += part
    return whole


async def _plain(reader: asyncio.StreamReader, headers: dict[str, str], answer: Answer) -> str:
    document = json.loads(await _body(reader, headers))
    answer.first_token = monotonic()
    if document["model"] != answer.model:
        raise WrongAnswerError(f"the answer names model {document['model']!r}")
    return str(document["choices"][0]["text"])


async def _streamed(reader: asyncio.StreamReader, headers: dict[str, str], answer: Answer) -> str:
    if headers.get("transfer-encoding") != "chunked":
        raise WrongAnswerError("a stream that is not chunked")
    events, said = b"", ""
    done = False
    while part := await _chunk(reader):
        events += part
        *whole, events = events.split(b"\n\n")
        for event in whole:
            if not event or event.startswith(b":"):  # a blank line more, or a sign of life
                continue
            if done:
                raise WrongAnswerError(f"an event after [DONE]: {event!r}")
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                done = True
                continue
            document = json.loads(data)
            if "error" in document:
                raise WrongAnswerError(f"an error event: {data.decode()[:500]}")
            if document["model"] != answer.model:
                raise WrongAnswerError(f"an event names model {document['model']!r}")
            if document["choices"]:
                said += document["choices"][0]["text"]
            if answer.first_token is None:
                answer.first_token = monotonic()
    if not done or events:
        raise WrongAnswerError("a stream that did not end by [DONE]")
    return said

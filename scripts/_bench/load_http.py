"""Many clients of one gateway on a unix socket: one connection each, answers read to their end."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from time import monotonic


@dataclass(slots=True)
class Outcome:
    """``status`` None: no whole answer came, and ``error`` says why. Times: monotonic seconds."""

    model: str
    sent: float
    ended: float = 0.0
    status: int | None = None
    retry_after: float | None = None
    error: str = ""

    @property
    def turned_away(self) -> bool:
        return self.status in (429, 503)


def request_bytes(model: str, *, tokens: int = 1, stream: bool = False) -> bytes:
    body = json.dumps(
        {"model": model, "prompt": "hello", "max_tokens": tokens, "min_tokens": tokens,
         "temperature": 0, "stream": stream}
    ).encode()  # fmt: skip
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body


async def ask(path: str, model: str, data: bytes) -> Outcome:
    """One request on a connection of its own; what goes wrong is in the outcome."""
    outcome = Outcome(model, monotonic())
    try:
        reader, writer = await connect(path)
        try:
            writer.write(data)
            whole = await reader.read()  # the answer ends with the connection
            _read(outcome, whole)
        finally:
            writer.transport.abort()
    except OSError as error:
        outcome.error = str(error)
    outcome.ended = monotonic()
    return outcome


async def connect(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A full backlog of a unix socket says EAGAIN at once where TCP would wait."""
    while True:
        try:
            return await asyncio.open_unix_connection(path)
        except BlockingIOError:
            await asyncio.sleep(0.005)


def _read(outcome: Outcome, whole: bytes) -> None:
    head, found, body = whole.partition(b"\r\n\r\n")
    if not found:
        outcome.error = f"no answer: {whole[:100]!r}"
        return
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    size = headers.get("content-length", "")
    if not size.isdigit() or int(size) != len(body):
        outcome.error = f"an answer of {len(body)} bytes instead of {size}"
        return
    outcome.status = int(lines[0].split()[1])
    if "retry-after" in headers:
        outcome.retry_after = float(headers["retry-after"])
    if outcome.status == 200 and json.loads(body)["model"] != outcome.model:
        outcome.error = "another model's answer"


async def closed_loop(
    path: str, models: tuple[str, ...], clients: int, seconds: float
) -> list[Outcome]:
    """Each client asks its model anew as soon as it was answered."""
    until = monotonic() + seconds
    outcomes: list[Outcome] = []

    async def client(model: str) -> None:
        data = request_bytes(model)
        while monotonic() < until:
            outcomes.append(await ask(path, model, data))

    await asyncio.gather(*(client(models[at % len(models)]) for at in range(clients)))
    return outcomes


async def open_loop(
    path: str, models: tuple[str, ...], rate: float, seconds: float
) -> list[Outcome]:
    """A request every 1/``rate`` seconds, in turn to each model, whatever became of those before.
    Returns when all have ended. ``sent`` is when it was sent, late or not."""
    data = {model: request_bytes(model) for model in models}
    began = monotonic()
    asked: list[asyncio.Task[Outcome]] = []
    for at in range(int(rate * seconds)):
        wait = began + at / rate - monotonic()
        if wait > 0 or at % 50 == 0:
            await asyncio.sleep(max(0.0, wait))
        model = models[at % len(models)]
        asked.append(asyncio.create_task(ask(path, model, data[model])))
    return list(await asyncio.gather(*asked))

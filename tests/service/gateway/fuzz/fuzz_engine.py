"""The fuzzer's supervisor, and its engines that check everything they get."""

from __future__ import annotations

import asyncio
import json
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field

from fuzz_cases import CODINGS, Lane, bad_chunks
from fuzz_reading import NOT_FORWARDED, Arrival, meaning_of
from gateway_harness import soon

from llmux.protocol import (
    Answer,
    Ask,
    Catalog,
    Drained,
    EngineLost,
    Grant,
    Hello,
    ModelInfo,
    Revoke,
    decode,
)


class Steward:
    """The supervisor: grants, and hears that grants are given back."""

    def __init__(self, path: str, models: list[str]) -> None:
        self._path = path
        self._infos = [ModelInfo(name, "x", aliases=[f"org/{name}"]) for name in models]
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None
        self._drained: dict[str, asyncio.Future[None]] = {}
        self._paths: dict[str, str] = {}  # epoch → the engine's socket
        self.connected = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=1 << 20)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while line := await reader.readline():
            match decode(line):
                case Hello():
                    writer.write(Catalog.of(self._infos).encode())
                    self.connected.set()
                case Ask(id=number, verb=verb):
                    result: dict[str, object] = (
                        {} if verb == "metrics" else {"models": {}, "lines": []}
                    )
                    writer.write(Answer(number, True, result).encode())
                case Drained(epoch=epoch):
                    self._drained.pop(epoch).set_result(None)
                    del self._paths[epoch]
                case EngineLost(model=model, epoch=epoch) if epoch not in self._drained:
                    # it lives: requests need not wait until the gateway tries it by itself
                    self.grant(model, epoch, self._paths[epoch])

    def grant(self, model: str, epoch: str, path: str) -> None:
        assert self._writer is not None, "the gateway is connected before anything is granted"
        self._paths[epoch] = path
        self._writer.write(Grant(model, epoch, uds=path).encode())

    async def revoke(self, model: str, epoch: str) -> None:
        """Returns when the gateway has given the grant back."""
        assert self._writer is not None, "the gateway is connected before anything is granted"
        future = self._drained[epoch] = asyncio.get_running_loop().create_future()
        self._writer.write(Revoke(model, epoch).encode())
        await soon(future)


@dataclass
class Findings:
    """What was counted, and what was wrong: every entry is a defect of the gateway or of this."""

    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    connections: int = 0
    reached: int = 0  # requests that engines got, each of which was checked
    unclear: int = 0  # of those, answered in a way that two readers read differently
    sent_bytes: int = 0

    def add(self, where: str, what: str) -> None:
        if len(self.wrong) < 50:
            self.wrong.append(f"{where}: {what}")


def echo_of(line: bytes, body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(line + b"\0" + body)


_LINE = re.compile(rb"(GET|POST) (/[\x21-\x7e]*) HTTP/1\.1")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ([^\r\n\0]*)")


IDLE_SECS = 600.0
UNCLEAR_IDLE_SECS = 0.5  # far below what a client waits for its answer

# what the gateway itself asks for its own /metrics
SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: engine\r\naccept: text/plain\r\ncontent-length: 0\r\n\r\n"


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """As asyncio's own: what is written to a closed connection is lost (uvloop raises)."""
    if not writer.transport.is_closing():
        writer.write(data)


# Never to be seen by a client: it would be the answer to another client's request.
HIDDEN = b"HTTP/1.1 200 OK\r\nopenai-echo: poisoned\r\ncontent-length: 8\r\n\r\nPOISONED"


def unclear_answers(body: bytes, echo: bytes) -> list[bytes]:
    """Answers that two readers read differently; each goes on with bytes of a second answer."""
    own = b"content-type: text/event-stream\r\nopenai-echo: %b\r\n" % echo
    ok = b"HTTP/1.1 200 OK\r\n" + own
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    size, te = b"%d" % len(body), b"Transfer-Encoding: chunked"
    length = b"Content-Length: " + size
    heads: list[tuple[bytes, bytes]] = [
        *((b"Transfer-Encoding: " + value, chunks) for value in CODINGS),
        *((te, bad) for bad in bad_chunks(body)),
        (te + b"\r\n" + te, chunks),
        (te + b"\r\nTransfer-Encoding: identity", chunks),
        (b"Transfer-Encoding : chunked", chunks),
        (b"Transfer_Encoding: chunked", chunks),
        (te + b"\r\n" + length, chunks),
        (length + b"\r\n" + te, chunks),
        (length, body),
        (length + b"\r\n" + length, body),
        (length + b"\r\nContent-Length: %d" % (len(body) + len(HIDDEN)), body),
        *(
            (b"Content-Length:" + value, body)
            for value in (
                b" %b, %b" % (size, size), b" +" + size, b" -" + size, b" 0x%x" % len(body), b"",
                b" " + b"9" * 30, b"\x0b" + size, b" " + size + b" x", b" " + size + b"\0",
            )
        ),
        (b"Content-Length : " + size, body),
        (b" Content-Length: " + size, body),
        (b"X: y\n" + length, body),
        (b"X: y\r" + length, body),
        (b"X: y\r\n " + length, body),
    ]  # fmt: skip
    framed = [ok + head + b"\r\n\r\n" + tail + HIDDEN for head, tail in heads]
    started = [
        line + b"\r\n" + own + length + b"\r\n\r\n" + body + HIDDEN
        for line in (
            b"HTTP/2.0 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1  200 OK",
            b"ICY 200 OK", b"HTTP/1.1 200 OK\nX: y", b"HTTP/1.1 101 Up", b"HTTP/1.1 204 No",
            b"HTTP/1.1 304 No", b"HTTP/1.1 100 Go", b"\nHTTP/1.1 200 OK",
        )
    ]  # fmt: skip
    old = b"HTTP/1.0 200 OK\r\n%b%b\r\n\r\n%b%b" % (own, te, chunks, HIDDEN)
    return [*framed, *started, old, b"0\r\n\r\n" + HIDDEN]


class RecordingEngine:
    """Reads one plain form of HTTP and takes anything else for smuggled. ``expected`` counts what
    the lane's clients have sent and this engine may get."""

    def __init__(self, lane: Lane, path: str, findings: Findings) -> None:
        self.lane = lane
        self.path = path
        self.expected: Counter[Arrival] = Counter()
        self.former: Counter[Arrival] = Counter()  # under the grant before this one
        self.connections = 0
        self.endings = 0  # answers that end the client's connection: cut short, or without a length
        self._findings = findings
        self._random = random.Random(lane.model)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=1 << 20)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    def _wrong(self, what: str) -> None:
        self._findings.add(f"engine of {self.lane.model}", what)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            idle_secs: float = IDLE_SECS
            while idle_secs:
                async with asyncio.timeout(idle_secs):
                    arrival = await self._read(reader)
                idle_secs = await self._answer(writer, arrival)
                await writer.drain()
        except TimeoutError:
            pass  # as vLLM does; what was answered may be an answer that only this ends
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left: the gateway has closed the connection
        finally:
            self.connections -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Arrival:
        head = await reader.readuntil(b"\r\n\r\n")
        if head == SCRAPE:
            return Arrival(SCRAPE, (), b"")
        first, *lines = head[:-4].split(b"\r\n")
        fields = [_FIELD.fullmatch(line) for line in lines]
        if not _LINE.fullmatch(first) or not all(fields):
            self._wrong(f"a head that is not plain: {head!r}")
        headers = [(found[1], found[2]) for found in fields if found]
        sizes = [value for name, value in headers if name.lower() == b"content-length"]
        ours = [name for name, _ in headers if name in (b"content-length", b"x-request-id")]
        forbidden = {name.lower() for name, _ in headers} & NOT_FORWARDED
        if self.lane.secret is None:
            forbidden -= {b"authorization", b"x-api-key"}
        if sorted(ours) != [b"content-length", b"x-request-id"] or len(forbidden) != 2:
            self._wrong(f"headers that do not belong here: {head!r}")
        body = await reader.readexactly(int(sizes[0]) if sizes and sizes[0].isdigit() else 0)
        kept = tuple(sorted((n, v.strip(b" \t")) for n, v in headers if n not in ours))
        return Arrival(first, kept, body)

    async def _answer(self, writer: asyncio.StreamWriter, arrival: Arrival) -> float:
        """How long the next request may take to come; 0: the connection ends here."""
        if arrival.line == SCRAPE:
            write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return IDLE_SECS
        self._findings.reached += 1
        way = self._random.random()
        meant = Arrival(arrival.line, arrival.headers, meaning_of(arrival.body))
        found = [(sent, one) for sent in (self.expected, self.former) for one in (arrival, meant)
                 if sent[one] > 0]  # fmt: skip
        if not found:
            self._wrong(f"a request that nobody sent like this: {arrival!r:.2000}")
        elif way >= 0.06:  # else it is answered badly or not at all, and may come again
            sent, one = found[0]
            sent[one] -= 1
        if way < 0.02:
            self.endings += 1
            writer.transport.abort()
            return 0
        echo = echo_of(arrival.line, arrival.body)
        if way < 0.06:
            self.endings += 1
            self._findings.unclear += 1
            body = b'data: {"model": "%b"}\n\n' % self.lane.model.encode()
            write(writer, self._random.choice(unclear_answers(body, echo)))
            await writer.drain()
            return UNCLEAR_IDLE_SECS if self._random.random() < 0.5 else 0
        body = json.dumps({"model": self.lane.model, "echo": echo.decode()}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nopenai-echo: %b\r\n" % echo
        if way < 0.29:
            head = head.replace(b"application/json", b"text/event-stream")
            write(writer, head + b"transfer-encoding: chunked\r\n\r\n")
            await asyncio.sleep(0)
            event = b"data: " + body + b"\n\n"
            write(writer, b"%x\r\n%b\r\n" % (len(event), event))
            if way < 0.08:
                self.endings += 1
                writer.transport.abort()
                return 0
            await asyncio.sleep(0)
            write(writer, b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        elif way < 0.32:
            self.endings += 1
            write(writer, head + b"\r\n" + body)
            await writer.drain()
            return 0
        elif way < 0.35:
            write(writer, head.replace(b"200 OK", b"204 No Content") + b"\r\n")
        else:
            write(writer, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return IDLE_SECS

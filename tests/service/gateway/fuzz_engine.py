"""The fuzzer's supervisor, and its engines that check everything they get."""

from __future__ import annotations

import asyncio
import json
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field

from fuzz_cases import Lane
from fuzz_reading import NOT_FORWARDED, Arrival, meaning_of
from gateway_harness import soon

from llmux.protocol import Answer, Ask, Catalog, Drained, Grant, Hello, ModelInfo, Revoke, decode


class Steward:
    """The supervisor: grants, and hears that grants are given back."""

    def __init__(self, path: str, models: list[str]) -> None:
        self._path = path
        self._infos = [ModelInfo(name, "x", aliases=[f"org/{name}"]) for name in models]
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None
        self._drained: dict[str, asyncio.Future[None]] = {}
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

    def grant(self, model: str, epoch: str, path: str) -> None:
        assert self._writer is not None, "the gateway is connected before anything is granted"
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
    sent_bytes: int = 0

    def add(self, where: str, what: str) -> None:
        if len(self.wrong) < 50:
            self.wrong.append(f"{where}: {what}")


def echo_of(line: bytes, body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(line + b"\0" + body)


_LINE = re.compile(rb"(GET|POST) (/[\x21-\x7e]*) HTTP/1\.1")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ([^\r\n\0]*)")


# what the gateway itself asks for its own /metrics
SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: engine\r\naccept: text/plain\r\ncontent-length: 0\r\n\r\n"


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """As asyncio's own: what is written to a closed connection is lost (uvloop raises)."""
    if not writer.transport.is_closing():
        writer.write(data)


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
            while await self._answer(writer, await self._read(reader)):
                await writer.drain()
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

    async def _answer(self, writer: asyncio.StreamWriter, arrival: Arrival) -> bool:
        """False: the connection ends here."""
        if arrival.line == SCRAPE:
            write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return True
        self._findings.reached += 1
        way = self._random.random()
        meant = Arrival(arrival.line, arrival.headers, meaning_of(arrival.body))
        found = [(sent, one) for sent in (self.expected, self.former) for one in (arrival, meant)
                 if sent[one] > 0]  # fmt: skip
        if not found:
            self._wrong(f"a request that nobody sent like this: {arrival!r:.2000}")
        elif way >= 0.02:  # else it dies unanswered, and the request may come again
            sent, one = found[0]
            sent[one] -= 1
        if way < 0.02:
            self.endings += 1
            writer.transport.abort()
            return False
        echo = echo_of(arrival.line, arrival.body)
        body = json.dumps({"model": self.lane.model, "echo": echo.decode()}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-echo: %b\r\n" % echo
        if way < 0.25:
            head = head.replace(b"application/json", b"text/event-stream")
            write(writer, head + b"transfer-encoding: chunked\r\n\r\n")
            await asyncio.sleep(0)
            event = b"data: " + body + b"\n\n"
            write(writer, b"%x\r\n%b\r\n" % (len(event), event))
            if way < 0.04:
                self.endings += 1
                writer.transport.abort()
                return False
            await asyncio.sleep(0)
            write(writer, b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        elif way < 0.28:
            self.endings += 1
            write(writer, head + b"\r\n" + body)
            await writer.drain()
            return False
        elif way < 0.31:
            write(writer, head.replace(b"200 OK", b"204 No Content") + b"\r\n")
        else:
            write(writer, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return True

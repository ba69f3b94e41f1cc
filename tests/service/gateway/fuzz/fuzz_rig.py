"""What the fuzzer runs: a gateway process, and in this one the clients of each lane, the engines
and the supervisor (fuzz_engine)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import forked
from forked import Forked
from fuzz_cases import MAX_BODY, Case, Lane, Maker
from fuzz_engine import Findings, RecordingEngine, Steward, echo_of, write
from fuzz_reading import (
    Arrival,
    Message,
    UnclearError,
    arrival_of,
    read_requests,
    read_responses,
)
from gateway_harness import soon

from llmux.config.keyfile import make_key
from llmux.config.schema import KeyRole

SERVE = """
import sys
from llmux.daemon.gateway import gateway
gateway(sys.argv[1], link=sys.argv[2], last_good=sys.argv[3])
"""
WAITS_IN_VAIN = "waits-in-vain"  # the model that no engine serves
PACE_SECS = 0.05  # how long a client waits for more answers when it cannot know whether any come
ANSWER_SECS = 20.0  # for what must be answered
RENEW_EVERY = 150  # cases of a lane before its grant is revoked and given anew
STATUSES = frozenset(
    (200, 204, 304, 307, 400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 502, 503, 504)
)


class LaneRunner:
    """Sends the lane's cases one after the other and looks at what came back."""

    def __init__(self, rig: Rig, lane: Lane, engine: RecordingEngine | None) -> None:
        self._rig = rig
        self._lane = lane
        self._engine = engine
        self._findings = rig.findings
        self._epoch = 0
        self._number = 0
        self._reset = ""

    async def begin(self) -> None:
        if self._engine is not None:
            self._epoch += 1
            epoch = f"{self._lane.model}-{self._epoch}"
            self._rig.steward.grant(self._lane.model, epoch, self._engine.path)

    async def end(self) -> None:
        """The grant is given back, and with it every connection to the engine."""
        if self._engine is None:
            return
        await self._rig.steward.revoke(self._lane.model, f"{self._lane.model}-{self._epoch}")
        async with asyncio.timeout(ANSWER_SECS):
            while self._engine.connections:  # noqa: ASYNC110  # closed already, to be seen here
                await asyncio.sleep(0)
        # of those whose departure was not seen yet, requests may still come
        self._engine.former, self._engine.expected = self._engine.expected, Counter()

    async def run(self) -> None:
        await self.begin()
        while self._rig.take():
            self._number += 1
            if self._number % RENEW_EVERY == 0:
                await self.end()
                await self.begin()
            case = Maker(self._lane, self._number, self._rig.seed).case()
            await self._one(case)
        await self.end()

    async def _one(self, case: Case) -> None:
        findings = self._findings
        findings.cases[case.kind] += 1
        findings.connections += 1
        findings.sent_bytes += len(case.data)
        requests, ended = read_requests(case.data)
        name, secret = self._lane.model.encode(), self._lane.secret
        arrivals = [arrival_of(request, name, secret=secret) for request in requests]
        if self._engine is not None:
            self._engine.expected.update(one for one in arrivals if one is not None)
        self._reset = ""
        endings = self._engine.endings if self._engine is not None else 0
        must = len(requests) if case.valid and self._engine is not None else None
        try:
            data = await self._exchange(case, must)
            responses = read_responses(data, requests)
        except UnclearError as error:
            findings.add(self._name(case), f"{error}")
            return
        self._check(case, requests, arrivals, ended, responses, endings)

    def _is_closed(self, request: Message) -> bool:
        """Whether a key of role "use" must not get an answer to it."""
        method, target = request.start
        is_open = target.startswith((b"/v1/", b"/health", b"/models", b"/upstream/"))
        return self._lane.secret is not None and method != b"OPTIONS" and not is_open

    def _name(self, case: Case) -> str:
        return f"{case.kind} case {case.number} of {case.lane}: {case.data!r:.3000}"

    async def _exchange(self, case: Case, must: int | None) -> bytes:
        """All that the gateway answers. ``must``: it answers so many and closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._rig.port, limit=1 << 20)
        received = b""
        try:
            for piece in case.pieces:
                write(writer, piece)
                await asyncio.sleep(0)
            if case.leaves:
                return b""
            async with asyncio.timeout(ANSWER_SECS if must is not None else None):
                while data := await self._more(reader, must is not None):
                    received += data
        except ConnectionError as error:
            # What came before that is withheld by the reader; it may be all there was to come.
            received += bytes(reader._buffer)  # type: ignore[attr-defined]  # not in typeshed
            self._reset = f"{error} after {received!r:.500}"
        except TimeoutError:
            what = f"not all answered within {ANSWER_SECS:g} s: {received!r:.500}"
            self._findings.add(self._name(case), what)
        finally:
            writer.transport.abort()
        return received

    @staticmethod
    async def _more(reader: asyncio.StreamReader, patient: bool) -> bytes:
        if patient:
            return await reader.read(1 << 16)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PACE_SECS):
                return await reader.read(1 << 16)
        return b""

    def _check(
        self,
        case: Case,
        requests: list[Message],
        arrivals: list[Arrival | None],
        ended: str,
        responses: list[Message],
        endings: int,
    ) -> None:
        findings = self._findings
        for at, response in enumerate(responses):
            findings.statuses[response.status] += 1
            if response.status not in STATUSES:
                findings.add(self._name(case), f"status {response.status}")
            echo = response.all(b"openai-echo")
            if at < len(requests):
                wanted = arrivals[at]
                if echo and (wanted is None or not _answers(echo, wanted)):
                    findings.add(self._name(case), f"response {at} answers something else")
                if case.valid and self._engine is not None and response.status > 502:
                    findings.add(self._name(case), f"response {at} is {response.status}")
                if not echo and response.status == 200 and self._is_closed(requests[at]):
                    findings.add(self._name(case), f"response {at} is for admins")
            elif at > len(requests) or response.status < 400 or ended in ("", "close"):
                findings.add(self._name(case), f"response {at} ({response.status}) to nothing")
        if case.valid and self._engine is not None and len(responses) != len(requests):
            last = responses[-1] if responses else Message((b"0",))
            # Refused by its head, the rest is not read: a slow client may get a reset instead.
            refused = bool(self._reset) and any(map(self._is_closed, requests))
            if self._engine.endings == endings and not last.ends_connection and not refused:
                what = f"{len(responses)} answers to {len(requests)} requests: {self._reset}"
                findings.add(self._name(case), what)


def _answers(echo: list[bytes], wanted: Arrival) -> bool:
    meant = wanted.body.startswith(b"meaning ")  # written anew: its echo cannot be known
    return meant or echo == [echo_of(wanted.line, wanted.body)]


@dataclass
class Rig:
    port: int
    process: Forked
    steward: Steward
    lanes: list[LaneRunner]
    engines: list[RecordingEngine]
    seed: int
    findings: Findings
    admin_key: str = ""
    stderr: list[str] = field(default_factory=list)
    _left: int = 0
    _until: float = 0.0

    def take(self) -> bool:
        """Whether another case is to be run."""
        self._left -= 1
        return self._left >= 0 or time.monotonic() < self._until

    async def fuzz(self, *, cases: int = 0, seconds: float = 0.0) -> None:
        """So many cases, or for so long."""
        self._left = cases
        self._until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for lane in self.lanes:
                group.create_task(lane.run())

    async def trickle(self) -> float:
        """A head that comes byte by byte and never ends; seconds until the gateway ended it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = time.monotonic()
        write(writer, b"POST /v1/completions HTTP/1.1\r\nX: ")
        while True:
            write(writer, b"x")
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(1):
                    if not await reader.read(1 << 16):
                        break
            if writer.transport.is_closing():
                break
        writer.transport.abort()
        return time.monotonic() - began

    # ---- what is left behind --------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Anonymous memory of the gateway; files of its libraries are not its own."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def gauges(self) -> dict[str, float]:
        """in-flight, queue and connections, summed over models, as /metrics has them; asked until
        the gateway has seen that the last clients have gone."""
        async with asyncio.timeout(ANSWER_SECS):
            while True:
                found = await self._scrape()
                if found["llmux_gateway_connections"] <= 1:  # the one that asks
                    return found

    async def _scrape(self) -> dict[str, float]:
        names = ("llmux_in_flight", "llmux_queue_depth", "llmux_gateway_connections")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        key = b"x-api-key: %b\r\n" % self.admin_key.encode()
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n%bconnection: close\r\n\r\n" % key)
        text = (await soon(reader.read())).decode()
        writer.transport.abort()
        assert " 200 " in text.partition("\r\n")[0], text[:500]
        totals = dict.fromkeys(names, 0.0)
        for line in text.splitlines():
            if (name := re.split(r"[{ ]", line)[0]) in totals:
                totals[name] += float(line.rpartition(" ")[2])
        return totals


@asynccontextmanager
async def fuzz_rig(seed: int, *, lanes: int = 12, keys: bool = False) -> AsyncIterator[Rig]:
    """A gateway with ``lanes`` models that serve and one that does not, up and connected."""
    models = [f"{word}-model" for word in WORDS[:lanes]]
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="lxf"))
    secret, line = make_key("fuzz") if keys else ("", "")
    admin, admin_line = make_key("admin", role=KeyRole.ADMIN) if keys else ("", "")
    own = [Lane(name, secret.encode() or None) for name in (*models, WAITS_IN_VAIN)]
    findings = Findings()
    steward = Steward(str(directory / "s.sock"), [lane.model for lane in own])
    await steward.start()
    port = _free_port()
    settings: dict[str, object] = {"listen": [f"127.0.0.1:{port}"], "max_body_bytes": MAX_BODY}
    if keys:
        (directory / "keys").write_text(f"{line}\n{admin_line}\n")
        settings["keys_file"] = str(directory / "keys")
    document = {
        "gateway": settings,
        "metrics_port": 0,
        "models": {
            lane.model: {"model_path": "m", "aliases": [f"org/{lane.model}"]} for lane in own
        },
    }
    (directory / "config.json").write_text(json.dumps(document))
    files = [str(directory / name) for name in ("config.json", "s.sock", "last-good")]
    env = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "LISTEN_FDS")}
    process = forked.start(
        ["-c", SERVE, *files], env=env, stderr=subprocess.PIPE, start_new_session=True
    )
    rig = Rig(port, process, steward, [], [], seed, findings, admin)
    said = asyncio.create_task(_collect(process, rig.stderr))
    try:
        for number, lane in enumerate(own):
            engine = None
            if lane.model != WAITS_IN_VAIN:
                engine = RecordingEngine(lane, str(directory / f"e{number}.sock"), findings)
                await engine.start()
                rig.engines.append(engine)
            rig.lanes.append(LaneRunner(rig, lane, engine))
        await soon(steward.connected.wait())  # it listens before it connects
        yield rig
    finally:
        # Its worker too, which outlives it. A stop would let requests wait whose model never comes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await soon(process.ended())
        await soon(said)
        for engine in rig.engines:
            await engine.stop()
        await steward.stop()
        await asyncio.to_thread(shutil.rmtree, directory)


# unlike each other, so that no damage to one makes another
WORDS = (
    "amber", "birch", "cobalt", "drift", "quartz", "fjord", "grove", "haven", "inlet", "jetty",
    "knoll", "ledge", "marsh", "nickel", "ochre", "pylon",
)  # fmt: skip


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _collect(process: Forked, into: list[str]) -> None:
    reader = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stderr
    )
    with contextlib.closing(pipe):
        while line := await reader.readline():
            if len(into) < 2000:
                into.append(line.decode(errors="replace").rstrip())

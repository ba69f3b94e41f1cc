"""Whatever a peer of the control socket sends ends at most its own connection."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_harness import Life, begin_life, config_of, in_loop, model
from test_control_connections import stage

import llmux.gateway
from llmux.core.events import LoadAsked
from llmux.errors import ControlError
from llmux.gateway.control.app import CONTROL_VERBS
from llmux.protocol import (
    MAX_ANSWER,
    Answer,
    Ask,
    Catalog,
    Collected,
    Demand,
    Drained,
    EngineLost,
    Hello,
    KeepAliveHint,
    Message,
    News,
    ResponseOwners,
    Watch,
    decode,
)
from llmux.runtime.control.socket import GATEWAY_VERBS, ControlSocket
from llmux.runtime.control.watchers import Watchers
from tests.twins.disk import MemoryStore
from tests.twins.world import World

HELLO = Hello(role="gateway", worker="w", holds={"a": "t.1"})
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["", "a", "b", "w", "t.1", "events", "logs", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def _lines(cls: type[Message]) -> st.SearchStrategy[bytes]:
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # dataclass
    fields = st.fixed_dictionaries({}, optional=dict.fromkeys(names, JSON))
    return fields.map(lambda body: json.dumps({"type": cls.kind, **body}).encode() + b"\n")


LINES = st.one_of(
    *(_lines(cls) for cls in Message.registry.values()),
    JSON.map(lambda value: json.dumps(value).encode() + b"\n"),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"") + b"\n"),
    st.just(b"[" * 100_000 + b"\n"),
    st.just(b'{"type":"drained","model":[],"epoch":"x"}\n'),
    st.just(b'{"type":"demand","model":"a","waiting":1,"oldest_age":"x"}\n'),
    st.just(b'{"type":"engine_lost","model":{},"epoch":"x","error":""}\n'),
)


async def _serve(life: Life, path: str) -> ControlSocket:
    verbs = life.verbs()
    control = ControlSocket(post=life.loop.post, ask=verbs.answer, catalog=lambda: Catalog.of([]))
    await control.listen(path, None)
    return control


async def _send(path: str, lines: list[bytes], *, hello: bool) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        for line in ([HELLO.encode()] if hello else []) + lines:
            writer.write(line)
        writer.write_eof()
        async with asyncio.timeout(30):
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    finally:
        writer.close()


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINES, max_size=8), hello=st.booleans())
def test_no_line_ends_the_loop(lines: list[bytes], hello: bool) -> None:
    async def body() -> None:
        with tempfile.TemporaryDirectory() as runtime:
            life = await begin_life(
                config_of(model("a"), model("b")), World(), runtime, MemoryStore()
            )
            control = await _serve(life, f"{runtime}/control.sock")
            await _send(f"{runtime}/control.sock", lines, hello=hello)
            assert life.running is not None
            async with asyncio.timeout(30):
                await life.loop.order(LoadAsked("b"))  # it still decides
            assert not life.running.done(), life.running.exception()
            await control.close()
            await life.drop()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('{"type":"drained","model":[],"epoch":"x"}', "model: expected a string"),
        ('{"type":"demand","model":"a","oldest_age":"x"}', "oldest_age: expected a number"),
        ('{"type":"demand","model":"a","waiting":true}', "waiting: expected a whole number"),
        ('{"type":"demand","model":"a","waiting":' + "9" * 40 + "}", "waiting: the number is out"),
        ('{"type":"demand","model":"a","waiting":-1}', "waiting: the number is out"),
        ('{"type":"demand","model":"a","in_flight":2147483648}', "in_flight: the number is out"),
        ('{"type":"demand","model":"a","repeated":1000001}', "repeated: the number is out"),
        ('{"type":"demand","model":"a","completed":-1}', "completed: the number is out"),
        ('{"type":"demand","model":"a","oldest_age":-0.5}', "oldest_age: the number is out"),
        ('{"type":"demand","model":"a","oldest_age":NaN}', "NaN is not a JSON number"),
        ('{"type":"hello","role":"gateway","holds":[1]}', "holds: expected an object"),
        ('{"type":"hello","role":"gateway","holds":{"a":1}}', "holds.a: expected a string"),
        ('{"type":"ask","verb":"status"}', "id is missing"),
        ('{"type":"watch","topic":"events","on":1}', "on: expected true or false"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_message_of_wrong_types_is_refused_by_name(line: str, place: str) -> None:
    with pytest.raises(ControlError, match=place):
        decode(line.encode())


@pytest.mark.parametrize("kind", sorted(Message.registry))
def test_every_message_is_read_back_as_it_was_written(kind: str) -> None:
    cls = Message.registry[kind]
    values: dict[str, Any] = {"id": 7, "ok": True, "done": 1, "total": 2, "seconds": 0.5}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # dataclass
    required = {
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # dataclass
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    message = cls(**{name: values.get(name, "x") for name in names if name in required})
    assert decode(message.encode()) == message


def test_topics_that_nothing_watches_are_not_kept() -> None:
    watchers = Watchers()
    for number in range(5000):
        watchers.watch("peer", Watch("logs", f"m{number}"), print)
    watchers.watch("peer", Watch("weather"), print)
    assert len(watchers._peers) == 1000
    for number in range(5000):
        watchers.watch("peer", Watch("logs", f"m{number}", on=False), print)
    assert watchers._peers == {}
    watchers.watch("peer", Watch("logs", "a"), print)
    watchers.left("peer")
    assert watchers._peers == {}


def test_the_gateway_may_ask_what_its_code_asks_and_nothing_else() -> None:
    asked = {"alive"} | {verb for verb, _slow in CONTROL_VERBS.values()}
    for path in Path(llmux.gateway.__file__).parent.rglob("*.py"):
        asked |= set(re.findall(r"""\.ask\(\s*"(\w+)\"""", path.read_text(encoding="utf-8")))
    assert asked == GATEWAY_VERBS


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
@pytest.mark.parametrize(
    ("verb", "code"),
    [("status", None), ("load", "forbidden"), ("reload", "forbidden"), ("validate", "forbidden")],
)
def test_the_gateway_s_user_has_the_verbs_that_http_offers(verb: str, code: str | None) -> None:
    async def body() -> None:
        with tempfile.TemporaryDirectory() as runtime:
            os.chmod(runtime, 0o755)
            life = await begin_life(config_of(model("a")), World(), runtime, MemoryStore())
            verbs = life.verbs()
            control = ControlSocket(
                post=life.loop.post,
                ask=verbs.answer,
                catalog=lambda: Catalog.of([]),
                allowed_uids=frozenset({65534}),
            )
            await control.listen(f"{runtime}/control.sock", 65534)
            os.chmod(f"{runtime}/control.sock", 0o666)
            sock = socket.socket(socket.AF_UNIX)
            os.seteuid(65534)
            try:
                sock.connect(f"{runtime}/control.sock")
            finally:
                os.seteuid(0)
            reader, writer = await asyncio.open_unix_connection(sock=sock)
            writer.write(Hello(role="cli").encode() + Ask(1, verb, {"model": "a"}).encode())
            answer = decode(await reader.readline())
            writer.close()
            assert isinstance(answer, Answer)
            assert answer.code == code
            await control.close()
            await life.drop()

    asyncio.run(body())


def test_a_connection_that_ends_while_it_is_written_to_ends_nothing_else() -> None:
    """uvloop raises when a closed transport is written to, and that ended the supervisor: between
    the end of a connection and the moment in which its reader sees it, one broadcast was enough."""

    async def body() -> None:
        control = ControlSocket(post=lambda _event: None, ask=no_verbs, catalog=empty_catalog)
        with tempfile.TemporaryDirectory() as runtime:
            await control.listen(f"{runtime}/control.sock", None)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(f"{runtime}/control.sock")
            sock.sendall(HELLO.encode() + Watch("events").encode())
            sock.settimeout(5)
            assert await asyncio.to_thread(sock.recv, 1 << 16), "the catalogue: it has joined"
            writer = control._workers["w"]
            sock.close()
            try:
                for _ in range(50):
                    control.broadcast(Catalog.of([]))
                    control.send("w", Catalog.of([]))
                    control._write(writer, Catalog.of([]))  # what watchers and answers do
                    await asyncio.sleep(0)
                assert writer.is_closing()
            finally:
                await control.close()

    uvloop.run(body())


async def no_verbs(_ask: Ask, _report: object) -> None:
    """Answers nothing."""


def empty_catalog() -> Catalog:
    return Catalog.of([])


# ---- what is sent, what is said ------------------------------------------------------------------


class Sent:
    """A peer that takes everything."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.transport = self
        self.write = self.lines.append

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def test_only_an_answer_is_replaced_where_it_is_too_long() -> None:
    """What an engine prints, and a catalogue, go as they are: they have no number to answer to."""
    control = ControlSocket(post=lambda _event: None, ask=no_verbs, catalog=empty_catalog)
    peer: Any = Sent()
    news = News("logs", "a", "x" * MAX_ANSWER)
    control._write(peer, news)
    assert len(peer.lines.pop()) > MAX_ANSWER


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (Ask(1, "status", {}).encode(), "that does not begin with hello"),
        (b'{"type":"hello","role":"cli","version":-1}\n', "a peer of protocol version -1"),
        (b"[]\n", ""),
    ],
)
@in_loop
async def test_a_connection_that_is_dropped_is_said_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, told: str
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(line)
        assert await peer.hear() is None
    (message,) = caplog.messages
    assert message.startswith("control connection dropped: ") and told in message


# ---- what only a worker may say ------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Demand("a", 1, 0.0, 0, 0, 0),
        Drained("a", "t.1"),
        EngineLost("a", "t.1", "refused"),
        KeepAliveHint("a", 5.0),
        ResponseOwners({"resp_1": "a"}, {"resp_1": "key"}),
        Collected(1, {}),
    ],
    ids=lambda message: message.kind,
)
@in_loop
async def test_a_peer_that_is_no_worker_moves_nothing(tmp_path: Path, message: Message) -> None:
    async with stage(tmp_path) as s:
        stranger = await s.connect()
        stranger.say(Hello(role="cli"), message)
        assert await stranger.hear() is None, "the connection ends"
        assert s.events.empty()
        assert s.control_socket.responses.model_of("resp_1") is None
        worker = await s.worker()  # who is one may
        worker.say(message, message)
        worker.say(Demand("b", 1, 0.0, 0, 0, 0))
        while getattr(await s.events.get(), "model", "") != "b":
            pass

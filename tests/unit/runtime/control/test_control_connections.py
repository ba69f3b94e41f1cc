"""The control socket: who may speak, what is understood, who is dropped."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from runtime_harness import in_loop

from llmux.core.events import (
    DemandChanged,
    EngineSuspect,
    Event,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.errors import DriverError, Reason, Refused
from llmux.peers import caller_of
from llmux.protocol import (
    MAX_ANSWER,
    MAX_LINE,
    Answer,
    Ask,
    Catalog,
    Collected,
    Demand,
    Drained,
    EngineLost,
    Grant,
    Hello,
    KeepAliveHint,
    Message,
    ModelInfo,
    ResponseOwners,
    decode,
)
from llmux.runtime.control.socket import MAX_UNANSWERED, MAX_UNSENT, ControlSocket

ROOT = Path(__file__).resolve().parents[4]
CATALOG = Catalog.of([ModelInfo("a", "serving")])
GATEWAY = Hello(role="gateway", worker="w", holds={"a": "t.1"})


class Peer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.writer.write(message.encode() if isinstance(message, Message) else message)

    async def hear(self) -> Message | None:
        """None: the control socket has ended the connection."""
        try:
            line = await self.reader.readline()
        except ConnectionError:
            return None
        return decode(line) if line else None


class Stage:
    def __init__(self, path: str) -> None:
        self.path = path
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.waiting, self.cancelled = asyncio.Event(), asyncio.Event()
        self.control_socket = ControlSocket(
            post=self.events.put_nowait, ask=self._ask, catalog=lambda: CATALOG
        )
        self.peers: list[Peer] = []

    async def _ask(self, ask: Ask, *_: object) -> object:
        match ask.verb:
            case "refuse":
                raise Refused(Reason.BACKING_OFF, "not now", retry_after=7.0)
            case "long":
                return "x" * ask.args["length"]
            case "fail":
                raise DriverError("do", "it", "because")
            case "wait":
                self.waiting.set()
                try:
                    return await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case _:
                return {"did": ask.verb, **ask.args}

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_unix_connection(self.path))
        self.peers.append(peer)
        return peer

    async def worker(self) -> Peer:
        peer = await self.connect()
        peer.say(GATEWAY)
        assert await peer.hear() == CATALOG
        assert await self.events.get() == WorkerJoined("w", {"a": "t.1"})
        return peer


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(str(tmp_path / "control.sock"))
    await made.control_socket.listen(made.path, None)
    try:
        yield made
    finally:
        for peer in made.peers:
            peer.writer.close()
        await made.control_socket.close()
        with pytest.raises(FileNotFoundError):  # the socket went with the control socket
            await asyncio.open_unix_connection(made.path)


AS_ANOTHER = """
import os, socket, sys
from llmux.protocol import Ask, Hello, decode
user, group, *more = map(int, sys.argv[3:])
os.setgroups(more)
os.setresgid(group, group, group)
os.setresuid(user, user, user)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    try:
        sock.sendall(Hello(role="cli").encode() + Ask(1, sys.argv[2], {}).encode())
        line = sock.makefile("rb").readline()
    except ConnectionError:
        line = b""
    print(decode(line).code or "done" if line else "closed")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as another user")
@in_loop
async def test_members_of_a_group_may_give_orders_and_the_gateways_user_never(
    tmp_path: Path,
) -> None:
    admins, gateway, operator = 64001, 64002, 64003
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o711)  # others pass through, as in /run/llmux
    path = f"{directory}/control.sock"
    made = ControlSocket(
        post=lambda _: None, ask=Stage("")._ask, catalog=lambda: CATALOG,
        allowed_uids=frozenset({gateway}), admins=admins,
    )  # fmt: skip

    async def ask(user: int, group: int, *more: int) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AS_ANOTHER, path, "load", *map(str, (user, group, *more)),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        said, errors = await process.communicate()
        return said.decode().strip() or errors.decode().strip().rpartition("\n")[2]

    await made.listen(path, gateway)
    try:
        assert await ask(operator, operator, admins) == "done"
        assert await ask(operator, admins) == "done"
        assert await ask(gateway, gateway, admins) == "forbidden"
        assert await ask(operator, gateway) == "closed", "the gateway's group is no operator"
        assert "PermissionError" in await ask(operator, operator)
    finally:
        await made.close()
        shutil.rmtree(directory)


@in_loop
async def test_a_worker_says_hello_and_what_it_says_becomes_events(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        before = monotonic()
        demand = Demand("a", 2, 1.5, 3, 9, 7)
        peer.say(demand, Drained("a", "t.1"), EngineLost("a", "t.1", "refused"))
        event = await s.events.get()
        assert isinstance(event, DemandChanged)
        assert event.oldest_since is not None
        assert before <= event.oldest_since + 1.5 <= monotonic(), "the age when it arrived"
        assert event == DemandChanged("w", "a", 2, event.oldest_since, 3, 9, 7)
        assert await s.events.get() == WorkerDrained("w", "a", "t.1")
        assert await s.events.get() == EngineSuspect("a", "t.1", "refused")


@in_loop
async def test_what_only_a_newer_worker_says_is_ignored_and_the_rest_is_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(*[b'{"type": "mood", "of": "a"}\n'] * 3, Drained("a", "t.1"))
        assert await s.events.get() == WorkerDrained("w", "a", "t.1")
    assert caplog.messages == ["cannot read a control message: unknown type 'mood': ignored"]


@in_loop
async def test_messages_reach_the_worker_they_are_for(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        s.control_socket.send("nobody", Grant("a", "t.2"))
        s.control_socket.send("w", Grant("a", "t.3"))
        assert await peer.hear() == Grant("a", "t.3")
        s.control_socket.broadcast(CATALOG)
        assert await peer.hear() == CATALOG


@pytest.mark.parametrize(
    "first",
    [
        Demand("a"),
        b"not json\n",
        b"[]\n",
        b'{"type": "nonsense"}\n',
        b'{"type": "hello"}\n',
        Hello(role="gateway", worker="w", version=999),
    ],
    ids=str,
)
@in_loop
async def test_whoever_does_not_begin_with_a_hello_of_our_version_is_dropped(
    tmp_path: Path, first: Message | bytes
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(first)
        assert await peer.hear() is None
        assert s.events.empty()


@in_loop
async def test_an_ask_ends_with_the_command_line_that_asked(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), Ask(4, "wait"))
        await s.waiting.wait()
        peer.writer.close()
        await s.cancelled.wait()


@in_loop
async def test_an_ask_of_a_worker_outlives_its_connection(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(Ask(4, "wait"))
        await s.waiting.wait()
        peer.writer.close()
        assert isinstance(await s.events.get(), WorkerLeft)
        assert not s.cancelled.is_set()


@in_loop
async def test_a_command_line_asks_and_may_not_speak_for_a_worker(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), Ask(4, "load", {"model": "a", "by": "another"}))
        signed = {"did": "load", "model": "a", "by": caller_of(os.getpid(), os.getuid())}
        assert await peer.hear() == Answer(4, True, signed), "an order has its giver's own name"
        peer.say(Demand("a", 1))
        assert await peer.hear() is None
        assert s.events.empty()


@pytest.mark.parametrize(
    "message",
    [
        Demand("a", 1),
        Drained("a", "t.1"),
        EngineLost("a", "t.1", "refused"),
        KeepAliveHint("a", None),
        ResponseOwners({"resp_1": "a"}),
        Collected(1),
    ],
    ids=lambda message: message.kind,
)
@in_loop
async def test_what_only_a_worker_says_ends_the_connection_of_anybody_else(
    tmp_path: Path, message: Message
) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), message)
        assert await peer.hear() is None
        assert s.events.empty()
        assert s.control_socket.responses.answer({"id": "resp_1"})["model"] is None


@in_loop
async def test_refusals_and_failures_are_answers_too(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.connect()
        peer.say(Hello(role="cli"), Ask(1, "refuse"))
        refused = await peer.hear()
        assert isinstance(refused, Answer)
        assert (refused.code, refused.retry_after) == ("model_backing_off", 7.0)
        peer.say(Ask(2, "fail"))
        failed = await peer.hear()
        assert isinstance(failed, Answer)
        assert (failed.ok, failed.code) == (False, "internal_error")
        assert failed.message == "cannot do it: because"


@in_loop
async def test_a_long_answer_is_passed_and_one_that_is_too_long_is_a_refusal(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        reader, writer = await asyncio.open_unix_connection(s.path, limit=2 * MAX_ANSWER)
        peer = Peer(reader, writer)
        s.peers.append(peer)
        peer.say(Hello(role="cli"), Ask(1, "long", {"length": 5 * MAX_LINE}))
        long = await peer.hear()
        assert isinstance(long, Answer)
        assert (long.ok, len(long.result)) == (True, 5 * MAX_LINE)
        peer.say(Ask(2, "long", {"length": MAX_ANSWER}), Ask(3, "other"))
        refused = await peer.hear()
        assert isinstance(refused, Answer)
        assert (refused.id, refused.ok, refused.code) == (2, False, "internal_error")
        other = await peer.hear()
        assert isinstance(other, Answer)
        assert (other.id, other.ok) == (3, True)


@in_loop
async def test_a_line_without_end_is_not_collected_for_ever(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.say(b"x" * (MAX_LINE * 2))
        assert await peer.hear() is None


@in_loop
async def test_a_peer_that_reads_nothing_is_dropped(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        peer = await s.worker()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # both ways on a socket
        heavy = Catalog.of([ModelInfo("a" * 1000, "serving")] * 500)
        count = MAX_UNSENT // len(heavy.encode()) + 3
        for _ in range(count):
            s.control_socket.broadcast(heavy)
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above
        received = len(await peer.reader.read())  # to the end, which is not that of what was said
        assert received < count * len(heavy.encode())


@in_loop
async def test_a_worker_that_comes_back_replaces_its_former_connection(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        former = await s.worker()
        peer = await s.connect()
        peer.say(GATEWAY)
        assert await peer.hear() == CATALOG
        assert await former.hear() is None
        s.control_socket.send("w", Grant("a", "t.9"))
        assert await peer.hear() == Grant("a", "t.9")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: a peer of another user")
@in_loop
async def test_a_user_who_may_not_is_dropped_unheard(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        os.chmod(s.path, 0o666)
        # pytest's own directories are closed to others; how many there are depends on its plugins
        base = next(p for p in tmp_path.parents if p.name.startswith("pytest-of-"))
        for directory in (tmp_path, *tmp_path.parents):
            os.chmod(directory, 0o755)
            if directory == base:
                break
        os.seteuid(65534)
        try:
            peer = await s.connect()
        finally:
            os.seteuid(0)
        peer.say(GATEWAY)
        assert await peer.hear() is None
        assert s.events.empty()


@in_loop
async def test_the_socket_is_for_our_own_user_only_without_a_group(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        assert os.stat(s.path).st_mode & 0o777 == 0o600


@in_loop
@pytest.mark.parametrize("other", [False, True], ids=["removed", "replaced"])
async def test_a_socket_that_was_removed_comes_back(tmp_path: Path, other: bool) -> None:
    made = Stage(str(tmp_path / "control.sock"))
    await made.control_socket.listen(made.path, None, look_secs=0.01)
    before = await made.worker()
    os.unlink(made.path)
    if other:
        os.close(os.open(made.path, os.O_CREAT | os.O_WRONLY))
    while True:
        try:
            after = await made.connect()
            break
        except (FileNotFoundError, ConnectionRefusedError):
            await asyncio.sleep(0)
    before.say(Ask(1, "status", {}))
    assert isinstance(await before.hear(), Answer), "former connections go on"
    after.say(Hello(role="gateway", worker="v", holds={}))
    assert await after.hear() == CATALOG
    for peer in (before, after):
        peer.writer.close()
    await made.control_socket.close()


class Gone:
    """The writer of a connection that has ended, as uvloop shows it: there is no socket."""

    closed = False

    def get_extra_info(self, _name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@in_loop
async def test_a_peer_that_is_gone_before_it_was_looked_at_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(tmp_path) as s:
        accept: Any = s.control_socket._connected
        gone = Gone()
        await accept(asyncio.StreamReader(), gone)
        assert gone.closed
        assert [record for record in caplog.records if record.exc_info] == []


@in_loop
async def test_what_gateways_ask_and_wait_for_is_bounded(tmp_path: Path) -> None:
    """Each ask is kept until its answer. Whoever owns the gateway's process could fill the memory
    with some that wait; an operator's are not refused for it."""
    async with stage(tmp_path) as s:
        worker, other = await s.worker(), await s.connect()
        other.say(Hello(role="gateway", worker="v", holds={}))
        assert await other.hear() == CATALOG
        large = {"length": 1, "x": "x" * (MAX_LINE // 2)}
        fit = MAX_UNANSWERED // (MAX_LINE // 2) - 1
        worker.say(*(Ask(number, "wait", large) for number in range(fit)))
        worker.say(Ask(98, "do", {}), Ask(99, "long", large))
        for number, code in ((98, None), (99, Reason.RATE_LIMITED.value)):
            answer = await worker.hear()
            assert isinstance(answer, Answer)
            assert (answer.id, answer.code) == (number, code)
        other.say(Ask(1, "long", large), Ask(2, "do", {}))
        assert {getattr(await other.hear(), "ok", None) for _ in range(2)} == {False, True}
        operator = await s.connect()
        operator.say(Hello(role="cli"), Ask(3, "long", large))
        assert getattr(await operator.hear(), "ok", None) is True


@pytest.mark.parametrize("end", ["reset", "too long a line", "no number"])
@in_loop
async def test_a_connection_that_ends_badly_is_no_fault_of_ours(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(tmp_path) as s:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, s.path)
            peer.sendall(GATEWAY.encode())
            assert isinstance(await s.events.get(), WorkerJoined)
            if end != "reset":
                line = b"x" * (MAX_LINE * 2) if end == "too long a line" else b"\xff\n"
                with suppress(BrokenPipeError):  # dropped before all was sent
                    await asyncio.get_running_loop().sock_sendall(peer, line)
                assert isinstance(await s.events.get(), WorkerLeft)
        if end == "reset":  # what it did not read is lost
            assert isinstance(await s.events.get(), WorkerLeft)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []

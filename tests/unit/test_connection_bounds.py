"""How many control connections a user may have, and how one more is told so."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from runtime_harness import in_loop

from llmux.cli.client import ask
from llmux.core.events import Event
from llmux.errors import Reason, Refused
from llmux.gateway.link import Link
from llmux.protocol import OF_CONNECTION, Answer, Ask, Catalog, Hello, Message, decode
from llmux.runtime.connections import COMPLAINTS, WINDOW_SECS, Complaints, Connections
from llmux.runtime.control.socket import ControlSocket

GATEWAY, OPERATOR, OTHER = 64002, 64003, 64004


class Counted(Connections):
    """Whose own user is bounded as another's."""

    def admit(self, uid: int) -> str | None:
        return super().admit(uid or OTHER)

    def left(self, uid: int) -> None:
        super().left(uid or OTHER)


def test_a_user_has_so_many_connections_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    some = Connections(of_user=4, of_others=100)
    assert [some.admit(GATEWAY) for _ in range(4)] == [None] * 4
    said = "user 64002 has 4 control connections"
    for _ in range(3):
        assert some.admit(GATEWAY) == f"cannot accept the connection: {said}"
    assert some.admit(OPERATOR) is None, "another's are not counted with them"
    some.left(GATEWAY)
    assert some.admit(GATEWAY) is None
    assert some.admit(GATEWAY) is not None
    once = [f"user 64002 is refused a control connection: {said}"]
    assert caplog.messages == once, "said once, though it comes and goes"
    some.left(GATEWAY)
    some.left(GATEWAY)
    assert [some.admit(GATEWAY) is None for _ in range(3)] == [True, True, False]
    assert caplog.messages == once * 2, "and again when it was over in between"


def test_all_users_together_have_a_bound_that_root_has_not() -> None:
    some = Connections(of_user=4, of_others=6)
    assert [some.admit(uid) for uid in [GATEWAY] * 4 + [OPERATOR] * 2] == [None] * 6
    refused = "cannot accept the connection: there are 6 control connections"
    assert some.admit(OPERATOR) == refused
    assert some.admit(OTHER) == refused
    assert [some.admit(uid) for uid in (0, os.getuid()) * 10] == [None] * 20
    for uid in (0, os.getuid()):
        some.left(uid)
    assert some.admit(OTHER) == refused, "root's end is nobody else's"
    some.left(GATEWAY)
    assert some.admit(OTHER) is None


def test_who_is_gone_is_not_counted() -> None:
    some = Connections(of_user=2, of_others=2)
    for _ in range(5):
        assert some.admit(GATEWAY) is None
        assert some.admit(OTHER) is None
        some.left(GATEWAY)
        some.left(OTHER)
    assert not some._open


def test_what_peers_do_wrong_is_said_so_often_and_then_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 5.0
    complaints = Complaints(lambda: now)
    for number in range(COMPLAINTS + 30):
        complaints.warn("%d is wrong", number)
    assert caplog.messages == [f"{number} is wrong" for number in range(COMPLAINTS)]
    caplog.clear()
    now += WINDOW_SECS
    complaints.warn("again")
    assert caplog.messages == ["30 more complaints of control connections", "again"]
    caplog.clear()
    now += WINDOW_SECS
    complaints.warn("and again")
    assert caplog.messages == ["and again"]


# ---- over the socket ----------------------------------------------------------------------------


@asynccontextmanager
async def control_socket(path: Path, of_user: int) -> AsyncIterator[str]:
    events: asyncio.Queue[Event] = asyncio.Queue()

    async def answer(asked: Ask, _report: Callable[..., None]) -> object:
        return {"did": asked.verb}

    made = ControlSocket(
        post=events.put_nowait, ask=answer, catalog=lambda: Catalog.of([]),
        connections=Counted(of_user),
    )  # fmt: skip
    await made.listen(str(path / "s.sock"), None)
    try:
        yield str(path / "s.sock")
    finally:
        await made.close()


async def connected(path: str, message: Message) -> tuple[asyncio.StreamWriter, Message | None]:
    """A connection that said hello and the message; what it heard."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(Hello(role="cli").encode() + message.encode())
        line = await reader.readline()
    except ConnectionError:
        line = b""
    return writer, decode(line) if line else None


@in_loop
async def test_one_too_many_is_told_so_and_there_is_room_again_when_one_ends(
    tmp_path: Path,
) -> None:
    async with control_socket(tmp_path, of_user=2) as path:
        writers = []
        for _ in range(2):
            writer, heard = await connected(path, Ask(7, "status"))
            assert heard == Answer(7, True, {"did": "status"})
            writers.append(writer)
        writer, heard = await connected(path, Ask(7, "status"))
        assert isinstance(heard, Answer)
        assert (heard.id, heard.ok) == (OF_CONNECTION, False)
        assert heard.code == Reason.RATE_LIMITED.value
        writer.close()
        with pytest.raises(Refused, match=r"user .* has 2 control connections") as refused:
            await asyncio.to_thread(ask, path, "status")
        assert refused.value.reason is Reason.RATE_LIMITED
        writers.pop().close()
        while True:
            writer, heard = await connected(path, Ask(7, "status"))
            writer.close()
            if heard == Answer(7, True, {"did": "status"}):
                break
        writers.pop().close()


def test_a_command_line_that_is_refused_before_it_has_spoken_says_why(tmp_path: Path) -> None:
    """The supervisor has ended the connection when the command line begins to talk."""
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def refuse() -> None:
            peer, _ = listener.accept()
            with peer:
                why = Reason.RATE_LIMITED.value
                peer.sendall(Answer(OF_CONNECTION, False, None, why, "too many").encode())

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(Refused, match="too many"):
            ask(path, "status")
        thread.join()


@in_loop
async def test_a_peer_that_comes_again_and_again_does_not_fill_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with control_socket(tmp_path, of_user=2) as path:
        for _ in range(6 * COMPLAINTS):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"nonsense\n")
            assert await reader.read() == b""
            writer.close()
    # a window may end in between
    assert COMPLAINTS <= len(caplog.records) < 6 * COMPLAINTS


# ---- a gateway that is sent away ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (b"", "it ended the connection without a word"),
        (Answer(OF_CONNECTION, False, None, "x", "too many").encode(), "too many"),
    ],
)
@in_loop
async def test_a_gateway_that_is_sent_away_asks_again_after_a_pause_and_says_so_once(
    tmp_path: Path, says: bytes, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, it connected again at once, with a line in the journal each time: 1,000 a second."""
    path, now = str(tmp_path / "s.sock"), asyncio.get_running_loop().time
    came: list[float] = []
    enough = asyncio.Event()

    async def send_away(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(now())
        writer.write(says)
        writer.close()
        if len(came) == 5:
            enough.set()

    async with await asyncio.start_unix_server(send_away, path):
        link = asyncio.create_task(Link(path).run())
        try:
            await enough.wait()
        finally:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)
    pauses = [after - before for before, after in itertools.pairwise(came)]
    for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.16), strict=True):
        assert pause > least * 0.9
    words = f"cannot use the supervisor at {path}: {told}; trying again"
    assert [record.getMessage() for record in caplog.records] == [words]


@in_loop
async def test_a_gateway_that_ends_leaves_no_connection(tmp_path: Path) -> None:
    path, heard = str(tmp_path / "s.sock"), asyncio.Event()
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        heard.set()
        await reader.read()
        ended.set()
        writer.close()

    async with await asyncio.start_unix_server(listen, path):
        made = Link(path)
        link = asyncio.create_task(made.run())
        await heard.wait()
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)
        await ended.wait()
        assert not made.up


def test_connections_are_counted_by_user_and_of_all_and_each_refusal_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    open_ones = Connections(of_user=2, of_others=3)
    assert [open_ones.admit(0) for _ in range(9)] == [None] * 9
    assert [open_ones.admit(5) is None for _ in range(4)] == [True, True, False, False]
    assert len(caplog.messages) == 1
    assert [open_ones.admit(6) is None for _ in range(2)] == [True, False]
    assert len(caplog.messages) == 2
    open_ones.left(5)
    assert open_ones.admit(5) is None and open_ones.admit(5) is not None
    assert len(caplog.messages) == 3, "half had ended"
    open_ones.left(99)
    for _ in range(2):
        open_ones.left(5)
    assert [open_ones.admit(6) is None for _ in range(2)] == [True, False]


def test_complaints_are_bounded_in_a_window_and_the_rest_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    complaints = Complaints(lambda: now[0])
    for _ in range(COMPLAINTS + 3):
        complaints.warn("%s", "x")
    now[0] += WINDOW_SECS - 0.1
    complaints.warn("%s", "x")
    assert caplog.messages == ["x"] * COMPLAINTS
    now[0] += 0.1
    complaints.warn("%s", "y")
    assert caplog.messages[COMPLAINTS:] == ["4 more complaints of control connections", "y"]
    now[0] += WINDOW_SECS
    complaints.warn("%s", "z")
    assert caplog.messages[COMPLAINTS + 2 :] == ["z"]

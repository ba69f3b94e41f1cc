"""One connection to an engine, byte by byte, without a socket."""

from __future__ import annotations

import gc
import weakref

import pytest
from engine_wire import (
    ASKED,
    CHUNKED,
    CLOSED,
    EARLY,
    EMPTY,
    ENDLESS,
    SHORT,
    Line,
    pieces_of,
)

from llmux.gateway.engine.connection import COPY_BYTES, MAX_HEAD, MAX_INTERIM, EngineConnection
from llmux.gateway.engine.request import Delivery, EngineRequest, Rename
from llmux.gateway.engine.rewriting import RenamingConnection, UnchunkingConnection
from llmux.gateway.http.multipart import Upload


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "status", "length", "reusable"),
    [
        (SHORT, 200, b"content-length: 5\r\n", True),
        (CHUNKED, 200, b"", True),
        (CLOSED, 200, b"content-length: 5\r\n", False),
        (EMPTY, 204, b"", True),
        (EARLY + SHORT, 200, b"content-length: 5\r\n", True),
        (EARLY + EARLY + CHUNKED, 200, b"", True),
        (EARLY * MAX_INTERIM + SHORT, 200, b"content-length: 5\r\n", True),
    ],
)
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(
    answer: bytes, status: int, length: bytes, reusable: bool, size: int
) -> None:
    line = Line()
    answers = 2 if reusable else 1  # the second as the first
    for number in range(1, answers + 1):
        sink = line.ask()
        line.hear(*pieces_of(answer, size))
        assert sink.heads == [(status, length)]
        assert sink.body == answer.replace(EARLY, b"").partition(b"\r\n\r\n")[2]
        assert (sink.ended, sink.failures, sink.connection) == (1, [], None)
        assert line.owners.released == [reusable] * number
        assert line.connection.served == number
        assert not line.connection.until_close
        assert not line.wire.closing
    assert line.wire.written == [ASKED.head + b"{}"] * answers


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_one_without_an_end_ends_with_the_connection(size: int) -> None:
    line = Line()
    sink = line.ask()
    line.hear(*pieces_of(ENDLESS, size))
    assert (sink.ended, line.connection.until_close, line.owners.released) == (0, True, [])
    line.connection.connection_lost(None)
    assert (sink.ended, sink.failures, sink.connection) == (1, [], None)
    assert (sink.heads, sink.body, line.owners.gone) == ([(200, b"")], b"hello", 1)
    cut = Line()
    sink = cut.ask()
    cut.hear(ENDLESS)
    cut.connection.connection_lost(ConnectionResetError("reset"))
    assert [one.error for one in sink.failures] == ["the engine closed the connection: reset"]
    assert not sink.failures[0].malformed


SWITCHES = b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"junk\r\n\r\n", "the engine's answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\na: " + b"x" * MAX_HEAD, "has a head of more than 65536 bytes"),
        (SHORT + SHORT, "the engine sent more than one answer"),
        (CHUNKED + b"HTTP", "the engine"),
        (CHUNKED.replace(b"2\r\n!!", b"2\r\n!!!"), "the engine's answer is not HTTP"),
        (SHORT.replace(b": 5", b": +5"), "the engine's answer is not HTTP"),
        (EMPTY + b"hello", "the engine's answer is not HTTP"),
        (EARLY * (MAX_INTERIM + 1) + SHORT, "more than 16 interim responses"),
        (EARLY * 5000 + SHORT, "more than 16 interim responses"),
        (SWITCHES, "it switches protocols"),
        (EARLY + SWITCHES + b"abc", "it switches protocols"),
        (SHORT + SWITCHES, "it switches protocols"),
    ],
    ids=range(12),
)
def test_what_is_no_answer_ends_the_connection(answer: bytes, said: str) -> None:
    line = Line()
    sink = line.ask()
    line.hear(answer)
    assert [said in one.error and one.connected for one in sink.failures] == [True]
    assert [one.malformed for one in sink.failures] == [True], "the engine lives"
    assert (sink.ended, sink.connection, line.wire.closing) == (0, None, True)
    assert line.owners.released == []


def test_a_head_of_exactly_what_is_taken_is_waited_for() -> None:
    line = Line()
    sink = line.ask()
    line.hear(b"HTTP/1.1 200 OK\r\na: ".ljust(MAX_HEAD, b"x"))
    assert (sink.failures, line.wire.closing) == ([], False)
    line.hear(b"x")
    assert len(sink.failures) == 1


def test_bytes_without_a_request_end_the_connection() -> None:
    line = Line()
    line.hear(b"H")
    assert line.wire.closing


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("heard", "between"),
    [
        (b"", True),
        (b"5", False),  # the size was passed on
        (b"5\r", False),
        (b"5\r\n", False),
        (b"5\r\nab\r\n", False),
        (b"5\r\nhello", False),
        (b"5\r\nhello\r", False),
        (b"5\r\nhello\r\n", True),
        (b"5\r\nhello\r\n1", False),
        (b"5\r\nhello\r\n1\r\n\n", False),
        (b"5\r\nhello\r\n1\r\n\n\r\n", True),
    ],
)
def test_where_an_answer_was_cut_is_known(heard: bytes, between: bool, size: int) -> None:
    """Between chunks an error event can follow."""
    line = Line()
    sink = line.ask()
    line.hear(*pieces_of(CHUNKED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + heard, size))
    assert line.connection.between_chunks is between
    line.connection.connection_lost(None)
    assert [(one.between_chunks, one.connected) for one in sink.failures] == [(between, True)]


@pytest.mark.parametrize("kind", [EngineConnection, UnchunkingConnection])
@pytest.mark.parametrize("heard", [SHORT[:-1], SHORT[:-4], SHORT[:-5]])
def test_one_without_chunks_is_never_cut_in_a_chunk(
    heard: bytes, kind: type[EngineConnection]
) -> None:
    line = Line(kind)
    sink = line.ask()
    line.hear(heard[:-3], heard[-3:])
    line.connection.connection_lost(None)
    assert [(one.between_chunks, one.malformed) for one in sink.failures] == [(True, False)]


def test_an_idle_connection_that_closes_as_it_is_used_is_replaced_once() -> None:
    def lost(answers: int, *, wants: bool = True, heard: bytes = b"") -> Line:
        line = Line()
        for _ in range(answers):
            line.ask()
            line.hear(SHORT)
        sink = line.ask()
        sink.wants = wants
        line.hear(*pieces_of(heard, 1))
        line.connection.connection_lost(None)
        return line

    again = lost(1)
    assert again.owners.fresh == [(ASKED, True)]
    assert (again.sink.failures, again.sink.connection) == ([], None)
    for line in (lost(0), lost(1, wants=False), lost(1, heard=b"H")):
        assert (line.owners.fresh, len(line.sink.failures)) == ([], 1)


def test_a_body_is_sent_as_the_engine_takes_it() -> None:
    line = Line()
    body = bytes(range(256)) * (COPY_BYTES // 256)
    line.ask(EngineRequest(b"head", body))
    assert line.wire.written == [b"head" + body], "one system call"
    line = Line()
    line.ask(EngineRequest(b"head", body + b"x"))
    assert line.wire.written == [b"head", body + b"x"], "not copied"
    upload = Upload()
    upload.write(body + body + b"x")
    line = Line()
    line.connection.pause_writing()
    line.ask(EngineRequest(b"head", upload))
    assert line.wire.written == [b"head"], "its buffer is full"
    line.connection.resume_writing()
    assert line.wire.written == [b"head", body, body, b"x"]
    line.hear(SHORT)
    assert line.owners.released == [True]


@pytest.mark.parametrize("left", ["upload", "buffer"])
def test_one_that_answers_before_it_has_read_all_is_not_used_again(left: str) -> None:
    line = Line()
    upload = Upload()
    upload.write(b"x")
    if left == "upload":
        line.connection.pause_writing()
        line.ask(EngineRequest(b"head", upload))
    else:
        line.ask()
        line.wire.buffered = 1
    line.hear(SHORT)
    assert line.owners.released == [False]


def test_the_clients_pace_is_the_engines() -> None:
    line = Line()
    line.connection.resume()
    assert line.wire.resumed == 0, "it was not paused"
    line.connection.pause()
    assert (line.wire.reading_paused, line.connection.paused) == (True, True)
    line.connection.resume()
    assert (line.wire.resumed, line.connection.paused) == (1, False)
    line.connection.pause()
    line.wire.closing = True
    line.connection.resume()
    assert line.wire.resumed == 1
    line.wire.reading_paused = False
    line.connection.pause()
    assert not line.wire.reading_paused


# ---- rewriting -----------------------------------------------------------------------------------


def answer_of(body: bytes, *, chunked: bool, status: bytes = b"200 OK") -> bytes:
    if not chunked:
        return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces_of(body, 9))
    return b"HTTP/1.1 %b\r\ntransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % (status, chunks)


def unchunked(data: bytes) -> tuple[bytes, bool]:
    """(the body, whether it has an end)."""
    body = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size, 16)
        assert rest[count : count + 2] == b"\r\n"
        if not count:
            return body, rest == b"\r\n"
        body, data = body + rest[:count], rest[count + 2 :]
    return body, False


NAMED = b'{"id":"1","model":"org/long-name","choices":[{"text":"\\"model\\":\\"org/long-name\\""}]}'
RENAMED = NAMED.replace(b'"model":"org/long-name"', b'"model":"chat"')
SPACED = b'data: {"model": "org/long-name", "object": "x"}\n\n' * 3 + b'data: {"model":"other"}\n\n'


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13, 1000])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (NAMED, RENAMED),
        (SPACED, SPACED.replace(b"org/long-name", b"chat")),
        (b"", b""),
        (b'ends with "mod', b'ends with "mod'),
        (b'ends with "model":"org', b'ends with "model":"org'),
    ],
    ids=range(5),
)
def test_the_client_gets_the_name_that_it_used(
    body: bytes, expected: bytes, chunked: bool, size: int
) -> None:
    line = Line(RenamingConnection)
    for framed in (True, False):
        asked = EngineRequest(
            b"h", b"", Delivery.RENAMED, Rename("org/long-name", "chat", chunked=framed)
        )
        sink = line.ask(asked)
        line.hear(*pieces_of(answer_of(body, chunked=chunked), size))
        assert sink.ended == 1
        assert (unchunked(sink.body) if framed else (sink.body, True)) == (expected, True)


@pytest.mark.parametrize(
    "body", [b"x" * 300 + NAMED + b"y" * 300, b"x" * 90 + SPACED], ids=range(2)
)
def test_a_name_is_found_wherever_it_is_cut(body: bytes) -> None:
    expected = body.replace(b'"model":"org/long-name"', b'"model":"chat"')
    expected = expected.replace(b'"model": "org/long-name"', b'"model": "chat"')
    line = Line(RenamingConnection)
    head, _, _ = answer_of(body, chunked=False).partition(b"\r\n\r\n")
    for at in range(len(body)):
        asked = EngineRequest(
            b"h", b"", Delivery.RENAMED, Rename("org/long-name", "chat", chunked=True)
        )
        sink = line.ask(asked)
        line.hear(head + b"\r\n\r\n" + body[:at], body[at:])
        assert (unchunked(sink.body), sink.ended) == ((expected, True), 1), at


def test_an_answer_without_a_body_gets_none() -> None:
    line = Line(RenamingConnection)
    sink = line.ask(EngineRequest(b"h", b"", Delivery.RENAMED, Rename("a", "b", chunked=True)))
    line.hear(EMPTY)
    assert (sink.body, sink.ended) == (b"", 1)


def test_a_renamed_answer_that_ends_with_the_connection_has_no_chunks() -> None:
    line = Line(RenamingConnection)
    sink = line.ask(EngineRequest(b"h", b"", Delivery.RENAMED, Rename("a", "b", chunked=True)))
    line.hear(b'HTTP/1.1 200 OK\r\n\r\n{"model":"a"}')
    assert sink.body == b'{"model":"b"}'


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_an_old_client_gets_the_body_alone(size: int) -> None:
    line = Line(UnchunkingConnection)
    for _ in range(2):
        sink = line.ask()
        line.hear(*pieces_of(CHUNKED, size))
        assert (sink.body, sink.ended) == (b"hello!!", 1)


@pytest.mark.parametrize("kind", [EngineConnection, RenamingConnection, UnchunkingConnection])
def test_one_that_was_closed_says_nothing_more_and_is_free_at_once(
    kind: type[EngineConnection],
) -> None:
    rename = Rename("a", "b", chunked=True)
    asked = EngineRequest(b"h", b"", Delivery.RENAMED, rename)
    line = Line(type("Watched", (kind,), {}))  # with weak references
    sink = line.ask(asked)
    line.hear(CHUNKED[:-10])
    body = sink.body
    line.connection.abort()
    line.hear(CHUNKED[-10:])
    line.connection.connection_lost(None)
    assert (sink.body, sink.ended, sink.failures, line.owners.gone) == (body, 0, [], 1)
    del line.owners.connection
    sink.connection = None
    freed = weakref.ref(line.connection)
    gc.disable()
    try:
        del line.connection
        assert freed() is None, "without a collection"
    finally:
        gc.enable()


def test_chunks_of_our_own_are_whole_wherever_the_engines_are_cut() -> None:
    line = Line(RenamingConnection)
    rename = Rename("a", "b", chunked=True)
    head, _, body = CHUNKED.partition(b"\r\n\r\n")
    for cut in range(1, 12):
        line.ask(EngineRequest(b"h", b"", Delivery.RENAMED, rename))
        line.hear(head + b"\r\n\r\n" + body[:cut])
        assert line.connection.between_chunks, cut
        line.hear(body[cut:])


def test_an_upload_begins_at_once() -> None:
    upload = Upload()
    upload.write(b"form")
    line = Line()
    line.ask(EngineRequest(b"head", upload))
    assert line.wire.written == [b"head", b"form"]
    line.hear(SHORT)
    assert line.owners.released == [True]


@pytest.mark.parametrize(
    "lines", [b"transfer-encoding: gzip", b"content-length: 5\r\nContent-Length: 5", b"a b: c"]
)
def test_a_head_that_is_refused_is_no_answer(lines: bytes) -> None:
    line = Line()
    sink = line.ask()
    line.hear(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\nhello")
    (failure,) = sink.failures
    assert failure.error.startswith("the engine's answer is not HTTP: ")
    assert (failure.malformed, sink.heads, line.wire.closing) == (True, [], True)

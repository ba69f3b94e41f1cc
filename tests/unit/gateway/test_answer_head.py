"""What of an engine's head goes on, and what is refused."""

from __future__ import annotations

import pytest

from llmux.gateway.engine.answer_head import read_answer_head
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.http.heads import BadHead


def head(*lines: bytes, status: int = 200, version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"HTTP/%b %d Fine" % (version, status), *lines, b"", b""])


def test_headers_of_the_list_pass_as_they_came_and_no_others() -> None:
    read, length = read_answer_head(
        head(
            b"Date: today",
            b"OpenAI-Own:no blank",
            b"X-Own: what",
            b"Set-Cookie: a=b",
            b"Strict-Transport-Security: max-age=1",
            b"Alt-Svc: clear",
            b"Clear-Site-Data: *",
            b"Access-Control-Allow-Methods: *",
            b"Trailer: x",
            b"Connection: keep-alive",
            b"X-Request-Id: theirs",
            b"Access-Control-Allow-Origin: *",
            b"Content-Type: application/json",
        ),
        200,
    )
    assert read.lines == (
        b"HTTP/1.1 200 Fine\r\nDate: today\r\nOpenAI-Own:no blank\r\n"
        b"Content-Type: application/json\r\n"
    )
    assert not read.chunked and not length and not read.event_stream


@pytest.mark.parametrize(
    "name",
    [
        "Allow", "Anthropic-Own", "Cache-Control", "Content-Disposition", "Content-Encoding",
        "Content-Language", "Content-Type", "Date", "ETag", "Expires", "Last-Modified",
        "OpenAI-Own", "Retry-After", "Server", "Vary", "WWW-Authenticate", "X-Accel-Buffering",
        "X-RateLimit-Limit-Requests",
    ],
)  # fmt: skip
def test_each_of_these_passes(name: str) -> None:
    line = f"{name}: x".encode()
    read, _ = read_answer_head(head(b"X-Own: what", line, b"Set-Cookie: a=b"), 200)
    assert read.lines == b"HTTP/1.1 200 Fine\r\n" + line + b"\r\n"


def test_length_chunks_and_event_streams_are_seen_whatever_their_spelling() -> None:
    for line in (b"CONTENT-LENGTH: 5", b"content-length: 5", b"content-length:5"):
        read, length = read_answer_head(head(b"vary: b", line, b"etag: d"), 200)
        assert length == line + b"\r\n"
        assert read.lines == b"HTTP/1.1 200 Fine\r\nvary: b\r\netag: d\r\n"
    assert read_answer_head(head(b"Transfer-Encoding:Chunked"), 200)[0].chunked
    for line in (b"content-type:text/event-stream", b"Content-Type:  Text/Event-Stream; charset=x"):
        assert read_answer_head(head(line), 200)[0].event_stream


@pytest.mark.parametrize(
    ("encoding", "readable"), [(b"gzip", False), (b"Identity", True), (b"", True)]
)
def test_no_event_of_ours_goes_into_a_compressed_stream(encoding: bytes, readable: bool) -> None:
    lines = [b"content-encoding: " + encoding, b"content-type: text/event-stream"]
    for given in (lines, lines[::-1]):
        assert read_answer_head(head(*given), 200)[0].event_stream is readable


def test_the_same_head_with_another_length_or_status_is_not_taken_for_the_one_before() -> None:
    for size in (b"5", b"17"):
        _, length = read_answer_head(head(b"content-length: " + size), 200)
        assert length == b"content-length: " + size + b"\r\n"
    for status in (200, 404):
        assert read_answer_head(head(b"a: b", status=status), status)[0].status == status


def test_heads_that_differ_in_their_length_alone_are_read_once() -> None:
    first, again = (
        read_answer_head(head(b"date: 1", b"content-length: " + size, b"server: e"), 200)
        for size in (b"5", b"1234")
    )
    assert again[0] is first[0]
    assert (first[1], again[1]) == (b"content-length: 5\r\n", b"content-length: 1234\r\n")


def test_digits_in_a_status_line_are_no_length() -> None:
    for reason in (b"Fine " * 3 + b"123", b"abcde123", b"abcdefg5"):
        line = b"HTTP/1.1 200 " + reason + b"\r\n"
        read, length = read_answer_head(line + b"date: 1\r\n\r\n", 200)
        assert (read.lines, length) == (line + b"date: 1\r\n", b"")


@pytest.mark.parametrize(
    "line",
    [
        b"a: b\nset-cookie: c",  # one line here, two headers to a lenient client
        b"a: b\rc: d\n",
        b"a: b\r\n\nc: d",
        b"a: b\rc: d",
        b"a: b\0c",
        b"date: b\0",
        b" transfer-encoding: chunked",  # a continuation of the line before, to some
        b"content-length : 5",
        b"content-length: 5\nset-cookie: c",
        b"content-length: 5\r",
        b"no colon here, but blanks",
        b": nothing",
    ],
)
def test_a_head_that_two_readers_could_split_differently_is_refused(line: bytes) -> None:
    with pytest.raises(BadHead):
        read_answer_head(head(b"first: 1", line), 200)


@pytest.mark.parametrize(
    "lines",
    [
        *(
            (b"Transfer-Encoding: " + value,)
            for value in (
                b"xchunked", b"chunked, identity", b"identity, chunked", b"chunked;a=b", b"gzip",
                b"gzip, chunked", b"\x0bchunked", b"chunked\x0b", b"chunked\0", b'"chunked"', b"",
                b"identity", b"chunked,", b",chunked", b"chunked\r\n chunked",
            )
        ),
        (b"transfer-encoding: chunked", b"Transfer-Encoding: chunked"),
        (b"transfer-encoding: chunked", b"Transfer-Encoding: identity"),
        (b"transfer-encoding: chunked", b"content-length: 5"),
        (b"content-length: 5", b"transfer-encoding: chunked"),
        (b"Content-Length: 5", b"content-length: 5"),
        (b"content-length: 5", b"Content-Length: 6"),
        (b"Content-Length: 5", b"CONTENT-LENGTH: 5"),
        (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
        (b"content-length: 5, 5",),
        (b"Content-Length: +5",),
        (b"Content-Length: -5",),
        (b"Content-Length: 0x5",),
        (b"Content-Length: 5 5",),
        (b"Content-Length:",),
        (b"content-length: " + b"9" * 30,),
        (b"content-length: +123456",),  # in lower case the rest of the head may be known already
        (b"content-length: -123456",),
        (b"content-length: 0x123456",),
        (b"content-length: 5, 123456",),
        (b"content-length: 123456 5",),
        (b"content-length: 123456x",),
    ],
)  # fmt: skip
def test_a_body_that_two_readers_could_frame_differently_is_refused(
    lines: tuple[bytes, ...],
) -> None:
    with pytest.raises(BadHead):
        read_answer_head(head(b"date: 1", *lines), 200)


@pytest.mark.parametrize(
    ("line", "status", "fine"),
    [
        (b"HTTP/1.1 200 OK", 200, True),
        (b"HTTP/1.0 200 OK", 200, True),
        (b"HTTP/1.1 200 ", 200, True),
        (b"HTTP/1.1 200 OK", 201, False),
        (b"HTTP/1.0 404 OK", 200, False),
        (b"HTTP/2.0 200 OK", 200, False),
        (b"HTTP/1.1  200 OK", 200, False),
        (b"http/1.1 200 OK", 200, False),
        (b"HTTP/1.12 00 OK", 200, False),
        (b" HTTP/1.1 200 OK", 200, False),
    ],
)
def test_a_status_line_says_what_the_parser_read(line: bytes, status: int, fine: bool) -> None:
    whole = line + b"\r\netag: x\r\n\r\n"
    if fine:
        read, length = read_answer_head(whole, status)
        assert read.lines == b"HTTP/1.1 " + line[9:] + b"\r\netag: x\r\n"
        assert (read.status, length, read.chunked) == (status, b"", False)
    else:
        with pytest.raises(BadHead, match="the status line is malformed"):
            read_answer_head(whole, status)


def test_chunks_are_of_http_1_1_and_of_responses_with_a_body() -> None:
    chunked = b"transfer-encoding: chunked"
    with pytest.raises(BadHead):
        read_answer_head(head(chunked, version=b"1.0"), 200)
    with pytest.raises(BadHead):
        read_answer_head(head(chunked, status=204), 204)
    with pytest.raises(BadHead):
        read_answer_head(head(version=b"2.0"), 200)


@pytest.mark.parametrize("name", [b"content-length", b"Content-Length"])
def test_a_length_has_as_many_digits_as_fit_into_64_bits(name: bytes) -> None:
    most = b"9" * 18
    _, length = read_answer_head(head(name + b": " + most), 200)
    assert length == name + b": " + most + b"\r\n"
    with pytest.raises(BadHead):
        read_answer_head(head(name + b": 9" + most), 200)


def test_a_failure_is_an_engines_that_was_reached_unless_it_is_said() -> None:
    """Else the client is told "unreachable" of one that died (``Dispatch.engine_failed``)."""
    failure = EngineFailure("it closed the connection at once")
    assert (failure.connected, failure.between_chunks) == (True, False)

"""What of an engine's head goes on, and what is refused."""

from __future__ import annotations

import pytest

from llmux.gateway.answer_head import read_answer_head
from llmux.gateway.heads import BadHead


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 Fine", *lines, b"", b""])


def test_headers_pass_as_they_came_but_for_those_about_the_connection() -> None:
    read, length = read_answer_head(
        head(
            b"Date: today",
            b"X-Own:no blank",
            b"Connection: keep-alive",
            b"X-Request-Id: theirs",
            b"Access-Control-Allow-Origin: *",
            b"Content-Type: application/json",
        ),
        200,
    )
    assert read.lines == (
        b"HTTP/1.1 200 Fine\r\nDate: today\r\nX-Own:no blank\r\nContent-Type: application/json\r\n"
    )
    assert not read.chunked and not length and not read.event_stream


def test_length_chunks_and_event_streams_are_seen_whatever_their_spelling() -> None:
    for line in (b"CONTENT-LENGTH: 5", b"content-length: 5", b"content-length:5"):
        read, length = read_answer_head(head(b"a: b", line, b"c: d"), 200)
        assert length == line + b"\r\n"
        assert read.lines == b"HTTP/1.1 200 Fine\r\na: b\r\nc: d\r\n"
    assert read_answer_head(head(b"Transfer-Encoding:Chunked"), 200)[0].chunked
    for line in (b"content-type:text/event-stream", b"Content-Type:  text/event-stream; charset=x"):
        assert read_answer_head(head(line), 200)[0].event_stream


def test_the_same_head_with_another_length_or_status_is_not_taken_for_the_one_before() -> None:
    for size in (b"5", b"17"):
        _, length = read_answer_head(head(b"content-length: " + size), 200)
        assert length == b"content-length: " + size + b"\r\n"
    for status in (200, 404):
        assert read_answer_head(head(b"a: b"), status)[0].status == status


@pytest.mark.parametrize(
    "line",
    [
        b"a: b\nset-cookie: c",  # one line here, two headers to a lenient client
        b"a: b\rc: d\n",
        b"a: b\r\n\nc: d",
        b"a: b\rc: d",
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

"""What of an engine's head goes on, and what is refused."""

from __future__ import annotations

import pytest

from llmux.gateway.answer_head import BadHead, read_answer_head


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 Fine", *lines, b"", b""])


def test_headers_pass_as_they_came_but_for_those_about_the_connection() -> None:
    read = read_answer_head(
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
    assert read.lines == [
        b"HTTP/1.1 200 Fine",
        b"Date: today",
        b"X-Own:no blank",
        b"Content-Type: application/json",
    ]
    assert not read.chunked and not read.length_line and not read.event_stream


def test_length_chunks_and_event_streams_are_seen_whatever_their_spelling() -> None:
    assert read_answer_head(head(b"CONTENT-LENGTH: 5"), 200).length_line == b"CONTENT-LENGTH: 5"
    assert read_answer_head(head(b"Transfer-Encoding:Chunked"), 200).chunked
    for line in (b"content-type:text/event-stream", b"Content-Type:  text/event-stream; charset=x"):
        assert read_answer_head(head(line), 200).event_stream


@pytest.mark.parametrize(
    "line",
    [
        b"a: b\nset-cookie: c",  # one line here, two headers to a lenient client
        b"a: b\rc: d\n",
        b"a: b\r\n\nc: d",
        b"a: b\rc: d",
        b" transfer-encoding: chunked",  # a continuation of the line before, to some
        b"content-length : 5",
        b"no colon here, but blanks",
        b": nothing",
    ],
)
def test_a_head_that_two_readers_could_split_differently_is_refused(line: bytes) -> None:
    with pytest.raises(BadHead):
        read_answer_head(head(b"first: 1", line), 200)

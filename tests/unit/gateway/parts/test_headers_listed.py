"""Which headers pass the gateway, each by its name, in either direction."""

from __future__ import annotations

import pytest

from llmux.gateway.engine.answer_head import MAX_LENGTH_DIGITS, read_answer_head
from llmux.gateway.exposition import OPENMETRICS, TEXT, Format, negotiate
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.request_head import MAX_REQUEST_ID, read_head

FROM_ENGINES = (
    "Allow", "Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language",
    "Content-Type", "Date", "ETag", "Expires", "Last-Modified", "Retry-After", "Server", "Vary",
    "WWW-Authenticate", "X-Accel-Buffering", "anthropic-version", "OpenAI-Model", "x-ratelimit-a",
)  # fmt: skip
NOT_FROM_ENGINES = (
    "Set-Cookie", "Access-Control-Allow-Origin", "Connection", "Keep-Alive", "Location",
    "X-Request-Id", "Strict-Transport-Security", "x-anthropic-version", "openai",
)  # fmt: skip
FROM_CLIENTS = ("Accept", "User-Agent", "X-Other", "Content-Type", "Host", "Cookie", "Traceparent")
OURS = (
    "Accept-Encoding", "Content-Encoding", "Expect", "Keep-Alive", "Origin", "Proxy-Authorization",
    "Proxy-Connection", "TE", "Trailer", "Upgrade", "X-Request-Id", "X-Request-Timeout",
    "X-Stainless-Timeout", "Connection",
)  # fmt: skip


@pytest.mark.parametrize("spelled", [str, str.lower, str.upper])
def test_an_engines_headers_pass_by_name(spelled: type[str]) -> None:
    first = b"HTTP/1.1 200 OK\r\n"
    for name in FROM_ENGINES:
        line = f"{spelled(name)}: x\r\n".encode()
        assert read_answer_head(first + line + b"\r\n", 200)[0].lines == first + line, name
    for name in NOT_FROM_ENGINES:
        line = f"{spelled(name)}: x\r\n".encode()
        assert read_answer_head(first + line + b"\r\n", 200)[0].lines == first, name


@pytest.mark.parametrize("spelled", [str, str.lower, str.upper])
def test_a_clients_headers_pass_unless_they_are_for_us(spelled: type[str]) -> None:
    def forwarded(*names: str) -> bytes:
        named = [(spelled(name).encode(), b"identity") for name in names]
        return read_head([(b"host", b"h"), *named], "1.1")[0].forwarded

    for name in FROM_CLIENTS:
        if name != "Host":
            line = f"{spelled(name)}: identity\r\n".encode()
            assert forwarded(name) == b"host: h\r\n" + line
    for name in OURS:
        assert forwarded(name) == b"host: h\r\n", name


@pytest.mark.parametrize("name", [b"X-Request-Timeout", b"x-stainless-timeout"])
@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"7", 7.0), (b"0.5", 0.5), (b"1234567", 1234567.0), (b"12345678", None), (b"-1", None),
     (b"7s", None), (b"", None), (b"1.0123456789", None)],
)  # fmt: skip
def test_a_clients_own_timeout_is_read(name: bytes, value: bytes, seconds: float | None) -> None:
    read, _ = read_head([(b"host", b"h"), (name, value)], "1.1")
    assert read.timeout_secs == seconds
    for first, second in ((value, b"3"), (b"3", value)):
        both = [(b"host", b"h"), (b"x-request-timeout", first), (b"x-stainless-timeout", second)]
        assert read_head(both, "1.1")[0].timeout_secs == min(3.0, seconds or 3.0)


def test_what_is_read_has_its_bounds() -> None:
    longest = b"r" * MAX_REQUEST_ID
    for given, read in ((longest, longest), (longest + b"r", b"")):
        assert read_head([(b"host", b"h"), (b"x-request-id", given)], "1.1")[0].request_id == read
    digits = b"1" * MAX_LENGTH_DIGITS
    line = b"content-length: " + digits + b"\r\n"
    assert read_answer_head(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n", 200)[1] == line
    for wrong in (b"1" + digits, b"", b"1x", b"-1"):
        with pytest.raises(BadHead, match="content-length is not a number"):
            read_answer_head(b"HTTP/1.1 200 OK\r\ncontent-length: " + wrong + b"\r\n\r\n", 200)
    for status in (204, 304):
        head = b"HTTP/1.1 %d X\r\ntransfer-encoding: chunked\r\n\r\n" % status
        with pytest.raises(BadHead, match=f"status {status} has no body"):
            read_answer_head(head, status)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", TEXT),
        ("text/plain", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text; version=1.0.0", OPENMETRICS),
        ("application/openmetrics-text; version=x", TEXT),
        ("text/plain; version=x", TEXT),
        ("text/plain; version=", TEXT),
    ],
)
def test_any_wish_for_a_format_has_an_answer(accept: str, form: Format) -> None:
    assert negotiate(accept) is form

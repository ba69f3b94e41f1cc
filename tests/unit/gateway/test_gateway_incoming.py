"""Heads as they come in and as they go on."""

from __future__ import annotations

import json

import pytest

from llmux.errors import Refused
from llmux.gateway import openai
from llmux.gateway.incoming import Incoming

HOST = (b"host", b"h")


def incoming(*headers: tuple[bytes, bytes]) -> Incoming:
    made = Incoming()
    made.method, made.target = b"POST", b"/v1/completions?x=1"
    made.headers = list(headers)
    return made


def test_the_engine_gets_one_length_and_nothing_about_the_clients_connection() -> None:
    request = incoming(
        (b"Host", b"h"), (b"Content-Length", b"99"), (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"), (b"TE", b"trailers"), (b"X-Keep", b"2"), (b"X-Request-ID", b"r1"),
    )  # fmt: skip
    assert request.read_head("1.1") is None
    request.body = b"{}"
    assert request.length == 99
    assert request.engine_head() == (
        b"POST /v1/completions?x=1 HTTP/1.1\r\nHost: h\r\nX-Keep: 2\r\nx-request-id: r1\r\n"
        b"content-length: 2\r\n\r\n"
    )


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\x07b"])
def test_an_unusable_request_id_is_replaced(given: bytes) -> None:
    request = incoming(HOST, (b"x-request-id", given))
    request.read_head("1.1")
    assert request.request_id.startswith(b"req-")


def test_request_ids_differ() -> None:
    first, second = incoming(HOST), incoming(HOST)
    first.read_head("1.1")
    second.read_head("1.1")
    assert first.request_id != second.request_id


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"1"), (b"Content-Length", b"1")],
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"-1")],
        [(b"content-length", b"0x1")],
        [(b"content-length", b"")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"x", b"a\r\ny: b")],
        [(b"x", b"a\nb")],
        [(b"content-length ", b"5")],
        [(b"", b"5")],
        [(b"x", b"a\0b")],
    ],
)
def test_ambiguous_heads_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert incoming(HOST, *headers).read_head("1.1")
    assert incoming(HOST).read_head("1.1") is None


def test_a_request_is_for_one_host() -> None:
    assert incoming(HOST, (b"HOST", b"h")).read_head("1.1")
    assert incoming(HOST, HOST).read_head("1.0")
    assert incoming().read_head("1.1")
    assert incoming().read_head("1.0") is None


def test_only_the_one_expectation_that_there_is_is_met() -> None:
    for value, met in ((b"100-Continue", True), (b"100", False)):
        request = incoming(HOST, (b"expect", value))
        assert request.read_head("1.1") is None and request.expects_continue is met


def test_http_1_0_knows_no_chunks_and_no_continue() -> None:
    assert incoming((b"transfer-encoding", b"chunked")).read_head("1.0")
    request = incoming((b"expect", b"100-continue"))
    assert request.read_head("1.0") is None
    assert not request.expects_continue


def test_the_last_of_two_model_keys_counts_as_in_the_engine() -> None:
    assert openai.model_of(b'{"model": "a", "x": {"model": "c"}, "model": "b"}') == "b"


@pytest.mark.parametrize(
    ("body", "written"),
    [
        (b'{"model" :\t"a", "x": 1.50}', b'{"model" :\t"b\\u00e9", "x": 1.50}'),
        (b'{"x": "\\"model\\": \\"a\\"", "model":"a"}', None),
        (b'{"model": "a", "x": {"model": "a"}, "y": NaN}', None),
        (b'{"mod\\u0065l": "a", "x": {"model": "a"}}', None),
        (b'{"model": "z", "model": "a", "n": 12345678901234567890}', None),
        ('{"model": "a", "x": "é"}'.encode("utf-16"), None),
        (b'\xef\xbb\xbf{"model": "a"}', None),
        (b'{"model": "\\u0061", "x": "\\ud800"}', None),
    ],
    ids=range(8),
)
def test_another_name_in_the_same_body(body: bytes, written: bytes | None) -> None:
    renamed = openai.renamed(body, "bé")
    assert written is None or renamed == written
    expected = json.loads(body) | {"model": "bé"}
    assert str(json.loads(renamed)) == str(expected)


@pytest.mark.parametrize("body", [b"", b"1", b"null", b"[]", b'{"model": null}', b'{"model": {}}'])
def test_bodies_without_a_model_are_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        openai.model_of(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a"} \r\n\t', b' {"model": "a"}', b'\xef\xbb\xbf{"model": "a"}',
        b'{"model": "a"} x', b'{"model": "a"}\x0b', b'{"model": "\xff"}', b'{"model": NaN}',
        b'{"model": "\\ud800"}', b'{"model": "a",}', b'{"model": "a"}{}', b"{" * 100_000,
        '{"model": "é"}'.encode("utf-16"), '{"model": "é"}'.encode("utf-32-le"),
    ],
    ids=range(13),
)  # fmt: skip
def test_the_short_way_reads_bodies_as_json_loads_does(body: bytes) -> None:
    try:
        expected = json.loads(body)
    except (ValueError, RecursionError):
        expected = None
    try:
        assert openai.model_of(body) == expected["model"]
    except Refused:
        assert expected is None or not isinstance(expected["model"], str)

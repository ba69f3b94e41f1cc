"""Heads as they come in and as they go on."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.errors import Refused
from llmux.gateway.http import openai
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.hosts import MAX_CACHED, Hosts
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.request_head import Headers, HeadReader, read_head
from llmux.gateway.http.routes import Source

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
    request.read_head("1.1", HeadReader())
    request.body = b"{}"
    assert request.length == 99
    assert request.engine_head() == (
        b"POST /v1/completions?x=1 HTTP/1.1\r\nHost: h\r\nX-Keep: 2\r\nx-request-id: r1\r\n"
        b"content-length: 2\r\n\r\n"
    )


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\x07b"])
def test_an_unusable_request_id_is_replaced(given: bytes) -> None:
    request = incoming(HOST, (b"x-request-id", given))
    request.read_head("1.1", HeadReader())
    assert request.request_id.startswith(b"req-")


def test_request_ids_differ() -> None:
    first, second = incoming(HOST), incoming(HOST)
    for request in (first, second):
        request.read_head("1.1", HeadReader())
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
def test_ambiguous_heads_are_refused(headers: Headers) -> None:
    with pytest.raises(BadHead):
        read_head([HOST, *headers], "1.1")
    read_head([HOST], "1.1")


def test_a_request_is_for_one_host() -> None:
    for headers, version in (([HOST, (b"HOST", b"h")], "1.1"), ([HOST, HOST], "1.0"), ([], "1.1")):
        with pytest.raises(BadHead):
            read_head(headers, version)
    read_head([], "1.0")


def test_only_the_one_expectation_that_there_is_is_met() -> None:
    for value, met in ((b"100-Continue", True), (b"100", False)):
        head, _ = read_head([HOST, (b"expect", value)], "1.1")
        assert head.expects_continue is met


def test_http_1_0_knows_no_chunks_and_no_continue() -> None:
    with pytest.raises(BadHead):
        read_head([(b"transfer-encoding", b"chunked")], "1.0")
    head, _ = read_head([(b"expect", b"100-continue")], "1.0")
    assert not head.expects_continue


NAMES = st.sampled_from(
    [b"host", b"Content-Length", b"content-length", b"Transfer-Encoding", b"x", b"Connection",
     b"Authorization", b"X-Api-Key", b"X-Request-Id", b"X-Request-Timeout", b"Origin", b"a b"]
)  # fmt: skip
VALUES = st.sampled_from([b"1", b"22", b"1 ", b"+3", b"h", b"x, close", b"chunked", b"a\nb", b""])
LENGTH = (b"Content-Length", b"1")
PLAIN = st.sampled_from([(b"x", b"1"), (b"Authorization", b"a"), (b"X-Request-Id", b"r")])
USUAL = st.lists(PLAIN, max_size=2).flatmap(lambda more: st.permutations([HOST, LENGTH, *more]))


@st.composite
def changed(draw: st.DrawFn, headers: Headers) -> Headers:
    """Another value, another name or both, in one place or two; or all of them again."""
    again = list(headers)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(headers) - 1))
        name = draw(st.just(headers[at][0]) | NAMES)
        again[at] = (name, draw(st.just(headers[at][1]) | VALUES))
    return again


@given(data=st.data())
def test_a_connections_heads_are_read_as_if_each_were_its_first(data: st.DataObject) -> None:
    reader, usual = HeadReader(), data.draw(USUAL)
    for _ in range(4):
        headers = data.draw(changed(usual))
        version = data.draw(st.sampled_from(["1.1", "1.0"]))
        before = list(headers)
        try:
            expected = read_head(list(headers), version)
        except BadHead as error:
            with pytest.raises(BadHead, match=re.escape(str(error))):
                reader.read(headers, version)
        else:
            assert reader.read(headers, version) == expected
        assert headers == before


def test_a_head_that_comes_again_is_read_once() -> None:
    """It costs a tenth; only its length may differ."""
    reader = HeadReader()
    usual = [HOST, (b"Content-Length", b"1"), (b"x", b"1")]
    first, length = reader.read(list(usual), "1.1")
    again, longer = reader.read([HOST, (b"Content-Length", b"22"), (b"x", b"1")], "1.1")
    assert again is first
    assert (length, longer) == (1, 22)
    for other in (
        [*usual, (b"y", b"2")], [HOST, (b"content-length", b"1"), (b"x", b"1")],
        [HOST, (b"y", b"1"), (b"x", b"1")], [HOST, (b"Content-Length", b"1"), (b"x", b"2")],
    ):  # fmt: skip
        kept = reader.read(list(usual), "1.1")[0]
        assert kept == first
        read, length = reader.read(list(other), "1.1")
        assert read is not kept
        assert (read, length) == read_head(list(other), "1.1")
    assert reader.read(list(usual), "1.0")[0].version_1_0
    assert not reader.read(list(usual), "1.1")[0].version_1_0
    for size, same in ((2048 - 21, True), (2048 - 20, False)):
        long = [HOST, (b"content-length", b"1"), (b"x", b"y" * size)]
        assert (reader.read(list(long), "1.1")[0] is reader.read(list(long), "1.1")[0]) is same


def test_the_last_of_two_model_keys_counts_as_in_the_engine() -> None:
    assert openai.read_body(b'{"model": "a", "x": {"model": "c"}, "model": "b"}')[0] == "b"


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
    renamed = openai.replace_model(body, "bé")
    assert written is None or renamed == written
    expected = json.loads(body) | {"model": "bé"}
    assert str(json.loads(renamed)) == str(expected)


STREAM = b'{"model": "a", "stream": true, "previous_response_id": "resp_1"}'


@pytest.mark.parametrize(
    ("start", "body", "stream", "model", "named"),
    [
        ("POST /v1/completions", STREAM, True, "a", "resp_1"),
        ("POST /v1/completions", b'{"model": "a", "stream": false}', False, "a", None),
        ("POST /v1/completions", b'{"model": "a", "stream": 1}', True, "a", None),
        ("POST /v1/completions", b'{"model": "a"}', False, "a", None),
        ("POST /upstream/b/v1/completions", STREAM, True, "b", "resp_1"),
        ("POST /upstream/b/v1/completions", b'{"stream": true}', True, "b", None),
        ("POST /upstream/b/v1/responses", STREAM.replace(b'"a"', b"null"), True, "b", "resp_1"),
        ("POST /upstream/b/v1/responses", STREAM.replace(b'"a"', b"5"), True, "b", "resp_1"),
        ("POST /upstream/b/v1/responses", STREAM.replace(b'"a"', b'""'), True, "b", "resp_1"),
        ("POST /upstream/b/v1/responses", STREAM.replace(b"model", b"x"), True, "b", "resp_1"),
        ("POST /upstream/b/v1/completions", b"not JSON", False, "b", None),
        ("GET /upstream/b/v1/models", b"", False, "b", None),
        ("GET /v1/responses/resp_2", STREAM, False, None, "resp_2"),
        ("POST /v1/responses/resp_2/cancel", STREAM, False, None, "resp_2"),
        ("GET /upstream/b/v1/responses/resp_2", b"", False, "b", "resp_2"),
        ("POST /upstream/b/v1/audio/translations", STREAM, False, "b", None),
    ],
)
def test_each_way_to_an_engine_says_its_model_its_stream_and_its_response(
    start: str, body: bytes, stream: bool, model: str | None, named: str | None
) -> None:
    request = incoming(HOST)
    request.method, request.target = start.encode().split()
    request.find_route()
    request.body = body
    assert request.match is not None
    assert request.wants_stream() is stream
    assert request.model() == model
    assert request.named_response() == named
    if request.match.route.source is Source.JSON and body != b"not JSON":
        short, request.body, request._json = request.json(), b"", None
        request.begin_json()
        request.add_upload(body)  # as a long one is read
        assert request.json() == short
        assert (request.wants_stream(), request.model()) == (stream, model)
        assert request.named_response() == named


@pytest.mark.parametrize("body", [b"", b"1", b"null", b"[]", b'{"model": null}', b'{"model": {}}'])
def test_bodies_without_a_model_are_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        openai.read_body(body)


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
        assert openai.read_body(body)[0] == expected["model"]
    except Refused:
        assert expected is None or not isinstance(expected["model"], str)


@pytest.mark.parametrize(
    ("host", "known"),
    [
        (b"localhost", True), (b"LOCALHOST:8080", True), (b"gpu1", True), (b"gpu1:80", True),
        (b"proxy.example", True), (b"Proxy.Example:443", True), (b"127.0.0.1", True),
        (b"10.1.2.3:8000", True), (b"[::1]", True), (b"[fe80::1]:8000", True),
        (b"attacker.example", False), (b"attacker.example:80", False),
        (b"proxy.example.org", False), (b"a.localhost", True), (b"a.b.INTERNAL:1", True),
        (b"localhost.a", False), (b"a.xlocalhost", False), (b"10.1.2.3.example", False),
        (b"[attacker.example]", False), (b"gpu1:http", False),
        (b"", False), (b":80", False), (b"[", False),
    ],
)  # fmt: skip
def test_a_host_is_ours_by_address_by_a_name_without_a_dot_or_by_the_configuration(
    host: bytes, known: bool
) -> None:
    """Else a page of any site reads a gateway without keys, under a name of its own (rebinding)."""
    hosts = Hosts(["proxy.example"])
    for _ in range(2):  # judged, and looked up
        assert hosts[host] is known
    assert Hosts(["*"])[host] is True


def test_no_more_hosts_are_remembered_than_the_bound() -> None:
    hosts = Hosts(())
    assert [hosts[b"h%d" % number] for number in range(300)] == [True] * 300
    assert len(hosts) == MAX_CACHED


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(("close", "keeps"), [(True, True), (False, False), (False, True)])
def test_our_own_routes_get_a_request_whose_connection_is_ours(
    version: str, close: bool, keeps: bool
) -> None:
    request = incoming(HOST, (b"Connection", b"x"), (b"X-Request-Id", b"r1"), (b"A", b"b"))
    request.read_head(version, HeadReader())
    request.body, request.keep_alive = b"{}", keeps
    kept = b"keep-alive" if keeps and not close else b"close"
    assert request.sanic_request(close=close) == (
        b"POST /v1/completions?x=1 HTTP/%b\r\nhost: h\r\nA: b\r\nx-request-id: r1\r\n"
        b"content-length: 2\r\nconnection: %b\r\n\r\n{}" % (version.encode(), kept)
    )


def test_an_adapter_that_the_body_names_is_not_written_again() -> None:
    body = b'{"model" : "l\\u006fra"}'
    for path, written in ((b"lora", body), (b"other", b'{"model" : "other"}')):
        request = incoming(HOST)
        request.target = b"/upstream/%b/v1/completions" % path
        request.find_route()
        request.body = body
        request.write_adapter(path.decode())
        assert request.body == written


@pytest.mark.parametrize(
    ("headers", "field", "value"),
    [
        ([(b"X-Request-Timeout", b"7")], "timeout_secs", 7.0),
        ([(b"X-Stainless-Timeout", b"7.5")], "timeout_secs", 7.5),
        ([(b"X-Request-Timeout", b"7"), (b"X-Stainless-Timeout", b"9")], "timeout_secs", 7.0),
        ([(b"X-Request-Timeout", b"9"), (b"X-Stainless-Timeout", b"7")], "timeout_secs", 7.0),
        ([(b"X-Request-Timeout", b"soon")], "timeout_secs", None),
        ([(b"X-Request-Timeout", b"-1")], "timeout_secs", None),
        ([(b"Keep-Alive", b"5"), (b"Te", b"5"), (b"Upgrade", b"5")], "timeout_secs", None),
        ([(b"X-Llmux-Keep-Alive", b"10m")], "keep_alive_secs", 600.0),
        ([(b"X-Llmux-Keep-Alive", b"0")], "keep_alive_secs", 0.0),
        ([(b"X-Llmux-Keep-Alive", b"1.5h")], "keep_alive_secs", 5400.0),
        ([(b"X-Llmux-Keep-Alive", b"-1")], "keep_alive_secs", float("inf")),
        ([(b"Content-Encoding", b"gzip")], "encoding", b"gzip"),
        ([(b"Content-Encoding", b" Identity ")], "encoding", b""),
        ([(b"Content-Encoding", b"")], "encoding", b""),
        ([(b"Origin", b"https://page")], "origin", b"https://page"),
        ([(b"Authorization", b"Bearer x")], "authorization", b"Bearer x"),
        ([(b"Authorization", b"Bearer x")], "credentials", b"Authorization: Bearer x\r\n"),
        ([(b"X-Api-Key", b"x")], "x_api_key", b"x"),
        ([(b"X-Request-Id", b"r" * 128)], "request_id", b"r" * 128),
        ([(b"X-Request-Id", b"r" * 129)], "request_id", b""),
        ([(b"Connection", b"close"), (b"Close", b"x")], "forwarded", b"host: h\r\nClose: x\r\n"),
        ([(b"Connection", b"a, B"), (b"A", b"x"), (b"b", b"y")], "forwarded", b"host: h\r\n"),
        ([(b"Te", b"x"), (b"Keep-Alive", b"y"), (b"Z", b"z")], "forwarded",
         b"host: h\r\nZ: z\r\n"),
    ],
)  # fmt: skip
def test_each_header_that_means_something_is_read_and_what_is_about_the_connection_dropped(
    headers: Headers, field: str, value: object
) -> None:
    head, _ = read_head([HOST, *headers], "1.1")
    assert getattr(head, field) == value


@pytest.mark.parametrize("value", [b"ten", b"", b"10 m", b"-2", b"1w"])
def test_a_keep_alive_that_is_no_duration_is_refused(value: bytes) -> None:
    with pytest.raises(BadHead, match="must be a duration"):
        read_head([HOST, (b"x-llmux-keep-alive", value)], "1.1")


@pytest.mark.parametrize("name", [b"authorization", b"X-Api-Key"])
def test_credentials_are_given_once(name: bytes) -> None:
    with pytest.raises(BadHead, match="given more than once"):
        read_head([HOST, (name, b"one"), (name, b"two")], "1.1")


@pytest.mark.parametrize(
    ("target", "path", "engines"),
    [
        (b"/v1/completions", b"/v1/completions", True),
        (b"/completions", b"/v1/completions", True),
        (b"/completions?a=1&b=2", b"/v1/completions?a=1&b=2", True),
        (b"/v1/completions?x", b"/v1/completions?x", True),
        (b"/upstream/org/a/v1/completions?x=1", b"/v1/completions?x=1", True),
        (b"/nothing?x=1", b"/nothing?x=1", False),
    ],
)
def test_the_engine_gets_its_own_path_with_the_clients_query(
    target: bytes, path: bytes, engines: bool
) -> None:
    request = incoming(HOST)
    request.target = target
    request.find_route()
    assert (request.target, request.match is not None) == (path, engines)

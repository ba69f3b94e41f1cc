"""What is seldom met in requests and answers: bounds met exactly, odd bodies, names in paths."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llmux.errors import Refused
from llmux.gateway.event_feed import check_news, read_page
from llmux.gateway.exchange.response_id import SEARCHED_BYTES, ResponseIdFinder
from llmux.gateway.http import openapi, routes
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.json_finder import JsonError, JsonFinder
from llmux.gateway.http.multipart import MAX_MODEL, MAX_PART_HEAD, MAX_PARTS, FormError, ModelFinder
from llmux.gateway.http.request import Incoming, new_request_id, plain_head
from llmux.gateway.http.request_head import HeadReader
from llmux.protocol import News
from llmux.typed_json import BadJson

# ---- the id of a stored response -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_the_id_is_looked_for_in_the_first_bytes_and_no_further(size: int) -> None:
    def feed(body: bytes) -> tuple[list[str], int]:
        """What was found, and after how many bytes the search ended."""
        finder, found = ResponseIdFinder(), []
        for at in range(0, len(body), size):
            if (name := finder.feed(body[at : at + size])) is not None:
                found.append(name)
            if finder.done:
                return found, min(at + size, len(body))
        return found, -1

    start = b'{"x":1,"id": "'
    body = start + b"r_-9" + b'"}'
    found, at = feed(body)
    assert found == ["r_-9"]
    assert at == min(-(-(len(start) + 5) // size) * size, len(body))
    assert feed(b" " * (SEARCHED_BYTES - 1)) == ([], -1)
    assert feed(b" " * SEARCHED_BYTES)[1] == -(-SEARCHED_BYTES // size) * size or size == 7
    assert feed(b" " * (SEARCHED_BYTES + 10) + body)[0] == []
    assert feed(b'{"id":"' + b"r" * 200 + b'"}')[0] == ["r" * 200]
    assert feed(b'{"id":"' + b"r" * 201 + b'"}')[0] == []
    assert feed(b'{"id":"r\xc3\xa9"}')[0] == []


def test_a_search_that_reached_its_bound_exactly_is_over() -> None:
    finder = ResponseIdFinder()
    assert finder.feed(b" " * (SEARCHED_BYTES - 1)) is None
    assert not finder.done
    assert finder.feed(b" ") is None
    assert finder.done


# ---- bodies --------------------------------------------------------------------------------------


def found(*pieces: bytes) -> JsonFinder:
    finder = JsonFinder()
    for piece in pieces:
        finder.feed(piece)
    finder.close()
    return finder


@pytest.mark.parametrize(
    ("body", "model", "wrong", "stream", "previous"),
    [
        (b'{"model":"\\x"}', None, "empty", False, None),
        (b'{"model":"a\xff"}', None, "empty", False, None),
        (b'{"stream":tru,"model":"a"}', "a", "", False, None),
        (b'{"stream":true}', None, "missing", True, None),
        (b'{"stream":"\\x","model":"a"}', "a", "", False, None),
        (b'{"previous_response_id":"\\x"}', None, "missing", False, None),
        (b'{"previous_response_id":7,"model":nul}', None, "not a string", False, None),
        (b' \r\n\t{"model" : "a" } \n', "a", "", False, None),
        (b'{"\\x":1,"model":"a"}', "a", "", False, None),
        (b'{"model":"a","stream":' + b" " * 200 + b"true}", "a", "", False, None),
        (b'{"model":"a",}', "a", "", False, None),
        (b'{"model":,"x":"a"}', None, "missing", False, None),
        (b'{:"b","model":"a"}', "a", "", False, None),
        (b'{"model"}', None, "missing", False, None),
        (b'{"model":"a" "b"}', "b", "", False, None),
        (b'{"model":{"a":["]"]},"stream":1}', None, "not a string", True, None),
    ],
    ids=range(16),
)
def test_a_body_that_the_engine_will_refuse_is_read_without_harm(
    body: bytes, model: str | None, wrong: str, stream: bool, previous: str | None
) -> None:
    for cut in range(len(body)):
        finder = found(body[:cut], body[cut:])
        assert (finder.model, finder.wrong) == (model, wrong)
        assert (finder.stream, finder.previous) == (stream, previous)


@pytest.mark.parametrize("body", [b"{\0", b" {\0m", b" []", b"\0{", b"\xff\xfe{\0"])
def test_another_encoding_is_no_object(body: bytes) -> None:
    with pytest.raises(JsonError, match="expected a JSON object in UTF-8"):
        found(body)


def form(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"--B\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + b"--B--\r\n"


NAMED = b'content-disposition: form-data; name="model"'


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
def test_a_form_is_searched_part_by_part(size: int) -> None:
    body = form(
        (b"x: y", b"no name"), (b"Content-Disposition: form-data; name=file", b"--B is text"),
        (b"x-model: 1\r\n" + NAMED, b"alpha"), (NAMED.replace(b"model", b"modem"), b"no"),
    )  # fmt: skip
    finder = ModelFinder(b"B")
    for at in range(0, len(body), size):
        finder.feed(body[at : at + size])
    assert finder.model == "alpha"
    assert body[slice(*finder.span)] == b"alpha"
    finder.feed(form((NAMED, b"after the end")))
    assert finder.model == "alpha"


@pytest.mark.parametrize("room", [0, 1])
def test_what_a_form_names_has_a_bound(room: int) -> None:
    for body, said in (
        (form((NAMED, b"m" * (MAX_MODEL + room))), "is longer than"),
        (form((NAMED + b"\r\nx: " + b"x" * (MAX_PART_HEAD - len(NAMED) - 7 + room), b"a")), "head"),
        (form((NAMED, b"a"), *[(NAMED, b"b")] * room), "more than one"),
        (form((NAMED, b"a\xc3" if room else b"a")), "not UTF-8"),
    ):
        finder = ModelFinder(b"B")
        if room:
            with pytest.raises(FormError, match=said):
                finder.feed(body)
        else:
            finder.feed(body)
            assert finder.model


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("room", [0, 1])
def test_a_form_has_no_more_parts_than_its_engine_takes(room: int, size: int) -> None:
    """A form of 20 MiB of empty parts took 16 s, and others waited 0.8 s for each piece of it."""
    body = form(*[(b"", b"")] * (MAX_PARTS - 1 + room), (NAMED, b"alpha"))
    finder = ModelFinder(b"B")

    def feed() -> None:
        for at in range(0, len(body), size):
            finder.feed(body[at : at + size])

    if room:
        with pytest.raises(FormError, match="more than 1000 parts"):
            feed()
    else:
        feed()
        assert finder.model == "alpha"
        assert body[slice(*finder.span)] == b"alpha"


def test_nothing_is_kept_of_what_follows_a_form() -> None:
    finder = ModelFinder(b"B")
    finder.feed(form((NAMED, b"alpha")))
    kept = len(finder._rest)
    for _ in range(3):
        finder.feed(b"x" * 1000)
    assert len(finder._rest) == kept


# ---- heads and paths -----------------------------------------------------------------------------


def test_the_size_of_a_head_is_that_of_its_lines() -> None:
    request = Incoming()
    assert request.head_bytes() == 0
    request.target = b"/12345678"
    request.headers = [(b"host", b"x"), (b"abc", b"defg")]
    assert request.head_bytes() == 9 + 4 + 1 + 3 + 4 + 4 * 2


@pytest.mark.parametrize("target", [b"", b"/a b", b"/a\x7f", b"/\xc3\xa9", b"/\0"])
def test_a_target_with_other_characters_is_refused(target: bytes) -> None:
    request = Incoming()
    request.target, request.headers = target, [(b"host", b"x")]
    with pytest.raises(BadHead, match="the request target contains"):
        request.read_head("1.1", HeadReader())


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://a.b:1/v1/models?x", b"/v1/models?x", b"a.b:1"),
        (b"HTTPS://a", b"/", b"a"),
        (b"http://a?x=1", b"/?x=1", b"a"),
        (b"http://u@a/x", b"http://u@a/x", b"h"),
        (b"http://u:p@a", b"http://u:p@a", b"h"),
        (b"http://a/x@y", b"/x@y", b"a"),
        (b"http://a?@", b"/?@", b"a"),
        (b"*", b"*", b"h"),
        (b"ftp://a/", b"ftp://a/", b"h"),
    ],
)
def test_a_target_in_absolute_form_names_the_host(target: bytes, path: bytes, host: bytes) -> None:
    request = Incoming()
    request.target, request.headers = target, [(b"x", b"1"), (b"Host", b"h")]
    request.read_head("1.1", HeadReader())
    assert (request.target, request.head.host) == (path, host)


class Parsed:
    def get_http_version(self) -> str:
        return "1.1"

    def get_method(self) -> bytes:
        return b"GET"


@pytest.mark.parametrize(
    ("headers", "plain"),
    [
        ([(b"Host", b"x"), (b"UPGRADE", b"h2c"), (b"HTTP2-Settings", b"a")], b"Host: x\r\n"),
        ([], b""),
        ([(b"a", b"b\nc")], None),
        ([(b"a", b"b\rc")], None),
        ([(b"a", b"b\r\nc: d")], None),
    ],
)
def test_a_head_is_written_again_or_is_none(
    headers: list[tuple[bytes, bytes]], plain: bytes | None
) -> None:
    whole = None if plain is None else b"GET /x HTTP/1.1\r\n" + plain + b"\r\n"
    assert plain_head(Parsed(), b"/x", headers) == (whole or b"\0\r\n\r\n")


def test_forked_workers_give_requests_other_names() -> None:
    own = new_request_id().split(b"-")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, new_request_id())
        os._exit(0)
    os.waitpid(pid, 0)
    theirs = os.read(read_end, 100).split(b"-")
    os.close(read_end)
    os.close(write_end)
    assert (len(own[1]), len(theirs[1])) == (12, 12)
    assert own[1] != theirs[1]
    assert int(theirs[2], 16) == int(own[2], 16) + 1


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (b"/upstream/a/v1/completions", "a"),
        (b"/upstream/a/b/v1/completions", "a/b"),
        (b"/upstream/a%2Fb/v1/completions", "a/b"),
        (b"/upstream/" + b"a" * 600 + b"/v1/completions", "a" * 600),
        (b"/upstream/" + b"a" * 601 + b"/v1/completions", None),
        (b"/upstream//v1/completions", "/v1"),
        (b"/upstream/%ff/v1/completions", None),
        (b"/upstream/a", None),
        (b"/upstream/", None),
        (b"/upstream/a/", None),
    ],
)
def test_a_path_may_name_the_model(path: bytes, model: str | None) -> None:
    match = routes.find(b"POST", path)
    assert (None if match is None else match.model) == model


@pytest.mark.parametrize(
    ("target", "shorter"),
    [
        (b"/v1/models/", b"/v1/models"),
        (b"/v1/completions//?x=1/", b"/v1/completions?x=1/"),
        (b"/v1/responses/r1/", b"/v1/responses/r1"),
        (b"/health/", b"/health"),
        (b"/health/live/?a", b"/health/live?a"),
        (b"/v1/models/org/alpha/", b"/v1/models/org/alpha"),
        (b"/openapi.json//", b"/openapi.json"),
        (b"/control/status/", b"/control/status"),
        (b"/control/pin/", None),
        (b"/v1/completions", None),
        (b"/version/", None),
        (b"//health/", None),
        (b"*/", None),
        (b"/ui/", None),
        (b"/", None),
    ],
)
def test_a_slash_too_many_leads_to_where_there_is_a_route(
    target: bytes, shorter: bytes | None
) -> None:
    assert openapi.without_slash(target) == shorter


# ---- the supervisor's events ---------------------------------------------------------------------

EVENT = {"id": 1, "type": "x", "time": 2.0, "more": [1]}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"events": []}, ([], False)),
        ({"events": [EVENT], "more": True}, ([EVENT], True)),
        ({"events": [EVENT, {"id": 1, "type": "x"}]}, None),
        ({"events": [{"id": "1", "type": "x", "time": 2.0}]}, None),
        ({"more": True}, None),
        (None, None),
    ],
    ids=range(6),
)
def test_a_page_of_events_is_checked(result: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises(Refused, match="cannot read the supervisor's events"):
            read_page(result)
    else:
        assert read_page(result) == expected


@pytest.mark.parametrize(
    ("topic", "item", "good"),
    [
        ("events", EVENT, True), ("timeline", EVENT, True), ("logs", "a line", True),
        ("events", "a line", False), ("timeline", {"id": 1}, False), ("logs", EVENT, False),
        ("logs", None, False),
    ],
    ids=range(7),
)  # fmt: skip
def test_news_are_checked_by_their_topic(topic: str, item: Any, good: bool) -> None:
    if good:
        check_news(News(topic, "", item))
    else:
        with pytest.raises(BadJson):
            check_news(News(topic, "", item))

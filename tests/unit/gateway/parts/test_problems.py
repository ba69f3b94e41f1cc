"""What clients are told: each reason's status, type and headers, in each shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway.http import openai, problems
from llmux.gateway.http.cors import EXPOSED, Cors
from llmux.gateway.http.problems import HttpRefused, Moved, error_event, error_response
from llmux.gateway.http.replies import refusal
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.request_head import HeadReader
from llmux.protocol import ModelInfo

# code → status, OpenAI's type, Anthropic's type, Retry-After
TOLD: dict[str, tuple[int, str, str, int | None]] = {
    "model_not_found": (404, "invalid_request_error", "not_found_error", None),
    "invalid_request": (400, "invalid_request_error", "invalid_request_error", None),
    "wait_expired": (504, "timeout_error", "timeout_error", None),
    "model_start_failed": (503, "server_error", "overloaded_error", 1),
    "model_backing_off": (503, "server_error", "overloaded_error", 1),
    "engine_died": (502, "server_error", "api_error", None),
    "engine_unreachable": (502, "server_error", "api_error", None),
    "malformed_answer": (502, "server_error", "api_error", None),
    "cut_by_switch": (503, "server_error", "overloaded_error", 1),
    "manual_mode": (503, "server_error", "overloaded_error", 1),
    "cancelled": (409, "invalid_request_error", "api_error", None),
    "pinned_models_in_the_way": (409, "invalid_request_error", "api_error", None),
    "shutting_down": (503, "server_error", "overloaded_error", 1),
    "model_cannot_fit": (503, "server_error", "overloaded_error", 1),
    "already_running": (409, "invalid_request_error", "api_error", None),
    "queue_full": (503, "server_error", "overloaded_error", 1),
    "model_overloaded": (429, "rate_limit_error", "rate_limit_error", 1),
    "body_too_large": (413, "invalid_request_error", "request_too_large", None),
    "unsupported_encoding": (415, "invalid_request_error", "invalid_request_error", None),
    "invalid_api_key": (401, "authentication_error", "authentication_error", None),
    "forbidden": (403, "permission_error", "permission_error", None),
    "rate_limit_exceeded": (429, "rate_limit_error", "rate_limit_error", 1),
    "supervisor_unreachable": (503, "server_error", "overloaded_error", 1),
    "not_found": (404, "invalid_request_error", "not_found_error", None),
    "method_not_allowed": (405, "invalid_request_error", "invalid_request_error", None),
    "internal_error": (500, "server_error", "api_error", None),
}
TEXTS = {
    307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict",
    413: "Content Too Large", 415: "Unsupported Media Type", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


def read(response: bytes) -> tuple[str, dict[str, str], Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines)
    assert len(headers) == len(lines)
    assert int(headers.pop("content-length")) == len(body) or not body
    assert headers.pop("content-type") == "application/json"
    return line, headers, json.loads(body) if body else None


def test_no_reason_is_left_out() -> None:
    assert set(TOLD) == {str(reason) for reason in Reason} == {*map(str, problems.PROBLEMS)}
    assert {status: text.decode() for status, text in problems.STATUS_LINES.items()} == {
        status: f"{status} {text}" for status, text in TEXTS.items()
    }


@pytest.mark.parametrize("code", TOLD)
def test_each_reason_has_its_status_its_type_and_its_headers(code: str) -> None:
    status, kind, anthropic_kind, retry_after = TOLD[code]
    problem = Refused(Reason(code), "it fails", param="model")
    expected = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        expected["www-authenticate"] = 'Bearer realm="llmux"'
    if status == 415:
        expected["accept-encoding"] = "identity"
    line, headers, body = read(error_response(problem))
    assert (line, headers) == (f"HTTP/1.1 {status} {TEXTS[status]}", expected)
    shape = {"message": "it fails", "type": kind, "param": "model", "code": code}
    assert body == {"error": shape}
    line, headers, body = read(error_response(problem, anthropic=True, close=True))
    assert headers == {**expected, "connection": "close"}
    anthropic = {"type": "error", "error": {"type": anthropic_kind, "message": "it fails"}}
    assert body == anthropic
    assert error_event(problem) == b"\n\ndata: %b\n\n" % json.dumps({"error": shape}).encode()
    assert error_event(problem, anthropic=True) == (
        b"\n\nevent: error\ndata: %b\n\n" % json.dumps(anthropic).encode()
    )


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        ("queue_full", 0.0, "1"), ("queue_full", 1.0, "1"), ("queue_full", 1.01, "2"),
        ("queue_full", 40.0, "40"), ("model_overloaded", 7.5, "8"), ("cancelled", 2.0, "2"),
        ("cancelled", None, None), ("queue_full", 86400.5, "86400"),
        ("rate_limit_exceeded", float("inf"), "86400"),
    ],
)  # fmt: skip
def test_retry_after_is_rounded_up_one_at_the_least_and_a_day_at_the_most(
    code: str, seconds: float | None, said: str | None
) -> None:
    _, headers, _ = read(error_response(Refused(Reason(code), "no", retry_after=seconds)))
    assert headers.get("retry-after") == said


def test_a_refusal_of_http_has_its_own_status_and_a_move_its_place() -> None:
    line, headers, body = read(error_response(HttpRefused(431, "the head is too large")))
    assert (line, headers) == ("HTTP/1.1 431 Request Header Fields Too Large", {})
    assert body["error"]["code"] == "invalid_request"
    line, headers, body = read(error_response(Moved(b"/v1/models/", b"/v1/models")))
    assert line == "HTTP/1.1 307 Temporary Redirect"
    assert headers == {"location": "/v1/models"}
    assert body["error"]["message"] == "/v1/models/ is /v1/models here"


def test_who_waits_for_a_supervisor_that_is_away_comes_back_in_ten_seconds() -> None:
    _, headers, body = read(error_response(problems.supervisor_lost("alpha")))
    assert headers == {"retry-after": "10"}
    assert body["error"]["code"] == "supervisor_unreachable"
    assert '"alpha"' in body["error"]["message"]
    assert "systemctl status llmux" in body["error"]["message"]


@pytest.mark.parametrize("code", [*TOLD, "of_a_newer_supervisor"])
def test_a_supervisors_code_is_a_reason_or_our_own_fault(code: str) -> None:
    assert str(problems.reason_of(code)) == (code if code in TOLD else "internal_error")


# ---- whole refusals ------------------------------------------------------------------------------


def incoming(path: bytes, *headers: tuple[bytes, bytes], method: bytes = b"POST") -> Incoming:
    made = Incoming()
    made.method, made.target = method, path
    made.headers = [(b"host", b"h"), (b"x-request-id", b"r1"), *headers]
    made.read_head("1.1", HeadReader())
    made.find_route()
    return made


PAGE = (b"origin", b"https://page.example")


@pytest.mark.parametrize(
    ("path", "anthropic"),
    [(b"/v1/messages", True), (b"/upstream/a/v1/messages?x=1", True), (b"/v1/completions", False),
     (b"/nothing", False)],
)  # fmt: skip
def test_a_refusal_is_in_the_shape_of_its_path(path: bytes, anthropic: bool) -> None:
    problem = Refused(Reason.BAD_REQUEST, "no")
    _, headers, body = read(refusal(incoming(path), problem, None, close=False))
    assert headers == {"x-request-id": "r1"}
    assert (body.get("type") == "error") is anthropic
    whole = refusal(incoming(path, method=b"HEAD"), problem, None, close=True)
    assert whole.endswith(b"connection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("origins", "told"),
    [((), None), (("https://page.example",), "https://page.example"), (("*",), "*"),
     (("https://page.example", "*"), "*"), (("https://other.example",), None)],
)  # fmt: skip
def test_only_a_page_that_may_reads_a_refusal(origins: tuple[str, ...], told: str | None) -> None:
    problem = Refused(Reason.BAD_REQUEST, "no")
    cors = Cors(origins)
    _, headers, _ = read(refusal(incoming(b"/v1/completions", PAGE), problem, cors, close=False))
    assert headers.get("access-control-allow-origin") == told
    assert headers.get("access-control-expose-headers") == (EXPOSED.decode() if told else None)
    assert headers.get("vary") == ("origin" if told else None)
    _, headers, _ = read(refusal(incoming(b"/v1/completions"), problem, cors, close=False))
    assert headers == {"x-request-id": "r1"}


# ---- lists of models -----------------------------------------------------------------------------


def test_models_are_listed_with_their_adapters_below_them() -> None:
    infos = [
        ModelInfo("alpha", "serving", aliases=["a"], adapters=["poet"], created=7,
                  max_model_len=4096),
        ModelInfo("beta", "stopped", stale=True),
    ]  # fmt: skip
    own = {"object": "model", "owned_by": "llmux"}
    alpha = own | {"created": 7, "root": "alpha", "state": "serving", "max_model_len": 4096}
    beta = own | {"id": "beta", "created": infos[1].created, "root": "beta", "state": "stopped"}
    assert openai.model_list(infos) == {
        "object": "list",
        "data": [
            alpha | {"id": "alpha", "aliases": ["a"]},
            alpha | {"id": "poet", "parent": "alpha", "aliases": []},
            beta | {"aliases": [], "stale": True},
        ],
    }
    assert openai.model_object(infos[0], called="a") == alpha | {"id": "a", "aliases": ["a"]}

"""What becomes of an error in a route of our own: whose fault it is said to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sanic.exceptions import MethodNotAllowed, NotFound, SanicException, ServerError

from llmux.errors import Reason, Refused
from llmux.gateway.control.app import _problem
from llmux.gateway.exchange.keep_alive import KeepAlive

REFUSED = Refused(Reason.FORBIDDEN, "no")


def request(path: str, method: str = "GET") -> Any:
    return SimpleNamespace(method=method, path=path, raw_url=path.encode() + b"?x=1", headers={})


@pytest.mark.parametrize(
    ("error", "path", "reason", "said"),
    [
        (REFUSED, "/x", Reason.FORBIDDEN, "no"),
        (NotFound("gone"), "/x", Reason.NOT_FOUND, "there is no GET /x"),
        (SanicException("odd", status_code=400), "/x", Reason.BAD_REQUEST, "odd"),
        (SanicException("odd", status_code=499), "/x", Reason.BAD_REQUEST, "odd"),
        (SanicException("secret", status_code=500), "/x", Reason.INTERNAL, "internal error"),
        (ServerError("secret"), "/x", Reason.INTERNAL, "internal error"),
        (ValueError("secret"), "/x", Reason.INTERNAL, "internal error"),
        (
            MethodNotAllowed("no", "GET", ["POST", "HEAD"]),
            "/x",
            Reason.METHOD_NOT_ALLOWED,
            "cannot GET /x: only HEAD, POST allowed",
        ),
        (
            MethodNotAllowed("no", "GET", []),
            "/control/eviction",
            Reason.METHOD_NOT_ALLOWED,
            "cannot GET /control/eviction: only GET, POST allowed",
        ),
        (
            MethodNotAllowed("no", "GET", []),
            "/x",
            Reason.METHOD_NOT_ALLOWED,
            "cannot GET /x: only other methods allowed",
        ),
        (
            NotFound("gone"),
            "/v1/completions",
            Reason.METHOD_NOT_ALLOWED,
            "cannot GET /v1/completions: only POST is allowed",
        ),
    ],
    ids=str,
)
def test_an_error_is_the_clients_or_ours_and_ours_is_told_to_the_journal_alone(
    error: Exception, path: str, reason: Reason, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = _problem(request(path), error)
    assert problem.reason is reason
    assert str(problem).startswith(said)
    assert "secret" not in str(problem)
    assert (f"internal error: GET {path}" in caplog.messages) is (reason is Reason.INTERNAL)
    assert problem.fields.get("allow") == (
        said.partition("only ")[2]
        .removesuffix(" allowed")
        .removesuffix(" is")
        .replace("other methods", "")
        if reason is Reason.METHOD_NOT_ALLOWED
        else None
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": {"message": 7}}', "7"),
        (b'{"error": {}}', None),
        (b'{"error": "odd"}', None),
        (b'{"error": null}', None),
        (b"{}", None),
        (b"[]", None),
        (b"7", None),
        (b"not JSON", None),
        (b"\xff", None),
        (b"", None),
        (b"[" * 100_000, None),
    ],
    ids=range(12),
)
def test_whatever_an_engine_refuses_with_after_a_comment_is_told(
    body: bytes, said: str | None
) -> None:
    expected = f"the engine answered: {body[:500].decode('utf-8', 'replace')}"
    keep_alive = KeepAlive("alpha", 1.0, anthropic=False)
    keep_alive.error = bytearray()
    for at in range(0, len(body), 1000):
        keep_alive.collect(body[at : at + 1000])
    problem = keep_alive.problem()
    assert (problem.reason, str(problem)) == (Reason.BAD_REQUEST, said or expected)

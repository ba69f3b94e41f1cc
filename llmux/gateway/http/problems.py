"""The one table from reasons to HTTP: status, headers and OpenAI's error object.

``llmux.cli.main`` has the other mapping of reasons (to exit codes); there is no third.
"""

from __future__ import annotations

import json
import math
from typing import Any

from llmux.errors import Reason, Refused

# reason → (HTTP status, OpenAI's error type). 503: retry later; 502: engine failure; 504: timeout.
PROBLEMS: dict[Reason, tuple[int, str]] = {
    Reason.UNKNOWN_MODEL: (404, "invalid_request_error"),
    Reason.BAD_REQUEST: (400, "invalid_request_error"),
    Reason.WAIT_EXPIRED: (504, "timeout_error"),
    Reason.START_FAILED: (503, "server_error"),
    Reason.BACKING_OFF: (503, "server_error"),
    Reason.ENGINE_DIED: (502, "server_error"),
    Reason.ENGINE_UNREACHABLE: (502, "server_error"),
    Reason.MALFORMED_ANSWER: (502, "server_error"),
    Reason.CUT_BY_SWITCH: (503, "server_error"),
    Reason.MANUAL_MODE: (503, "server_error"),
    Reason.CANCELLED: (409, "invalid_request_error"),
    Reason.PINNED: (409, "invalid_request_error"),
    Reason.SHUTTING_DOWN: (503, "server_error"),
    Reason.CANNOT_FIT: (503, "server_error"),
    Reason.ALREADY_RUNNING: (409, "invalid_request_error"),
    Reason.QUEUE_FULL: (503, "server_error"),
    Reason.OVERLOADED: (429, "rate_limit_error"),
    Reason.BODY_TOO_LARGE: (413, "invalid_request_error"),
    Reason.UNSUPPORTED_ENCODING: (415, "invalid_request_error"),
    Reason.NO_KEY: (401, "authentication_error"),
    Reason.FORBIDDEN: (403, "permission_error"),
    Reason.RATE_LIMITED: (429, "rate_limit_error"),
    Reason.SUPERVISOR_UNREACHABLE: (503, "server_error"),
    Reason.NOT_FOUND: (404, "invalid_request_error"),
    Reason.METHOD_NOT_ALLOWED: (405, "invalid_request_error"),
    Reason.INTERNAL: (500, "server_error"),
}

# Sent when the refusal names no time: a client without a Retry-After retries at once, which makes
# an overload worse.
DEFAULT_RETRY_AFTER = 1.0
AWAY_RETRY_SECS = 10.0  # while the supervisor is away
MAX_RETRY_AFTER = 86400.0  # more is no time that a client waits

STATUS_LINES: dict[int, bytes] = {
    307: b"307 Temporary Redirect",
    400: b"400 Bad Request",
    401: b"401 Unauthorized",
    403: b"403 Forbidden",
    404: b"404 Not Found",
    405: b"405 Method Not Allowed",
    408: b"408 Request Timeout",
    409: b"409 Conflict",
    413: b"413 Content Too Large",
    415: b"415 Unsupported Media Type",
    429: b"429 Too Many Requests",
    431: b"431 Request Header Fields Too Large",
    500: b"500 Internal Server Error",
    502: b"502 Bad Gateway",
    503: b"503 Service Unavailable",
    504: b"504 Gateway Timeout",
}


CHALLENGE = b'www-authenticate: Bearer realm="llmux"\r\n'


class HttpRefused(Refused):
    """A refusal at the HTTP level (a malformed or oversized head), with its own status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(Reason.BAD_REQUEST, message)
        self.status = status


class Moved(HttpRefused):
    """The path has one "/" too many at its end. As the engine says it: FastAPI answers 307, which
    clients of OpenAI and Anthropic follow."""

    def __init__(self, target: bytes, location: bytes) -> None:
        super().__init__(307, f"{target[:200].decode()} is {location[:200].decode()} here")
        self.location = location


def unsupported_encoding(encoding: bytes) -> Refused:
    return Refused(
        Reason.UNSUPPORTED_ENCODING,
        f"cannot read a request body with content-encoding {encoding[:100].decode('latin-1')!r}",
        hint="send it as it is, without content-encoding",
    )


def too_large(limit: int) -> Refused:
    return Refused(
        Reason.BODY_TOO_LARGE,
        f"the request body is larger than {limit} bytes, the limit for this path",
        hint="gateway.max_body_bytes is the limit for inference",
    )


def supervisor_lost(model: str) -> Refused:
    return Refused(
        Reason.SUPERVISOR_UNREACHABLE,
        f'cannot wait for model "{model}": the supervisor that wakes models is away',
        hint="systemctl status llmux",
        retry_after=AWAY_RETRY_SECS,
    )


def reason_of(code: str) -> Reason:
    """The Reason of a code from the supervisor, which may be newer and have codes unknown here."""
    try:
        return Reason(code)
    except ValueError:
        return Reason.INTERNAL


def status_of(problem: Refused) -> int:
    if isinstance(problem, HttpRefused):
        return problem.status
    return PROBLEMS[problem.reason][0]


def retry_after_of(problem: Refused) -> int | None:
    """Whole seconds for Retry-After, of 1 to a day; None when a retry cannot succeed."""
    if problem.retry_after is None and status_of(problem) not in (429, 503):
        return None
    seconds = DEFAULT_RETRY_AFTER if problem.retry_after is None else problem.retry_after
    return max(1, math.ceil(min(seconds, MAX_RETRY_AFTER)))


# Anthropic's error types by status; any other status is an "api_error".
ANTHROPIC_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_object(problem: Refused, *, anthropic: bool = False) -> dict[str, Any]:
    """OpenAI's ``{"error": {"message", "type", "param", "code"}}``, or Anthropic's shape."""
    if anthropic:
        kind = ANTHROPIC_TYPES.get(status_of(problem), "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(problem)}}
    return {
        "error": {
            "message": str(problem),
            "type": PROBLEMS[problem.reason][1],
            "param": problem.fields.get("param"),
            "code": str(problem.reason),
        }
    }


def error_body(problem: Refused, *, anthropic: bool = False) -> bytes:
    return json.dumps(error_object(problem, anthropic=anthropic)).encode()


def error_response(
    problem: Refused, *, extra: bytes = b"", close: bool = False, anthropic: bool = False
) -> bytes:
    """A complete HTTP/1.1 response; ``extra`` are header lines, each with its CRLF."""
    body = error_body(problem, anthropic=anthropic)
    retry_after = retry_after_of(problem)
    status = status_of(problem)
    return b"".join(
        (
            b"HTTP/1.1 ",
            STATUS_LINES[status],
            b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body),
            b"retry-after: %d\r\n" % retry_after if retry_after is not None else b"",
            CHALLENGE if problem.reason is Reason.NO_KEY else b"",
            b"accept-encoding: identity\r\n" if status == 415 else b"",
            b"location: %b\r\n" % problem.location if isinstance(problem, Moved) else b"",
            extra,
            b"connection: close\r\n\r\n" if close else b"\r\n",
            body,
        )
    )


def error_event(problem: Refused, *, anthropic: bool = False) -> bytes:
    """The error as a server-sent event. The leading blank line ends an event that was cut short."""
    name = b"event: error\n" if anthropic else b""
    return b"\n\n" + name + b"data: " + error_body(problem, anthropic=anthropic) + b"\n\n"

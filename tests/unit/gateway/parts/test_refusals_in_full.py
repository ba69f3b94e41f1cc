"""Each refusal in full: its reason, what it says with the next step, and when to come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.errors import Reason, Refused
from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.admission.keys import OPEN_PATHS, Guard, begin_use, check_role
from llmux.gateway.admission.queue import Ticket
from llmux.gateway.http import openai, problems
from llmux.gateway.http.budget import BodyBudget
from llmux.gateway.link import LinkDownError
from llmux.gateway.ui.rows import head, row
from llmux.protocol import Address

LISTS = "GET /v1/models lists the models"
BOUND = Key("k", hash_key("s"), models=frozenset({"m"}))


def admission(lease: bool, **more: Any) -> Admission[Ticket]:
    made: Admission[Ticket] = Admission(
        clock=lambda: 0.0, max_waiting=0, wait_secs=1.0, max_in_flight=0, models=("m",)
    )
    if lease:
        made.grant("m", "e", Address(port=1))
    return made


def submits(made: Admission[Ticket], model: str = "m") -> Callable[[], Any]:
    return lambda: made.submit(Ticket(model, 0.0, 1.0))


def closed() -> Admission[Ticket]:
    made = admission(lease=False)
    made.close()
    return made


def use(key: Key = BOUND) -> KeyUse:
    return KeyUse(key, 1, lambda: 0.0)


def identified(secret: bytes) -> Callable[[], Any]:
    guard = Guard(lambda: (BOUND,), workers=1, clock=lambda: 0.0)
    return lambda: guard.identify(b"/metrics", secret, None)


def given(problem: Refused) -> Callable[[], Any]:
    def say() -> None:
        raise problem

    return say


@pytest.mark.parametrize(
    ("refuse", "reason", "text", "hint", "param", "retry_after"),
    [
        (submits(admission(True), "x"), Reason.UNKNOWN_MODEL, 'the model "x" does not exist',
         LISTS, "model", None),
        (submits(closed()), Reason.SHUTTING_DOWN,
         'cannot wait for model "m": the gateway is shutting down', None, None, None),
        (submits(admission(True)), Reason.OVERLOADED,
         'cannot accept a request for model "m": 0 are in flight and 0 are waiting',
         "try again later", None, None),
        (submits(admission(False)), Reason.QUEUE_FULL,
         'cannot wait for model "m": 0 requests are waiting for it',
         "try again later, or raise gateway.max_waiting", None, None),
        (given(openai.no_model("missing")), Reason.BAD_REQUEST,
         'cannot determine the model: "model" is missing', LISTS, "model", None),
        (given(openai.unknown_model("x" * 300)), Reason.UNKNOWN_MODEL,
         f'the model "{"x" * 200}" does not exist', LISTS, "model", None),
        (given(problems.too_large(7)), Reason.BODY_TOO_LARGE,
         "the request body is larger than 7 bytes, the limit for this path",
         "gateway.max_body_bytes is the limit for inference", None, None),
        (given(problems.unsupported_encoding(b"gz\xff" + b"i" * 100)),
         Reason.UNSUPPORTED_ENCODING,
         f"cannot read a request body with content-encoding 'gz\xff{'i' * 97}'",
         "send it as it is, without content-encoding", None, None),
        (given(problems.supervisor_lost("m")), Reason.SUPERVISOR_UNREACHABLE,
         'cannot wait for model "m": the supervisor that wakes models is away',
         "systemctl status llmux", None, problems.AWAY_RETRY_SECS),
        (given(BodyBudget(8).exceeded()), Reason.QUEUE_FULL,
         "cannot receive the request body: 0 bytes of other requests are held",
         "try again later; the limit is gateway.max_buffered_bytes", None, 1.0),
        (given(LinkDownError("it is away")), Reason.SUPERVISOR_UNREACHABLE, "it is away",
         "systemctl status llmux", None, 1.0),
        (lambda: begin_use(use(), "x"), Reason.UNKNOWN_MODEL,
         'the model "x" does not exist or this API key may not use it', LISTS, "model", None),
        (identified(b""), Reason.NO_KEY, "an API key is required",
         "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`", None, None),
        (identified(b"x"), Reason.NO_KEY, "this API key is not valid",
         "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`", None, None),
        (lambda: check_role(use(), b"/metrics"), Reason.FORBIDDEN,
         "this API key may only use models, not control llmux", None, None, None),
        (lambda: use(Key("k", b"", max_in_flight=0)).begin(), Reason.RATE_LIMITED,
         "this key is limited to 0 concurrent requests", None, None, None),
        (lambda: use(Key("k", b"", max_waiting=0)).wait(), Reason.RATE_LIMITED,
         "this key is limited to 0 waiting requests", None, None, None),
    ],
    ids=range(17),
)  # fmt: skip
def test_a_refusal_says_all_there_is_to_say(
    refuse: Callable[[], Any],
    reason: Reason,
    text: str,
    hint: str | None,
    param: str | None,
    retry_after: float | None,
) -> None:
    with pytest.raises(Refused) as caught:
        refuse()
    problem = caught.value
    assert (problem.reason, problem.message, problem.hint) == (reason, text, hint)
    assert (problem.fields.get("param"), problem.retry_after) == (param, retry_after)
    assert str(problem) == (f"{text} ({hint})" if hint else text)


def test_liveness_needs_no_key() -> None:
    guard = Guard(lambda: (BOUND,), workers=1, clock=lambda: 0.0)
    assert {b"/health", b"/health/live", b"/health/ready"} == OPEN_PATHS
    for path in OPEN_PATHS:
        assert guard.identify(path, b"", None) is None
    for path in (b"/v1/x", b"/health", b"/health/weights", b"/models"):
        check_role(use(), path)


@pytest.mark.parametrize("name", ["gpu_bytes", "ram_bytes", "used_bytes", "engines_bytes"])
@pytest.mark.parametrize(("more", "kept"), [(1, True), ((64 << 20) - 1, True), (64 << 20, False)])
def test_memory_that_changes_a_little_is_no_change(name: str, more: int, kept: bool) -> None:
    former = 1 << 33
    assert row({name: former + more}, 0.0, {name: former})[name] == former + (0 if kept else more)
    assert row({name: former - more}, 0.0, {name: former})[name] == former - (0 if kept else more)
    assert row({name: 0}, 0.0, {name: 5})[name] == 0, "none is none"
    assert row({"other": former + more}, 0.0, {"other": former})["other"] == former + more


@pytest.mark.parametrize(
    ("field", "name", "sign"),
    [("since_secs", "since", -1), ("oldest_wait_secs", "oldest_since", -1),
     ("idle_secs", "idle_since", -1), ("phase_secs", "phase_since", -1),
     ("retry_in_secs", "retry_at", 1), ("wait_at_most_secs", "wait_until", 1),
     ("left_secs", "done_at", 1), ("pinned_secs", "pinned_until", 1)],
)  # fmt: skip
def test_each_age_is_a_point_in_time(field: str, name: str, sign: int) -> None:
    at = 1000.0 + sign * 7.26
    assert row({field: 7.26}, 1000.0, None) == {name: round(at, 1)}
    assert row({field: 7.0}, 1000.0, {name: 1000.0 + sign * 7 + 0.74}) == {
        name: 1000.0 + sign * 7 + 0.74
    }
    assert row({field: 7.0}, 1000.0, {name: 1000.0 + sign * 7 + 0.76}) == {name: 1000.0 + sign * 7}
    assert row({field: None}, 1000.0, {name: 5.0}) == {name: None}
    assert row({field: 0}, 1000.0, None) == {name: None if field == "idle_secs" else 1000}


def test_the_head_is_all_but_the_models() -> None:
    status = {
        "models": {}, "generation": 7, "mode": "auto", "gpus": [{"index": 1, "used_bytes": 10}],
        "orders": [{"id": 3, "left_secs": 1.0}, {"id": 4, "left_secs": 2.0}],
    }  # fmt: skip
    former = {"gpus": [{"index": 1, "used_bytes": 9}], "orders": [{"id": 4, "done_at": 102.5}]}
    assert head(status, 100.0, former) == {
        "mode": "auto", "gpus": [{"index": 1, "used_bytes": 9}],
        "orders": [{"id": 3, "done_at": 101.0}, {"id": 4, "done_at": 102.5}],
    }  # fmt: skip
    assert head({"gpus": None}, 0.0, {}) == {"gpus": None}

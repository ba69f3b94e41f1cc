"""Which requests the journal hears of, how often, and in which words."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway.journal import BURST, BURST_SECS, RequestLog, on_loop_error


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> RequestLog:
    caplog.set_level(logging.DEBUG, "llmux")
    return RequestLog(clock, {"alpha"})


def fields(record: logging.LogRecord) -> tuple[object, ...]:
    known = record.__dict__
    return (known["request"], known["model"], known["reason"])


DIED = Refused(Reason.ENGINE_DIED, 'cannot get an answer from model "alpha": it died')


def test_a_line_says_which_request_which_model_and_why(
    log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.refused(DIED, request=b"req-1", model="alpha")
    log.broken(DIED, request=b"req-2", model="alpha")
    log.again(DIED, request=b"req-3", model="alpha")
    assert [fields(record) for record in caplog.records] == [
        (f"req-{number}", "alpha", "engine_died") for number in (1, 2, 3)
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert caplog.messages[0] == (
        'request refused with 502, engine_died: cannot get an answer from model "alpha": it died'
    )


@pytest.mark.parametrize(
    ("reason", "level"),
    [
        (Reason.BAD_REQUEST, logging.DEBUG),
        (Reason.NO_KEY, logging.DEBUG),
        (Reason.UNKNOWN_MODEL, logging.DEBUG),
        (Reason.RATE_LIMITED, logging.INFO),
        (Reason.OVERLOADED, logging.INFO),
        (Reason.QUEUE_FULL, logging.INFO),
        (Reason.SHUTTING_DOWN, logging.INFO),
        (Reason.WAIT_EXPIRED, logging.WARNING),
        (Reason.START_FAILED, logging.WARNING),
        (Reason.INTERNAL, logging.WARNING),
    ],
)
def test_how_loud(
    reason: Reason, level: int, log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.refused(Refused(reason, "x"), request=b"r", model="alpha")
    assert [record.levelno for record in caplog.records] == [level]


def test_nothing_that_a_client_wrote_is_repeated(
    log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in (Reason.BAD_REQUEST, Reason.UNKNOWN_MODEL):
        log.refused(Refused(reason, "a secret prompt"), request=b"r", model="a secret name")
        log.broken(Refused(reason, "a secret prompt"), request=b"r", model="a secret name")
    assert len(caplog.records) == 4
    assert "secret" not in caplog.text
    assert {record.__dict__["model"] for record in caplog.records} == {None}


@pytest.mark.parametrize(
    "reason", [Reason.RATE_LIMITED, Reason.OVERLOADED, Reason.QUEUE_FULL, Reason.WAIT_EXPIRED]
)
def test_what_ran_into_a_limit_says_which(
    reason: Reason, log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.refused(Refused(reason, "the limit is 7"), request=b"r", model="alpha")
    assert caplog.messages[0].endswith(f"{reason}: the limit is 7")


def test_an_engines_last_lines_are_left_to_the_supervisors_line(
    log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.refused(Refused(Reason.START_FAILED, "it failed\nline\nline"), request=b"r", model="alpha")
    assert caplog.messages == ["request refused with 503, model_start_failed: it failed"]


def test_a_crowd_of_one_kind_is_counted_and_not_listed(
    log: RequestLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(BURST + 7):
        log.refused(DIED, request=b"r", model="alpha")
    assert len(caplog.records) == BURST
    log.refused(Refused(Reason.QUEUE_FULL, "full"), request=b"r", model="alpha")
    log.refused(DIED, request=b"r", model="beta")
    assert len(caplog.records) == BURST + 2, "other kinds are heard all the same"
    clock.now += BURST_SECS
    log.refused(DIED, request=b"r", model="alpha")
    assert caplog.messages[-1].endswith("it died (7 more since the last such line)")
    log.refused(DIED, request=b"r", model="alpha")
    assert caplog.messages[-1].endswith("it died")


def test_an_error_nobody_caught_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    exchange = SimpleNamespace(request_id=b"req-9", model="alpha")
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        error = RuntimeError("boom")
        for protocol in (SimpleNamespace(exchange=exchange), SimpleNamespace(sink=exchange)):
            context = {"message": "call failed", "exception": error, "protocol": protocol}
            on_loop_error(loop, context)
        on_loop_error(loop, {"message": "of nobody's"})
    first, second, third = caplog.records
    for record in (first, second):
        assert (record.__dict__["request"], record.__dict__["model"]) == ("req-9", "alpha")
        assert record.exc_info is not None and record.exc_info[1] is error
    assert third.name == "asyncio"

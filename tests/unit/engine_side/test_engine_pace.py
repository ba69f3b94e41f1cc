"""When an engine is asked again: on a loop whose time goes on by itself, of one in memory."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from llmux.drivers.engine.vllm import VllmEngine
from llmux.errors import DriverError, DriverTimeout, EngineUnhealthy
from llmux.protocol import Address

Answer = Callable[[str], bytes | None]
ADDRESS = Address(uds="/no/such/directory/s")
TAKES = 1 / 512  # seconds, an answer


def reply(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


SLEEPING, AWAKE = (reply(200, b'{"is_sleeping": %s}' % word) for word in (b"true", b"false"))


class Connection(asyncio.Transport):
    """Answers what is written; None is no answer."""

    def __init__(self, loop: Paced, protocol: asyncio.BaseProtocol, answer: Answer) -> None:
        super().__init__()
        self._loop, self._protocol, self._answer = loop, protocol, answer
        self._ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        method, path = bytes(data).split()[:2]
        self._loop.asked.append((self._loop.time(), f"{method.decode()} {path.decode()}"))
        if (answer := self._answer(path.decode())) is not None:
            self._loop.call_later(TAKES, self._hear, answer)

    def _hear(self, answer: bytes) -> None:
        if not self._ended:
            self._protocol.data_received(answer)  # type: ignore[attr-defined]

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self._ended


class Jump(selectors.SelectSelector):
    """Waits for nothing: where nothing is ready, the time that it would have waited is over."""

    passed = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.passed += timeout
        return ready


class Paced(asyncio.SelectorEventLoop):
    """``asked``: when, and for what. Without an ``answer`` no socket is there."""

    def __init__(self, answer: Answer | None) -> None:
        self._jump, self._answer = Jump(), answer
        self.asked: list[tuple[float, str]] = []
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.passed

    async def create_unix_connection(  # type: ignore[override]
        self, factory: Any, path: Any = None, **_: Any
    ) -> Any:
        assert path == ADDRESS.uds
        if self._answer is None:
            self.asked.append((self.time(), "nothing"))
            raise FileNotFoundError("no such socket")
        protocol = factory()
        transport = Connection(self, protocol, self._answer)
        protocol.connection_made(transport)
        return transport, protocol


Asked = list[tuple[float, str]]
Paces = Callable[[Answer | None, Coroutine[Any, Any, Any]], tuple[Asked, DriverError | None]]


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch) -> Paces:
    """What was asked when, and how it ended."""

    def run(
        answer: Answer | None, work: Coroutine[Any, Any, Any]
    ) -> tuple[Asked, DriverError | None]:
        loop = Paced(answer)
        failure = None
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", loop.time)
            try:
                loop.run_until_complete(work)
            except DriverError as error:
                failure = error
            finally:
                loop.close()
        return loop.asked, failure

    return run


def test_an_engine_that_starts_is_asked_ever_less_often_and_four_times_a_second(
    paces: Paces,
) -> None:
    for answer in (None, lambda _: reply(503, b"loading")):
        asked, failure = paces(answer, VllmEngine().wait_healthy(ADDRESS, 60))
        assert isinstance(failure, DriverTimeout)
        last = "no such socket" if answer is None else "503 loading"
        assert str(failure).endswith(f"/health did not say 200 within 60s (last: {last})")
        times = [when for when, _ in asked]
        pauses = [after - before for before, after in pairwise(times)]
        assert pauses[0] < 0.01, "one that is about to listen is not waited for"
        # Clocks are floats.
        assert pauses[:10] == sorted(pauses[:10])
        assert pauses[1] == pytest.approx(1.5 * pauses[0], rel=0.2)
        assert all(pause == pytest.approx(0.25, abs=0.003) for pause in pauses[12:-1])
        assert 59.75 <= times[-1] < 60


def test_a_probe_has_five_seconds_and_the_wait_its_own_end(paces: Paces) -> None:
    asked, failure = paces(lambda _: None, VllmEngine().wait_healthy(ADDRESS, 12))
    assert [round(when, 1) for when, _ in asked] == [0, 5, 10]
    assert str(failure).endswith("(last: no answer within 1.9875s)"), "the last that it had"
    # A hang after an answer is news; one that the wait's end cuts short is none.
    for answers, deadline, last in (
        ([reply(503, b"busy"), None], 5.01, "no answer within 5s"),
        ([reply(503, b"busy"), None], 4, "503 busy"),
    ):
        asked, failure = paces(
            lambda _, left=answers: left.pop(0),  # type: ignore[misc]
            VllmEngine().wait_healthy(ADDRESS, deadline),
        )
        assert f"(last: {last})" in str(failure)
        assert answers == []
    asked, failure = paces(None, VllmEngine().wait_healthy(ADDRESS, 0))
    assert asked == []
    assert str(failure).endswith("within 0s (last: no process listens)")


def test_an_order_that_failed_is_given_twice_more(paces: Paces) -> None:
    orders = VllmEngine().reload_weights(ADDRESS, 20)
    asked, failure = paces(lambda _: reply(503, b"busy"), orders)
    assert {what for _, what in asked} == {"POST /collective_rpc"}
    assert [round(when, 2) for when, _ in asked] == [0, 0.5, 1.5]
    assert isinstance(failure, EngineUnhealthy)
    for deadline, times in ((0.4, 1), (0.5, 1), (0.6, 2), (1.5, 2), (1.6, 3)):
        asked, failure = paces(None, VllmEngine().reload_weights(ADDRESS, deadline))
        assert len(asked) == times, "not where its pause would end too late"
        assert isinstance(failure, EngineUnhealthy) and "no such socket" in str(failure)


@pytest.mark.parametrize("want", [True, False])
def test_until_it_sleeps_or_wakes_it_is_asked_ever_less_often(paces: Paces, want: bool) -> None:
    def order(deadline: float) -> Coroutine[Any, Any, None]:
        if want:
            return VllmEngine().sleep(ADDRESS, 1, deadline)
        return VllmEngine().wake(ADDRESS, (), deadline)

    contrary = AWAKE if want else SLEEPING
    asked, failure = paces(lambda path: contrary if "is_" in path else reply(200), order(30))
    state = "awake" if want else "asleep"
    assert isinstance(failure, DriverTimeout)
    assert str(failure).endswith(f"still {state} after 30s")
    times = [when for when, what in asked if what == "GET /is_sleeping"]
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses[0] < 0.01
    assert pauses[1] == pytest.approx(2 * pauses[0], rel=0.2)
    assert all(pause == pytest.approx(0.25, abs=0.003) for pause in pauses[8:-1])
    assert 100 < len(times) < 140
    asked, failure = paces(lambda path: reply(404 if "is_" in path else 200), order(30))
    assert failure is None, "one that cannot say is believed"
    assert len(asked) == 2


@pytest.mark.parametrize("silent", ["is_sleeping", "/"])
def test_one_that_never_says_whether_it_sleeps_is_not_called_awake(
    paces: Paces, silent: str
) -> None:
    asked, failure = paces(
        lambda path: None if silent in path else reply(200), VllmEngine().sleep(ADDRESS, 1, 7)
    )
    assert isinstance(failure, DriverTimeout)
    assert "was not answered within 7s" in str(failure)
    assert "still" not in str(failure)
    assert len(asked) == (1 if silent == "/" else 2)


def test_a_refusal_of_one_field_is_what_it_says(paces: Paces) -> None:
    """Asked again without the field only where the engine names it, and refuses because of it."""
    for status, words, paths in (
        (400, b"logprobs are off", ["/v1/completions"] * 2),
        (400, b"no such task", ["/v1/completions", "/v1/chat/completions"]),
        (500, b"logprobs broke", ["/v1/completions"]),
    ):
        asked, failure = paces(
            lambda path, status=status, words=words: (  # type: ignore[misc]
                reply(status, words) if path == "/v1/completions" else reply(500)
            ),
            VllmEngine().canary(ADDRESS, "m", 5),
        )
        assert [what.split()[1] for _, what in asked][: len(paths)] == paths
        assert isinstance(failure, EngineUnhealthy)
        assert len(asked) == len(paths) + (status == 400 and len(set(paths)) == 1)


CALLS: list[Callable[[VllmEngine, Address], Coroutine[Any, Any, Any]]] = [
    lambda engine, at: engine.healthy(at, 5),
    lambda engine, at: engine.wait_healthy(at, 5),
    lambda engine, at: engine.sleeping(at, 5),
    lambda engine, at: engine.vitals(at, 5),
    lambda engine, at: engine.describe(at, 5),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_of_ours_is_not_laid_on_the_engine(
    call: Callable[[VllmEngine, Address], Coroutine[Any, Any, Any]],
) -> None:
    with pytest.raises(OverflowError):
        asyncio.run(call(VllmEngine(), Address(port=70_000)))

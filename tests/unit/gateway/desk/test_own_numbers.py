"""A worker's own numbers, those of all on one page, and the headers of its own answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_desk import Desk, FakePool, a_request, answers, body_of, in_a_loop

from llmux import metrics as m
from llmux.errors import Reason, Refused
from llmux.gateway.control import app as app_module
from llmux.gateway.control.app import _Headers
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.engine.request import Delivery
from llmux.gateway.engine_series import MAX_BYTES
from llmux.gateway.observer import UNKNOWN, Observer
from llmux.metrics import Store
from llmux.protocol import Revoke

# ---- numbers -------------------------------------------------------------------------------------


def numbers(snapshot: dict[str, Any], name: str) -> dict[tuple[str, ...], Any]:
    return {tuple(labels): value for labels, value in snapshot.get(name, [])}


@in_a_loop
async def test_a_worker_counts_what_it_did_and_has(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    for _ in range(3):
        desk.asks()
    desk.asks(desk.incoming(b'{"model":"beta"}'))
    worker = desk.worker
    next(queue for queue in worker.admission.queues() if queue.model == "alpha").progress = 11
    observer = worker.observer
    for number, counter in enumerate((observer.broken, observer.abandoned, observer.retried), 1):
        counter["alpha"] += number
    observer.answered("alpha", 200)
    observer.answered("alpha", 200)
    observer.answered("gamma", 404)
    observer.times_of("alpha").durations.observe(2.0)
    observer.times_of("alpha").first_tokens.observe(3.0)
    observer.times_of("gamma").durations.observe(9.0)
    worker.clients, desk.link.connects = 4, 5
    snapshot = desk.page.snapshot()

    def both(alpha: float, beta: float = 0) -> dict[tuple[str, ...], float]:
        return {("alpha",): alpha, ("beta",): beta}

    assert numbers(snapshot, m.IN_FLIGHT) == both(3)
    assert numbers(snapshot, m.QUEUE_DEPTH) == both(0, 1)
    assert numbers(snapshot, m.CHUNKS) == both(11)
    assert numbers(snapshot, m.BROKEN) == both(1)
    assert numbers(snapshot, m.ABANDONED) == both(2)
    assert numbers(snapshot, m.RETRIED) == both(3)
    assert numbers(snapshot, m.REQUESTS) == {("alpha", "200"): 2, ("", "404"): 1}
    assert {key: sum(value[0]) for key, value in numbers(snapshot, m.QUEUE_WAIT).items()} == {
        ("alpha",): 3
    }
    sums = [(m.REQUEST_SECONDS, 2.0), (m.FIRST_TOKEN, 3.0), (m.QUEUE_WAIT, 0.0)]
    for name, total in sums:
        assert {key: value[1] for key, value in numbers(snapshot, name).items()} == {
            ("alpha",): total
        }
    assert numbers(snapshot, m.CONNECTIONS) == {(): 4}
    assert numbers(snapshot, m.WORKERS) == {(): 1}
    assert numbers(snapshot, m.RECONNECTS) == {(): 5}
    assert numbers(snapshot, "process_open_fds")[()] > 0


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        ("", 1.0),
        ("10", 1.0),
        ("1", 0.5),
        ("0.5", 0.25),
        ("0", 1.0),
        ("-3", 1.0),
        ("x", 1.0),
        ("nan", 1.0),
    ],
)
@in_a_loop
async def test_a_page_of_numbers_has_those_of_all(
    timeout: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    other, supervisor = Store(), Store()
    other.set(m.WORKERS, value=1)
    supervisor.set(m.MAX_WAIT, value=15.0)
    desk.link.answer = lambda _verb, _args: {"w2": other.snapshot(), "": supervisor.snapshot()}
    text, kind = await desk.page.scrape("", timeout)
    lines = text.decode().splitlines()
    assert kind.startswith("text/plain")
    for line in (
        "llmux_gateway_workers 2.0", "llmux_max_wait_seconds 15.0", "llmux_supervisor_up 1.0",
        "llmux_supervisor_silent_seconds 0.25",
    ):  # fmt: skip
        assert line in lines
    ((verb, args, within),) = desk.link.asked
    assert (verb, args["worker"], within) == ("metrics", "w1", seconds)
    assert numbers(args["snapshot"], m.WORKERS) == {(): 1}


@in_a_loop
async def test_without_a_supervisor_there_are_a_workers_own_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.link.answer = lambda _verb, _args: Refused(Reason.SUPERVISOR_UNREACHABLE, "away")
    text, kind = await desk.page.scrape("application/openmetrics-text", "")
    assert kind.startswith("application/openmetrics-text")
    assert b"llmux_supervisor_up 0.0\n" in text
    assert b"llmux_gateway_workers 1.0\n" in text
    desk.link.answer = lambda _verb, _args: KeyError("ours")
    with pytest.raises(KeyError):
        await desk.page.scrape("", "")


METRICS = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"
RUNNING = b"# TYPE vllm:running gauge\nvllm:running 3\n"


async def scraped(desk: Desk, *pieces: bytes, end: str = "end") -> tuple[bytes, int]:
    """The page, and how many engines were asked for it; the first one is answered here."""
    before = [len(pool.sent) for pool in FakePool.made]
    page = asyncio.get_running_loop().create_task(desk.page.scrape("", ""))
    for _ in range(10):
        await asyncio.sleep(0)
    asked = [pool.sent[-1][1] for pool, count in zip(FakePool.made, before, strict=True)
             if len(pool.sent) > count]  # fmt: skip
    for sink in asked:
        answers(sink, pieces[0], until_close=True)
        for piece in pieces[1:]:
            sink.response_bytes(piece)
        if end == "end":
            sink.response_end()
        elif end == "failed":
            sink.response_failed(EngineFailure("it died"))
        sink.response_failed(EngineFailure("too late"))
    return (await page)[0], len(asked)


@in_a_loop
async def test_an_engines_own_numbers_are_asked_for_at_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    page, asked = await scraped(desk)
    assert asked == 0, "no engine is granted"
    pool = desk.grant()
    for number, pieces in enumerate(((METRICS + RUNNING,), (METRICS, RUNNING[:9], RUNNING[9:])), 1):
        page, asked = await scraped(desk, *pieces)
        assert (b'vllm:running{model="alpha"} 3.0' in page, asked) == (True, 1)
        request = pool.sent[-1][0]
        assert request.head.startswith(b"GET /metrics HTTP/1.1\r\n")
        assert request.delivery is Delivery.UNCHUNKED
        desk.now += 1.9
        page, asked = await scraped(desk)
        assert (b'vllm:running{model="alpha"} 3.0' in page, asked) == (True, 0), number
        desk.now += 0.1
    desk.supervisor.on_message(Revoke("alpha", "e1"))
    page, asked = await scraped(desk)
    assert (b"vllm:running" in page, asked) == (False, 0)
    desk.grant(epoch="e2")
    page, asked = await scraped(desk, METRICS + RUNNING)
    assert (b"vllm:running" in page, asked) == (True, 1), "another epoch is another engine"
    lease = desk.worker.admission.held("alpha")
    assert lease is not None
    desk.worker.admission.suspect(lease)
    desk.now += 9.0
    assert (await scraped(desk))[1] == 0


@in_a_loop
async def test_an_engines_numbers_may_be_as_long_as_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    page, _ = await scraped(desk, METRICS + (RUNNING + b"#").ljust(MAX_BYTES, b" "))
    assert b"vllm:running" in page


def test_until_the_models_are_known_any_may_be_counted() -> None:
    observer = Observer()
    for known in (None, {"a"}):
        observer.known = known
        for model in ("a", "b"):
            observer.answered(model, 200)
            observer.times_of(model).waits.observe(0.1)
    assert observer.requests == {("a", 200): 2, ("b", 200): 1, (UNKNOWN, 200): 1}
    observer.times.clear()
    observer.times_of("b")
    observer.times_of("a")
    assert list(observer.times) == ["a"]


@in_a_loop
async def test_each_model_has_its_numbers_before_anything_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Desk(monkeypatch).page.snapshot()
    for name in (m.IN_FLIGHT, m.QUEUE_DEPTH, m.BROKEN, m.ABANDONED, m.RETRIED):
        assert numbers(store, name) == {("alpha",): 0, ("beta",): 0}


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (METRICS.replace(b"200 OK", b"503 No") + RUNNING, "end"),
        (METRICS + RUNNING + b"#" * MAX_BYTES, "end"),
        (METRICS + RUNNING, "failed"),
        (METRICS + b"junk", "end"),
    ],
    ids=["503", "too long", "failed", "junk"],
)
@in_a_loop
async def test_an_engine_without_numbers_costs_its_own_alone(
    answer: bytes, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    page, asked = await scraped(desk, answer, end=end)
    assert (asked, b"vllm:running" in page) == (1, False)
    assert b"llmux_gateway_workers" in page


# ---- headers and errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [((), b"https://a", None), (("https://a",), b"https://a", "https://a"),
     (("https://a",), b"https://b", None), (("*",), b"https://b", "*"), (("*",), b"", None)],
)  # fmt: skip
@in_a_loop
async def test_answers_name_their_request_and_who_may_read_them(
    origins: tuple[str, ...],
    origin: bytes,
    allowed: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, cors_origins=origins)
    for given in ({"x-request-id": "r7"}, {}):
        response = SimpleNamespace(headers={"a": "b"})
        request = a_request(desk, headers=given, origin=origin)
        await app_module._name_request(request, response)  # type: ignore[arg-type]
        response.headers["alt-svc"] = ""
        headers = dict(response.headers)
        assert headers.pop("a") == "b"
        assert headers.pop("x-request-id", None) == given.get("x-request-id")
        assert headers.pop("access-control-allow-origin", None) == allowed
        assert ("vary" in headers) is (allowed is not None)
        assert "alt-svc" not in headers
    assert isinstance(response.headers, _Headers)


@pytest.mark.parametrize("path", [b"/x", b"/v1/messages?beta=1"])
@in_a_loop
async def test_an_error_has_its_status_and_its_headers(
    path: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    desk = Desk(monkeypatch)
    for problem, status, headers in (
        (Refused(Reason.NOT_FOUND, "no"), 404, {}),
        (Refused(Reason.QUEUE_FULL, "no", retry_after=2.5), 503, {"retry-after": "3"}),
        (Refused(Reason.METHOD_NOT_ALLOWED, "no", allow="GET"), 405, {"allow": "GET"}),
        (
            ValueError("ours"),
            500 if path == b"/x" else 405,
            {} if path == b"/x" else {"allow": "POST"},
        ),
    ):
        request = a_request(desk, raw_url=path, headers={"x-request-id": "r\xe9"})
        response = app_module._on_error(request, problem)
        assert response.status == status
        found = {name: value for name, value in response.headers.items() if name != "content-type"}
        assert found == headers
        error = body_of(response)["error"]
        assert ("code" in error) is (path == b"/x")
        assert "ours" not in error["message"]

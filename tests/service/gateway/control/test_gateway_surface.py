"""Each route of the gateway's own: what is asked of the supervisor, and what is answered."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_harness import ADMIN, ADMINS, Response, Stage, in_loop, stage

from llmux.protocol import Ask

STATUS: dict[str, Any] = {
    "models": {
        "alpha": {"state": "serving", "address": "unix:/a", "unit": "a.scope", "pid": 7,
                  "since_secs": 1.5},
        "beta": {"state": "parked", "address": None, "unit": None, "pid": 8, "since_secs": 2.5},
        "gamma": {"state": "stopped", "address": None, "unit": None, "pid": None,
                  "since_secs": 3.5},
    }
}  # fmt: skip


def asked(s: Stage) -> list[tuple[str, dict[str, Any]]]:
    """What the supervisor was asked, without who asks."""
    return [
        (one.verb, {name: value for name, value in one.args.items() if name != "by"})
        for one in s.supervisor.heard
        if isinstance(one, Ask)
    ]


def answering(s: Stage) -> None:
    results = {"status": STATUS, "logs": {"lines": ["one", "two"]}, "metrics": {}}
    s.supervisor.answer = lambda ask: {"ok": True, "result": results.get(ask.verb, {})}


async def send(
    s: Stage, method: str, path: str, body: bytes = b"", *headers: str, head: bool = False
) -> Response:
    client = await s.client()
    client.send(path, method=method, body=body, headers=(ADMIN, *headers))
    return await (client.head() if head else client.answer())


@in_loop
async def test_what_runs_is_listed_parked_ones_included() -> None:
    async with stage(keys=lambda: ADMINS) as s:
        answering(s)
        answer = await send(s, "GET", "/running")
        alpha, beta = answer.json()["running"]
        assert alpha == {
            "model": "alpha", "name": "alpha", "state": "ready", "llmux_state": "serving",
            "proxy": "unix:/a", "cmd": "a.scope", "since_secs": 1.5,
        }  # fmt: skip
        assert (beta["model"], beta["proxy"], beta["cmd"]) == ("beta", "", "")
        assert beta["llmux_state"] == "parked"


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("/logs/alpha", {"model": "alpha", "lines": 100}),
        ("/logs/alef", {"model": "alpha", "lines": 100}),
        ("/logs/org/alpha", {"model": "alpha", "lines": 100}),
        ("/logs?model=beta&lines=7", {"model": "beta", "lines": 7}),
        ("/logs/alpha?model=beta&lines=1", {"model": "alpha", "lines": 1}),
        ("/logs/alpha?lines=10000", {"model": "alpha", "lines": 10_000}),
        ("/logs", "model"),
        ("/logs/alpha?lines=0", "lines"),
        ("/logs/alpha?lines=10001", "lines"),
        ("/logs/alpha?lines=-1", "lines"),
        ("/logs/alpha?lines=all", "lines"),
        ("/logs/nobody", None),
    ],
)
def test_output_is_of_the_model_in_the_path_or_in_the_query(
    path: str, args: dict[str, Any] | str | None
) -> None:
    @in_loop
    async def run() -> None:
        async with stage(keys=lambda: ADMINS) as s:
            answering(s)
            answer = await send(s, "GET", path)
            if isinstance(args, dict):
                assert (answer.status, answer.body) == (200, b"one\ntwo\n")
                assert answer.headers["content-type"].startswith("text/plain")
                assert asked(s) == [("logs", args)]
            else:
                assert answer.status == (404 if args is None else 400)
                assert answer.json()["error"]["param"] in (args, "model")
                assert asked(s) == []

    run()


@pytest.mark.parametrize(
    ("method", "path", "body", "stopped"),
    [
        ("GET", "/unload?model=alpha", b"", ["alpha"]),
        ("GET", "/unload?model=alef", b"", ["alpha"]),
        ("GET", "/unload?model=alpha", b'{"model": "beta"}', ["alpha"]),
        ("POST", "/unload", b'{"model": "beta"}', ["beta"]),
        ("POST", "/unload", b'"org/alpha"', ["alpha"]),
        ("POST", "/unload?model=alpha", b'{"model": "beta"}', ["beta"]),
        ("POST", "/unload?model=alpha", b"{}", ["alpha"]),
        ("GET", "/unload", b"", None),
        ("POST", "/unload", b"", None),
        ("POST", "/unload", b"{}", None),
        ("POST", "/unload", b'{"model": 7}', []),
        ("POST", "/unload", b"[1]", []),
        ("POST", "/unload", b"not JSON", []),
    ],
)
def test_the_model_that_is_named_is_unloaded_or_all_that_are_not_stopped(
    method: str, path: str, body: bytes, stopped: list[str] | None
) -> None:
    @in_loop
    async def run() -> None:
        async with stage(keys=lambda: ADMINS) as s:
            answering(s)
            answer = await send(s, method, path, body)
            if stopped == []:
                assert answer.status == 400
                assert asked(s) == []
                return
            names = stopped or ["alpha", "beta"]
            assert (answer.status, answer.json()["models"]) == (200, names)
            orders = [("unload", {"model": name}) for name in names]
            assert asked(s) == (orders if stopped else [("status", {}), *orders])

    run()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version="),
        ("text/plain", "text/plain; version="),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version="),
    ],
)
def test_metrics_are_in_the_format_that_is_asked_for(accept: str, kind: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            answering(s)
            headers = (f"Accept: {accept}",) if accept else ()
            answer = await send(s, "GET", "/metrics", b"", *headers)
            assert answer.headers["content-type"].startswith(kind)
            text = answer.body.decode()
            values = dict(
                line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
            )
            for model in ("alpha", "beta"):  # nothing was asked of them yet
                for name in ("llmux_in_flight", "llmux_queue_depth"):
                    assert float(values[f'{name}{{model="{model}"}}']) == 0
            assert float(values["llmux_supervisor_up"]) == 1
            assert float(values["llmux_supervisor_silent_seconds"]) >= 0
            head = await send(s, "HEAD", "/metrics", b"", *headers, head=True)
            assert head.headers["content-type"] == answer.headers["content-type"]

    run()


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("PUT", "/control/status", 405, "GET"),
        ("DELETE", "/control/eviction", 405, "GET, POST"),
        ("GET", "/control/mode", 405, "POST"),
        ("POST", "/running", 405, "GET"),
        ("POST", "/events", 405, "GET"),
        ("POST", "/logs/alpha", 405, "GET"),
        ("POST", "/ui/history", 405, "GET"),
        ("DELETE", "/metrics", 405, "GET, HEAD"),
        ("GET", "/v1/completions", 405, "POST"),
        ("GET", "/nothing", 404, None),
        ("GET", "/control/nothing", 404, None),
        ("POST", "/control/pin", 400, None),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    method: str, path: str, status: int, allow: str | None
) -> None:
    @in_loop
    async def run() -> None:
        async with stage(keys=lambda: ADMINS) as s:
            answer = await send(s, method, path, b"[" if method == "POST" else b"")
            assert (answer.status, answer.headers.get("allow")) == (status, allow)
            assert answer.headers["x-request-id"].startswith("req-")
            assert answer.json()["error"]["code"] != "internal_error"
            assert asked(s) == []

    run()


@pytest.mark.parametrize("path", ["/ui/feed", "/events"])
def test_a_feed_is_kept_by_nobody_on_its_way(path: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            client = await s.client()
            client.send(path, method="GET")
            head = await client.head()
            assert head.headers["content-type"].startswith("text/event-stream")
            assert head.headers["x-accel-buffering"] == "no"
            assert head.headers.get("cache-control") in ("no-store", "no-cache")

    run()


@in_loop
async def test_head_and_get_are_answered_alike() -> None:
    async with stage() as s:
        answering(s)
        for path, status in (
            ("/ui", 308), ("/ui/", 200), ("/ui/static/main.js", None), ("/health/live", 200),
            ("/health/ready", None), ("/health/weights", None), ("/models", 200),
            ("/metrics", 200), ("/openapi.json", 200),
        ):  # fmt: skip
            get = await send(s, "GET", path)
            head = await send(s, "HEAD", path, head=True)
            assert head.status == get.status, path
            assert status in (None, get.status), path

"""What a worker answers itself: lists, health, orders, logs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_desk import Desk, a_request, body_of, in_a_loop

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.errors import Reason, Refused
from llmux.gateway.control import app as app_module
from llmux.gateway.control import observation
from llmux.gateway.control.app import CONTROL_VERBS
from llmux.gateway.control.weights import WEIGHTS, _weights
from llmux.protocol import ModelInfo

INFOS = (
    ModelInfo("alpha", "serving", created=5, aliases=["alef", "a/b"], max_model_len=4096),
    ModelInfo("beta", "stopped", adapters=["lora"], stale=True),
)
BOUND = Key("one", hash_key("1"), models=frozenset({"beta"}))


def entry(name: str, info: ModelInfo, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": info.created, "owned_by": "llmux",
        "root": info.name, "state": info.state, "aliases": list(info.aliases), **more,
    }  # fmt: skip


@in_a_loop
async def test_lists_of_models_show_what_a_key_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(*INFOS)
    alpha = entry("alpha", INFOS[0], max_model_len=4096)
    beta = entry("beta", INFOS[1], stale=True)
    lora = entry("lora", INFOS[1], stale=True, parent="beta")
    for key, expected in ((None, [alpha, beta, lora]), (BOUND, [beta, lora])):
        listed = body_of(await app_module._models(a_request(desk, key=key)))
        assert listed == {"object": "list", "data": expected}
    for name, one in (
        ("alpha", alpha), ("alef", alpha | {"id": "alef"}), ("a%2Fb", alpha | {"id": "a/b"}),
        ("beta", beta), ("lora", lora),
    ):  # fmt: skip
        assert body_of(await app_module._model(a_request(desk), name)) == one
    for name, key in (("gamma", None), ("alpha", BOUND), ("alef", BOUND)):
        with pytest.raises(Refused) as refused:
            await app_module._model(a_request(desk, key=key), name)
        assert (refused.value.reason, refused.value.fields["param"]) == (
            Reason.UNKNOWN_MODEL, "model",
        )  # fmt: skip


@in_a_loop
async def test_how_well_each_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(*(ModelInfo(state, state, aliases=["x", "y"]) for state in (*WEIGHTS, "odd")))
    worker = desk.worker
    models = body_of(await _weights(a_request(desk)))["models"]
    assert models["serving"] == {"weight": 100, "state": "serving", "aliases": ["x", "y"]}
    weights = {name: one["weight"] for name, one in models.items()}
    assert weights == {
        "serving": 100, "waking": 60, "starting": 50, "draining": 10, "parking": 10, "parked": 10,
        "stopping": 1, "stopped": 1, "failed": 0, "odd": 1,
    }  # fmt: skip
    plain = a_request(desk, headers={"accept": "text/plain"})
    lines = bytes((await _weights(plain)).body or b"").decode().splitlines()
    assert lines[0] == "100 serving\tx\ty"
    assert len(lines) == len(weights)
    bound = Key("one", hash_key("1"), models=frozenset({"parked"}))
    assert list(body_of(await _weights(a_request(desk, key=bound)))["models"]) == ["parked"]
    worker.supervisor_lost = True
    weights = {
        name: one["weight"]
        for name, one in body_of(await _weights(a_request(desk)))["models"].items()
    }
    assert {name for name, weight in weights.items() if weight} == {"serving"}


@in_a_loop
async def test_ready_is_one_that_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    assert body_of(await app_module._health(a_request(desk))) == {"status": "ok"}
    for up, holds, draining, expected in (
        (True, False, False, "up"),
        (False, False, False, Reason.SUPERVISOR_UNREACHABLE),
        (False, True, False, "away"),
        (True, True, False, "up"),
        (True, True, True, Reason.SHUTTING_DOWN),
    ):
        desk.link.up, desk.worker.draining = up, draining
        if holds:
            desk.grant()
        try:
            said = body_of(await app_module._ready(a_request(desk)))
        except Refused as problem:
            assert problem.reason is expected
        else:
            assert said == {"status": "ready", "supervisor": expected}


@in_a_loop
async def test_an_order_is_passed_on_with_who_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(*INFOS, startup_timeout_secs=100.0)
    desk.link.answer = lambda verb, _args: {"did": verb}
    slow = {"pin", "switch", "sleep", "wake", "restart", "checkpoint"}
    for (method, name), (verb, _) in CONTROL_VERBS.items():
        for model, sent in (("alef", "alpha"), ("gamma", "gamma"), (7, 7)):
            given = {"model": model, "x": [1]}
            body = json.dumps(given).encode()
            request = a_request(
                desk, method=method, body=body, key=None if name == "pin" else BOUND
            )
            assert body_of(await app_module._control(request, name)) == {"did": verb}
            by = "a local client of the API" if name == "pin" else "key one"
            args = {"by": by} if method == "GET" else {"model": sent, "x": [1], "by": by}
            assert desk.link.asked[-1] == (verb, args, 110.0 if name in slow else 10.0)
    for body in (b"{", b"[]", b"7", b"[" * 100_000, b"\xff"):
        with pytest.raises(Refused, match="cannot read the request body") as refused:
            await app_module._control(a_request(desk, method="POST", body=body), "pin")
        assert refused.value.reason is Reason.BAD_REQUEST
    await app_module._control(a_request(desk, method="POST"), "unpin")
    assert desk.link.asked[-1][1] == {"by": "a local client of the API"}


@pytest.mark.parametrize(
    ("given", "orders"),
    [
        ({}, ["alpha", "beta"]),
        ({"args": {"model": "alef"}}, ["alpha"]),
        ({"args": {"model": "gamma"}}, ["gamma"]),
        ({"method": "POST", "body": b'{"model":"beta"}'}, ["beta"]),
        ({"method": "POST", "body": b'"beta"'}, ["beta"]),
        ({"method": "POST", "body": b"{}", "args": {"model": "alef"}}, ["alpha"]),
        ({"method": "POST", "body": b'{"model":"beta"}', "args": {"model": "alef"}}, ["beta"]),
        ({"method": "GET", "body": b'{"model":"beta"}', "args": {"model": "alef"}}, ["alpha"]),
        ({"method": "POST", "body": b"{}"}, ["alpha", "beta"]),
        ({"method": "POST"}, ["alpha", "beta"]),
        ({"method": "POST", "body": b"{"}, None),
        ({"method": "POST", "body": b"[" * 100_000}, None),
        ({"method": "POST", "body": b'{"model":7}'}, None),
        ({"method": "POST", "body": b"[]"}, None),
    ],
    ids=range(14),
)
@in_a_loop
async def test_one_model_is_unloaded_or_all_that_run(
    given: dict[str, Any], orders: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(*INFOS, startup_timeout_secs=100.0)
    states = {
        "alpha": {"state": "serving"},
        "beta": {"state": "parked"},
        "gamma": {"state": "stopped"},
    }
    desk.link.answer = lambda verb, _args: {"models": states} if verb == "status" else {}
    if orders is None:
        with pytest.raises(Refused) as refused:
            await observation._unload(a_request(desk, **given))
        assert refused.value.reason is Reason.BAD_REQUEST
        assert desk.link.asked == []
        return
    answer = body_of(await observation._unload(a_request(desk, **given)))
    assert answer == {"message": "unloaded", "models": orders}
    asked = [one for one in desk.link.asked if one[0] != "status"]
    by = "a local client of the API"
    assert asked == [("unload", {"model": name, "by": by}, 110.0) for name in orders]


@in_a_loop
async def test_all_are_unloaded_before_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    states = {name: {"state": "serving"} for name in "abc"}

    def answer(verb: str, args: dict[str, Any]) -> Any:
        if verb == "status":
            return {"models": states}
        return Refused(Reason.PINNED, "pinned") if args["model"] == "a" else {}

    desk.link.answer = answer
    with pytest.raises(Refused, match="pinned"):
        await observation._unload(a_request(desk))
    assert [args["model"] for verb, args, _ in desk.link.asked if verb == "unload"] == list("abc")


@in_a_loop
async def test_what_runs_in_the_words_of_other_swappers(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    words = {
        "starting": "starting", "waking": "starting", "serving": "ready", "draining": "stopping",
        "parking": "stopping", "stopping": "stopping", "parked": "parked",
    }  # fmt: skip
    models = {
        state: {"state": state, "address": f"to {state}", "unit": f"of {state}", "pid": 7,
                "since_secs": 2.5}
        for state in words
    }  # fmt: skip
    models["bare"] = {"state": "serving", "address": None, "unit": None, "pid": 1, "since_secs": 0}
    models["gone"] = models["bare"] | {"pid": None}
    desk.link.answer = lambda _verb, _args: {"models": models}
    running = body_of(await observation._running(a_request(desk)))["running"]
    assert running == [
        *(
            {"model": state, "name": state, "state": word, "llmux_state": state,
             "proxy": f"to {state}", "cmd": f"of {state}", "since_secs": 2.5}
            for state, word in words.items()
        ),
        {"model": "bare", "name": "bare", "state": "ready", "llmux_state": "serving", "proxy": "",
         "cmd": "", "since_secs": 0},
    ]  # fmt: skip
    assert desk.link.asked == [("status", {}, 10.0)]


@pytest.mark.parametrize(
    ("model", "args", "asked"),
    [
        ("alpha", {}, ("alpha", 100)),
        ("alef", {"lines": "7"}, ("alpha", 7)),
        ("a%2Fb", {"lines": "1"}, ("alpha", 1)),
        (None, {"model": "beta", "lines": "10000"}, ("beta", 10_000)),
        ("alpha", {"model": "beta"}, ("alpha", 100)),
        (None, {}, Reason.BAD_REQUEST),
        ("gamma", {}, Reason.UNKNOWN_MODEL),
        ("alpha", {"lines": "0"}, Reason.BAD_REQUEST),
        ("alpha", {"lines": "10001"}, Reason.BAD_REQUEST),
        ("alpha", {"lines": "-1"}, Reason.BAD_REQUEST),
        ("alpha", {"lines": ""}, Reason.BAD_REQUEST),
        ("alpha", {"lines": "\u0663"}, Reason.BAD_REQUEST),
        ("alpha", {"lines": "9" * 5000}, Reason.BAD_REQUEST),
        ("alpha", {"lines": "0" * 17 + "1"}, ("alpha", 1)),
        ("alpha", {"lines": "0" * 18 + "1"}, Reason.BAD_REQUEST),
    ],
    ids=range(15),
)
@in_a_loop
async def test_the_last_lines_of_an_engine(
    model: str | None, args: dict[str, str], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.catalog(*INFOS)
    desk.link.answer = lambda _verb, _args: {"lines": ["one", "two"]}
    request = a_request(desk, args=args)
    if isinstance(asked, Reason):
        with pytest.raises(Refused) as refused:
            await observation._logs(request, model)
        assert (refused.value.reason, desk.link.asked) == (asked, [])
        return
    assert (await observation._logs(request, model)).body == b"one\ntwo\n"
    name, lines = asked
    assert desk.link.asked == [("logs", {"model": name, "lines": lines}, 10.0)]


@pytest.mark.parametrize("queues", [True, False])
@in_a_loop
async def test_events_are_fetched_page_by_page(
    queues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    kept = [{"id": number, "type": "x", "time": 1.0} for number in range(1, 6)]

    def answer(_verb: str, args: dict[str, Any]) -> Any:
        newer = [one for one in kept if one["id"] > args["after"]]
        return {"events": newer[:2], "more": len(newer) > 2}

    desk.link.answer = answer
    worker = desk.worker
    assert await observation.events_after(worker, 0, queues=queues) == kept
    asked = [("events", {"after": after, "queues": queues}, 10.0) for after in (0, 2, 4)]
    assert desk.link.asked == asked
    assert await observation.events_after(worker, 4) == kept[4:]
    assert await observation.events_after(worker, 9) == []
    desk.link.answer = lambda _verb, _args: {"events": kept[:3], "more": True}
    assert await observation.events_after(worker, 1) == kept[1:3], "an earlier version's answer"
    for header, missed in (("", []), ("x", []), ("2", kept[2:3]), ("9" * 19, [])):
        request = a_request(desk, headers={"last-event-id": header} if header else {})
        assert await observation._missed(request) == missed


def test_an_event_is_one_for_a_browser() -> None:
    event = {"id": 7, "type": "transition", "model": "a"}
    lines = observation._sse(event).split("\n")
    assert lines[:2] == ["id: 7", "event: transition"]
    assert json.loads(lines[2].removeprefix("data: ")) == event
    assert lines[3:] == ["", ""]

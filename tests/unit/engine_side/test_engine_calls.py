"""What an engine is asked, word for word, and what is made of each answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.engine import http, vllm
from llmux.drivers.engine.counters import work_counters
from llmux.drivers.engine.http import Reply, Unreachable, exchange
from llmux.drivers.engine.vllm import VllmEngine
from llmux.engines.vllm import VLLM
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.protocol import Address

Answer = Callable[[str, bytes], bytes | None]


def reply(status: int, body: object = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)


class Asked(list[tuple[str, bytes]]):
    """(head, body) of each request."""

    def lines(self) -> list[str]:
        return [head.splitlines()[0].removesuffix(" HTTP/1.1") for head, _ in self]


@asynccontextmanager
async def engine(place: Path | None, answer: Answer) -> AsyncIterator[tuple[Address, Asked]]:
    """On a unix socket, or without ``place`` on a port. What answers None says nothing at all."""
    asked, hung = Asked(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(
                line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line
            )
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            asked.append((head, body))
            data = answer(head.splitlines()[0], body)
            if data is None:
                await hung.wait()
            else:
                writer.write(data)
                await writer.drain()
        writer.close()

    if place is None:
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address(port=listener.sockets[0].getsockname()[1])
    else:
        listener = await asyncio.start_unix_server(serve, str(place / "s"))
        address = Address(uds=str(place / "s"))
    try:
        yield address, asked
    finally:
        hung.set()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        listener.close()
        await listener.wait_closed()


def test_a_request_is_complete_on_a_port_too() -> None:
    async def body() -> None:
        async with engine(None, lambda *_: reply(201, b"made")) as (address, asked):
            assert await exchange(address, "GET", "/x?y") == Reply(201, b"made")
            assert await exchange(address, "POST", "/z", b"data", "text/plain") == Reply(
                201, b"made"
            )
            assert await exchange(address, "DELETE", "/z") == Reply(201, b"made")
        empty = "Content-Type: application/json\r\nContent-Length: 0\r\n"
        common = "Host: localhost\r\nConnection: close\r\nAccept: */*\r\n"
        assert list(asked) == [
            (f"GET /x?y HTTP/1.1\r\n{common}\r\n", b""),
            (f"POST /z HTTP/1.1\r\n{common}Content-Type: text/plain\r\nContent-Length: 4\r\n\r\n",
             b"data"),
            (f"DELETE /z HTTP/1.1\r\n{common}{empty}\r\n", b""),
        ]  # fmt: skip

    asyncio.run(body())


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 204 No\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", None),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", None),
        (b"HTTP/1.1 200 OK\r\n", None),
        (b"", None),
        (b"HTTP/9 x\r\n\r\n", None),
    ],
)
def test_an_answer_is_whole_or_none(tmp_path: Path, data: bytes, body: bytes | None) -> None:
    async def run() -> None:
        async with engine(tmp_path, lambda *_: data) as (address, _):
            if body is None:
                with pytest.raises(Unreachable):
                    await exchange(address, "GET", "/")
            else:
                assert (await exchange(address, "GET", "/")).body == body
        with pytest.raises(Unreachable):
            await exchange(Address(uds=str(tmp_path / "none")), "GET", "/")

    asyncio.run(run())


def test_an_answer_may_be_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_CAP", 1000)

    async def body() -> None:
        sizes = [1000, 1001]
        async with engine(tmp_path, lambda *_: reply(200, b"x" * sizes.pop(0))) as (address, _):
            assert len((await exchange(address, "GET", "/")).body) == 1000
            with pytest.raises(Unreachable, match="the answer is longer than 1000 bytes"):
                await exchange(address, "GET", "/")

    asyncio.run(body())


def test_an_excerpt_ends_where_it_is_cut() -> None:
    assert Reply(500, b"a \n b").excerpt == "a b"
    assert Reply(500, b"x" * http.EXCERPT).excerpt == "x" * http.EXCERPT
    assert Reply(500, b"x" * (http.EXCERPT + 1)).excerpt == "x" * http.EXCERPT + "…"
    assert Reply(200, b'{"a": 1}').json() == {"a": 1}


Call = Callable[[VllmEngine, Address], Awaitable[Any]]
RPC = "POST /collective_rpc"
CACHE = {"tags": ["kv_cache"]}
SLEEPING, AWAKE = reply(200, {"is_sleeping": True}), reply(200, {"is_sleeping": False})
ORDERS: list[tuple[Call, bytes, list[tuple[str, Any]], str]] = [
    (lambda e, a: e.sleep(a, 2, 5), SLEEPING,
     [("POST /sleep?level=2&mode=wait", None), ("GET /is_sleeping", None)], "put to sleep"),
    (lambda e, a: e.wake(a, (), 5), AWAKE,
     [("POST /wake_up", None), ("GET /is_sleeping", None)], "wake"),
    (lambda e, a: e.wake(a, ("weights",), 5), SLEEPING, [("POST /wake_up?tags=weights", None)],
     "wake"),
    (lambda e, a: e.reload_weights(a, 5), AWAKE, [(RPC, {"method": "reload_weights"})],
     "reload the weights of"),
    (lambda e, a: e.discard_cache(a, 5), AWAKE, [(RPC, {"method": "discard", "kwargs": CACHE})],
     "discard the KV cache of"),
    (lambda e, a: e.return_cache(a, 5), AWAKE, [(RPC, {"method": "wake_up", "kwargs": CACHE})],
     "return the KV cache of"),
    (lambda e, a: e.reset_prefix_cache(a, 5), reply(200, {"success": True}),
     [("POST /reset_prefix_cache", None)], "reset the prefix cache of"),
    (lambda e, a: e.reset_prefix_cache(a, 5), reply(200, b""),
     [("POST /reset_prefix_cache", None)], "reset the prefix cache of"),
    (lambda e, a: e.sleeping(a, 5), AWAKE, [("GET /is_sleeping", None)], "ask"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "answer", "asked", "name"), ORDERS)
def test_an_order_is_given_and_its_failure_names_it(
    tmp_path: Path, call: Call, answer: bytes, asked: list[tuple[str, Any]], name: str
) -> None:
    async def body() -> None:
        async with engine(tmp_path, lambda *_: answer) as (address, seen):
            await call(VllmEngine((0.0,)), address)
        bodies = [json.loads(data) if data else None for _, data in seen]
        assert list(zip(seen.lines(), bodies, strict=True)) == asked
        async with engine(tmp_path, lambda *_: reply(503, b"no luck")) as (address, seen):
            with pytest.raises(EngineUnhealthy) as raised:
                await call(VllmEngine((0.0,)), address)
        path = asked[0][0].split()[1]
        assert str(raised.value).startswith(
            f"cannot {name} the engine at {address}: {path} answered 503: no luck"
        )
        assert raised.value.fields["status"] == 503
        assert len(seen) == (1 if name == "ask" else 2)
        async with engine(tmp_path, lambda *_: reply(405, b"")) as (address, seen):
            if name == "ask":
                assert await call(VllmEngine(), address) is None
            else:
                with pytest.raises(EngineUnhealthy, match=r"answered 405: \(no body\)") as raised:
                    await call(VllmEngine(), address)
                assert raised.value.hint == VLLM.control_hint
            assert len(seen) == 1

    asyncio.run(body())


@pytest.mark.parametrize(("call", "name"), [(row[0], row[3]) for row in ORDERS])
def test_an_engine_that_is_not_there_is_named(tmp_path: Path, call: Call, name: str) -> None:
    address = Address(uds=str(tmp_path / "none"))
    with pytest.raises(EngineUnhealthy, match=f"cannot {name} the engine at .*No such file"):
        asyncio.run(call(VllmEngine(()), address))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer", [{"is_sleeping": 1}, {"is_sleeping": "false"}, {"is_sleeping": None}, {}, [], "x", 7]
)
def test_an_answer_of_another_shape_is_a_bad_one(tmp_path: Path, answer: object) -> None:
    async def body() -> None:
        data = reply(200, json.dumps(answer).encode())
        async with engine(tmp_path, lambda *_: data) as (address, _):
            with pytest.raises(EngineUnhealthy, match="/is_sleeping answered 200"):
                await VllmEngine().sleeping(address, 5)

    asyncio.run(body())


def test_a_cache_that_was_not_reset_is_an_error(tmp_path: Path) -> None:
    async def body() -> None:
        no = reply(200, {"success": False})
        async with engine(tmp_path, lambda *_: no) as (address, _):
            with pytest.raises(EngineUnhealthy, match="/reset_prefix_cache answered 200"):
                await VllmEngine().reset_prefix_cache(address, 5)

    asyncio.run(body())


class Clock:
    """Goes on by ten seconds whenever it is asked: deadlines pass without being waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


@pytest.mark.parametrize("want", [True, False])
def test_an_order_is_done_when_the_engine_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: bool
) -> None:
    async def body() -> None:
        answers = [reply(200)] + [AWAKE if want else SLEEPING] * 3 + [SLEEPING if want else AWAKE]
        async with engine(tmp_path, lambda *_: answers.pop(0)) as (address, asked):
            if want:
                await VllmEngine().sleep(address, 1, 5)
            else:
                await VllmEngine().wake(address, (), 5)
            assert len(asked) == 5
        monkeypatch.setattr(vllm, "time", Clock())
        stuck: list[bytes | None] = [reply(200), AWAKE if want else SLEEPING, None]
        async with engine(tmp_path, lambda *_: stuck.pop(0)) as (address, _):
            state = "awake" if want else "asleep"
            with pytest.raises(DriverTimeout, match=f"still {state} after 25s"):
                if want:
                    await VllmEngine().sleep(address, 1, 25)
                else:
                    await VllmEngine().wake(address, (), 25)

    asyncio.run(body())


@pytest.mark.parametrize("up", [True, False])
def test_communicators_are_moved_by_the_first_method_that_is_known(
    tmp_path: Path, up: bool
) -> None:
    methods = list(VLLM.communicators_up if up else VLLM.communicators_down)

    async def body() -> None:
        def answer(known: str) -> Answer:
            return lambda line, data: reply(200 if json.loads(data)["method"] == known else 400)

        for known in methods:
            async with engine(tmp_path, answer(known)) as (address, asked):
                await VllmEngine().communicators(address, up=up, deadline=5)
                tried = [json.loads(data)["method"] for _, data in asked]
                assert tried == methods[: methods.index(known) + 1]
        async with engine(tmp_path, answer("")) as (address, _):
            verb = "restore" if up else "suspend"
            text = f"cannot {verb} the communicators of .*: it knows neither of {methods[0]}"
            with pytest.raises(EngineUnhealthy, match=text) as raised:
                await VllmEngine().communicators(address, up=up, deadline=5)
            assert "keep_running or stop" in (raised.value.hint or "")

    asyncio.run(body())


def test_what_an_engine_says_of_itself(tmp_path: Path) -> None:
    answers: dict[str, Any] = {
        "/version": {"version": "0.32\x1b[0m" + "x" * 200},
        "/v1/models": {"data": [{"max_model_len": 4096}]},
        "/openapi.json": {"paths": {"/b": {}, "/a": {}}},
    }

    async def look() -> dict[str, Any]:
        def answer(line: str, _: bytes) -> bytes:
            found = answers[line.split()[1]]
            return found if isinstance(found, bytes) else reply(200, found)

        async with engine(tmp_path, answer) as (address, asked):
            found = dict(await VllmEngine().describe(address, 5))
            assert sorted(asked.lines()) == [f"GET {path}" for path in sorted(answers)]
            return found

    found = asyncio.run(look())
    assert found == {
        "version": ("0.32" + "x" * 200)[:100], "max_model_len": 4096, "paths": ["/a", "/b"],
    }  # fmt: skip
    nothings: list[Any] = [reply(404), reply(200, b"no json"), [], {}, "x", 7]
    for nothing in nothings:
        for path in answers:
            answers[path] = nothing
        assert asyncio.run(look()) == {"version": None, "max_model_len": None, "paths": []}
    answers["/v1/models"] = {"data": [{"max_model_len": 2**63}]}
    assert asyncio.run(look())["max_model_len"] is None
    answers["/v1/models"] = {"data": [{"max_model_len": 1}]}
    assert asyncio.run(look())["max_model_len"] == 1


def test_who_waits_for_health_hears_why_it_did_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        answers = [b"", reply(503, b"loading"), reply(200)]
        async with engine(tmp_path, lambda *_: answers.pop(0)) as (address, asked):
            await VllmEngine().wait_healthy(address, 20)
            assert asked.lines() == ["GET /health"] * 3
            answers[:] = [reply(503), reply(200)]
            assert not await VllmEngine().healthy(address, 5)
            assert await VllmEngine().healthy(address, 5)
        for answer, last in (
            (reply(503, b"loading"), "503 loading"), (b"x", ""), (None, "no answer within"),
        ):  # fmt: skip
            async with engine(tmp_path, lambda *_, answer=answer: answer) as (address, _):
                with monkeypatch.context() as patched:
                    patched.setattr(vllm, "time", Clock())
                    if answer is None:
                        patched.setattr(vllm, "PROBE_TIMEOUT", 0.01)
                    with pytest.raises(DriverTimeout, match=rf"within 25s \(last: .*{last}"):
                        await VllmEngine().wait_healthy(address, 25)
                if answer is None:
                    assert not await VllmEngine().healthy(address, 0.01)
        with pytest.raises(DriverTimeout, match=r"cannot wait for the engine at .*No such file"):
            monkeypatch.setattr(vllm, "time", Clock())
            await VllmEngine().wait_healthy(Address(uds=f"{tmp_path}/none/s"), 25)

    asyncio.run(body())


def test_a_probe_that_the_end_cuts_short_is_not_the_reason(tmp_path: Path) -> None:
    async def body() -> None:
        answers = [reply(503, b"loading")]
        async with engine(tmp_path, lambda *_: answers.pop() if answers else None) as (address, _):
            with pytest.raises(DriverTimeout, match=r"within 1s \(last: 503 loading\)"):
                await VllmEngine().wait_healthy(address, 1)
        async with engine(tmp_path, lambda *_: None) as (address, _):
            with pytest.raises(DriverTimeout, match=r"\(last: no answer within 0\.0"):
                await VllmEngine().wait_healthy(address, 0.05)

    asyncio.run(body())


TWO = """vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 1
# vllm:num_requests_running 5
vllm:request_success_total 2
vllm:generation_tokens_total{a="b c"} 5
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vllm:num_requests_running 1\nvllm:num_requests_waiting 2\nvllm:generation_tokens_total 7",
         (3, 7.0)),
        (TWO, (2, 7.0)),
        ("vllm:num_requests_running x\nvllm:num_requests_running 1\nvllm:request_success_total 2",
         (1, 2.0)),
        ("vllm:num_requests_running 1", (None, None)),
        ("vllm:request_success_total 1", (None, None)),
        ("vllm:num_requests_running NaN\nvllm:request_success_total 2", (None, None)),
        ("vllm:num_requests_running +Inf\nvllm:request_success_total 2", (None, None)),
        ("vllm:num_requests_running 0\nvllm:request_success_total 0\nother 5", (0, 0.0)),
        ("", (None, None)),
    ],
)  # fmt: skip
def test_work_is_counted_over_all_of_an_engines_parts(
    text: str, found: tuple[int | None, float | None]
) -> None:
    assert work_counters(text.encode(), VLLM) == found

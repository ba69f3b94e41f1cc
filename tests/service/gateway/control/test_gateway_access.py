"""Who may do what, over real sockets: keys, roles, limits, pages, TLS; slow and bad senders."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import Client, EngineRequest, Stage, a_config, in_loop, soon, stage, until

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.gateway.client import connection as front
from llmux.protocol import Catalog, ModelInfo

ADMIN, USE, LIMITED, SLOW = "sk-admin", "sk-use", "sk-limited", "sk-slow"
PATIENT, ALIAS = "sk-patient", "sk-alias"
KEYS = (
    Key("admin", hash_key(ADMIN), KeyRole.ADMIN),
    Key("use", hash_key(USE)),
    Key("limited", hash_key(LIMITED), models=frozenset({"beta"}), max_in_flight=1),
    Key("slow", hash_key(SLOW), requests_per_minute=1),
    Key("alias", hash_key(ALIAS), models=frozenset({"org/alpha"})),
    Key("patient", hash_key(PATIENT), max_waiting=1),
)


@asynccontextmanager
async def guarded(**more: Any) -> AsyncIterator[Stage]:
    async with stage(keys=lambda: KEYS, **more) as running:
        yield running


async def get(running: Stage, path: str, key: str | None = None, *headers: str) -> Any:
    client = await running.client()
    given = headers if key is None else (f"Authorization: Bearer {key}", *headers)
    client.send(path, method="GET", headers=given)
    return await client.answer()


def chat(client: Client, key: str, model: str = "alpha", **more: Any) -> None:
    message = {"role": "user", "content": "hi"}
    payload = {"model": model, "messages": [message], **more}
    client.send(payload=payload, headers=(f"x-api-key: {key}",))


# ---- keys ----------------------------------------------------------------------------------------


@in_loop
async def test_without_a_key_nothing_but_health_is_answered() -> None:
    async with guarded() as running:
        for path in ("/v1/models", "/metrics", "/control/status", "/events", "/nothing"):
            for key in (None, "wrong", "sk-admin "[:-1] + "x"):
                answer = await get(running, path, key)
                assert answer.status == 401 and answer.code == "invalid_api_key", path
                assert answer.headers["www-authenticate"] == 'Bearer realm="llmux"'
                assert "retry-after" not in answer.headers
        assert (await get(running, "/health")).status == 200
        client = await running.client()
        client.chat()
        assert (await client.answer()).status == 401
        assert running.waiting() == 0


@in_loop
async def test_a_body_without_a_key_is_refused_before_it_is_sent() -> None:
    async with guarded() as running:
        client = await running.client()
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"
        )
        assert (await client.answer()).status == 401


@in_loop
async def test_a_key_for_use_asks_models_and_an_admins_controls() -> None:
    async with guarded() as running:
        assert (await get(running, "/v1/models", USE)).status == 200
        answer = await get(running, "/control/status", USE)
        assert answer.status == 403 and answer.code == "forbidden"
        for path in ("/metrics", "/running", "/logs/alpha", "/%63ontrol/status"):
            assert (await get(running, path, USE)).status == 403, path
        assert (await get(running, "/control/status", ADMIN)).status == 200
        assert (await get(running, "/metrics", ADMIN)).status == 200


@in_loop
async def test_no_engine_ever_sees_a_key() -> None:
    async with guarded() as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        client.send(
            payload={"model": "alpha", "messages": []},
            headers=(f"Authorization: Bearer {USE}", f"X-Api-Key: {USE}"),
        )
        assert (await client.answer()).status == 200
        assert USE.encode() not in engine.requests[0].raw_head
        assert not {"authorization", "x-api-key"} & engine.requests[0].headers.keys()


@in_loop
async def test_without_keys_a_clients_key_is_for_the_engine() -> None:
    async with stage() as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        client.send(
            payload={"model": "alpha", "messages": []}, headers=("Authorization: Bearer theirs",)
        )
        assert (await client.answer()).status == 200
        assert engine.requests[0].headers["authorization"] == "Bearer theirs"


@in_loop
async def test_a_key_sees_only_its_models() -> None:
    async with guarded() as running:
        listed = (await get(running, "/v1/models", LIMITED)).json()["data"]
        assert [entry["id"] for entry in listed] == ["beta"]
        assert (await get(running, "/v1/models/alpha", LIMITED)).status == 404
        client = await running.client()
        chat(client, LIMITED, "alpha")
        answer = await client.answer()
        assert answer.status == 404 and answer.code == "model_not_found"
        assert running.waiting() == 0, "and nothing is switched in for it"


@in_loop
async def test_a_key_may_be_bound_to_a_model_by_its_alias() -> None:
    keys = list(KEYS)
    reload: list[Callable[[], None]] = []
    async with stage(keys=lambda: keys, reload=reload) as running:
        running.supervisor.grant(await running.engine())
        await until(lambda: running.gateway.names.get("org/alpha") == "alpha")
        client = await running.client()
        for again in (False, True):
            if again:
                keys[:] = [one for one in KEYS if one.name == "alias"]
                for part in reload:
                    part()
            for model, status in (("alpha", 200), ("alef", 200), ("beta", 404)):
                chat(client, ALIAS, model)
                assert (await client.answer()).status == status
            answer = await get(running, "/v1/models", ALIAS)
            assert [entry["id"] for entry in answer.json()["data"]] == ["alpha"]


@in_loop
async def test_requests_in_flight_are_limited_per_key_and_waiters_count() -> None:
    async with guarded() as running:
        first, second = await running.client(), await running.client()
        chat(first, LIMITED, "beta")
        await until(lambda: running.waiting("beta") == 1)
        chat(second, LIMITED, "beta")
        answer = await second.answer()
        assert answer.status == 429 and answer.code == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        first.leave()
        await until(lambda: running.waiting("beta") == 0)
        engine = await running.engine()
        running.supervisor.grant(engine, "beta")
        third = await running.client()
        for _ in range(3):  # one after the other
            chat(third, LIMITED, "beta")
            assert (await third.answer()).status == 200


@in_loop
async def test_requests_that_wait_are_limited_per_key_and_those_served_are_not() -> None:
    deaths = 0

    async def die_once(request: EngineRequest) -> None:
        nonlocal deaths
        if not deaths:
            deaths += 1
            request.die()
        else:
            request.json({"ok": True})

    async with guarded() as running:
        running.supervisor.say(
            Catalog.of([ModelInfo("alpha", "parked", switch_secs=40.0), ModelInfo("beta", "x")])
        )
        await until(lambda: running.gateway.models["alpha"].switch_secs == 40.0)
        clients = [await running.client() for _ in range(3)]
        chat(clients[0], PATIENT)
        await until(lambda: running.waiting() == 1)
        for model in ("alpha", "beta"):  # whatever it would wait for
            chat(clients[1], PATIENT, model)
            answer = await clients[1].answer()
            assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
            assert int(answer.headers["retry-after"]) >= 40
        chat(clients[2], USE)
        await until(lambda: running.waiting() == 2)
        engine = await running.engine(die_once)
        running.supervisor.grant(engine)
        # one of them meets the engine's death, waits again and is not refused for that
        await until(lambda: running.waiting() == 1)
        running.supervisor.grant(engine, epoch="e2")
        assert (await clients[0].answer()).status == 200
        assert (await clients[2].answer()).status == 200
        for client in clients:
            chat(client, PATIENT)
            assert (await client.answer()).status == 200
        assert running.gateway.guard is not None
        use = running.gateway.guard.identify(b"/", PATIENT.encode(), None)
        assert use is not None and (use.in_flight, use.waiting) == (0, 0)


@in_loop
async def test_requests_a_minute_are_limited() -> None:
    async with guarded() as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        chat(client, SLOW)
        assert (await client.answer()).status == 200
        chat(client, SLOW)
        answer = await client.answer()
        assert answer.status == 429 and 50 <= int(answer.headers["retry-after"]) <= 60
        chat(client, USE)
        assert (await client.answer()).status == 200, "others are not concerned"


@in_loop
async def test_keys_are_replaced_while_serving() -> None:
    keys: list[tuple[Key, ...]] = [KEYS]
    reload: list[Callable[[], None]] = []
    async with stage(keys=lambda: keys[-1], reload=reload) as running:
        assert (await get(running, "/v1/models", USE)).status == 200
        keys.append((Key("use", hash_key("sk-new")),))
        for part in reload:
            part()
        assert (await get(running, "/v1/models", USE)).status == 401
        assert (await get(running, "/v1/models", "sk-new")).status == 200


@in_loop
async def test_each_request_of_a_connection_stands_for_itself() -> None:
    keys: list[tuple[Key, ...]] = [KEYS]
    reload: list[Callable[[], None]] = []
    async with stage(keys=lambda: keys[-1], reload=reload) as running:
        engine = await running.engine()
        running.supervisor.grant(engine)
        client = await running.client()
        for text in ("hi", "hello there"):  # the same head but for the length
            client.send(
                payload={"model": "alpha", "messages": [{"role": "user", "content": text}]},
                headers=(f"x-api-key: {USE}",),
            )
            assert (await client.answer()).status == 200
            assert USE.encode() not in engine.requests[-1].raw_head
            assert json.loads(engine.requests[-1].body)["messages"][0]["content"] == text
        assert (
            engine.requests[0].headers["x-request-id"] != engine.requests[1].headers["x-request-id"]
        )
        keys.append(tuple(key for key in KEYS if key.name != "use"))
        for part in reload:
            part()
        chat(client, USE)
        assert (await client.answer()).status == 401
        assert len(engine.requests) == 2


# ---- pages in a user's browser -------------------------------------------------------------------


@in_loop
async def test_a_web_page_cannot_give_orders_where_there_are_no_keys() -> None:
    async with stage() as running:
        for header in ("Origin: https://evil.example", "Sec-Fetch-Site: cross-site"):
            for path in ("/control/status", "/unload", "/logs/alpha"):
                answer = await get(running, path, None, header)
                assert answer.status == 403 and answer.code == "forbidden"
            assert (await get(running, "/v1/models", None, header)).status == 200
        assert not [message for message in running.supervisor.heard if message.kind == "ask"]


# ---- TLS -----------------------------------------------------------------------------------------


def certificate(directory: Path, name: str) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip


async def name_of(running: Stage, trusted: Path) -> str:
    """The common name that the gateway shows, after a request over that connection."""
    context = ssl.create_default_context(cafile=str(trusted))
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=context)
    client = Client(reader, writer)
    running.clients.append(client)
    client.send("/health", method="GET")
    assert (await client.answer()).status == 200
    shown = writer.get_extra_info("peercert")
    return str(dict(pair for part in shown["subject"] for pair in part)["commonName"])


@in_loop
async def test_tls_and_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    certificate(tmp_path, "first")
    files = (str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    reload: list[Callable[[], None]] = []
    async with stage(tls=files, reload=reload) as running:
        assert await name_of(running, tmp_path / "cert.pem") == "first"
        engine = await running.engine()
        running.supervisor.grant(engine)
        context = ssl.create_default_context(cafile=files[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=context)
        kept = Client(reader, writer)
        running.clients.append(kept)
        kept.chat()
        assert (await kept.answer()).status == 200
        kept.chat(padding="x" * 4_000_000)  # read in turns
        assert (await kept.answer()).status == 200
        certificate(tmp_path, "second")
        for part in reload:
            part()
        assert await name_of(running, tmp_path / "cert.pem") == "second"
        kept.chat()
        assert (await kept.answer()).status == 200, "who is connected stays so"
        (tmp_path / "cert.pem").rename(tmp_path / "good.pem")
        (tmp_path / "cert.pem").write_text("not a certificate")
        for part in reload:
            part()
        assert await name_of(running, tmp_path / "good.pem") == "second"


# ---- senders ------------------------------------------------------------------------------------


@in_loop
async def test_a_head_that_trickles_in_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is progress; the whole must still come in time."""
    monkeypatch.setattr(front, "RECEIVE_SECS", 0.2)
    monkeypatch.setattr("llmux.gateway.server.SWEEP_SECS", 0.02)
    async with stage() as running:
        client = await running.client()
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
        answering = asyncio.ensure_future(client.head())
        for letter in b"x-slow: " + b"a" * 10_000:
            if answering.done():
                break
            client.writer.write(bytes([letter]))
            await asyncio.wait([answering], timeout=0.02)
        assert (await soon(answering)).status == 408


@pytest.mark.parametrize("keeps_on", [True, False])
def test_a_large_body_has_time_as_long_as_it_keeps_a_rate(
    keeps_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "RECEIVE_RATE", 100)  # 6000 bytes in every 60 s
    monkeypatch.setattr("llmux.gateway.server.SWEEP_SECS", 0.01)

    @in_loop
    async def run() -> None:
        async with stage() as running:
            running.supervisor.grant(await running.engine())
            now = 1000.0
            running.gateway.clock = lambda: now
            body = b'{"model":"alpha","x":"' + b"y" * 20_000 + b'"}'
            client = await running.client()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            client.writer.write(head.encode() + body[:7000])
            await until(lambda: running.gateway.bodies.used == 7000)
            for sent in (14_000, 20_000):
                now += 50.0
                to = sent if keeps_on else 7000 + sent // 1000
                client.writer.write(body[running.gateway.bodies.used : to])
                await until(lambda to=to: running.gateway.bodies.used in (to, 0))  # type: ignore[misc]
            if keeps_on:
                client.writer.write(body[to:])
            assert (await client.answer()).status == (200 if keeps_on else 408)

    run()


# ---- nothing is told -----------------------------------------------------------------------------


@in_loop
async def test_no_log_line_holds_a_key_or_a_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "llmux")
    prompt = "the-secret-prompt"

    async def dies(request: EngineRequest) -> None:
        request.die()

    async with guarded(config=dataclasses.replace(a_config(wait_secs=0.2))) as running:
        engine = await running.engine(dies)
        running.supervisor.grant(engine)
        for key in (USE, "sk-wrong-secret"):
            client = await running.client()
            message = {"role": "user", "content": prompt}
            client.send(
                payload={"model": "alpha", "messages": [message]}, headers=(f"x-api-key: {key}",)
            )
            assert (await client.answer()).status in (401, 502, 503, 504)
        broken = await running.client()
        broken.writer.write(f"GET /{prompt}\x01 HTTP/1.1\r\nx-api-key: {USE}\r\n\r\n".encode())
        assert (await broken.answer()).status == 400
    said = "\n".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records if r.exc_info is None)
    assert said, "something was said, about the engine"
    for secret in (USE, ADMIN, "sk-wrong-secret", prompt):
        assert secret not in said

"""Without keys: a local user is no administrator, and a web page is no local user."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import Client, Response, Stage, a_config, in_loop, stage

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.gateway.admission import keys

ADMIN, USE = "sk-admin", "sk-use"
KEYS = (Key("admin", hash_key(ADMIN), role=KeyRole.ADMIN), Key("use", hash_key(USE)))
ORDERS = [
    ("POST", "/control/sleep"), ("POST", "/control/pin"), ("POST", "/control/unpin"),
    ("POST", "/control/mode"), ("POST", "/control/eviction"), ("POST", "/control/switch"),
    ("POST", "/control/wake"), ("POST", "/unload"), ("GET", "/unload"), ("GET", "/logs/alpha"),
    ("GET", "/logs"), ("GET", "/logs/stream/alpha"), ("POST", "/control/not-yet-described"),
    ("GET", "/logs/org/one"),
]  # fmt: skip


async def ask(s: Stage, method: str, path: str, *headers: str, host: str = "x") -> Response:
    client = await s.client()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Content-Length: 2", *headers]
    client.writer.write("\r\n".join([*lines, "", "{}"]).encode())
    return await client.head()


def asked(s: Stage) -> list[str]:
    return [message.verb for message in s.supervisor.heard if message.kind == "ask"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "path"), ORDERS)
def test_an_order_over_tcp_needs_an_admin_key(method: str, path: str) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            assert (await ask(s, method, path)).status == 403
            assert asked(s) == []

    run()


@in_loop
async def test_inference_and_reading_of_harmless_state_need_none() -> None:
    async with stage() as s:
        results: dict[str, Any] = {"metrics": {}, "events": {"events": []}}
        s.supervisor.answer = lambda ask: {
            "ok": True, "result": results.get(ask.verb, {"models": {}})
        }  # fmt: skip
        await s.granted()
        for path in ("/control/status", "/control/eviction", "/running", "/metrics", "/events",
                     "/v1/models", "/health", "/health/weights", "/openapi.json"):  # fmt: skip
            assert (await ask(s, "GET", path)).status == 200, path
        assert (await (await s.chat()).answer()).status == 200
        assert (await ask(s, "GET", "/nothing")).status == 404
        assert (await ask(s, "GET", "/control/pin")).status in (403, 405)


@pytest.mark.parametrize("trusted", [True, False])
def test_root_on_a_unix_socket_is_an_administrator(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not trusted:
        monkeypatch.setattr(keys, "TRUSTED_UIDS", frozenset())
        own = os.getuid()
        monkeypatch.setattr("llmux.gateway.admission.keys.os.getuid", lambda: own + 1)

    @in_loop
    async def run() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        async with stage(also=(listener,)) as s:
            for method, path in ORDERS[:8]:
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
                client = Client(reader, writer)
                s.clients.append(client)
                client.send(path, method=method, body=b'{"model": "alpha"}')
                assert (await client.answer()).status == (200 if trusted else 403), path

    run()


@in_loop
async def test_state_is_changed_by_get_only_with_an_admin_key() -> None:
    async with stage(keys=lambda: KEYS) as s:
        s.supervisor.answer = lambda _ask: {"ok": True, "result": {"models": {}}}
        assert (await ask(s, "GET", "/unload", f"x-api-key: {ADMIN}")).status == 200
        assert (await ask(s, "GET", "/unload", f"x-api-key: {USE}")).status == 403


@in_loop
async def test_a_page_cannot_reach_the_gateway_under_its_own_name() -> None:
    cases = (
        ("evil.example:3000", 403), ("evil.example", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("", 403), ("evil.example.", 403), ("[evil.example]", 403),
        ("localhost:3000", 200), ("127.0.0.1:3000", 200), ("[::1]:3000", 200), ("gpubox", 200),
        ("LOCALHOST", 200), ("a.localhost", 200), ("x.internal:80", 200), ("10.0.0.7", 200),
        ("llm.example.org", 200), ("LLM.example.org:443", 200),
    )  # fmt: skip
    async with stage(a_config(allowed_hosts=("llm.example.org",))) as s:
        s.supervisor.answer = lambda _ask: {"ok": True, "result": {"models": {}}}
        for host, status in cases:
            for path in ("/v1/models", "/control/status"):
                assert (await ask(s, "GET", path, host=host)).status == status, host
    async with stage(keys=lambda: KEYS) as s:
        for host, _ in cases:
            found = await ask(s, "GET", "/v1/models", f"x-api-key: {USE}", host=host)
            assert found.status == 200, "a page has no key"


@in_loop
async def test_a_foreign_page_may_not_post() -> None:
    async with stage() as s:
        await s.granted()
        for origin, host, status in (
            ("https://evil.example", "localhost:3000", 403),
            ("null", "localhost:3000", 403),
            ("http://localhost:8080", "localhost:3000", 403),
            ("http://localhost:3000", "localhost:3000", 200),
        ):
            client = await s.client()
            body = '{"model": "alpha"}'
            client.writer.write(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n"
                f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert (await client.answer()).status == status, origin
    async with stage(a_config(cors_origins=("https://chat.example",))) as s:
        await s.granted()
        for origin, status in (("https://chat.example", 200), ("https://evil.example", 403)):
            client = await s.client()
            client.send(payload={"model": "alpha"}, headers=(f"Origin: {origin}",))
            assert (await client.answer()).status == status


@in_loop
async def test_two_keys_are_one_too_many() -> None:
    """Which of them counts two readers may decide differently."""
    async with stage(keys=lambda: KEYS) as s:
        for first, second in (
            (f"Authorization: Bearer {USE}", f"Authorization: Bearer {ADMIN}"),
            (f"x-api-key: {USE}", f"X-API-Key: {USE}"),
        ):
            assert (await ask(s, "GET", "/v1/models", first, second)).status == 400
        both = (f"Authorization: Bearer {USE}", "x-api-key: other")
        assert (await ask(s, "GET", "/v1/models", *both)).status == 200, "as some clients send them"

"""``llmux serve``, whole and in the test's process: supervisor, gateway and what joins them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from daemon_host import Host, allow, certificate, free_port, host_for
from runtime_harness import drivers_on, in_loop

from llmux.cli import client
from llmux.config.schema import Config
from llmux.daemon.serve import serve
from llmux.errors import ConfigError, LlmuxError
from llmux.runtime.host import Drivers

CHAT = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host_for(monkeypatch) as made:
        monkeypatch.setenv("XDG_RUNTIME_DIR", made.files.runtime)
        made.write(gateway={"listen": [f"unix:{made.top}/http"]}, metrics_port=0)
        yield made


@asynccontextmanager
async def serving(host: Host, *, twins: bool = True, **settings: Any) -> AsyncIterator[None]:
    """It is ready; at the end it is told to stop, and has ended."""

    def drivers(config: Config, runtime: str) -> Drivers:
        assert set(config.models) == {"a"}
        return drivers_on(host.world, runtime)

    if twins:
        settings["drivers"] = drivers
    async with host.hearing():
        task = asyncio.create_task(serve(host.config, **settings))
        ready = asyncio.create_task(host.told("READY=1"))
        try:
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                yield
        finally:
            ready.cancel()
            if not task.done():
                signal.raise_signal(signal.SIGTERM)
            await asyncio.wait([task, ready])
        await task
    assert os.listdir(host.files.runtime) == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def get(
    path: str, where: str, key: str | None = None, body: bytes | None = None
) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_unix_connection(where)
    return await exchange(reader, writer, path, key, body)


async def exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    key: str | None = None,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: x", "Connection: close"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    writer.transport.abort()
    return int(head.split()[1]), answer


@in_loop
async def test_one_process_serves_with_keys_tls_metrics_and_a_control_socket(host: Host) -> None:
    made, key = certificate(host.top)
    port, http, metrics = free_port(), f"{host.top}/http", f"{host.top}/metrics"
    gateway = {
        "listen": [f"unix:{http}", f"127.0.0.1:{port}"], "metrics_listen": [f"unix:{metrics}"],
        "keys_file": allow(host, "sk-one"), "tls_certificate": made, "tls_key": key,
    }  # fmt: skip
    host.write(gateway=gateway, metrics_port=1)
    control = f"{host.top}/control"
    async with serving(host, control=control):
        assert (await get("/v1/models", http))[0] == 200, "root needs no key there"

        async def status_for(key: str) -> int:
            trusted = ssl.create_default_context(cafile=made)
            streams = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)
            return (await exchange(*streams, "/v1/models", key))[0]

        assert [await status_for(key) for key in ("sk-one", "sk-two")] == [200, 401]
        status, text = await get("/metrics", metrics)
        assert status == 200 and b"llmux_" in text

        await asyncio.to_thread(client.ask, control, "load", {"model": "a"}, timeout=20)
        await host.told("STATUS=serving a")
        assert "a" in host.world.engines
        host.write(models=host.document["models"] | {"b": {"model_path": "b"}})
        allow(host, "sk-two")
        signal.raise_signal(signal.SIGHUP)
        await host.told("RELOADING=1")
        await host.told("READY=1")
        assert [await status_for(key) for key in ("sk-one", "sk-two")] == [401, 200]
        state = await asyncio.to_thread(client.ask, control, "status", timeout=20)
        assert set(state["models"]) == {"a", "b"}
    assert host.world.names("units.close") == ["units.close"]
    assert "control" not in os.listdir(host.top)


@in_loop
async def test_who_waits_at_the_end_is_told_at_once_since_no_model_can_come(host: Host) -> None:
    held = host.world.hold("units.start")
    async with serving(host):
        waiting = asyncio.create_task(get("/v1/chat/completions", f"{host.top}/http", body=CHAT))
        await held.reached.wait()
        signal.raise_signal(signal.SIGTERM)
        assert (await waiting)[0] == 503


@in_loop
async def test_models_are_warmed_up_where_that_is_configured(host: Host) -> None:
    host.write(warmup=True)
    async with serving(host):
        await host.world.hold("engine.sleep").reached.wait()
        shutil.rmtree(host.files.runtime)  # whoever tidies: the end is as ever
        os.mkdir(host.files.runtime)


@in_loop
async def test_without_other_drivers_engines_are_children_and_a_port_takes_the_lists_place(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.write(policy=host.document["policy"] | {"eviction": "offload+checkpoint"})
    with pytest.raises(ConfigError):
        async with serving(host, twins=False):
            pass
    host.write(
        policy=host.document["policy"] | {"eviction": "offload+keep_running"},
        vllm_command=["/bin/true"],
    )
    port = free_port()
    async with serving(host, twins=False, port=port):
        streams = await asyncio.open_connection("127.0.0.1", port)
        assert (await exchange(*streams, "/health"))[0] == 200
        assert "http" not in os.listdir(host.top)
        (runtime,) = os.listdir(host.files.runtime)
        assert runtime.startswith("llmux-")
        control = f"{host.files.runtime}/{runtime}/control.sock"
        assert f"other verbs reach this process with --socket {control}" in caplog.messages
        state = await asyncio.to_thread(client.ask, control, "status", timeout=20)
        assert set(state["models"]) == {"a"}


@in_loop
async def test_a_control_socket_that_was_asked_for_must_be_free(host: Host) -> None:
    path = f"{host.top}/control"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(LlmuxError, match=f"cannot listen at {path}: another llmux does"):
            async with serving(host, control=path):
                pass
    async with serving(host, control=path):  # what a former one left is replaced
        pass
    os.mkdir(path)
    with pytest.raises(LlmuxError, match=f"cannot listen at {path}: Is a directory"):
        async with serving(host, control=path):
            pass
    assert host.world.names("units.close") == ["units.close"] * 3


@in_loop
async def test_without_a_usual_control_socket_it_serves_all_the_same(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        deep = os.path.join(host.files.runtime, "d" * 100)
        os.mkdir(deep)
        monkeypatch.setenv("XDG_RUNTIME_DIR", deep)
        task = asyncio.create_task(
            serve(host.config, drivers=lambda _, runtime: drivers_on(host.world, runtime))
        )
        async with host.hearing():
            await host.told("READY=1")
            assert "no socket for other verbs at" in caplog.text
            signal.raise_signal(signal.SIGTERM)
            await task
        assert os.listdir(deep) == []


@in_loop
async def test_bad_keys_and_taken_addresses_are_refused_before_anything_is_made(
    host: Host,
) -> None:
    host.write(gateway=host.document["gateway"] | {"keys_file": f"{host.top}/none"})
    with pytest.raises(LlmuxError, match="none"):
        async with serving(host):
            pass
    host.write(gateway={"listen": [f"unix:{host.top}/no/such/directory"]})
    with pytest.raises(OSError, match="cannot listen on"):
        async with serving(host):
            pass
    assert host.world.calls == []

"""Several gateway workers are one gateway: its keys, its limits, its ids."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import pytest
from gateway_harness import SECONDS, Client, EngineRequest, StubEngine, in_loop, until
from workers_rig import (
    front,
    gone,
    hub_and_front,
)

from llmux.config.keyfile import make_key

pytestmark = pytest.mark.long


@in_loop
async def test_every_worker_asks_for_keys() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "keys"
        file.write_text("")
        async with front(2, keys_file=str(file)) as gateway:
            await gateway.told("READY=1")
            for _ in range(6):
                client = await gateway.client()
                client.send("/v1/models", method="GET", headers=("x-api-key: wrong",))
                answer = await client.answer()
                assert answer.status == 401 and answer.code == "invalid_api_key"
            client = await gateway.client()
            client.send("/control/status", method="GET")
            assert (await client.answer()).status == 200, "our own user, seen on a unix socket"


@in_loop
async def test_metrics_of_several_workers_have_a_port_of_their_own() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = f"{name}/metrics.sock"
        async with front(2, metrics_listen=[f"unix:{path}"]) as gateway:
            await gateway.told("READY=1")
            for target, status in (("/metrics", 200), ("/v1/models", 404)):
                reader, writer = await asyncio.open_unix_connection(path)
                client = Client(reader, writer)
                client.send(target, method="GET")
                answer = await client.answer()
                assert answer.status == status
                assert (b"llmux_gateway_connections" in answer.body) is (status == 200)
                client.leave()


@in_loop
async def test_a_reload_reaches_every_worker() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "keys"
        file.write_text("")
        async with front(2, keys_file=str(file)) as gateway:
            await gateway.told("READY=1")
            secret, line = make_key("new")
            file.write_text(line)
            gateway.process.send_signal(signal.SIGHUP)
            accepted = 0
            async with asyncio.timeout(SECONDS):
                while accepted < 8:  # by whichever worker takes the connection
                    client = await gateway.client()
                    client.send("/v1/models", method="GET", headers=(f"x-api-key: {secret}",))
                    accepted = accepted + 1 if (await client.answer()).status == 200 else 0
                    client.leave()


@in_loop
async def test_all_workers_together_keep_a_limit_that_they_divide() -> None:
    async with front(2, max_waiting=4) as gateway:
        await gateway.told("READY=1")
        clients = [await gateway.client() for _ in range(12)]
        for client in clients:
            client.chat()
        answers = [asyncio.create_task(client.answer()) for client in clients]

        def waiting() -> int:
            return sum(demand.waiting for demand in gateway.supervisor.demands.values())

        await until(lambda: waiting() + sum(answer.done() for answer in answers) == 12)
        assert 2 <= waiting() <= 4  # by one worker or by both
        for answer in answers:
            if answer.done():
                assert (answer.result().status, answer.result().code) == (503, "queue_full")
            answer.cancel()


@in_loop
async def test_a_response_is_found_through_every_worker_and_after_a_restart() -> None:
    async def keep(request: EngineRequest) -> None:
        method = request.line.partition(" ")[0]
        request.json({"id": "resp_1"} if method == "POST" else {"line": request.line})

    async with hub_and_front(3) as (hub, gateway):
        engine = StubEngine(keep, path=str(gateway.directory / "engine.sock"))
        await engine.start()
        hub.grant(engine, "beta")
        first = await gateway.client()
        first.send("/v1/responses", {"model": "beta", "input": "x"})
        assert (await first.answer()).json() == {"id": "resp_1"}

        async def read_by(connections: int) -> None:
            for _ in range(connections):
                client = await gateway.client()
                client.send("/v1/responses/resp_1", method="GET")
                answer = await client.answer()
                assert answer.json() == {"line": "GET /v1/responses/resp_1 HTTP/1.1"}

        await read_by(12)
        for pid in hub.pids():
            os.kill(pid, signal.SIGKILL)
            await gone(pid)
        await hub.joined(6)
        await read_by(6)
        await engine.stop()


@in_loop
async def test_a_request_id_is_never_given_twice() -> None:
    async with front(2) as gateway:
        await gateway.told("READY=1")
        seen = set()
        for _ in range(20):
            client = await gateway.client()
            client.send("/health", method="GET")
            seen.add((await client.answer()).headers["x-request-id"])
        assert len(seen) == 20

"""``llmux serve``: both halves in one process, from the first check to the last close."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import config_of, drivers_on, in_loop, model

from llmux.config.schema import Config, GatewayConfig
from llmux.daemon import serve as serving
from llmux.daemon.supervisor import Supervisor
from llmux.errors import ConfigError, LlmuxError, Problem
from tests.twins.world import World

CONFIG = config_of(model("a"))
PROBLEM = Problem("x.yaml", 1, 1, "models.a", "it is missing")


class Notifier:
    def __init__(self) -> None:
        self.told: list[str] = []

    def status(self, text: str) -> None:
        self.told.append(text)


def marked(config: Config) -> Any:
    return SimpleNamespace(config=config, marks={})


class Embedded:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
        self.config, self.seen, self.front = config, list[Any](), dict[str, Any]()
        self.world, self.notifier = World(), Notifier()
        self.stop: asyncio.Event | None = None
        self.front_fails = False
        secrets = SimpleNamespace(
            keys="keys", tls="tls", check=lambda: self.seen.append("secrets checked")
        )

        def put(name: str, value: Any) -> None:
            monkeypatch.setattr(serving, name, value)

        put("load_marked", lambda path: (self.seen.append(path), marked(config))[1])
        put("load_config", lambda path: (self.seen.append(path), config)[1])
        put("check_embedded", lambda given, marks: () if (given, marks) == (config, {}) else None)
        put("Secrets", lambda given: secrets)
        put("bind_all", lambda addresses, access=None: list(addresses))
        put("stop_on_signals", lambda stop: setattr(self, "stop", stop))
        put("embedded_drivers", self._drivers)
        put("reload_on_hangup", lambda *given: self.seen.append(("hangup", *given)))
        put("SdNotifier", lambda: self.notifier)
        put("serve_gateway", self._front)
        put("warm", self._warm)

    def _drivers(self, config: Config, runtime: str) -> Any:
        self.seen.append(f"drivers in {os.path.dirname(runtime)}")
        assert os.path.basename(runtime).startswith("llmux-") and config is self.config
        return drivers_on(self.world, runtime)

    async def _front(self, config: Config, **given: Any) -> None:
        self.front = given
        link: socket.socket = given["link"]
        if self.front_fails:
            link.close()
            raise RuntimeError("the front end ended")
        await given["stop"].wait()
        self.seen.append("front stopped")
        link.close()

    async def _warm(self, supervisor: Supervisor, stop: asyncio.Event) -> None:
        self.seen.append(supervisor)
        assert stop is self.stop, "signals set it, too"
        assert supervisor.control_socket._path is not None
        await asyncio.sleep(0)
        stop.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("port", [None, 4242])
@in_loop
async def test_one_process_serves_until_it_is_stopped_and_leaves_nothing(
    tmp_path: Path, port: int | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        config = replace(CONFIG, port=71, metrics_port=72, gateway=GatewayConfig())
        stage = Embedded(monkeypatch, config)
        control = tmp_path / "control"
        await serving.serve("/x.yaml", port=port, control=str(control))
        assert stage.seen[:2] == ["/x.yaml", "secrets checked"]
        assert stage.seen[-1] == "front stopped"
        front = stage.front
        assert front["sockets"] == [f"127.0.0.1:{port or 71}"]
        assert front["metrics_sockets"] == ["127.0.0.1:72"]
        assert (front["keys"], front["tls"], front["notifier"]) == ("keys", "tls", stage.notifier)
        assert front["reload"] == [] and front["drain_limits"].waiters is False
        given = next(one for one in stage.seen if isinstance(one, Supervisor))
        kinds = [type(one).__name__ for one in given.loop.listeners]
        assert kinds[-1] == "StatusLine"
        assert given.loop.listeners[-1]._notifier is stage.notifier  # type: ignore[attr-defined]
        hangup = ("hangup", given, stage.notifier, front["reload"])
        assert hangup in stage.seen and f"drivers in {tmp_path}" in stage.seen
        assert os.listdir(tmp_path) == [], "its directory and its socket are gone"
        (supervisor,) = [one for one in stage.seen if isinstance(one, Supervisor)]
        assert supervisor._load(False) is config and stage.seen[-1] == "/x.yaml"
        assert "units.close" in stage.world.names()


@in_loop
async def test_a_front_end_that_ends_by_itself_ends_the_process(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        stage = Embedded(monkeypatch, CONFIG)
        stage.front_fails = True

        async def idle(*_: Any) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(serving, "warm", idle)
        with pytest.raises(RuntimeError, match="the front end ended"):
            await serving.serve("/x.yaml")
        assert "units.close" in stage.world.names()


@in_loop
async def test_a_front_end_that_runs_ends_nothing(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        stage, warmed = Embedded(monkeypatch, CONFIG), asyncio.Event()

        async def idle(*_: Any) -> None:
            warmed.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(serving, "warm", idle)
        running = asyncio.create_task(serving.serve("/x.yaml"))
        await warmed.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not running.done() and "front stopped" not in stage.seen
        assert stage.stop is not None
        stage.stop.set()
        await running
        assert "front stopped" in stage.seen


@in_loop
async def test_what_needs_a_service_is_a_problem_before_anything_is_bound(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Embedded(monkeypatch, CONFIG)
        monkeypatch.setattr(serving, "check_embedded", lambda *_: (PROBLEM,))
        with pytest.raises(ConfigError):
            await serving.serve("/x.yaml")
        assert stage.seen == ["/x.yaml"]
        made: list[Any] = []

        def own(config: Config, runtime: str) -> Any:
            made.append(config)
            return drivers_on(stage.world, runtime)

        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        await serving.serve("/x.yaml", drivers=own)
        assert made == [CONFIG], "with drivers of its own every eviction is allowed"


@in_loop
async def test_the_control_socket_that_was_asked_for_is_one_or_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bound: list[Any] = []
    failure: list[OSError] = []

    async def listen(path: str, group: int | None) -> None:
        bound.append((path, group))
        if failure:
            raise failure[0]

    supervisor: Any = SimpleNamespace(control_socket=SimpleNamespace(listen=listen))
    await serving._open_control(supervisor, None, "/usual")
    await serving._open_control(supervisor, str(tmp_path / "mine"), "/usual")
    assert bound == [("/usual", None), (str(tmp_path / "mine"), None)]
    assert "other verbs reach this process with --socket /usual" in caplog.messages
    caplog.clear()
    failure.append(OSError(36, "File name too long"))
    await serving._open_control(supervisor, None, "/usual")
    assert ["no socket for other verbs at /usual" in line for line in caplog.messages] == [True]
    with pytest.raises(LlmuxError, match=r"cannot listen at /mine: File name too long$"):
        await serving._open_control(supervisor, "/mine", "/usual")
    other = tmp_path / "other"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(other))
        listening.listen()
        with pytest.raises(LlmuxError, match="another llmux does") as refused:
            await serving._open_control(supervisor, str(other), "/usual")
        assert refused.value.hint == "choose another --socket"

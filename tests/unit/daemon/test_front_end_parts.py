"""``llmux gateway`` and its worker, taken apart: what each part is given and does with it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import in_virtual_time

from llmux.config.schema import Config, GatewayConfig
from llmux.daemon import gateway as module
from llmux.daemon import gateway_worker
from llmux.daemon.gateway import Installed, Secrets, _kept_sockets, gateway, metrics_sockets
from llmux.gateway.stopping import Handover
from llmux.gateway.workers import BEATS, HAND_OVER, HANG_SECS


class Sock:
    """A listening socket, of which only its name matters."""

    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def close(self) -> None:
        self.closed = True


class Notifier:
    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def store_fds(self, name: str, sockets: Sequence[Any]) -> None:
        self.told.append((f"store {name}", [sock.name for sock in sockets]))

    def drop_fds(self, name: str) -> None:
        self.told.append((f"drop {name}", None))


def config_of(**settings: Any) -> Config:
    port = settings.pop("metrics_port", 0)
    return Config(gateway=GatewayConfig(**settings), metrics_port=port)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_parent_gets_what_is_configured_and_a_worker_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    config, notifier, made = config_of(workers=workers), Notifier(), dict[str, Any]()
    keys, tls, code = object(), ("c", "k"), tmp_path / "code"

    class Parent:
        outdated: Callable[[], bool]

        def __init__(self, *args: Any) -> None:
            made["parent"], made["object"] = args, self

        def run(self) -> None:
            made["ran"] = True

    def load(path: str, *, check_files: bool) -> Any:
        made["loaded"] = (path, check_files)
        return SimpleNamespace(config=config)

    checked: list[Config] = []
    secrets = SimpleNamespace(keys=keys, tls=tls, check=lambda: checked.append(config))
    imported: list[str] = []
    monkeypatch.setattr(module, "LastGood", lambda where: SimpleNamespace(load=load, at=where))
    monkeypatch.setattr(module, "SdNotifier", lambda: notifier)
    monkeypatch.setattr(module, "Secrets", lambda given: secrets)
    monkeypatch.setattr(module, "_kept_sockets", lambda *given: ((["s"], ["m"]), given)[0])
    monkeypatch.setattr(module, "Parent", Parent)
    monkeypatch.setattr(module.importlib, "import_module", imported.append)
    given: list[tuple[Any, Any]] = []
    monkeypatch.setattr(gateway_worker, "work", lambda *args, **kw: given.append((args, kw)))
    unit = cast_unit()
    gateway("/etc/x.yaml", link="/link", hang_secs=7.0, orphan_secs=9.0, unit=unit, code=str(code))
    assert (made["loaded"], checked, made["ran"]) == (("/etc/x.yaml", False), [config], True)
    count, work, parents_notifier, parents_unit, hang_secs = made["parent"]
    assert (count, parents_notifier, parents_unit, hang_secs) == (workers, notifier, unit, 7.0)
    assert imported == ["llmux.daemon.gateway_worker"] * (workers - 1), "once, where it is shared"
    told = object()
    work(told)
    assert given == [((config, told), {
        "link": "/link", "sockets": ["s"], "metrics_sockets": ["m"], "keys": keys, "tls": tls,
        "hang_secs": 7.0, "orphan_secs": 9.0,
    })]  # fmt: skip
    assert made["object"].outdated() is False
    code.touch()
    assert made["object"].outdated() is True


def cast_unit() -> Any:
    return object()


def test_the_own_unit_is_asked_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = config_of(), list[Any]()
    marked = SimpleNamespace(config=config)
    load = SimpleNamespace(load=lambda path, check_files: marked)
    monkeypatch.setattr(module, "LastGood", lambda where: load)
    monkeypatch.setattr(module, "SdNotifier", Notifier)
    monkeypatch.setattr(module, "_kept_sockets", lambda *_: ([], []))
    monkeypatch.setattr(module, "OwnUnit", lambda: "own")
    parent = SimpleNamespace(run=lambda: None)
    monkeypatch.setattr(module, "Parent", lambda *args: made.extend(args) or parent)
    gateway("/etc/x.yaml")
    assert made[3:] == ["own", HANG_SECS]


# ---- sockets -------------------------------------------------------------------------------------


def test_sockets_are_those_kept_and_the_others_are_bound_stored_or_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(listen=("127.0.0.1:1", "unix:/a/b"), metrics_port=7)
    notifier, bound = Notifier(), list[Any]()
    client, metrics = config.listen_addresses(), config.metrics_addresses()
    names = ["listen-" + a.replace(":", "_").replace("/", "-") for a in client]
    metric = "metrics-" + metrics[0].replace(":", "_")
    old, kept = Sock("old"), Sock("kept")
    monkeypatch.setattr(
        module, "listen_fds", lambda: {names[1]: [kept], "gone": [old], names[0]: []}
    )

    def bind(addresses: Sequence[str], access: object) -> list[Any]:
        bound.append((tuple(addresses), access))
        return [Sock(*addresses)]

    monkeypatch.setattr(module, "bind_all", bind)
    found, of_metrics = _kept_sockets(config, notifier)  # type: ignore[arg-type]
    assert [sock.name for sock in found] == [client[0], "kept"]  # type: ignore[attr-defined]
    assert [sock.name for sock in of_metrics] == list(metrics)  # type: ignore[attr-defined]
    access = module.access_of(config)
    assert bound == [((client[0],), access), ((metrics[0],), access)]
    assert notifier.told == [
        (f"store {names[0]}", [client[0]]), (f"store {metric}", [metrics[0]]), ("drop gone", None),
    ]  # fmt: skip
    assert (old.closed, kept.closed) == (True, False)


def test_a_metrics_port_that_is_taken_is_logged_only(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(metrics_port=7)

    def taken(addresses: Sequence[str]) -> list[socket.socket]:
        raise OSError(98, f"cannot listen on {addresses[0]}")

    assert metrics_sockets(config, taken) == []
    assert "no metrics port: " in caplog.text and "cannot listen on" in caplog.text
    assert metrics_sockets(config, lambda addresses: list(addresses)) == list(  # type: ignore[arg-type]
        config.metrics_addresses()
    )


def test_code_that_is_replaced_or_gone_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "code"
    file.write_text("1")
    installed = Installed(str(file))
    assert not installed.is_replaced()
    later = os.stat(file).st_mtime_ns + 1
    os.utime(file, ns=(later, later))
    assert installed.is_replaced()
    os.utime(file, ns=(later - 1, later - 1))
    assert not installed.is_replaced()
    other = tmp_path / "other"
    other.write_text("1")
    os.utime(other, ns=(later - 1, later - 1))
    other.replace(file)
    assert installed.is_replaced(), "another file with the same time"
    file.unlink()
    assert installed.is_replaced()
    assert not Installed(str(file)).is_replaced()


def test_secrets_are_looked_for_where_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    none = Secrets(config_of())
    assert (none.keys, none.tls) == (None, None)
    none.check()
    assert Secrets(config_of(tls_certificate="c")).tls is None
    assert Secrets(config_of(tls_key="k")).tls is None
    both = Secrets(
        config_of(tls_certificate="credential:c", tls_key="/k", keys_file="credential:x")
    )
    assert both.tls == (f"{tmp_path}/c", "/k")
    assert both.keys is not None
    with pytest.raises(Exception, match=f"{tmp_path}/x"):
        both.check()
    (tmp_path / "x").write_text("")
    (tmp_path / "x").chmod(0o600)
    with pytest.raises(Exception, match=f"{tmp_path}/c"):
        both.check()


# ---- one worker ----------------------------------------------------------------------------------


def test_a_worker_beats_as_often_as_its_parent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    told = SimpleNamespace(life=object())
    monkeypatch.setattr(
        gateway_worker, "serve_gateway", lambda *args, **kw: given.update(kw, args=args)
    )
    monkeypatch.setattr(gateway_worker, "_serve", lambda *args: args)
    monkeypatch.setattr(gateway_worker, "run", lambda main: given.update(run=main))
    config = config_of(drain_timeout_secs=33.0)
    gateway_worker.work(
        config, told, link="/l", sockets=[], metrics_sockets=["m"], keys=None,  # type: ignore[list-item,arg-type]
        tls=("c", "k"), hang_secs=BEATS * 2.0, orphan_secs=9.0,
    )  # fmt: skip
    serving, *rest = given.pop("run")
    assert rest == [told.life, 33.0, 9.0]
    serving()
    assert given == {
        "args": (config,), "link": "/l", "sockets": [], "metrics_sockets": ["m"], "notifier": told,
        "watchdog_secs": gateway_worker.WATCHDOG_BEATS * 2.0, "keys": None, "tls": ("c", "k"),
    }  # fmt: skip


class Worker:
    """One whose signals are handlers that a test calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.handlers: dict[int, Callable[[], Any]] = {}
        self.timers: list[tuple[int, float]] = []
        monkeypatch.setattr(loop, "add_signal_handler", self.handlers.__setitem__)
        monkeypatch.setattr(
            signal, "setitimer", lambda which, secs: self.timers.append((which, secs))
        )
        self.life, self.parent = socket.socketpair()
        self.given: dict[str, Any] = {}
        self.task = asyncio.create_task(gateway_worker._serve(self.serving, self.life, 30.0, 100.0))

    async def serving(self, **given: Any) -> None:
        self.given = given
        await given["stop"].wait()

    @property
    def handover(self) -> Handover:
        found = self.given["handover"]
        assert isinstance(found, Handover)
        return found

    async def end(self) -> None:
        await self.task
        for sock in (self.life, self.parent):
            sock.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@in_virtual_time
async def test_a_worker_that_is_to_stop_hurries_while_it_drains_too(
    number: signal.Signals,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        worker = Worker(monkeypatch)
        await asyncio.sleep(0)
        assert (worker.handover.secs, worker.handover.begun) == (30.0, False)
        assert not worker.given["stop"].is_set()
        worker.handlers[number]()
        assert worker.given["stop"].is_set() and worker.handover.hurried.is_set()
        worker.handlers[HAND_OVER]()
        assert (worker.handover.begun, worker.timers) == (False, []), "it stops already"
        await worker.end()


@in_virtual_time
async def test_a_worker_hands_over_once_and_the_kernel_ends_one_that_hangs() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        worker = Worker(monkeypatch)
        await asyncio.sleep(0)
        heard: list[str] = []
        worker.given["reload"] += [lambda: heard.append("keys"), lambda: heard.append("tls")]
        worker.handlers[signal.SIGHUP]()
        assert heard == ["keys", "tls"]
        for _ in range(2):
            worker.handlers[HAND_OVER]()
        assert worker.timers == [(signal.ITIMER_REAL, 30.0 + HANG_SECS)]
        assert worker.handover.begun and not worker.handover.hurried.is_set()
        await worker.end()


@in_virtual_time
async def test_a_worker_without_its_parent_serves_on_for_a_while() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        worker = Worker(monkeypatch)
        await asyncio.sleep(1.0)
        worker.parent.close()
        await asyncio.sleep(50.0)
        assert not worker.given["stop"].is_set()
        await asyncio.sleep(51.0)
        assert worker.given["stop"].is_set() and worker.handover.begun
        assert len(worker.timers) == 1
        await worker.end()

"""``llmux supervise`` and an order without it, whole: on the twins and on files of their own."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import grp
import json
import logging
import os
import pwd
import signal
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from daemon_host import Host, host_for
from runtime_harness import drivers_on, in_loop

from llmux.config.advice import WITHOUT_KEYS
from llmux.config.schema import Config
from llmux.daemon.gpu_driver import restart_for_driver
from llmux.daemon.supervise import order, supervise
from llmux.drivers.systemd.own_unit import OwnUnit
from llmux.errors import ConfigError, LlmuxError, Reason, Refused
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.host import Drivers
from tests.twins.units import MemoryUnits

GATEWAY, ADMINS = 40001, 40002  # the service's user and the group of who may give orders


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host_for(monkeypatch) as made:
        yield made


class Unit(OwnUnit):
    """``successor``: systemd starts one."""

    def __init__(self, successor: bool = False) -> None:
        self.successor = successor
        self.restarted = asyncio.Event()

    def is_restarting(self) -> bool:
        return self.successor

    def restart(self) -> bool:
        self.restarted.set()
        return True


class Units(MemoryUnits):
    stopping = False  # everything

    async def ending(self) -> bool:
        return self.stopping


@asynccontextmanager
async def supervising(
    host: Host, unit: Unit | None = None, look: Any = None, **drivers: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """It is up; at the end it is told to stop, and has ended."""

    def made(config: Config) -> Drivers:
        assert set(config.models) == {"a"}
        return replace(drivers_on(host.world, host.files.runtime), **drivers)

    settings = {} if look is None else {"restart_for_driver": look}
    async with host.hearing():
        task = asyncio.create_task(
            supervise(host.config, files=host.files, drivers=made, unit=unit or Unit(), **settings)
        )
        await asyncio.wait(
            [task, asyncio.ensure_future(host.up.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        try:
            assert not task.done(), task.exception()
            yield task
        finally:
            if not task.done():
                signal.raise_signal(signal.SIGTERM)
            await asyncio.wait([task])
        await task


@contextmanager
def held(lock: str) -> Iterator[None]:
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_free(lock: str) -> bool:
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def kept(host: Host) -> set[str] | None:
    """Models of the configuration that a next supervisor goes on with."""
    try:
        text = Path(host.files.last_good, "config.json").read_text()
    except FileNotFoundError:
        return None
    return set(json.loads(text)["models"])


def models_in(file: str, *keys: str) -> Any:
    found = json.loads(Path(file).read_text())["state"]
    for key in keys:
        found = found[key]
    return found


def orders(host: Host) -> list[str]:
    events = map(json.loads, Path(host.files.events).read_text().splitlines())
    return [event["result"] for event in events if event["type"] == "order"]


@in_loop
async def test_a_supervisor_from_its_start_to_its_stop(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("WATCHDOG_USEC", "6000")
    files = host.files
    async with supervising(host):
        assert WITHOUT_KEYS in caplog.messages
        assert f"supervises {len(host.document['models'])} models" in caplog.text
        assert stat.S_IMODE(os.stat(host.top / "images").st_mode) == 0o700
        assert stat.S_IMODE(os.stat(files.lock).st_mode) == 0o600
        assert not is_free(files.lock)
        assert kept(host) == {"a"}
        async with host.worker():
            await host.told("READY=1")
            await host.told("WATCHDOG=1")
            await host.ask("load", model="a")
            await host.told("STATUS=")
            assert orders(host) == ["given", "done"]
            assert "a" in models_in(files.notes, "models")
            await host.ask("sleep", model="a")
            assert host.world.engines["a"].frozen
            await host.ask("wake", model="a")
            assert set(models_in(files.learned)) == {"a"}

            models = dict(host.document["models"])
            host.write(models=models | {"b": {"model_path": "b", "extra_args": ["--hf-token=x"]}})
            assert (await host.ask("reload", dry_run=True))["added"] == ["b"]
            assert kept(host) == {"a"}
            assert "shows in the process list" not in caplog.text
            signal.raise_signal(signal.SIGHUP)
            await host.told("RELOADING=1")
            await host.told("READY=1")
            assert set((await host.ask("status"))["models"]) == {"a", "b"} == kept(host)
            assert "shows in the process list" in caplog.text
            host.write(models={"c": {}})
            signal.raise_signal(signal.SIGHUP)
            await host.told("STATUS=configuration not reloaded")
            assert kept(host) == {"a", "b"}
            signal.raise_signal(signal.SIGTERM)
            await host.told("STOPPING=1")
    assert kept(host) is None, "the next start reads the file"
    assert "stopped; the engines of a go on" in caplog.text
    assert "a" in host.world.engines
    assert host.world.names("units.close") == ["units.close"]
    assert "supervisor.sock" not in os.listdir(files.runtime)
    assert is_free(files.lock)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_loop
async def test_a_restart_leaves_the_configuration_in_force_and_says_nothing(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = asyncio.Event()

    async def start_cuda() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    units = Units(host.world)
    async with supervising(host, Unit(successor=True), units=units, cuda_started=start_cuda):
        host.write(policy=host.document["policy"] | {"eviction": "retain+freeze"})
        await host.ask("reload")
    assert cancelled.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert kept(host) == {"a"}
    assert "stopped;" not in caplog.text


@pytest.mark.parametrize("all_ends", [True, False])
@in_loop
async def test_frozen_engines_are_thawed_where_everything_is_stopped(
    host: Host, all_ends: bool
) -> None:
    units = Units(host.world)
    async with supervising(host, units=units):
        await host.ask("load", model="a")
        await host.ask("sleep", model="a")
        units.stopping = all_ends
    assert host.world.names("freezer.thaw") == ["freezer.thaw a"] * all_ends


@pytest.mark.parametrize("loaded", [True, False])
@in_loop
async def test_a_driver_that_comes_later_restarts_the_supervisor(host: Host, loaded: bool) -> None:
    """Where it was there from the beginning only NVML is waited for."""
    version = host.top / "version"
    version.touch()
    looked = asyncio.Event()
    nvml = [False]

    def has_nvml() -> bool:
        looked.set()
        return nvml[0]

    look = functools.partial(
        restart_for_driver, version=str(version), every=0.001, has_nvml=has_nvml
    )

    async def start_cuda() -> None: ...

    host.world.gpu_bytes = ()
    unit = Unit()
    async with supervising(host, unit, look, cuda_started=start_cuda if loaded else None):
        if loaded:
            await looked.wait()
            assert not unit.restarted.is_set()
            nvml[0] = True
        await unit.restarted.wait()
        assert "restarted-for-driver" in os.listdir(host.files.runtime)


@in_loop
async def test_with_gpus_no_driver_is_waited_for(host: Host) -> None:
    def look(*_: Any, **__: Any) -> Any:
        raise AssertionError

    async with supervising(host, look=look):
        pass


# ---- who may come in ----------------------------------------------------------------------------


def named(monkeypatch: pytest.MonkeyPatch, users: Mapping[str, int], groups: Any) -> None:
    """Users and groups of the host, with these besides."""

    def found(find: Callable[[str], Any], entries: Mapping[str, int], kind: str) -> Any:
        def look(name: str) -> Any:
            if name in entries:
                number = entries[name]
                return SimpleNamespace(
                    **{f"{kind}_name": name, "pw_uid": number, f"{kind[:2]}_gid": number}
                )
            return find(name)

        return look

    monkeypatch.setattr(pwd, "getpwnam", found(pwd.getpwnam, users, "pw"))
    monkeypatch.setattr(grp, "getgrnam", found(grp.getgrnam, groups, "gr"))


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user: needs root")
@in_loop
async def test_the_gateways_user_comes_in_and_admins_do_and_nobody_else(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        groups = {"llmux": GATEWAY, "llmux-admin": ADMINS}
        named(monkeypatch, {"llmux": GATEWAY}, groups)
        monkeypatch.chdir(host.files.runtime)
        for directory in (host.top, Path(host.files.runtime)):
            directory.chmod(0o755)
        os.chmod(host.config, 0o600)
        async with supervising(host):
            assert f"chgrp llmux {host.config}" in caplog.text
            found = os.stat(host.files.socket)
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, GATEWAY)
            assert struct.pack("<HHI", 0x08, 0o6, ADMINS) in os.getxattr(
                host.files.socket, "system.posix_acl_access"
            )
            assert os.stat(host.files.last_good).st_gid == GATEWAY
            assert await answers_as(GATEWAY, "status")
            assert not await answers_as(GATEWAY, "load")
            assert await answers_as(ADMINS, "load")
            assert not await answers_as(40003, "status")


async def answers_as(number: int, verb: str) -> bool:
    """Whether a user and group of this number gets an answer."""
    group = os.getegid()
    os.setegid(number)
    os.seteuid(number)
    try:
        reader, writer = await asyncio.open_unix_connection("supervisor.sock")
    except PermissionError:
        return False
    finally:
        os.seteuid(0)
        os.setegid(group)
    writer.write(b'{"type":"hello","role":"cli"}\n')
    ask = {"type": "ask", "id": 1, "verb": verb, "args": {"model": "a"}}
    writer.write(json.dumps(ask).encode() + b"\n")
    try:
        answer = json.loads(await reader.readline() or b"{}")
    except ConnectionError:
        return False
    finally:
        writer.close()
    return bool(answer.get("ok"))


# ---- refusals -----------------------------------------------------------------------------------


@in_loop
async def test_a_host_has_one_supervisor_and_the_next_waits_for_an_order_to_end(
    host: Host,
) -> None:
    with held(host.files.lock):
        starting = asyncio.create_task(asyncio.wait_for(supervised(host), 20))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not starting.done() and "supervisor.sock" not in os.listdir(host.files.runtime)
    await starting


async def supervised(host: Host) -> None:
    async with supervising(host):
        assert not is_free(host.files.lock)


@in_loop
async def test_a_supervisor_that_cannot_listen_leaves_nothing_held(host: Host) -> None:
    files = replace(host.files, runtime=f"{host.files.runtime}/{'d' * 100}")
    os.mkdir(files.runtime)
    with pytest.raises(OSError, match=r"too long"):
        await supervise(
            host.config, files=files, unit=Unit(),
            drivers=lambda _: drivers_on(host.world, host.files.runtime),
        )  # fmt: skip
    assert host.world.names("units.close") == ["units.close"]
    assert is_free(files.lock)
    assert kept(host) is None


def without(host: Host, verb: str, **args: Any) -> Any:
    """An order while no supervisor runs."""
    return order(
        host.config, verb, args, ignore_progress,
        files=host.files, drivers=lambda _: drivers_on(host.world, host.files.runtime),
    )  # fmt: skip


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_orders_without_a_supervisor_are_carried_out_and_noted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert without(host, "load", model="a") == {"message": "Model a is serving"}
    assert without(host, "status")["models"]["a"]["state"] == "serving"
    assert "a" in models_in(host.files.notes, "models")
    assert orders(host) == ["given", "done"]
    assert is_free(host.files.lock)
    with held(host.files.lock):
        assert without(host, "images") == {"images": []}
        before = open_files()
        with pytest.raises(Refused, match="another llmux does so") as refused:
            without(host, "load", model="a")
        assert refused.value.reason is Reason.ALREADY_RUNNING
        assert open_files() == before
    host.write(models={"c": {}})
    with pytest.raises(ConfigError):
        without(host, "status")


@pytest.mark.parametrize("uid", [1, 1000])
def test_an_order_without_a_supervisor_is_roots(
    host: Host, monkeypatch: pytest.MonkeyPatch, uid: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(LlmuxError, match="not root"):
        without(host, "status")


def test_without_its_directory_there_is_no_supervisor(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    os.rmdir(host.files.runtime)
    with pytest.raises(LlmuxError, match=r"cannot supervise engines: .*lock: No such") as failed:
        without(host, "load", model="a")
    assert "systemd-tmpfiles" in str(failed.value.hint)


def test_what_another_user_could_redirect_is_refused_by_a_reload_and_an_order(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    images = host.top / "open"
    images.mkdir()
    images.chmod(0o777)
    host.write(checkpoint={"images_dir": str(images)})
    with pytest.raises(ConfigError, match="images directory is not safe"):
        without(host, "status")

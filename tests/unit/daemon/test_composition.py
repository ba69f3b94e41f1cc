"""``llmux supervise``, single orders and ``llmux serve``: what is built, and what runs when."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import config_of, drivers_on, in_loop, model

from llmux.config.schema import (
    AfterReboot,
    CheckpointConfig,
    Config,
    Eviction,
    Process,
    Weights,
)
from llmux.daemon import gpu_driver
from llmux.daemon import supervise as module
from llmux.daemon.supervisor import Supervisor
from llmux.drivers.cuda.driver import LIBRARY
from llmux.errors import ConfigError, LlmuxError, Problem, Reason, Refused
from llmux.protocol import Ask
from llmux.runtime.control.orders import ignore_progress
from tests.twins.disk import MemoryEvents, MemoryStore
from tests.twins.world import World

CONFIG = config_of(model("a"))
PROBLEM = Problem("x.yaml", 1, 1, "models.a", "it is missing")


class Notifier:
    def __init__(self) -> None:
        self.told: list[str] = []

    def status(self, text: str) -> None:
        self.told.append(f"status {text}")

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.told.append(name)


def marked(config: Config = CONFIG) -> Any:
    return SimpleNamespace(config=config, marks={}, notes=())


class Stage:
    """The module's parts of the world, replaced; ``seen`` has what was done in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Path, config: Config) -> None:
        self.world, self.config, self.seen = World(), config, list[Any]()
        self.notifier, self.made = Notifier(), dict[str, Any]()
        self.stop: asyncio.Event | None = None
        self.restarting = False
        self.noted: list[Config] = []
        self.drivers = drivers_on(self.world, str(runtime))
        self.problems: tuple[Problem, ...] = ()

        def put(name: str, value: Any) -> None:
            monkeypatch.setattr(module, name, value)

        note = self.seen.append
        keeper = SimpleNamespace(
            load=lambda path: (note(("load", path)), marked(config))[1],
            keep=lambda sources: note(("keep", sources)), forget=lambda: note("forget"),
        )  # fmt: skip
        put("LastGood", lambda where, group=None: (note(("last good", where, group)), keeper)[1])

        def checks(path: str) -> Callable[[Config, Any], list[Problem]]:
            def check(given: Config, marks: Any) -> list[Problem]:
                assert (given, marks) == (config, {})
                return [replace(PROBLEM, path=path)]

            return check

        put("check_host", checks(PROBLEM.path))
        put("check_gateway_reads", checks("gateway"))
        put("Notes", lambda: SimpleNamespace(say=lambda read: self.noted.append(read.config)))
        put("check_directories", lambda *_: self.problems)
        put("make_private", lambda path: note(("private", path)))
        put("SdNotifier", lambda: self.notifier)
        put("_system_drivers", lambda given: self.drivers)
        put("FileStateStore", self._store)
        put("EventFile", lambda path: self.made.setdefault(path, MemoryEvents()))
        put("Supervisor", self._supervisor)
        put("uids_of", lambda user: frozenset({len(user)}))
        put("gid_of", lambda group: {"llmux": 71, module.ADMINS: 72}[group])
        put("stop_on_signals", lambda stop: setattr(self, "stop", stop))
        put("_alone", self._alone)
        put("announce", self._announce)
        put("watch_pressure", self._work("pressure"))
        put("feed_watchdog", self._work("watchdog"))
        put("reload_on_hangup", self._hangup)
        put("watchdog_interval", lambda: None)
        put("OwnUnit", lambda: SimpleNamespace(is_restarting=lambda: self.restarting, restart="r"))
        monkeypatch.setattr(gpu_driver, "restart_for_driver", self._work("driver"))

    def _store(self, path: str) -> MemoryStore:
        return self.made.setdefault(path, MemoryStore())  # type: ignore[no-any-return]

    def _supervisor(self, *args: Any, **kwargs: Any) -> Supervisor:
        self.made["given"] = kwargs
        made = self.made["supervisor"] = Supervisor(*args, **kwargs)
        listen, close = made.control_listen = self._listen, made.close  # type: ignore[attr-defined]

        async def closed() -> None:
            self.seen.append("closed")
            await close()

        prepare = made.prepare

        async def prepared() -> None:
            await prepare()
            made.control_socket.listen = listen  # type: ignore[method-assign]

        made.prepare, made.close = prepared, closed  # type: ignore[method-assign]
        return made

    def _hangup(self, supervisor: Supervisor, notifier: Any) -> None:
        assert (supervisor, notifier) == (self.made["supervisor"], self.notifier)
        self.seen.append("reload on hangup")

    async def _listen(self, *args: Any) -> None:
        self.seen.append(("listen", *args))

    async def _alone(self, *, patience: float) -> int:
        self.seen.append(("alone", patience))
        return os.open("/dev/null", os.O_RDONLY)

    def _work(self, name: str) -> Callable[..., Any]:
        async def work(*args: Any, **kwargs: Any) -> None:
            self.seen.append((name, *args[1:], kwargs))
            await asyncio.Event().wait()

        return work

    async def _announce(self, supervisor: Supervisor, notifier: Any, stop: asyncio.Event) -> None:
        assert (supervisor, notifier) == (self.made["supervisor"], self.notifier)
        assert stop is self.stop, "signals set it, too"
        self.seen.append("announced")
        await asyncio.sleep(0)
        stop.set()
        await asyncio.Event().wait()

    def names(self) -> list[str]:
        return [one if isinstance(one, str) else one[0] for one in self.seen]


@in_loop
async def test_the_daemon_runs_its_works_until_it_is_stopped(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(monkeypatch, tmp_path, replace(CONFIG, sources=("/etc/x.yaml",)))
        await module.supervise("/etc/x.yaml")
        assert stage.seen[:3] == [
            ("last good", module.LAST_GOOD, 71), ("load", "/etc/x.yaml"),
            ("private", CONFIG.checkpoint.images_dir),
        ]  # fmt: skip
        assert ("listen", module.SOCKET, 71) in stage.seen
        assert ("keep", ("/etc/x.yaml",)) in stage.seen
        assert stage.names()[3:] == [
            "alone", "listen", "keep", "reload on hangup", "announced", "pressure", "forget",
            "closed",
        ]  # fmt: skip
        assert stage.seen[3] == ("alone", module.TAKEOVER_SECS)
        assert stage.noted == [stage.config]
        kinds = [type(one).__name__ for one in stage.made["supervisor"].loop.listeners]
        assert kinds == [
            "_Catalogue",
            "Telemetry",
            "EventLog",
            "ArrivalLog",
            "Learned",
            "StatusLine",
        ]
        assert stage.notifier.told[-1] == "stopping"
        given = stage.made["given"]
        assert (given["allowed_uids"], given["admins"]) == (frozenset({5}), 72)
        assert given["events"] is stage.made[module.EVENTS]
        assert given["learned"] is stage.made[module.LEARNED]


@pytest.mark.parametrize("cuda", [True, False])
@in_loop
async def test_a_restart_keeps_the_copy_and_without_a_gpu_a_driver_is_looked_for(
    tmp_path: Path, cuda: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(monkeypatch, tmp_path, CONFIG)
        stage.restarting = True
        stage.world.gpu_bytes = ()
        started: list[bool] = []

        async def start() -> None:
            started.append(True)
            await asyncio.Event().wait()

        stage.drivers = replace(stage.drivers, cuda_started=start if cuda else None)
        monkeypatch.setattr(module, "watchdog_interval", lambda: 9.0)
        await module.supervise("/etc/x.yaml")
        assert "forget" not in stage.names()
        assert ("driver", module.DRIVER_MARK, {"loaded": cuda}) in stage.seen
        assert ("watchdog", stage.notifier, 9.0, {}) in stage.seen
        assert started == [True] * cuda
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@in_loop
async def test_what_does_not_fit_the_host_is_a_warning_and_foreign_directories_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(monkeypatch, tmp_path, CONFIG)
        await module.supervise("/etc/x.yaml")
        assert str(PROBLEM) in caplog.messages
        assert str(replace(PROBLEM, path="gateway")) in caplog.messages
        stage.seen.clear()
        stage.problems = (PROBLEM,)
        with pytest.raises(ConfigError):
            await module.supervise("/etc/x.yaml")
        assert "alone" not in stage.names()


@in_loop
async def test_a_reload_is_checked_noted_and_kept_and_a_dry_run_is_not_kept(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(monkeypatch, tmp_path, CONFIG)
        await module.supervise("/etc/x.yaml")
        new = replace(CONFIG, sources=("/etc/y.yaml",))
        monkeypatch.setattr(module, "load_marked", lambda path: marked(new))
        reload = stage.made["given"]["reload"]
        stage.seen.clear()
        stage.noted.clear()
        assert reload(True) is new
        assert (stage.names(), stage.noted) == (["private"], [])
        assert reload(False) is new
        assert stage.noted == [new]
        assert stage.seen[1:] == [
            ("private", new.checkpoint.images_dir),
            ("keep", ("/etc/y.yaml",)),
        ]
        stage.problems = (PROBLEM,)
        for dry_run in (True, False):
            with pytest.raises(ConfigError):
                reload(dry_run)


@pytest.mark.parametrize("verb", ["images", "image_here", "status"])
@in_loop
async def test_an_order_without_a_supervisor_takes_its_place_unless_it_only_looks(
    tmp_path: Path, verb: str
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(monkeypatch, tmp_path, CONFIG)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        ask = Ask(1, verb, {"model": "a", "salt": "0" * 32})
        answer = await module._order(CONFIG, ask, ignore_progress)
        key = {"images": "images", "image_here": "identity", "status": "models"}[verb]
        assert key in answer
        looks = verb != "status"
        assert stage.seen == ([] if looks else [("alone", 0.0), "closed"])
        assert stage.made["given"]["events"] is stage.made[module.EVENTS]
        assert stage.made["supervisor"]._load(True) is CONFIG
        monkeypatch.setattr(os, "geteuid", lambda: 1)
        with pytest.raises(LlmuxError, match="not root") as refused:
            await module._order(CONFIG, ask, ignore_progress)
        assert refused.value.hint == "use sudo"


def test_an_order_runs_in_a_loop_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    async def carried(config: Config, ask: Ask, report: Any) -> str:
        given.extend((config, ask, report))
        return "done"

    monkeypatch.setattr(module, "_load", lambda path: (path, CONFIG)[1])
    monkeypatch.setattr(module, "_order", carried)
    assert module.order("/etc/x.yaml", "load", {"model": "a"}, ignore_progress) == "done"
    assert given == [CONFIG, Ask(1, "load", {"model": "a"}), ignore_progress]


@in_loop
async def test_one_supervisor_runs_and_the_next_waits_for_as_long_as_it_is_told(
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "RUNTIME", str(tmp_path))
        lock = await module._alone(patience=0.0)
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
        now, sleeps = [10.0], list[float]()
        monkeypatch.setattr(module, "monotonic", lambda: now[0])

        async def sleep(secs: float) -> None:
            sleeps.append(secs)
            now[0] += 1.0

        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
        with pytest.raises(Refused) as refused:
            await module._alone(patience=2.0)
        assert (refused.value.reason, len(sleeps)) == (Reason.ALREADY_RUNNING, 2)
        os.close(lock)
        os.close(await module._alone(patience=0.0))
        monkeypatch.setattr(module, "RUNTIME", str(tmp_path / "gone"))
        with pytest.raises(LlmuxError, match=r"gone/lock: No such file") as missing:
            await module._alone(patience=0.0)
        assert "systemd-tmpfiles" in str(missing.value.hint)


# ---- which drivers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "library", "tool", "plugin", "cuda", "start"),
    [
        (False, None, False, False, None, None),
        (False, None, True, False, None, None),
        (True, None, False, False, f"driver {LIBRARY}", "cuda"),
        (False, "/lib/x", False, False, "driver /lib/x", "cuda"),
        (True, "/lib/x", False, False, "driver /lib/x", "cuda"),
        (True, None, True, False, "tool", f"driver {LIBRARY}"),
        (True, "/lib/x", True, False, "tool", "driver /lib/x"),
        (True, None, True, True, None, f"driver {LIBRARY}"),
        (False, None, False, True, None, None),
    ],
)
def test_cuda_state_is_saved_by_one_of_three_and_started_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: bool, library: str | None, tool: bool,
    plugin: bool, cuda: str | None, start: str | None,
) -> None:  # fmt: skip
    class Driver:
        def __init__(self, library: str = LIBRARY) -> None:
            self.name = f"driver {library}"

    version = tmp_path / "version"
    for wanted, name in ((driver, "version"), (tool, "tool"), (plugin, "cuda_plugin.so")):
        if wanted:
            (tmp_path / name).touch()
    monkeypatch.setattr(gpu_driver, "VERSION", str(version))
    monkeypatch.setattr(module, "CudaDriver", Driver)
    monkeypatch.setattr(module, "CudaCheckpointTool", lambda path: SimpleNamespace(name="tool"))
    monkeypatch.setattr(gpu_driver, "CudaStart", lambda own: own)
    if library is None:
        monkeypatch.delenv("LLMUX_LIBCUDA", raising=False)
    else:
        monkeypatch.setenv("LLMUX_LIBCUDA", library)
    settings = CheckpointConfig(
        cuda_checkpoint_path=str(tmp_path / "tool"), cuda_plugin_dir=str(tmp_path)
    )
    made: Any = module.cuda_driver(Config(checkpoint=settings))
    assert (made.name if made is not None else None) == cuda
    started: Any = module.cuda_start(made)
    assert (started.name if started is not None else None) == (cuda if start == "cuda" else start)
    assert start != "cuda" or started is made


@pytest.mark.parametrize("after", [AfterReboot.TRY, AfterReboot.DISCARD])
def test_criu_has_the_store_and_the_paths_that_are_configured(
    monkeypatch: pytest.MonkeyPatch, after: AfterReboot
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        module, "ImageStore", lambda *args, **kw: made.append((args, kw)) or "store"
    )
    monkeypatch.setattr(module, "Criu", lambda *args, **kw: (args, kw))
    monkeypatch.setattr(module, "_plugin_dir", lambda config: "/plugin")
    settings = CheckpointConfig(images_dir="/i", max_bytes=7, after_reboot=after, criu_path="/criu")
    units: Any = "units"
    found: Any = module._checkpointer(Config(checkpoint=settings), units)
    assert found == (
        ("units", "store", "/i"), {"criu_path": "/criu", "cuda_plugin_dir": "/plugin"}
    )  # fmt: skip
    assert made == [(("/i",), {"max_bytes": 7, "across_reboot": after is AfterReboot.TRY})]


def test_a_trial_needs_a_model_and_an_eviction_that_can_be_read() -> None:
    trial = module._trial({"model": "a", "eviction": "discard+checkpoint"})
    assert trial is not None
    assert (trial.model, trial.eviction) == ("a", Eviction(Weights.DISCARD, Process.CHECKPOINT))
    for args in ({"model": "a"}, {"model": "a", "eviction": "x"}, {}):
        assert module._trial(args) is None

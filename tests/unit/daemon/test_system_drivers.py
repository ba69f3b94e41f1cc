"""The drivers of the service, one by one, and how a daemon and an order of its own end."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import config_of, drivers_on, in_loop, model
from test_composition import PROBLEM, Stage, marked

from llmux.config.schema import CheckpointConfig, Config
from llmux.daemon import supervise as module
from llmux.daemon.supervisor import Supervisor
from llmux.errors import ConfigError, Refused
from llmux.protocol import Ask
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.host import Places
from tests.twins.disk import MemoryStore
from tests.twins.world import World

CONFIG = config_of(model("a"))


@pytest.mark.parametrize("start", [True, False])
def test_each_driver_of_the_service_is_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, start: bool
) -> None:
    def put(name: str, value: Any) -> None:
        monkeypatch.setattr(module, name, value)

    units = SimpleNamespace(SystemdUnits=lambda: "units")
    monkeypatch.setitem(sys.modules, "llmux.drivers.systemd.units", units)  # type: ignore[arg-type]
    put("CgroupFreezer", lambda: "freezer")
    put("VllmEngine", lambda: "engine")
    put("EngineFiles", lambda where: f"output in {where}")
    put("find_gpu_observer", lambda: "gpu")
    put("PageCache", lambda: "weights")
    put("engine_users", lambda config: ("users of", config))
    put("engine_environment", lambda: {"PATH": "/bin"})
    put("_checkpointer", lambda config, units: ("criu of", config, units))
    put("cuda_driver", lambda config: ("cuda of", config))
    wait = object()
    put("cuda_start", lambda cuda: SimpleNamespace(wait=wait) if start and cuda else None)
    config = replace(
        CONFIG, vllm_command=("v", "x"), checkpoint=CheckpointConfig(keep_images=False)
    )
    made = module._system_drivers(config)
    assert {one.name: getattr(made, one.name) for one in fields(made)} == {
        "units": "units", "freezer": "freezer", "engine": "engine",
        "output": f"output in {module.LOGS}", "gpu": "gpu", "identity": module.engine_identity,
        "portable_identity": module.portable_identity, "checkpointer": ("criu of", config, "units"),
        "cuda": ("cuda of", config), "cuda_started": wait if start else None, "keep_images": False,
        "available_memory": module.available_bytes, "files_are_here": module.model_files_are_here,
        "weights": "weights",
        "places": Places(module.RUNTIME, ("users of", config), ("v", "x"), {"PATH": "/bin"}),  # type: ignore[arg-type]
    }  # fmt: skip


# ---- ends ----------------------------------------------------------------------------------------


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Watched(Stage):
    """Whose locks and last words are seen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.locks: list[int] = []
        self.marks: Any = {}

    async def _alone(self, *, patience: float) -> int:
        self.locks.append(await super()._alone(patience=patience))
        return self.locks[-1]

    def _supervisor(self, *args: Any, **kwargs: Any) -> Supervisor:
        made = super()._supervisor(*args, **kwargs)

        async def told() -> None:
            self.seen.append("told what goes on")

        async def thawed() -> None:
            self.seen.append("thawed")

        made.tell_what_goes_on, made.thaw_if_ending = told, thawed  # type: ignore[method-assign]
        return made


@pytest.mark.parametrize("restarting", [True, False])
@in_loop
async def test_a_stop_is_told_and_thaws_and_gives_the_lock_back(
    tmp_path: Path, restarting: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Watched(monkeypatch, tmp_path, CONFIG)
        stage.restarting = restarting
        await module.supervise("/etc/x.yaml")
        words = ["forget", "told what goes on"]
        names = stage.names()
        wanted = [*([] if restarting else words), "thawed", "closed"]
        assert names[names.index("pressure") + 1 :] == wanted
        assert [is_open(fd) for fd in stage.locks] == [False]


@in_loop
async def test_a_daemon_that_cannot_listen_closes_what_it_opened(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Watched(monkeypatch, tmp_path, CONFIG)

        async def listen(*_: Any) -> None:
            raise OSError(13, "Permission denied")

        monkeypatch.setattr(stage, "_listen", listen)
        with pytest.raises(OSError, match="Permission denied"):
            await module.supervise("/etc/x.yaml")
        assert stage.names()[-1] == "closed"
        assert [is_open(fd) for fd in stage.locks] == [False]
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(Refused):
            await module._order(CONFIG, Ask(1, "load", {"model": "x"}), ignore_progress)
        assert [is_open(fd) for fd in stage.locks] == [False, False]


@in_loop
async def test_directories_that_cannot_be_made_are_judged_all_the_same(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage, judged = Stage(monkeypatch, tmp_path, CONFIG), list[Any]()

        def make(path: str) -> None:
            raise PermissionError(13, "no", path)

        def check(config: Config, marks: Any) -> tuple[Any, ...]:
            judged.append((config, marks))
            return stage.problems

        monkeypatch.setattr(module, "make_private", make)
        monkeypatch.setattr(module, "check_directories", check)
        module._require_own_directories(marked(CONFIG))
        assert judged == [(CONFIG, {})]
        stage.problems = (PROBLEM,)
        with pytest.raises(ConfigError):
            module._require_own_directories(marked(CONFIG))


@in_loop
async def test_an_order_ends_with_the_loop_s_fault_if_it_has_one(tmp_path: Path) -> None:
    world = World()
    supervisor = Supervisor(
        CONFIG, drivers_on(world, str(tmp_path)), MemoryStore(), lambda _: CONFIG
    )
    prepare = supervisor.prepare

    async def broken() -> None:
        raise ValueError("an invariant")

    async def prepared() -> None:
        await prepare()
        supervisor.loop.run = broken  # type: ignore[method-assign]

    supervisor.prepare = prepared  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="an invariant"):
        await module.carry_out(supervisor, Ask(1, "load", {"model": "a"}), ignore_progress)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert "units.close" in world.names()


@pytest.mark.parametrize("verb", ["load", "checkpoint"])
@in_loop
async def test_only_an_image_that_is_made_is_a_trial_of_its_eviction(
    tmp_path: Path, verb: str
) -> None:
    supervisor = Supervisor(
        CONFIG, drivers_on(World(), str(tmp_path)), MemoryStore(), lambda _: CONFIG
    )
    args = {"model": "a", "eviction": "discard+checkpoint"}
    await module.carry_out(supervisor, Ask(1, verb, args), ignore_progress)
    assert (supervisor.loop.state.models["a"].trial is not None) is (verb == "checkpoint")

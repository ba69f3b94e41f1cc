"""The drivers of the service: which there are, and what each is given of the configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_harness import config_of, in_loop, model

from llmux.config.schema import (
    AfterReboot,
    CheckpointConfig,
    Config,
    Eviction,
    Process,
    Weights,
)
from llmux.daemon.gpu_driver import VERSION, CudaStart
from llmux.daemon.host import look_as_engines, look_at_host
from llmux.daemon.supervise import cuda_driver, cuda_start, system_drivers
from llmux.drivers.criu.driver import Criu
from llmux.drivers.cuda.driver import LIBRARY, CudaDriver
from llmux.drivers.cuda.tool import CudaCheckpointTool
from llmux.drivers.doctor.facts import GIB, Host, Ran
from llmux.drivers.engine.identity import engine_identity, portable_identity
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.engine.vllm import VllmEngine
from llmux.drivers.engine.weights import PageCache
from llmux.drivers.images.identity import model_files_are_here
from llmux.drivers.memory import available_bytes
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.drivers.processes.users import ModelUsers
from llmux.drivers.systemd.units import SystemdUnits
from llmux.ports import LaunchSpec
from llmux.runtime.host import Drivers

DRIVER = os.path.exists(VERSION)  # this host has one of NVIDIA's


@pytest.fixture(autouse=True)
def own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMUX_LIBCUDA", raising=False)


def config_with(**checkpoint: Any) -> Config:
    return Config(
        models=config_of(model("a")).models, vllm_command=("v", "x"),
        checkpoint=CheckpointConfig(**checkpoint),
    )  # fmt: skip


async def closed(drivers: Drivers) -> None:
    await drivers.units.close()
    if drivers.cuda is not None:
        await drivers.cuda.close()


@pytest.mark.parametrize("library", [True, False])
@in_loop
async def test_the_service_has_each_driver(tmp_path: Path, library: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if library:
            monkeypatch.setenv("LLMUX_LIBCUDA", str(tmp_path / "libcuda.so"))
        made = system_drivers(config_with(images_dir=str(tmp_path), keep_images=False))
        await closed(made)
        cuda = library or DRIVER
        kinds = {
            "units": SystemdUnits, "freezer": CgroupFreezer, "engine": VllmEngine,
            "output": EngineFiles, "checkpointer": Criu, "weights": PageCache,
        }  # fmt: skip
        assert {name: type(getattr(made, name)) for name in kinds} == kinds
        assert isinstance(made.cuda, CudaDriver) is cuda
        assert (made.cuda_started is not None) is cuda
        assert made.gpu.available is DRIVER
        assert made.keep_images is False
        assert made.identity is engine_identity and made.portable_identity is portable_identity
        assert made.available_memory is available_bytes
        assert made.files_are_here is model_files_are_here
        places = made.places
        assert (places.runtime, places.vllm_command) == ("/run/llmux", ("v", "x"))
        assert isinstance(places.users, ModelUsers)
        assert "/usr/bin" in places.environment["PATH"].split(":")
        assert made.output.paths("a") == (
            "/var/log/llmux/a/stdout.log",
            "/var/log/llmux/a/stderr.log",
        )


@pytest.mark.parametrize("after", list(AfterReboot))
@in_loop
async def test_criu_is_the_one_and_keeps_its_images_as_configured(
    tmp_path: Path, after: AfterReboot
) -> None:
    (tmp_path / "cuda_plugin.so").touch()
    made = system_drivers(
        config_with(
            images_dir=str(tmp_path / "images"), criu_path="no-criu", max_bytes=5,
            after_reboot=after, cuda_plugin_dir=str(tmp_path),
        )
    )  # fmt: skip
    await closed(made)
    criu = made.checkpointer
    assert isinstance(criu, Criu)
    assert (await criu.check()).problems == ("no-criu is not installed",)
    assert criu._units is made.units
    store = criu._store
    assert (store.root, store.max_bytes) == (str(tmp_path / "images"), 5)
    assert criu._images_dir == store.root
    assert bool(store._ignore) is (after is AfterReboot.TRY)
    assert criu._plugin_dir == str(tmp_path)
    assert made.cuda is None, "CRIU's own plugin does it"


def calls_of(driver: Any) -> Any:
    return driver._calls


@pytest.mark.parametrize("library", [None, "lib/x.so"])
@pytest.mark.parametrize("tool", [None, "there", "missing"])
def test_cuda_is_the_library_or_a_tool_that_is_there_where_there_is_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str | None, tool: str | None
) -> None:
    (tmp_path / "there").touch()
    if library is not None:
        monkeypatch.setenv("LLMUX_LIBCUDA", library)
    path = str(tmp_path / tool) if tool else None
    cuda = cuda_driver(config_with(images_dir=str(tmp_path), cuda_checkpoint_path=path))
    start = cuda_start(cuda)
    if library is None and not DRIVER:
        assert (cuda, start) == (None, None)
        return
    assert isinstance(start, CudaStart)
    named = library or LIBRARY
    if tool == "there":
        assert isinstance(cuda, CudaCheckpointTool)
        assert (calls_of(cuda)._path, calls_of(start._driver)._library) == (path, named)
    else:
        assert isinstance(cuda, CudaDriver)
        assert start._driver is cuda, "one helper process for both"
        assert calls_of(cuda)._library == named


# ---- the doctor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("round_trip", [True, False])
def test_the_doctor_looks_at_what_was_asked_and_at_the_services_engines(
    tmp_path: Path, deep: bool, round_trip: bool
) -> None:
    ran: list[LaunchSpec] = []

    def as_engine(spec: LaunchSpec, seconds: float) -> Ran:
        ran.append(spec)
        return Ran(None, "cannot")

    machine = Host(
        root=tmp_path, run=lambda *_: Ran(None, "cannot"), which=lambda program: program,
        as_engine=as_engine, memory=lambda: (GIB, 0), euid=0,
    )  # fmt: skip
    freezes = model(
        "a", eviction=Eviction(Weights.OFFLOAD, Process.FREEZE), vllm_command=("/v/vllm",)
    )
    config = replace(config_of(freezes), engine_user="root")
    told: list[str] = []
    asked = {"deep": True} if deep else {}
    asked |= {"cuda_round_trip": True} if round_trip else {}
    checks = look_at_host(config, tell=told.append, machine=machine, **asked)
    assert ("looking at CUDA per GPU" in told) is deep
    assert ("looking at CUDA round trip" in told) is round_trip
    assert [spec.model for spec in ran] == ["a"]
    memory = next(check for check in checks if check.name == "memory")
    assert "what else a may ask for is not known here" in memory.seen


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_engines_access_is_looked_at_as_their_user(tmp_path: Path) -> None:
    config = replace(
        config_of(replace(model("a"), model_path=str(tmp_path))), engine_user="nobody",
        vllm_command=("/bin/true",),
    )  # fmt: skip
    told: list[str] = []
    checks = look_as_engines(config, told.append)
    assert told == ["looking at /bin/true as nobody"]
    assert checks[0].name == "engine access" and "nobody cannot read" in checks[0].seen

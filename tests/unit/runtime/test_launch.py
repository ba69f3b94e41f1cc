"""The command line and the environment that an engine is started with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from llmux.config.schema import Config, Eviction, ModelConfig, Process, Weights
from llmux.daemon.engine_users import planned_starts
from llmux.ports import EngineUser
from llmux.protocol import Address
from llmux.runtime.engines.launch import (
    engine_address,
    engine_argv,
    engine_environment,
    home_name,
)
from llmux.runtime.host import Places

SUPERVISOR = {
    "PATH": "/usr/bin",
    "NOTIFY_SOCKET": "/run/systemd/notify",
    "INVOCATION_ID": "0123",
    "CREDENTIALS_DIRECTORY": "/run/credentials/llmux.service",
    "HF_HOME": "/srv/hf",
}


def model(**settings: Any) -> ModelConfig:
    return ModelConfig("alpha", "models/alpha", **settings)


def places(**environment: str) -> Places:
    return Places("/run/llmux", environment={**SUPERVISOR, **environment})


# What systemd sets for a unit (systemd.exec(5)), and what a login of root's would.
OF_THE_UNIT = [
    "CACHE_DIRECTORY", "CONFIGURATION_DIRECTORY", "CREDENTIALS_DIRECTORY", "FDSTORE",
    "INVOCATION_ID", "JOURNAL_STREAM", "LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID",
    "LISTEN_PIDFDID", "LOGNAME", "LOGS_DIRECTORY", "MAINPID", "MANAGERPID",
    "MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE", "NOTIFY_SOCKET", "RUNTIME_DIRECTORY",
    "SHELL", "STATE_DIRECTORY", "SYSTEMD_EXEC_PID", "USER", "WATCHDOG_PID", "WATCHDOG_USEC",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_UNIT)
def test_nothing_of_the_supervisors_unit_reaches_the_engine(name: str) -> None:
    env = engine_environment(model(), (0,), places(**{name: "x"}))
    assert env["HF_HOME"] == "/srv/hf"
    assert env.get(name) != "x"


def test_the_programs_own_directory_is_searched_first(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = engine_environment(model(vllm_command=(str(program),)), (0,), places())
    assert env["PATH"] == f"{program.parent}:/usr/bin"
    own = model(vllm_command=(str(program),), env={"PATH": "/mine"})
    assert engine_environment(own, (0,), places())["PATH"] == "/mine"


class OneUser:
    def __init__(self, temporary: str | None) -> None:
        self.temporary = temporary

    def find(self, model: str) -> EngineUser:
        return EngineUser("llmux-60706", 60706, 60706, f"/cache/{model}", (), self.temporary)


def test_a_users_files_are_below_its_own_home() -> None:
    own = Places("/run/llmux", OneUser("/cache/alpha/tmp"), environment=SUPERVISOR)
    env = engine_environment(model(), (0,), own)
    assert (env["HOME"], env["TMPDIR"]) == ("/cache/alpha", "/cache/alpha/tmp")
    assert env["USER"] == env["LOGNAME"] == "llmux-60706"
    # HF_HOME may be shared, for its weights; code that comes with models is not
    assert env["HF_MODULES_CACHE"] == "/cache/alpha/.cache/huggingface/modules"
    shared = Places("/run/llmux", OneUser(None), environment=SUPERVISOR)
    env = engine_environment(model(), (0,), shared)
    assert env["HOME"] == "/cache/alpha"
    assert not {"TMPDIR", "HF_MODULES_CACHE"} & set(env)


def test_the_models_own_environment_has_the_last_word() -> None:
    env = engine_environment(
        model(env={"PYTHONUNBUFFERED": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}), (0,), places()
    )
    assert env["PYTHONUNBUFFERED"] == "0"
    assert env["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.parametrize(
    ("gpus", "restricted_to", "visible"),
    [
        ((0,), None, "0"),
        ((1, 3), None, "1,3"),
        ((1,), "4,5", "5"),
        ((0, 1), "GPU-aaaa,GPU-bbbb", "GPU-aaaa,GPU-bbbb"),
    ],
)
def test_the_gpus_are_counted_as_nvml_counts_them(
    gpus: tuple[int, ...], restricted_to: str | None, visible: str
) -> None:
    own = {} if restricted_to is None else {"CUDA_VISIBLE_DEVICES": restricted_to}
    env = engine_environment(model(), gpus, places(**own))
    assert env["CUDA_VISIBLE_DEVICES"] == visible
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_the_operators_own_order_of_gpus_is_kept() -> None:
    env = engine_environment(model(), (0,), places(CUDA_DEVICE_ORDER="FASTEST_FIRST"))
    assert env["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.parametrize(
    ("weights", "process", "sleep_mode", "dev_mode"),
    [
        (Weights.RETAIN, Process.FREEZE, False, False),
        (Weights.RETAIN, Process.CHECKPOINT, False, False),
        (Weights.OFFLOAD, Process.KEEP_RUNNING, True, True),
        (Weights.DISCARD, Process.CHECKPOINT, True, True),
    ],
)
def test_development_endpoints_are_open_only_where_they_are_used(
    weights: Weights, process: Process, sleep_mode: bool, dev_mode: bool
) -> None:
    config = model(eviction=Eviction(weights, process))
    argv = engine_argv(config, Address(uds="/x"), ("vllm",))
    env = engine_environment(config, (0,), places())
    assert ("--enable-sleep-mode" in argv) is sleep_mode
    assert ("VLLM_SERVER_DEV_MODE" in env) is dev_mode


def test_only_an_engine_with_an_image_gives_up_what_makes_the_image_larger() -> None:
    image = Eviction(Weights.RETAIN, Process.CHECKPOINT)
    assert engine_environment(model(eviction=image), (0,), places())["PYTHONNODEBUGRANGES"] == "1"
    assert "PYTHONNODEBUGRANGES" not in engine_environment(model(), (0,), places())
    own = model(eviction=image, env={"PYTHONNODEBUGRANGES": ""})  # as Python has it: off
    assert engine_environment(own, (0,), places())["PYTHONNODEBUGRANGES"] == ""


def test_an_engine_of_several_gpus_needs_the_communicators_hooks() -> None:
    config = model(
        eviction=Eviction(Weights.RETAIN, Process.CUDA_SUSPEND),
        extra_args=("--tensor-parallel-size", "2"),
    )
    assert engine_environment(config, (0, 1), places())["VLLM_SERVER_DEV_MODE"] == "1"


def test_an_engine_that_discards_its_kv_cache_alone_needs_them_too() -> None:
    apart = {"extra_args": ("--enable-sleep-mode",)}
    for process, opened in ((Process.CHECKPOINT, True), (Process.FREEZE, False)):
        config = model(eviction=Eviction(Weights.RETAIN, process), **apart)
        assert ("VLLM_SERVER_DEV_MODE" in engine_environment(config, (0,), places())) is opened


def test_the_command_line_ends_with_what_the_operator_wrote() -> None:
    config = model(aliases=("a", "b"), extra_args=("--max-model-len", "4096"))
    argv = engine_argv(config, Address(uds="/x"), ("uv", "run", "vllm"))
    assert argv == (
        *("uv", "run", "vllm", "serve", "models/alpha"),
        *("--served-model-name", "alpha", "--uds", "/x", "--gpu-memory-utilization", "0.9"),
        *("--max-model-len", "4096"),
    )


@pytest.mark.parametrize("own", ["--gpu-memory-utilization=0.3", "--gpu_memory_utilization=0.3"])
def test_the_claim_is_what_the_engine_is_told_to_take(own: str) -> None:
    def told(**settings: Any) -> list[str]:
        argv = engine_argv(model(**settings), Address(uds="/x"), ("vllm",))
        return [word for word in argv if "memory" in word]

    assert told(gpu_memory=0.4) == ["--gpu-memory-utilization"]
    argv = engine_argv(model(gpu_memory=0.4), Address(uds="/x"), ("vllm",))
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.4"
    assert told(gpu_memory=0.3, extra_args=(own,)) == [own]
    assert told(gpu_memory=0.3, extra_args=("--config", "/etc/vllm.yaml")) == []


def test_an_api_key_of_the_unit_does_not_reach_the_engine() -> None:
    assert "VLLM_API_KEY" not in engine_environment(model(), (0,), places(VLLM_API_KEY="x"))


def test_a_configured_port_is_on_the_loopback() -> None:
    config = model(port=8001)
    address = engine_address(config, places())
    argv = engine_argv(config, address, ("vllm",))
    assert argv[5:9] == ("--host", "127.0.0.1", "--port", "8001")


def test_a_long_name_fits_into_a_socket_address() -> None:
    name = "organisation--" + "x" * 200
    address = engine_address(ModelConfig(name, "m"), places())
    other = engine_address(ModelConfig(name + "y", "m"), places())
    assert address.uds is not None
    assert len(address.uds) < 108
    assert address.uds != other.uds


def test_a_homes_name_means_nothing_to_a_shell() -> None:
    assert home_name("qwen3-8b.v2_x") == "qwen3-8b.v2_x"
    names = ["a/b", "a-b", "-rf", ".ssh", "..", "$(x)", "a b", "é", "x" * 200, "x" * 201, "a\\b"]
    found = [home_name(name) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,47}", name)


def test_what_a_lower_rung_needs_is_there_from_the_start() -> None:
    """README's ladder: the engine that goes down to an image is the one that was started."""
    steps = (Eviction(Weights.OFFLOAD, Process.CHECKPOINT), Eviction())
    kept = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
    env = engine_environment(model(eviction=kept, ladder=steps), (0,), places())
    assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in engine_environment(
        model(eviction=kept), (0,), places()
    )
    frozen = model(
        eviction=Eviction(Weights.RETAIN, Process.FREEZE),
        ladder=(Eviction(Weights.DISCARD, Process.CHECKPOINT),),
    )
    command = engine_argv(frozen, Address(port=1), ("vllm",))
    assert "--enable-sleep-mode" in command


def test_what_would_be_started_is_named_whether_its_program_is_found_or_not(
    tmp_path: Path,
) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for command in (str(program), "no-such-program", "sh"):
        models = MappingProxyType({"alpha": model()})
        config = Config(models=models, engine_user="root", vllm_command=(command,))
        (start,) = planned_starts(config)
        assert start.argv[0] == (shutil.which(command) or command)

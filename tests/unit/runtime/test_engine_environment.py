"""The environment of engines is built: nothing of the process that starts them is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.daemon import engine_environment as module
from llmux.drivers.images.identity import launch_identity
from llmux.drivers.systemd import bus
from llmux.errors import DriverError
from llmux.runtime.engines.launch import engine_environment
from llmux.runtime.host import Places

UNIT = {"HF_HOME": "/srv/hf", "HTTPS_PROXY": "http://proxy:3128"}
SHELL = {
    "PATH": "/root/bin:/usr/bin", "HOME": "/somewhere", "PWD": "/root/work", "EDITOR": "vi",
    "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22", "HF_TOKEN": "secret", "LC_ALL": "de_DE.UTF-8",
}  # fmt: skip
SERVICE = {"PATH": "/usr/bin:/bin", "INVOCATION_ID": "1", "NOTIFY_SOCKET": "/run/x", "LANG": "C"}


@pytest.fixture(autouse=True)
def unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "service_environment", lambda name: dict(UNIT))


def identity(monkeypatch: pytest.MonkeyPatch, process: dict[str, str]) -> dict[str, str]:
    """Of the engine that a process with this environment starts."""
    for name in ("PATH", *SHELL, *SERVICE):
        monkeypatch.delenv(name, raising=False)
    for name, value in process.items():
        monkeypatch.setenv(name, value)
    config = ModelConfig("m", "org/m", eviction=Eviction(Weights.DISCARD, Process.CHECKPOINT))
    env = engine_environment(config, (0,), Places(environment=module.engine_environment()))
    return launch_identity(["vllm"], env, None)


def test_an_image_made_by_hand_has_the_identity_of_the_services_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert identity(monkeypatch, SHELL) == identity(monkeypatch, SERVICE)


def test_the_units_variables_reach_the_engine_and_the_processes_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    env = module.engine_environment()
    assert env.items() >= UNIT.items()
    assert set(env) - set(UNIT) <= {"PATH", "LANG", "CUDA_HOME"}
    assert env["PATH"].startswith("/usr/local/sbin:")


def test_cuda_home_is_set_where_there_is_one(tmp_path: Path) -> None:
    there = module.built_environment({}, str(tmp_path))
    assert there["CUDA_HOME"] == str(tmp_path)
    assert there["PATH"].endswith(f":{tmp_path}/bin")
    assert "CUDA_HOME" not in module.built_environment({}, str(tmp_path / "none"))
    assert module.built_environment({"CUDA_HOME": "/x"}, str(tmp_path))["CUDA_HOME"] == "/x"


def test_without_systemd_the_fixed_list_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> dict[str, str]:
        raise DriverError("read the environment of", name, "no bus")

    monkeypatch.setattr(bus, "service_environment", refuse)
    assert set(module.engine_environment()) <= {"PATH", "LANG", "CUDA_HOME"}
    assert "without the variables of llmux.service" in caplog.text

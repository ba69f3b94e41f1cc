"""The command line and the environment that an engine is started with."""

from __future__ import annotations

from typing import Any

import pytest

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.errors import LlmuxError
from llmux.protocol import Address
from llmux.runtime.drivers import Places
from llmux.runtime.launch import engine_address, engine_argv, engine_environment

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


def test_nothing_of_the_supervisors_unit_reaches_the_engine() -> None:
    env = engine_environment(model(), (0,), places())
    assert env["HF_HOME"] == "/srv/hf"
    assert not {"NOTIFY_SOCKET", "INVOCATION_ID", "CREDENTIALS_DIRECTORY"} & set(env)


def test_an_engine_user_that_is_not_there_is_named_with_the_remedy() -> None:
    nowhere = Places("/run/llmux", engine_user="no-such-user")
    with pytest.raises(LlmuxError, match=r'no user "no-such-user".*systemd-sysusers'):
        engine_environment(model(), (0,), nowhere)


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


def test_the_command_line_ends_with_what_the_operator_wrote() -> None:
    config = model(aliases=("a", "b"), extra_args=("--max-model-len", "4096"))
    argv = engine_argv(config, Address(uds="/x"), ("uv", "run", "vllm"))
    assert argv == (
        *("uv", "run", "vllm", "serve", "models/alpha"),
        *("--served-model-name", "alpha", "--uds", "/x", "--max-model-len", "4096"),
    )


def test_a_configured_port_is_on_the_loopback() -> None:
    config = model(port=8001)
    address = engine_address(config, places())
    argv = engine_argv(config, address, ("vllm",))
    assert argv[-4:] == ("--host", "127.0.0.1", "--port", "8001")


def test_a_long_name_fits_into_a_socket_address() -> None:
    name = "organisation--" + "x" * 200
    address = engine_address(ModelConfig(name, "m"), places())
    other = engine_address(ModelConfig(name + "y", "m"), places())
    assert address.uds is not None
    assert len(address.uds) < 108
    assert address.uds != other.uds

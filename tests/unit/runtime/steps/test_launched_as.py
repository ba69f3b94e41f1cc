"""What an engine is started as, at the edges: its names, its environment, and what is refused."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivers_called import ADDRESS, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import OFFLOAD, STOP, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.errors import EngineUnhealthy, LlmuxError
from llmux.protocol import Address
from llmux.runtime.engines.launch import (
    LONGEST_DIRECTORY,
    engine_directory,
    engine_environment,
    home_name,
    launch_spec,
    offline,
    refuse_strangers,
    require_model,
    require_whole_gpus,
    warn_about,
)
from llmux.runtime.host import Places

PLACES = Places("/run", environment={"PATH": "/usr/bin"})
RETAIN = Eviction(Weights.RETAIN, Process.KEEP_RUNNING)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("a/b", "a-b-"), ("-rf", "rf-"), (".ssh", "ssh-"), ("..", "model-"), ("$(x)", "x--"),
        ("-", "model-"), ("x" * 49, "x" * 35 + "-"),
    ],
)  # fmt: skip
def test_a_home_that_cannot_have_the_models_name_has_what_is_left_of_it(
    name: str, home: str
) -> None:
    assert home_name(name) == home + digest(name)


def test_a_name_of_the_longest_kind_stays_as_it_is() -> None:
    longest = "x" * LONGEST_DIRECTORY
    assert home_name(longest) == longest
    assert engine_directory(longest, PLACES) == f"/run/engines/{longest}"
    longer = f"{longest}y"
    assert engine_directory(longer, PLACES) == f"/run/engines/{'x' * 35}-{digest(longer)}"


# ---- environment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["USER", "LOGNAME", "SHELL", "MAINPID"])
def test_who_the_supervisor_is_says_nothing_of_the_engine_with_a_home(name: str) -> None:
    places = replace(PLACES, environment={"PATH": "/usr/bin", "HOME": "/h", name: "x"})
    env = engine_environment(CONFIG, (0,), places)
    assert name not in env and env["HOME"] == "/h"


@pytest.mark.parametrize("found", [True, False])
def test_without_a_path_programs_are_looked_for_where_the_system_has_them(
    tmp_path: Path, found: bool
) -> None:
    program = tmp_path / "vllm"
    if found:
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    config = replace(CONFIG, vllm_command=(str(program),))
    env = engine_environment(config, (0,), replace(PLACES, environment={}))
    assert env["PATH"] == (f"{tmp_path}:{os.defpath}" if found else os.defpath)


def test_the_programs_directory_is_searched_once(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    places = replace(PLACES, environment={"PATH": f"/bin:{tmp_path}:/usr/bin"})
    config = replace(CONFIG, vllm_command=("vllm",))
    assert engine_environment(config, (0,), places)["PATH"] == f"{tmp_path}:/bin:/usr/bin"
    bench = Bench()
    bench.without(places=places)
    assert launch_spec(config, ADDRESS, (0,), bench.drivers).argv[0] == str(program)


@pytest.mark.parametrize(
    ("gpus", "visible", "told"),
    [
        ((2,), "4,5", "2"), ((1,), "4,5", "5"), ((0, 2), "4,5", "4,2"), ((1,), "", "1"),
        ((), "4,5", "4,5"), ((), None, None),
    ],
)  # fmt: skip
def test_gpus_are_counted_within_what_the_unit_may_see(
    gpus: tuple[int, ...], visible: str | None, told: str | None
) -> None:
    own = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    env = engine_environment(CONFIG, gpus, replace(PLACES, environment=own))
    assert env.get("CUDA_VISIBLE_DEVICES") == told
    assert ("CUDA_DEVICE_ORDER" in env) is bool(gpus)


@pytest.mark.parametrize("here", [True, False, None])
@pytest.mark.parametrize("eviction", [CHECKPOINT, OFFLOAD], ids=str)
def test_whether_a_models_files_are_here_is_asked_by_its_path_with_the_engines_environment(
    eviction: Eviction, here: bool | None
) -> None:
    asked: list[Any] = []

    def look(*args: Any) -> bool | None:
        asked.append(args)
        return here

    config, env, bench = replace(CONFIG, eviction=eviction), {"HF_HOME": "/hf"}, Bench()
    bench.without(files_are_here=None if here is None else look)
    images = eviction is CHECKPOINT
    assert ("HF_HUB_OFFLINE" in offline(config, env, bench.drivers)) is (images and here is True)
    assert asked == ([("models/a", env)] if images and here is not None else [])


# ---- refusals and warnings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "target", "hint"),
    [
        (Address(port=7), 'port 7 for model "a"', "; or remove `port`"),
        (Address(uds="/x"), '/x for model "a"', ""),
    ],
)
@in_loop
async def test_a_stranger_is_named_with_where_it_listens_and_what_to_do(
    address: Address, target: str, hint: str
) -> None:
    bench = Bench(units_stranger="process 7 (nc)")
    with pytest.raises(EngineUnhealthy) as refused:
        await refuse_strangers(bench.drivers, "a", address, HANDLE)
    assert f"cannot use {target}: process 7 (nc) listens there" in str(refused.value)
    assert bench.seen == [("units.stranger", address, HANDLE)]
    assert ("; or remove `port`" in str(refused.value)) is bool(hint)
    bench.answers["units.stranger"] = None
    await refuse_strangers(bench.drivers, "a", address, None)
    assert bench.seen[1:] == [("units.stranger", address, None)]


def test_a_model_is_required_where_its_path_is_one_of_this_host(tmp_path: Path) -> None:
    for path in (str(tmp_path), "org/model", "gone"):
        require_model(replace(CONFIG, model_path=path))
    with pytest.raises(LlmuxError, match=r'cannot start model "a": .*/gone does not exist'):
        require_model(replace(CONFIG, model_path=f"{tmp_path}/gone"))


def test_whole_gpus_are_required_of_what_the_unit_may_see() -> None:
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "GPU-1"}, {"X": "MIG-1"}):
        require_whole_gpus(CONFIG, visible)
    with pytest.raises(LlmuxError, match="divides whole GPUs"):
        require_whole_gpus(CONFIG, {"CUDA_VISIBLE_DEVICES": "GPU-1,MIG-1"})


@pytest.mark.parametrize(
    ("version", "eviction", "ladder", "said"),
    [
        ("0.15.0", OFFLOAD, (), True),
        ("0.15.0", RETAIN, (), False),
        ("0.15.0", RETAIN, (OFFLOAD,), True),
        ("0.15.0", STOP, (), False),
        ("0.10.0", OFFLOAD, (), False),
        ("0.32.0", OFFLOAD, (), False),
        (None, OFFLOAD, (), False),
    ],
)
def test_a_version_that_breaks_what_the_models_parking_needs_is_named(
    version: str | None, eviction: Eviction, ladder: Any, said: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    warn_about(model("a", eviction=eviction, ladder=ladder), version)
    told = ["vLLM 0.15.0 of a: sleep does not free the weights"] if said else []
    assert [line[: len(told[0])] if told else line for line in caplog.messages] == told

"""What the doctor finds closed to an engine's user, and which compilers it misses."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.doctor.access import COMPILERS, NAME, check_access
from llmux.drivers.doctor.facts import Check, Host, Level, Ran

ALL = {"Python.h": True, "flashinfer-jit-cache": False, "ninja": True, "cc": True, "nvcc": True}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
PYTHON = "/usr/bin/python3"  # one that every user may run


def config_of(command: str, **paths: str) -> Config:
    models = {name: ModelConfig(name, path) for name, path in paths.items()}
    models = models or {"a": ModelConfig("a", "org/a")}
    return Config(models=models, vllm_command=(command,), engine_user="nobody")


def canned(tmp_path: Path, said: dict[str, Any] | str, *, driver: bool = True) -> list[Check]:
    if driver:
        version = tmp_path / "proc/driver/nvidia/version"
        version.parent.mkdir(parents=True)
        version.write_text("NVRM")
    text = said if isinstance(said, str) else json.dumps(said)

    def run(argv: Sequence[str], seconds: float) -> Ran:
        return Ran(0, text)

    host = Host(root=tmp_path, run=run, which=lambda name: "/v/bin/vllm", euid=0)
    return check_access(host, config_of("vllm"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"nvcc": False, "flashinfer-jit-cache": True}, ""),
        ({"ninja": False, "Python.h": False}, "finds no ninja, no Python.h"),
        ({"nvcc": False}, "finds no nvcc or flashinfer-jit-cache"),
    ],
)
def test_compilers(tmp_path: Path, change: dict[str, bool], words: str) -> None:
    said = {"problems": [], "files": 2, "found": {**ALL, **change}}
    access, compilers = canned(tmp_path, said)
    assert (access.name, access.level) == (NAME, Level.OK)
    assert "2 files" in access.seen
    assert compilers.name == COMPILERS
    assert compilers.level is (Level.WARN if words else Level.OK)
    assert words in compilers.seen


def test_without_a_driver_there_is_nothing_to_compile(tmp_path: Path) -> None:
    said = {"problems": [], "files": 0, "found": {}}
    (check,) = canned(tmp_path, said, driver=False)
    assert check.name == NAME


def test_what_cannot_be_looked_at_is_a_warning(tmp_path: Path) -> None:
    (check,) = canned(tmp_path, "Operation not permitted")
    assert (check.level, "Operation not permitted" in check.seen) == (Level.WARN, True)


def test_nothing_is_said_of_engines_that_run_as_whoever_starts_them() -> None:
    assert check_access(Host(euid=1000), config_of("sh")) == []
    assert check_access(Host(euid=0), None) == []


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


def environment(place: Path) -> Path:
    program = place / "opt" / "vllm"
    program.parent.mkdir(mode=0o755)
    program.write_text(f"#!{PYTHON}\n")
    program.chmod(0o755)
    return program


@as_root
def test_what_an_engine_can_use_is_good(place: Path) -> None:
    weights = place / "m" / "model.safetensors"
    weights.parent.mkdir(mode=0o755)
    weights.write_bytes(b"x")
    weights.chmod(0o644)
    hidden = weights.parent / ".cache"  # of a download; no engine reads it
    hidden.mkdir(mode=0o700)
    (hidden / "x.lock").touch(mode=0o600)
    found = check_access(Host(), config_of(str(environment(place)), a=str(weights.parent)))
    assert found[0].level is Level.OK, found
    assert "1 files" in found[0].seen


@as_root
def test_a_closed_directory_on_the_way_is_named(place: Path) -> None:
    program = environment(place)
    program.parent.chmod(0o700)
    (check,) = check_access(Host(), config_of(str(program)))
    assert check.level is Level.FAIL
    assert f"cannot execute {program}: {program.parent} is closed to it" in check.seen


@as_root
def test_a_python_that_is_closed_is_named(place: Path) -> None:
    """As uv leaves it: the environment is open, and its Python is below /root."""
    program = environment(place)
    closed = place / "root"
    closed.mkdir(mode=0o700)
    (closed / "python3").symlink_to(PYTHON)
    (place / "opt/python3").symlink_to(closed / "python3")
    program.write_text(f"#!{place}/opt/python3\n")
    (check,) = check_access(Host(), config_of(str(program)))
    assert check.level is Level.FAIL
    assert f"cannot execute {place}/opt/python3: " in check.seen


@as_root
def test_weights_that_are_closed_are_named(place: Path) -> None:
    weights = place / "m" / "model.safetensors"
    weights.parent.mkdir(mode=0o755)
    weights.write_bytes(b"x")
    weights.chmod(0o600)
    program = str(environment(place))
    (check,) = check_access(Host(), config_of(program, a=str(weights.parent), b=str(weights)))
    assert check.level is Level.FAIL
    assert f"cannot read {weights} of a: its mode is 0o600" in check.seen
    weights.parent.chmod(0o700)
    (check,) = check_access(Host(), config_of(program, a=str(weights.parent)))
    assert f"{weights.parent}" in check.seen

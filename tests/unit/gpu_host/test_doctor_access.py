"""What the doctor finds closed to an engine's user, and what its engine would miss."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.doctor.access import COMPILERS, DIRECTORIES, HUB, IMPORTS, NAME, check_access
from llmux.drivers.doctor.facts import Check, Host, Level, Ran
from llmux.errors import LlmuxError
from llmux.ports import EngineUser, LaunchSpec

ALL = {"Python.h": True, "flashinfer-jit-cache": False, "ninja": True, "cc": True, "nvcc": True}
SAID: dict[str, Any] = {"problems": [], "imports": None, "closed": {}, "files": 2, "found": ALL}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
PYTHON = "/usr/bin/python3"  # one that every user may run
NOBODY = EngineUser("nobody", 65534, 65534, "/nonexistent", (65534,))


def config_of(command: str, **paths: str) -> Config:
    models = {name: ModelConfig(name, path) for name, path in paths.items()}
    models = models or {"a": ModelConfig("a", "s3://a")}
    return Config(models=models, vllm_command=(command,), engine_user="nobody")


def starts(user: EngineUser | None, **env: str) -> Callable[[Config], Sequence[LaunchSpec]]:
    def plan(config: Config) -> Sequence[LaunchSpec]:
        home = user.home if user is not None else "/root"
        given = {"HOME": home, "PATH": "/usr/bin:/bin", **env}
        argv = (*config.vllm_command, "serve")
        return [LaunchSpec(name, argv, given, user, "", "", "/r") for name in config.models]

    return plan


def canned(
    tmp_path: Path,
    said: dict[str, Any] | str,
    *,
    driver: bool = True,
    config: Config | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Check]:
    if driver:
        version = tmp_path / "proc/driver/nvidia/version"
        version.parent.mkdir(parents=True)
        version.write_text("NVRM")
    text = said if isinstance(said, str) else json.dumps({**SAID, **said})

    def as_engine(spec: LaunchSpec, seconds: float) -> Ran:
        return Ran(0, text)

    host = Host(
        root=tmp_path,
        which=lambda name: name,
        euid=0,
        as_engine=as_engine,
        starts=starts(NOBODY, **(env or {})),
    )
    return check_access(host, config or config_of("/v/bin/vllm"))


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
    access, directories, compilers = canned(tmp_path, {"found": {**ALL, **change}})
    assert (access.name, access.level) == (NAME, Level.OK)
    assert "2 files" in access.seen
    assert (directories.name, directories.level) == (DIRECTORIES, Level.OK)
    assert compilers.name == COMPILERS
    assert compilers.level is (Level.WARN if words else Level.OK)
    assert words in compilers.seen


def test_without_a_driver_there_is_nothing_to_compile(tmp_path: Path) -> None:
    checks = canned(tmp_path, {}, driver=False)
    assert [check.name for check in checks] == [NAME, DIRECTORIES]


def test_what_cannot_be_looked_at_is_a_warning(tmp_path: Path) -> None:
    (check,) = canned(tmp_path, "Operation not permitted")
    assert (check.level, "Operation not permitted" in check.seen) == (Level.WARN, True)


def test_nothing_is_said_of_engines_that_run_as_whoever_starts_them() -> None:
    assert check_access(Host(euid=1000, starts=starts(NOBODY)), config_of("sh")) == []
    assert check_access(Host(euid=0, starts=starts(NOBODY)), None) == []
    assert check_access(Host(euid=0), config_of("sh")) == []

    def no_user(config: Config) -> Sequence[LaunchSpec]:
        raise LlmuxError("there is no user")

    assert check_access(Host(euid=0, starts=no_user), config_of("sh")) == []


def test_a_program_that_only_roots_own_path_has_is_named(tmp_path: Path) -> None:
    host = Host(root=tmp_path, which=lambda _: "/root/bin/vllm", euid=0, starts=starts(NOBODY))
    (check,) = check_access(host, config_of("vllm"))
    assert check.level is Level.FAIL
    assert "/root/bin/vllm is on your PATH, and not on that of engines" in check.seen


def test_models_that_differ_in_nothing_are_looked_at_once(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def as_engine(spec: LaunchSpec, seconds: float) -> Ran:
        seen.append(json.loads(spec.argv[-1]))
        return Ran(0, json.dumps(SAID))

    (tmp_path / "m").mkdir()
    host = Host(
        root=tmp_path, which=lambda name: name, euid=0, as_engine=as_engine, starts=starts(NOBODY)
    )
    check_access(host, config_of("/v/bin/vllm", a="/m", b="/m", c="s3://c"))
    assert [one["models"] for one in seen] == [{"a": "/m", "b": "/m"}]


def test_each_program_is_run_once_whoever_uses_it(tmp_path: Path) -> None:
    python = tmp_path / "v/bin/python3"
    (tmp_path / "v/bin").mkdir(parents=True)
    marker = tmp_path / str(tmp_path / "v/pyvenv.cfg").lstrip("/")
    marker.parent.mkdir(parents=True)
    marker.touch()
    programs = [tmp_path / "v/bin" / name for name in ("vllm", "other")]
    for program in programs:
        program.write_text(f"#!{python}\n")
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM")
    asked: list[dict[str, Any]] = []
    told: list[str] = []

    def as_engine(spec: LaunchSpec, seconds: float) -> Ran:
        asked.append(json.loads(spec.argv[-1]))
        found = {name: ALL[name] for name in ("ninja", "cc", "nvcc")}
        if asked[-1]["interpreter"]:
            found |= {"Python.h": False, "flashinfer-jit-cache": False}
        return Ran(0, json.dumps({**SAID, "found": found}))

    def a_user_for_each(config: Config) -> Sequence[LaunchSpec]:
        specs = starts(NOBODY)(config)
        own = [replace(NOBODY, name=spec.model, home=f"/home/{spec.model}") for spec in specs]
        return [
            replace(spec, argv=(str(programs[number % 2]),), user=user, env={"HOME": user.home})
            for number, (spec, user) in enumerate(zip(specs, own, strict=True))
        ]

    host = Host(
        root=tmp_path,
        euid=0,
        which=lambda name: name,
        as_engine=as_engine,
        tell=told.append,
        starts=a_user_for_each,
    )
    config = config_of("/v/bin/vllm", a="s3://a", b="s3://b", c="s3://c")
    checks = check_access(host, config)
    assert [bool(one["interpreter"]) for one in asked] == [True, False, False]
    assert [bool(one["modules"]) for one in asked] == [True, False, False]
    assert told == [
        f"importing torch and vllm as {programs[0]} does, as a (up to 180 s from a cold disk)",
        f"looking at {programs[1]} as b",
        f"looking at {programs[0]} as c",
    ]
    assert len([check for check in checks if check.name == IMPORTS]) == 1
    compilers = [check.seen for check in checks if check.name == COMPILERS]
    assert compilers == [f"{program} finds no Python.h" for program in programs]


COMMIT = "0" * 40


def a_hub(place: Path, *, complete: bool) -> Path:
    model = place / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    if complete:
        (snapshot / "model.safetensors").write_bytes(b"x")
    return place


def test_a_model_of_the_hub_is_found_or_said_to_be_missing(tmp_path: Path) -> None:
    config = config_of("/v/bin/vllm", a="org/name")
    whole = str(a_hub(tmp_path / "whole", complete=True))
    (check,) = [
        one
        for one in canned(tmp_path, {}, config=config, env={"HF_HUB_CACHE": whole})
        if one.name == HUB
    ]
    assert (check.level, check.seen) == (Level.OK, "complete on this host: org/name")


@pytest.mark.parametrize(
    ("state", "words"),
    [("none", "it is not there"), ("part", "it has no *.safetensors")],
)
@pytest.mark.parametrize("offline", [False, True])
def test_how_a_model_is_brought_along(
    tmp_path: Path, state: str, words: str, *, offline: bool
) -> None:
    config = config_of("/v/bin/vllm", a="org/name")
    hub = tmp_path / "hub"
    if state == "part":
        a_hub(hub, complete=False)
    env = {"HF_HUB_CACHE": str(hub), **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    (check,) = [one for one in canned(tmp_path, {}, config=config, env=env) if one.name == HUB]
    assert check.level is (Level.FAIL if offline else Level.WARN)
    assert f"org/name of a is not complete in {hub}: {words}" in check.seen
    assert ("HF_HUB_OFFLINE forbids its download" in check.seen) is offline
    assert "hf download org/name" in check.remedy
    assert ("downloads it at its first start" in check.remedy) is not offline


# ---- as another user, through the launcher -------------------------------------------------------


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, with a home for nobody."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        (Path(made) / "home").mkdir()
        os.chown(Path(made) / "home", NOBODY.uid, NOBODY.gid)
        yield Path(made)


def look(place: Path, config: Config, **env: str) -> dict[str, Check]:
    user = replace(NOBODY, home=str(place / "home"))
    host = Host(starts=starts(user, **env))
    return {check.name: check for check in check_access(host, config)}


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
    found = look(place, config_of(str(environment(place)), a=str(weights.parent)))
    assert {check.level for check in found.values()} == {Level.OK}, found
    assert "1 file of" in found[NAME].seen
    assert IMPORTS not in found, "a Python without an environment has no vLLM"
    assert list((place / "home").iterdir()) == [], "it leaves nothing"


@as_root
def test_a_closed_directory_on_the_way_is_named(place: Path) -> None:
    program = environment(place)
    program.parent.chmod(0o700)
    check = look(place, config_of(str(program)))[NAME]
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
    check = look(place, config_of(str(program)))[NAME]
    assert check.level is Level.FAIL
    assert f"cannot execute {place}/opt/python3: " in check.seen


@as_root
def test_weights_that_are_closed_are_named(place: Path) -> None:
    weights = place / "m" / "model.safetensors"
    weights.parent.mkdir(mode=0o755)
    weights.write_bytes(b"x")
    weights.chmod(0o600)
    program = str(environment(place))
    check = look(place, config_of(program, a=str(weights.parent), b=str(weights)))[NAME]
    assert check.level is Level.FAIL
    assert f"cannot read {weights} of a: its mode is 0o600" in check.seen
    weights.parent.chmod(0o700)
    check = look(place, config_of(program, a=str(weights.parent)))[NAME]
    assert f"{weights.parent}" in check.seen


@as_root
def test_directories_that_are_closed_are_named_with_what_they_are_for(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o755)
    config = config_of(str(environment(place)))
    check = look(place, config, HF_HOME=f"{closed}/hf", TRITON_CACHE_DIR=str(closed))[DIRECTORIES]
    assert check.level is Level.FAIL
    assert check.seen == (
        "nobody cannot write the Hugging Face cache and Triton's cache"
        f" ({closed}: Permission denied)"
    )
    os.chmod(place / "home", 0o500)
    check = look(place, config, TMPDIR=f"{place}/home/none")[DIRECTORIES]
    for what in ("HOME", "TMPDIR", "vLLM's cache", "TorchInductor's cache", "CUDA's cache"):
        assert what in check.seen


@as_root
def test_a_model_that_never_ran_gets_a_home_for_the_look(place: Path) -> None:
    """As the start makes it; the look leaves neither it nor its temporary files."""
    (place / "homes").mkdir(mode=0o711)
    user = EngineUser("llmux-x", 60999, 60999, f"{place}/homes/a", (), f"{place}/homes/a/tmp")
    host = Host(starts=starts(user, TMPDIR=f"{place}/homes/a/tmp"))
    found = check_access(host, config_of(str(environment(place))))
    assert {check.level for check in found} == {Level.OK}, found
    assert list((place / "homes").iterdir()) == []


def a_venv(place: Path, **modules: str) -> Path:
    """An environment whose Python finds these modules, and which says it is one."""
    program = environment(place)
    bin_directory = place / "venv/bin"
    bin_directory.mkdir(parents=True)
    for name, text in modules.items():
        (place / "venv" / f"{name}.py").write_text(text)
    (place / "venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    python = bin_directory / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place}/venv exec {PYTHON} "$@"\n')
    python.chmod(0o755)
    program.write_text(f"#!{python}\n")
    return program


@as_root
@pytest.mark.parametrize(
    ("torch", "vllm", "words"),
    [
        ("", "", ""),
        ("raise OSError('libcudart.so.13: cannot open')", "", "cannot import torch: OSError"),
        ("", "import nothing_of_the_kind", "cannot import vllm: ModuleNotFoundError"),
        ("print('hello')", "import os; os.abort()", "cannot import vllm: killed by signal 6"),
        ("open('/x/y', 'w')", "", "cannot import torch: FileNotFoundError"),
    ],
)
def test_what_an_engine_imports_is_imported(place: Path, torch: str, vllm: str, words: str) -> None:
    program = a_venv(place, torch=torch, vllm=vllm)
    check = look(place, config_of(str(program)))[IMPORTS]
    if words:
        assert check.level is Level.FAIL
        assert words in check.seen
        assert "-c 'import vllm'" in check.remedy
    else:
        assert (check.level, check.seen) == (Level.OK, f"{program}: torch, vllm")


@as_root
def test_an_import_that_does_not_end_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmux.drivers.doctor.access.IMPORT_SECS", 2.0)
    program = a_venv(place, torch="import time; time.sleep(600)", vllm="")
    check = look(place, config_of(str(program)))[IMPORTS]
    assert check.level is Level.FAIL
    assert "cannot import torch: not done after 2 s" in check.seen


@as_root
def test_it_is_the_launcher_that_starts_the_look(place: Path) -> None:
    """No privileges to gain, no io_uring, no capabilities, no core dumps: as an engine has it."""
    status = place / "home/status"
    torch = "import resource; said = open('/proc/self/status').read()"
    torch += f"; open({str(status)!r}, 'w').write(said + str(resource.getrlimit(4)))"
    look(place, config_of(str(a_venv(place, torch=torch, vllm=""))))
    said = status.read_text()
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said
    assert "CapBnd:\t0000000000000000" in said
    assert "Uid:\t65534\t65534" in said
    assert said.rpartition("\n")[2].startswith("(0, ")

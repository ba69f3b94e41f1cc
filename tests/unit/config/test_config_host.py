"""What this machine lacks to run a configuration: each finding by itself, and what it says."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.config.host import (
    GATEWAY,
    check_directories,
    check_embedded,
    check_gateway_reads,
    check_host,
)
from llmux.config.load import load_config
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    Limits,
    ModelConfig,
    Process,
    Weights,
)
from llmux.errors import ConfigError, Problem

FREEZE, SUSPEND = Eviction(Weights.RETAIN, Process.FREEZE), Eviction(process=Process.CUDA_SUSPEND)
CHECKPOINT, STOP = Eviction(process=Process.CHECKPOINT), Eviction(process=Process.STOP)
A = ModelConfig("a", "org/a", eviction=STOP)
B = ModelConfig("b", "org/b", eviction=STOP)


def texts(problems: tuple[Problem, ...]) -> list[str]:
    return [f"{problem.path}: {problem.message}" for problem in problems]


@pytest.fixture
def fit(tmp_path: Path) -> Config:
    """Nothing is missing for it."""
    return Config(
        models={"a": A, "b": B},
        vllm_command=("sh",),
        engine_user=pwd.getpwuid(os.getuid()).pw_name,
        checkpoint=CheckpointConfig(criu_path="sh", images_dir=str(tmp_path / "images")),
    )


@pytest.mark.parametrize("mode", [0o100, 0o010, 0o001, 0o755])
def test_a_program_is_a_file_that_somebody_may_run(mode: int, tmp_path: Path) -> None:
    program, file = tmp_path / "vllm", tmp_path / "c.yaml"
    program.touch()
    program.chmod(mode)
    file.write_text(f"vllm_command: {program}\n")
    assert load_config(file).vllm_command == (str(program),)


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("plain", "plain is not an executable file (chmod +x?)"),
        ("folder", "folder is not an executable file (chmod +x?)"),
        ("absent", "absent: no such file or directory"),
        ("plain/x", "plain/x: not a directory"),
    ],
)
def test_a_program_that_cannot_be_run_is_named_where_it_was_written(
    named: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch(mode=0o644)
    (tmp_path / "folder").mkdir()
    file = tmp_path / "c.yaml"
    program = tmp_path / named
    model = f"{{model_path: {tmp_path}/absent, vllm_command: {program}}}"
    file.write_text(f"vllm_command: {program}\nmodels:\n  a: {model}\n  b: {model}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    places = ["vllm_command", *(f"models.{m}.{k}" for m in "ab" for k in ("x", "vllm_command"))]
    missing = f"{tmp_path}/absent: no such file or directory"
    assert texts(caught.value.problems) == [
        f"{place.replace('.x', '.model_path')}: "
        + (
            f"cannot find the model: {missing}"
            if place.endswith(".x")
            else f"cannot run vLLM: {tmp_path}/{problem}"
        )
        for place in places
    ]


def test_a_fit_host_and_what_each_eviction_needs(fit: Config, tmp_path: Path) -> None:
    assert check_host(fit) == ()
    lacking = replace(
        fit,
        checkpoint=replace(
            fit.checkpoint,
            criu_path="no-criu",
            cuda_checkpoint_path="/no/tool",
            cuda_plugin_dir="/no/plugins",
        ),
    )
    criu = (
        "checkpoint.criu_path: cannot run CRIU: no-criu is not on PATH (install CRIU, or use"
        " another eviction than checkpoint, or set checkpoint.criu_path)"
    )
    plugins = (
        "checkpoint.cuda_plugin_dir: the directory /no/plugins does not exist (remove the key to do"
        " without it)"
    )
    tool = (
        "checkpoint.cuda_checkpoint_path: cannot run CUDA suspend: /no/tool is missing or not"
        " executable (remove the key to use the driver itself, or set"
        " checkpoint.cuda_checkpoint_path)"
    )
    for change, expected in (
        ({"eviction": FREEZE}, []),
        ({"eviction": SUSPEND}, [tool]),
        ({"eviction": FREEZE, "ladder": (SUSPEND, STOP)}, [tool]),
        ({"eviction": CHECKPOINT}, [criu, plugins, tool]),
        ({"eviction": FREEZE, "ladder": (CHECKPOINT, STOP)}, [criu, plugins, tool]),
        ({"checkpoint_path": "/"}, [criu, plugins, tool]),
    ):
        b = replace(B, **change)
        assert texts(check_host(replace(lacking, models={"a": A, "b": b}))) == expected, change
    plain = replace(lacking, checkpoint=CheckpointConfig("no-criu"), models={"a": A})
    assert check_host(plain) == ()


def test_programs_and_users_that_are_missing(fit: Config) -> None:
    b = replace(B, vllm_command=("/no/b",))
    lacking = replace(fit, vllm_command=("no-vllm",), models={"a": A, "b": b}, engine_user="no-one")
    assert texts(check_host(lacking)) == [
        "vllm_command: cannot run vLLM: no-vllm is not on PATH (install vLLM, or set vllm_command)",
        (
            "models.b.vllm_command: cannot run vLLM: /no/b is missing or not executable"
            " (install vLLM, or set models.b.vllm_command)"
        ),
        (
            "engine_user: the user no-one does not exist (run: useradd --system --shell"
            " /usr/sbin/nologin no-one)"
        ),
    ]


def test_engines_have_users_of_the_group_of_all_by_default(
    fit: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def entry(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(pw_uid=1)

    monkeypatch.setattr(pwd, "getpwnam", entry)
    assert check_host(replace(fit, engine_user=None)) == ()
    assert asked == ["llmux-engine"]


def test_sockets_are_made_in_the_gateways_own_directory(fit: Config) -> None:
    listen = ("127.0.0.1:1", "unix:/run/llmux-gateway/x", "unix:/run/y", "unix:/tmp/d/z")
    found = check_host(replace(fit, gateway=GatewayConfig(listen=listen)))
    assert texts(found) == [
        f"gateway.listen: the service cannot make a socket in {place} (write"
        f" unix:/run/llmux-gateway/{name})"
        for place, name in (("/run", "y"), ("/tmp/d", "z"))  # a name
    ]


def test_directories_that_others_may_write_to_are_not_safe(fit: Config, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o777)
    plugins = replace(fit.checkpoint, cuda_plugin_dir=str(tmp_path / "images"))
    found = check_directories(replace(fit, checkpoint=plugins))
    assert [problem.path for problem in found] == [
        "checkpoint.images_dir",
        "checkpoint.cuda_plugin_dir",
    ]
    assert "the images directory is not safe: " in found[0].message
    assert found[1].message.startswith("the directory is not safe: ")
    assert found[1].message.endswith(
        " (CRIU loads the libraries in it as root: make it root's, or remove the key)"
    )
    assert check_host(fit) == found[:1]
    assert check_directories(replace(fit, checkpoint=CheckpointConfig(images_dir="/"))) == ()


OTHER = 4_000_000_000  # nobody's


class Reader:
    """The gateway's user: none at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.entry: Any = None
        self.groups: list[Any] = []
        self.access_lists: list[str] = []
        monkeypatch.setattr(pwd, "getpwnam", self._named)
        monkeypatch.setattr(grp, "getgrall", lambda: self.groups)
        monkeypatch.setattr(os, "listxattr", self._attributes)

    def _named(self, name: str) -> Any:
        self.asked.append(name)
        if self.entry is None:
            raise KeyError(name)
        return self.entry

    def _attributes(self, path: Path) -> list[str]:
        return ["user.x", *(["system.posix_acl_access"] if str(path) in self.access_lists else [])]


@pytest.fixture
def closed() -> Iterator[Config]:
    """Its files, which others may read, in a directory that is not pytest's, which is closed."""
    with TemporaryDirectory() as top:
        Path(top).chmod(0o711)
        folder = Path(top) / "etc"
        folder.mkdir()
        for name in ("config.yaml", "keys", "cert", "key"):
            (folder / name).touch()
            (folder / name).chmod(0o604)
        settings = GatewayConfig(
            keys_file=f"{folder}/keys", tls_certificate=f"{folder}/cert", tls_key=f"{folder}/key"
        )
        yield Config(gateway=settings, sources=(f"{folder}/config.yaml",))
        folder.chmod(0o700)


def test_what_the_gateways_user_may_not_read(
    closed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(closed.sources[0]).parent
    reader = Reader(monkeypatch)
    all_four = ["", "gateway.keys_file", "gateway.tls_certificate", "gateway.tls_key"]

    def refused() -> list[str]:
        return [problem.path for problem in check_gateway_reads(closed)]

    folder.chmod(0o700)
    assert refused() == [], "there is no such user"
    assert reader.asked == [GATEWAY]
    reader.entry = SimpleNamespace(pw_uid=OTHER, pw_gid=OTHER)
    assert refused() == all_four
    found = check_gateway_reads(closed)[1].message
    assert found == (
        f"the gateway's user llmux cannot read {folder}/keys: {folder} is closed to it"
        f" (chgrp llmux {folder} && chmod g+rX {folder})"
    )
    folder.chmod(0o701)
    assert refused() == [], "to pass a directory is enough"
    folder.chmod(0o704)
    assert refused() == all_four, "to list it is not"
    reader.access_lists = [str(folder)]
    assert refused() == [], "who may pass is in its list"
    (folder / "key").chmod(0o640)
    assert refused() == all_four[3:], "that list is not the file's"
    reader.access_lists.append(f"{folder}/key")
    assert refused() == []
    (folder / "key").chmod(0o651)
    reader.access_lists = [str(folder)]
    assert refused() == all_four[3:], "to run it is not to read it"
    (folder / "key").chmod(0o640)
    reader.access_lists = []
    for mode, groups, paths in (
        (0o710, [os.getgid()], [*all_four[:3]]),
        (0o710, [os.getgid() + 1], all_four),
        (0o701, [os.getgid()], all_four),
    ):
        folder.chmod(mode)
        member = [SimpleNamespace(gr_gid=gid, gr_mem=["x", GATEWAY]) for gid in groups]
        reader.groups = [SimpleNamespace(gr_gid=os.getgid(), gr_mem=["x"]), *member]
        assert refused() == paths, (oct(mode), groups)
    reader.groups = []
    folder.chmod(0o611)
    reader.entry = SimpleNamespace(pw_uid=os.getuid(), pw_gid=OTHER)
    assert refused() == all_four, "its owner is no other"
    folder.chmod(0o100)
    assert refused() == [], "the owner may read its own"
    reader.entry = SimpleNamespace(pw_uid=OTHER, pw_gid=os.getgid())
    folder.chmod(0o710)
    assert refused() == all_four[:3], "its own group may not read what others may"


def test_files_that_are_missing_or_no_paths_are_reported_elsewhere(
    closed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(closed.sources[0]).parent
    reader = Reader(monkeypatch)
    reader.entry = SimpleNamespace(pw_uid=OTHER, pw_gid=OTHER)
    credentials = GatewayConfig(keys_file="credential:keys", tls_key=f"{folder}/absent/key")
    elsewhere = replace(closed, gateway=credentials, sources=(f"{folder}/absent",))
    assert check_gateway_reads(elsewhere) == ()


def test_what_engines_without_a_service_cannot_have() -> None:
    c = ModelConfig("c", "org/c", eviction=FREEZE, limits=Limits(tasks_max=100))
    d = ModelConfig("d", "org/d", eviction=Eviction(), ladder=(SUSPEND, CHECKPOINT))
    e = ModelConfig("e", "org/e", eviction=CHECKPOINT)
    found = check_embedded(
        Config(models={"a": A, "c": c, "d": d, "e": e}, gateway=GatewayConfig(workers=2))
    )
    use = "Use keep_running or stop, or run llmux as a service"
    assert texts(found) == [
        "gateway.workers: cannot have 2 workers in one process: write 1, or run llmux as a service",
        "models.c.limits: cannot limit engines without systemd: run llmux as a service",
        f"models.c.eviction: cannot use freeze without systemd: it needs the cgroup freezer. {use}",
        (
            "models.d.eviction: cannot use cuda_suspend without systemd: it needs the cgroup"
            f" freezer. {use}"
        ),
        f"models.e.eviction: cannot use checkpoint without systemd: it needs root and CRIU. {use}",
    ]
    assert check_embedded(Config(models={"a": A})) == ()

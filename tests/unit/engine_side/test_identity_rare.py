"""What an engine was made of, where a part of it is odd or there is no user."""

from __future__ import annotations

import hashlib
import os
import pwd
from pathlib import Path

import pytest

from llmux.config.schema import ModelConfig
from llmux.drivers.engine.identity import (
    driver_identity,
    engine_identity,
    portable_identity,
    program_identity,
)
from llmux.ports import EngineUser, LaunchSpec


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("binary")
    (tmp_path / "bin" / "vllm").write_text(f"#!{tmp_path}/bin/python3\n")
    (tmp_path / "bin" / "vllm").chmod(0o755)
    for version, libraries in (("3.11", ("Torch-2.8.0",)), ("3.12", ("vllm-0.32", "other-1"))):
        site = tmp_path / "lib" / f"python{version}" / "site-packages"
        site.mkdir(parents=True)
        for name in libraries:
            (site / f"{name}.dist-info").mkdir()
    return tmp_path


def test_site_packages_that_are_no_directory_hide_no_other(venv: Path) -> None:
    for folder in ("lib/python3.10", "lib64/python3.13"):
        (venv / folder).mkdir(parents=True)
        (venv / folder / "site-packages").write_text("a file")
    found = program_identity("vllm", str(venv / "bin"), {"torch", "vllm"})
    assert {name: value for name, value in found.items() if "version" in name} == {
        "version.torch": "2.8.0",
        "version.vllm": "0.32",
    }


def test_a_script_that_cannot_be_read_names_no_interpreter(venv: Path) -> None:
    script = venv / "bin" / "vllm"
    for data in (b"", b"\n", b"#!\n", b"\xff\xfe\n", b"#!\xff/python3\n"):
        script.write_bytes(data)
        found = program_identity("vllm", str(venv / "bin"), {"torch"})
        assert ("python" in found) is (b"python3" in data)
        assert "version.torch" not in found
        assert found["program"].startswith(os.path.realpath(script))


def test_the_weights_of_an_engine_elsewhere_count_by_content(venv: Path) -> None:
    model = venv / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = ModelConfig("m", str(model))
    spec = LaunchSpec("m", ("vllm",), {"PATH": str(venv / "bin")}, None, "/o", "/e", "/r")
    here = engine_identity(config, spec)
    away = portable_identity(config, spec, "00" * 16)
    content = hashlib.sha256(b"{}").hexdigest()[:32]
    assert here["file.config.json"] == f"2 bytes, {(model / 'config.json').stat().st_mtime_ns}"
    assert away["file.config.json"] == f"2 bytes, sha256 {content}"


def test_an_engine_without_a_user_is_roots(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("m", str(venv))
    spec = LaunchSpec("m", ("vllm",), {}, None, "/o", "/e", "/r")
    away = portable_identity(config, spec, "00" * 16)
    assert (away["uid"], away["gid"], away["user"]) == ("0", "0", "root")

    def nobody(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    assert portable_identity(config, spec, "00" * 16)["groups"] == "0"
    user = EngineUser("u", 70, 71, "/h", ())
    spec = LaunchSpec("m", ("vllm",), {}, user, "/o", "/e", "/r")
    away = portable_identity(config, spec, "00" * 16)
    assert (away["uid"], away["gid"], away["groups"]) == ("70", "71", "")


def test_a_gpu_that_says_nothing_hides_not_the_driver(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM 1\n")
    (tmp_path / "gpus").write_text("a file")
    assert driver_identity(tmp_path) == {"nvidia_driver": "NVRM 1"}
    (tmp_path / "gpus").unlink()
    (tmp_path / "version").unlink()
    (tmp_path / "gpus" / "0").mkdir(parents=True)
    (tmp_path / "gpus" / "0" / "information").write_text("Model: H200\nGPU UUID: a:b\nBus: 1\n")
    (tmp_path / "gpus" / "1").mkdir()
    assert driver_identity(tmp_path) == {"gpu.0.Model": "H200", "gpu.0.GPU UUID": "a:b"}

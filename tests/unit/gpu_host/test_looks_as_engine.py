"""Programs that are run as an engine would be, and what the look itself says."""

from __future__ import annotations

import json
import os
import pwd
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.doctor import as_engine, facts, look_as_engine
from llmux.ports import EngineUser, LaunchSpec


def test_a_home_for_the_look_is_used_wherever_the_home_is_named(tmp_path: Path) -> None:
    home = tmp_path / "users" / "m"
    (tmp_path / "users").mkdir()
    user = EngineUser("u", os.geteuid(), os.getegid(), str(home), (), temporary=f"{home}/tmp")
    spec = LaunchSpec("m", ("x", f"--a={home}/b"), {"HOME": str(home), "A": "b"}, user, "", "", "")
    with as_engine._home(spec) as own:
        assert own.user is not None
        made = Path(own.user.home)
        assert made.parent == tmp_path / "users" and made.is_dir() and made != home
        assert own.user.temporary == f"{made}/tmp"
        assert own.argv == ("x", f"--a={made}/b")
        assert own.env == {"HOME": str(made), "A": "b"}
        (made / "file").touch()
    assert list((tmp_path / "users").iterdir()) == []
    (tmp_path / "users").rmdir()
    with as_engine._home(spec) as own:
        assert own.user is not None
        assert Path(own.user.home).parent == tmp_path, "what is there of the way to it"
    home.mkdir(parents=True)
    shared = replace(spec, user=replace(user, temporary=None))
    for kept in (spec, shared, replace(spec, user=None)):
        with as_engine._home(kept) as own:
            assert own is kept
    assert os.listdir(tmp_path / "users") == ["m"]


def test_a_program_that_cannot_be_run_as_an_engine_is_an_answer(tmp_path: Path) -> None:
    spec = LaunchSpec("m", ("/no/such",), {}, None, "", "", str(tmp_path))
    status, said = as_engine.run_as_engine(spec, 20.0)
    assert status is None
    assert "cannot execute /no/such" in said
    echo = replace(spec, argv=("/bin/sh", "-c", "echo out; echo err >&2; exit 3"))
    assert as_engine.run_as_engine(echo, 20.0) == (3, "out\nerr")


def test_what_keeps_an_engine_out_is_said_by_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "model"
    (files / ".hidden").mkdir(parents=True)
    (files / ".hidden" / "x").touch()
    for name in ("a", "b", ".c"):
        (files / name).touch()
    python = [sys.executable, "-I", "-S"]  # without what takes time to start
    asked = {
        "program": "/bin/sh", "interpreter": [], "modules": [], "import_secs": 60.0,
        "models": {"m": str(files), "n": str(files / "a")},
        "directories": {"HOME": str(tmp_path), "A": f"{tmp_path}/new/b", "T": "/proc/x"},
    }  # fmt: skip

    def look(**change: Any) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["look", json.dumps({**asked, **change})])
        look_as_engine.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    said = look(interpreter=python, modules=["json", "no_such"])
    assert (said["problems"], said["files"]) == ([], 3)
    assert said["imports"].startswith(f"{sys.executable} cannot import no_such: ModuleNotFound")
    assert list(said["closed"].values()) == [["T"]]
    assert set(said["found"]) == {"ninja", "cc", "nvcc", "Python.h", "flashinfer-jit-cache"}
    assert sorted(os.listdir(tmp_path)) == ["model"], "nothing is left of it"
    gone = str(tmp_path / "gone")
    said = look(interpreter=python, modules=["json"], models={"m": gone}, program=gone)
    assert said["problems"] == [
        f"cannot execute {gone}: it is not there",
        f"cannot read {gone} of m: it is not there",
    ]
    assert (said["imports"], said["files"]) == (None, 0)
    assert look(interpreter=python, modules=["json"])["imports"] is None
    said = look(modules=["json"])
    assert (said["found"].keys(), said["imports"]) == ({"ninja", "cc", "nvcc"}, None)
    said = look(interpreter=[gone], modules=["json"])
    (problem,) = said["problems"]
    assert problem.startswith(f"cannot execute {gone}: [Errno 2] No such file or directory")
    assert said["imports"] is None
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho why >&2; exit 1\n")
    bad.chmod(0o755)
    assert look(interpreter=[str(bad)])["problems"] == [f"cannot execute {bad}: why"]
    bad.write_text("#!/bin/sh\necho no json\n")
    assert look(interpreter=[str(bad)])["problems"][0].startswith(f"cannot execute {bad}: Expect")
    bad.write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(look_as_engine, "ASK_SECS", 0.01)
    assert "timed out after 0.01 seconds" in look(interpreter=[str(bad)])["problems"][0]
    (files / "a").chmod(0o640)
    assert look_as_engine.closed(str(files / "a")) == "its mode is 0o640"


def test_without_a_place_for_the_look_there_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/gone")
    spec = LaunchSpec("m", ("/bin/true",), {}, None, "", "", str(tmp_path))
    status, said = as_engine.run_as_engine(spec, 20.0)
    assert status is None
    assert said.startswith(f"{tmp_path}/gone/llmux-doctor-")
    assert said.endswith(": No such file or directory")


def test_users_and_their_groups_are_those_of_the_host() -> None:
    me = pwd.getpwuid(os.geteuid())
    assert facts.user_exists(me.pw_name)
    assert not facts.user_exists("no-such-user")
    assert facts.groups_of(me.pw_name) == frozenset(os.getgrouplist(me.pw_name, me.pw_gid))
    with pytest.raises(KeyError):
        facts.groups_of("no-such-user")

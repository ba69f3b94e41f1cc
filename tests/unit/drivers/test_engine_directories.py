"""Directories that root makes for an engine: nothing that an engine left stops the next one."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmux.drivers.processes.directories import empty, prepare_directories
from llmux.errors import UnitFailed
from llmux.ports import EngineUser, LaunchSpec

UID = 60900
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


def spec(place: Path, *, user: bool = False) -> LaunchSpec:
    home = f"{place}/cache/poet"
    return LaunchSpec(
        model="poet",
        argv=("/bin/true",),
        env={},
        user=EngineUser("llmux-x", UID, UID, home, temporary=f"{home}/tmp") if user else None,
        stdout=str(place / "out"),
        stderr=str(place / "err"),
        runtime_dir=str(place / "engines" / "poet"),
    )


def empty_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        empty(fd)
    finally:
        os.close(fd)


def test_a_directory_in_place_of_the_socket_does_not_stop_the_next_engine(tmp_path: Path) -> None:
    where = tmp_path / "engines" / "poet"
    (where / "api.sock" / "inside").mkdir(parents=True)
    (where / "api.sock" / "inside" / "file").write_text("x")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(where / "old.sock"))
    prepare_directories(spec(tmp_path))
    assert list(where.iterdir()) == []


def test_what_a_link_leads_to_is_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep" / "file").write_text("untouched")
    where = tmp_path / "engines" / "poet"
    (where / "sub").mkdir(parents=True)
    (where / "link").symlink_to(victim)
    (where / "sub" / "link").symlink_to(victim)
    (where / "sub" / "file").symlink_to(victim / "deep" / "file")
    prepare_directories(spec(tmp_path))
    assert list(where.iterdir()) == []
    assert (victim / "deep" / "file").read_text() == "untouched"


def test_directories_deeper_than_any_stack_are_removed(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')",
        ],
        cwd=tmp_path,
        check=True,
    )
    assert made.returncode == 0
    empty_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "poet").symlink_to(tmp_path / "victim")
    with pytest.raises(UnitFailed, match=r"cannot make its directory .*engines/poet"):
        prepare_directories(spec(tmp_path))


@as_root
def test_the_home_is_the_users_alone_and_the_sockets_directory_not_the_gateways_to_change(
    tmp_path: Path,
) -> None:
    prepare_directories(spec(tmp_path, user=True))
    home = (tmp_path / "cache" / "poet").stat()
    assert (home.st_uid, home.st_gid, stat.S_IMODE(home.st_mode)) == (UID, UID, 0o700)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o711
    runtime = (tmp_path / "engines" / "poet").stat()
    assert (runtime.st_uid, stat.S_IMODE(runtime.st_mode)) == (UID, 0o2750)


@as_root
def test_what_the_home_holds_is_kept(tmp_path: Path) -> None:
    prepare_directories(spec(tmp_path, user=True))
    kept = tmp_path / "cache" / "poet" / "kernels"
    kept.write_text("compiled")
    prepare_directories(spec(tmp_path, user=True))
    assert kept.read_text() == "compiled"


@as_root
def test_a_home_of_another_user_is_refused_with_the_remedy(tmp_path: Path) -> None:
    home = tmp_path / "cache" / "poet"
    home.mkdir(parents=True)
    os.chown(home, UID + 1, UID + 1)
    with pytest.raises(UnitFailed, match=rf"belongs to user {UID + 1}.*chown -R {UID}:{UID}"):
        prepare_directories(spec(tmp_path, user=True))
    assert home.stat().st_uid == UID + 1


@as_root
def test_a_home_below_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", UID + 1, UID + 1)
    with pytest.raises(UnitFailed, match=rf"cache belongs to user {UID + 1}"):
        prepare_directories(spec(tmp_path, user=True))


@as_root
def test_a_link_in_place_of_the_home_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "poet").symlink_to(victim)
    with pytest.raises(UnitFailed, match="cannot make its directory"):
        prepare_directories(spec(tmp_path, user=True))
    assert victim.stat().st_uid == 0


@as_root
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    prepare_directories(spec(tmp_path, user=True))
    os.chown(tmp_path / "cache" / "poet", UID + 1, UID + 1)
    with pytest.raises(UnitFailed, match="belongs to user"):
        prepare_directories(spec(tmp_path, user=True))
    assert len(os.listdir("/proc/self/fd")) == before

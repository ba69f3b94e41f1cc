"""What an image makes CRIU open: recorded as the kernel knew it, refused when swapped.

With a real engine and CRIU: tests/system/parking/criu_swaps.py.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from llmux.drivers.criu import known_files, shm
from llmux.drivers.criu.known_files import FileChanged
from llmux.drivers.images.manifest import KnownFile

ENGINE = """
import mmap, os, sys
home = sys.argv[1]
os.chdir(f"{home}/work")
notes = open(f"{home}/notes", "ab")
with open(f"{home}/mapped", "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
ghost = open(f"{home}/ghosts/ghost", "wb")
os.unlink(f"{home}/ghosts/ghost")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("work", "ghosts"):
        (tmp_path / name).mkdir()
    for name in ("notes", "mapped"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "secret").write_text("root's")
    return tmp_path.resolve()


@pytest.fixture
def engine(home: pathlib.Path) -> Iterator[int]:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", ENGINE, str(home)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


def record(home: pathlib.Path, engine: int) -> tuple[KnownFile, ...]:
    held = known_files.record([engine])
    return known_files.complete(held, [str(home / "notes")], [str(home / "ghosts/ghost")])


def test_open_and_mapped_files_programs_and_directories_are_recorded(
    home: pathlib.Path, engine: int
) -> None:
    known = {file.path: file for file in record(home, engine)}
    for path in ("notes", "mapped", "work", "ghosts"):
        status = (home / path).stat()
        file = known[str(home / path)]
        assert (file.device, file.inode) == (status.st_dev, status.st_ino)
        assert (file.uid, file.mode) == (status.st_uid, status.st_mode)
    assert os.path.realpath(sys.executable) in known
    assert "/" in known
    assert not any("deleted" in path or path.startswith("/proc/") for path in known)
    known_files.check(known.values())


def link(home: pathlib.Path, name: str) -> None:
    (home / name).unlink()
    (home / name).symlink_to(home / "secret")


def hard_link(home: pathlib.Path, name: str) -> None:
    (home / name).unlink()
    os.link(home / "secret", home / name)


def move(home: pathlib.Path, name: str) -> None:
    """A directory, or a file, moves away and a link to that very one takes its place."""
    (home / name).rename(home / "away")
    (home / name).symlink_to(home / "away")


SWAPS: list[tuple[Callable[[pathlib.Path, str], None], str]] = [
    (link, "notes"),
    (link, "mapped"),
    (hard_link, "notes"),
    (hard_link, "mapped"),
    (move, "notes"),
    (move, "work"),
    (move, "ghosts"),
    (lambda home, name: (home / name).unlink(), "notes"),
    (lambda home, name: (home / name).chmod(0o666), "notes"),
]


@pytest.mark.parametrize(("swap", "name"), SWAPS)
def test_a_swap_is_seen_before_the_restore(
    home: pathlib.Path, engine: int, swap: Callable[[pathlib.Path, str], None], name: str
) -> None:
    known = record(home, engine)
    swap(home, name)
    with pytest.raises(FileChanged, match=str(home / name)):
        known_files.check(known)


def test_another_owner_is_another_file(home: pathlib.Path, engine: int) -> None:
    known = [
        replace(file, uid=file.uid + 1) if file.path == str(home / "notes") else file
        for file in record(home, engine)
    ]
    with pytest.raises(FileChanged, match=f"notes belongs to user {os.getuid()} now"):
        known_files.check(known)


def test_a_directory_above_by_a_link_is_seen(home: pathlib.Path, engine: int) -> None:
    known = record(home, engine)
    home.rename(f"{home}-away")
    home.symlink_to(f"{home}-away")
    with pytest.raises(FileChanged, match="Too many levels of symbolic links"):
        known_files.check(known)


def test_llmuxs_own_files_may_be_new(home: pathlib.Path, engine: int) -> None:
    known = record(home, engine)
    (home / "notes").unlink()
    (home / "notes").write_bytes(b"a new log")
    known_files.check(known, [str(home / "notes")])


def test_what_a_restored_process_holds_is_what_was_recorded(
    home: pathlib.Path, engine: int
) -> None:
    known = record(home, engine)
    ghost = str(home / "ghosts/ghost")
    known_files.check_restored([engine], known, [], [ghost])
    with pytest.raises(FileChanged, match=r"holds .*ghost \(deleted\), which it did not"):
        known_files.check_restored([engine], known, [], [])
    others = [file for file in known if file.path != str(home / "notes")]
    with pytest.raises(FileChanged, match=f"holds {home}/notes, which it did not when dumped"):
        known_files.check_restored([engine], others, [], [ghost])
    known_files.check_restored([engine], others, [str(home / "notes")], [ghost])
    with pytest.raises(FileChanged, match="belongs to user"):
        stolen = [replace(file, uid=file.uid + 1) for file in known]
        known_files.check_restored([engine], stolen, [], [ghost])


def test_a_name_of_the_image_that_became_a_link_ends_the_dump(home: pathlib.Path) -> None:
    link(home, "notes")
    with pytest.raises(OSError, match="symbolic links"):
        known_files.complete({}, [str(home / "notes")], [])


# ---- leftovers ----------------------------------------------------------------------------------

UID = 4242


@pytest.fixture
def leftover(home: pathlib.Path) -> pathlib.Path:
    path = home / "ghosts" / "ghost.cr.1.ghost"
    path.write_text("left by a killed CRIU")
    if os.geteuid() != 0:
        pytest.skip("gives files to another user: needs root")
    return path


def test_a_leftover_of_the_engines_is_removed(leftover: pathlib.Path) -> None:
    os.chown(leftover, UID, UID)
    shm.remove_leftovers([str(leftover)], UID)
    assert not leftover.exists()


def test_so_is_one_that_criu_had_not_given_it_yet(leftover: pathlib.Path) -> None:
    os.chown(leftover.parent, UID, UID)
    shm.remove_leftovers([str(leftover)], UID)
    assert not leftover.exists()


def test_what_is_anothers_stays(leftover: pathlib.Path) -> None:
    shm.remove_leftovers([str(leftover)], UID)
    assert leftover.exists()


def test_what_is_behind_a_link_stays(leftover: pathlib.Path, home: pathlib.Path) -> None:
    os.chown(leftover, UID, UID)
    leftover.parent.rename(home / "away")
    (home / "ghosts").symlink_to(home / "away")
    shm.remove_leftovers([str(leftover)], UID)
    assert (home / "away" / leftover.name).exists()


def test_a_link_in_its_place_stays_and_so_does_what_it_leads_to(leftover: pathlib.Path) -> None:
    os.chown(leftover.parent, UID, UID)
    leftover.rename(leftover.parent / "away")
    leftover.symlink_to("away")
    shm.remove_leftovers([str(leftover)], UID)
    assert leftover.is_symlink() and leftover.exists()

"""The files of /dev/shm that belong to an image, in a directory of ours: who may lose what."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import stat
from dataclasses import replace

import pytest

from llmux.drivers.criu import shm
from llmux.drivers.criu.held_names import HeldNames, is_name
from llmux.drivers.criu.tree import SHM
from llmux.drivers.images.manifest import ShmGroup
from llmux.drivers.images.store import ImageStore

ME, MINE = os.geteuid(), os.getegid()


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "shm"
    path.mkdir()
    return path


@pytest.fixture
def held(tmp_path: pathlib.Path, place: pathlib.Path) -> HeldNames:
    return HeldNames(ImageStore(str(tmp_path / "none")), str(place))


def key(path: pathlib.Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def test_names_are_found_by_their_inode_and_only_of_plain_files(place: pathlib.Path) -> None:
    for name in ("b", "a", "other"):
        (place / name).write_text(name)
    os.link(place / "a", place / "z")
    (place / "link").symlink_to("a")
    (place / "directory").mkdir()
    wanted = {key(place / name) for name in ("a", "b", "link", "directory")}
    found = shm.find_names(iter(wanted | {(1, 1)}), str(place))
    assert found == {key(place / "a"): ["a", "z"], key(place / "b"): ["b"]}
    assert list(found) == sorted(found)
    assert shm.find_names((), str(place)) == {}


def test_what_is_kept_is_described_file_by_file(
    tmp_path: pathlib.Path, place: pathlib.Path
) -> None:
    image = tmp_path / "image"
    image.mkdir()
    with (place / "b").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(500_000)
        file.write(b"middle")
    (place / "b").chmod(0o660)
    (place / "a").write_bytes(b"abc")
    (place / "a").chmod(0o604)
    os.link(place / "a", place / "link_remap.7")
    groups = {key(place / "b"): ["b"], key(place / "a"): ["link_remap.7", "a"]}
    first, second = shm.keep(
        groups, str(image), {f"{SHM}/link_remap.7": f"{SHM}/link_remap.7.t"}, str(place)
    )
    assert first == ShmGroup(("b",), "shm/0", 1 << 20, 0o660, ME, MINE)
    assert second == ShmGroup(("a", "link_remap.7.t"), "shm/1", 3, 0o604, ME, MINE)
    assert (image / "shm/0").read_bytes() == (place / "b").read_bytes()
    assert (image / "shm/0").stat().st_blocks * 512 < 1 << 19, "holes stay holes"
    assert (image / "shm/1").read_bytes() == b"abc"
    with pytest.raises(FileExistsError):  # an image is written once
        shm.keep(groups, str(image), {}, str(place))
    (place / "c").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        shm.keep({(0, 0): ["c"]}, str(tmp_path / "another"), {}, str(place))
    shm.remove(["b", "gone", "a"], str(place))
    assert sorted(os.listdir(place)) == ["c", "link_remap.7"]


def process(proc: pathlib.Path, pid: int, comm: str) -> pathlib.Path:
    own = proc / str(pid)
    (own / "fd").mkdir(parents=True)
    (own / "comm").write_text(f"{comm}\n")
    (own / "maps").write_text("")
    return own


@pytest.mark.parametrize("how", ["mapped", "open", "not"])
def test_a_link_of_another_criu_is_set_aside_unless_a_process_has_it(
    tmp_path: pathlib.Path, place: pathlib.Path, how: str
) -> None:
    """Whatever else there is in /proc: processes that end, descriptors that are closed meanwhile,
    other files."""
    link = place / "link_remap.3"
    link.write_text("")
    (place / "link_remap.33x").write_text("")
    status = link.stat()
    proc = tmp_path / "proc"
    for pid in (3, 5, 9):
        own = process(proc, pid, f"name{pid}")
        (own / "fd" / "1").symlink_to(tmp_path)
    (proc / "self").symlink_to("5")
    (proc / "4").mkdir()  # it has just ended
    (proc / "9" / "fd" / "0").symlink_to("/no/such/file")
    if how == "mapped":
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        other = f"7f00-7f01 r--s 0 {device} {status.st_ino}1 /x\n"
        mapping = f"7f00-7f01 rw-s 00000000 {device} {status.st_ino} /dev/shm/link\n"
        (proc / "3" / "maps").write_text(other)
        (proc / "5" / "maps").write_text(other + mapping)
    elif how == "open":
        (proc / "5" / "fd" / "7").symlink_to(link)
    moved, used = shm.set_aside_links("t", str(place), str(proc))
    if how == "not":
        assert (moved, used) == ([str(link)], [])
        assert sorted(os.listdir(place)) == ["link_remap.3.aside-t", "link_remap.33x"]
    else:
        assert (moved, used) == ([], [f"{link}, which process 5 (name5) uses"])
        assert sorted(os.listdir(place)) == ["link_remap.3", "link_remap.33x"]


def image_of(tmp_path: pathlib.Path, *names: str) -> list[ShmGroup]:
    (tmp_path / "image" / "shm").mkdir(parents=True)
    groups = []
    for number, name in enumerate(names):
        (tmp_path / "image" / "shm" / str(number)).write_bytes(b"kept" + bytes(5000))
        groups.append(ShmGroup((name, f"{name}.too"), f"shm/{number}", 5004, 0o640, ME, MINE))
    return groups


@pytest.mark.parametrize("there", ["nothing", "left by the engine", "held by llmux"])
def test_files_are_as_they_were_whatever_lies_under_their_names(
    tmp_path: pathlib.Path, place: pathlib.Path, held: HeldNames, there: str
) -> None:
    groups = image_of(tmp_path, "x", "y")
    (tmp_path / "proc").mkdir()
    if there == "left by the engine":
        (place / "x").write_text("old")
    elif there == "held by llmux":
        held.dumped("m", ["x"], [])
        held.settle()
        assert held.is_ours("x")
    made = shm.put_back(groups, str(tmp_path / "image"), held, str(place), str(tmp_path / "proc"))
    assert made == ("x", "x.too", "y", "y.too")
    assert sorted(os.listdir(place)) == sorted(made)
    for name in ("x", "y"):
        status = (place / name).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o640, 5004)
        assert (status.st_uid, status.st_gid) == (ME, MINE)
        assert (place / name).read_bytes() == b"kept" + bytes(5000)
        assert (place / name).samefile(place / f"{name}.too")
        assert not (place / name).samefile(tmp_path / "image" / "shm" / "0")


@pytest.mark.parametrize("what", ["a directory", "another's", "in use", "a link", "no file kept"])
def test_one_that_cannot_be_put_back_takes_the_others_with_it(
    tmp_path: pathlib.Path, place: pathlib.Path, held: HeldNames, what: str
) -> None:
    groups = image_of(tmp_path, "x", "y")
    last = place / "y.too"
    proc = tmp_path / "proc"
    proc.mkdir()
    if what == "a directory":
        last.mkdir()
    elif what == "a link":
        last.symlink_to(tmp_path)
    elif what == "another's":
        last.write_text("another's")
        groups[1] = replace(groups[1], uid=ME + 1)
    elif what == "in use":
        last.write_text("in use")
        (process(proc, 5, "cat") / "fd" / "0").symlink_to(last)
    else:
        (tmp_path / "image" / "shm" / "1").unlink()
    before = sorted(os.listdir(place))
    with pytest.raises((shm.ShmTaken, OSError)) as raised:
        shm.put_back(groups, str(tmp_path / "image"), held, str(place), str(proc))
    words = {"in use": "is used by process 5 (cat)", "no file kept": "No such file"}
    default = f"{last} exists and belongs to user {ME}, not"
    assert words.get(what, default) in str(raised.value)
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a"])
def test_a_name_is_one_in_the_directory(
    tmp_path: pathlib.Path, place: pathlib.Path, held: HeldNames, name: str
) -> None:
    assert not is_name(name)
    assert is_name("a..b")
    group = ShmGroup(("fine", name), "shm/0", 0, 0o600, ME, MINE)
    with pytest.raises(shm.ShmTaken) as raised:
        shm.put_back([group], str(tmp_path), held, str(place))
    assert str(raised.value) == f"{name!r} is not the name of a file in {place}"


@pytest.mark.parametrize("what", ["a file", "in use", "a directory", "a link"])
def test_leftovers_of_a_killed_restore_go_unless_they_are_used(
    tmp_path: pathlib.Path, what: str
) -> None:
    place = pathlib.Path(os.path.realpath(tmp_path)) / "shm"
    place.mkdir()
    left, next_one = place / "sem.x", place / "sem.y"
    proc = tmp_path / "proc"
    proc.mkdir()
    if what == "a directory":
        left.mkdir()
    elif what == "a link":
        left.symlink_to("sem.y")
    else:
        left.write_text("")
    if what == "in use":
        (process(proc, 5, "cat") / "fd" / "0").symlink_to(left)
    next_one.write_text("")
    shm.remove_leftovers(map(str, (left, next_one)), ME, shm=str(place), proc=str(proc))
    assert os.listdir(place) == ([] if what == "a file" else ["sem.x"])


# ---- names that are held -------------------------------------------------------------------------


def test_names_that_a_dump_left_go_and_those_that_it_needs_are_held_in_their_place(
    place: pathlib.Path, held: HeldNames
) -> None:
    for name in ("left", "needed", "another's"):
        (place / name).write_text(name)
    held.dumped("m", ["needed", "not there"], ["left", "needed", "gone", "..", "a/b"])
    assert sorted(os.listdir(place)) == ["another's", "needed"]
    assert held.is_ours("needed")
    held.dumped("n", ["of n"], [])
    held.settle()
    assert sorted(os.listdir(place)) == ["another's", "needed", "not there", "of n"]
    assert [held.is_ours(name) for name in sorted(os.listdir(place))] == [False, True, True, True]
    held.published("m", whole=False)
    assert sorted(os.listdir(place)) == ["another's", "of n"]
    held.give_up(["of n", "another's"])
    assert os.listdir(place) == ["of n"]
    held.published("n", whole=True)
    assert os.listdir(place) == []


def test_a_new_file_takes_the_place_of_what_holds_its_name_and_of_nothing_else(
    place: pathlib.Path, held: HeldNames
) -> None:
    held.dumped("m", ["x"], [])
    held.settle()
    (place / "y").write_text("another's")
    fd = held.make("x")
    try:
        assert os.fstat(fd).st_size == 0
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        os.write(fd, b"engine's")
        held.add(fd, "z")
        before = len(os.listdir("/proc/self/fd"))
        for attempt in (lambda: held.add(fd, "y"), lambda: held.make("y")):
            with pytest.raises(FileExistsError):
                attempt()
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)
    assert {name: (place / name).read_text() for name in os.listdir(place)} == {
        "x": "engine's", "y": "another's", "z": "engine's",
    }  # fmt: skip
    assert not held.is_ours("x")
    assert not held.is_ours("nothing")


def test_a_name_that_cannot_be_taken_over_leaves_no_other(
    place: pathlib.Path, held: HeldNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.dumped("m", ["x"], [])
    held.settle()

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "full")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        with pytest.raises(OSError, match="full"):
            held.make("x")
    assert os.listdir(place) == ["x"]
    assert held.is_ours("x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_directory_nothing_is_held_and_nothing_breaks(
    place: pathlib.Path, held: HeldNames
) -> None:
    shutil.rmtree(place)
    held.recover(["m"])
    held.dumped("m", ["x"], ["y"])
    held.settle()
    held.end("m", ["x"])
    assert not held.is_ours("x")
    place.mkdir()
    held.settle()
    assert held.is_ours("x")


def test_what_llmux_made_before_its_end_goes_at_its_next_start(
    place: pathlib.Path, held: HeldNames
) -> None:
    fd = os.open(place / "another", os.O_CREAT | os.O_RDWR)
    os.close(fd)
    ours = place / f"{held._temporary}1"
    ours.touch()
    (place / ".llmux-00000000-1").touch()
    (place / f"x{held._temporary}").touch()
    if os.geteuid() == 0:
        (place / f"{held._temporary}2").touch()
        os.chown(place / f"{held._temporary}2", 4242, 4242)
    before = set(os.listdir(place))
    held.recover(())
    assert before - set(os.listdir(place)) == {ours.name}

"""Files that a compiler deletes while their engine is parked are there again before its restore."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmux.drivers.criu import small_files
from llmux.drivers.images.manifest import SmallFile

ENGINE = """
import os, sys
home = sys.argv[1]
lock = open(f"{home}/cache/kernel.lock", "a")
large = open(f"{home}/cache/weights", "rb")
outside = open(f"{home}/../outside", "a")
gone = open(f"{home}/cache/gone", "a")
os.unlink(f"{home}/cache/gone")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    place = tmp_path.resolve() / "home"
    (place / "cache").mkdir(parents=True)
    (place / "cache" / "kernel.lock").write_bytes(b"7\n")
    (place / "cache" / "kernel.lock").chmod(0o640)
    with (place / "cache" / "weights").open("wb") as file:
        file.truncate(small_files.MOST_BYTES + 1)
    return place


@pytest.fixture
def image(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "image"
    path.mkdir()
    return path


@pytest.fixture
def kept(place: pathlib.Path, image: pathlib.Path) -> Iterator[tuple[SmallFile, ...]]:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", ENGINE, str(place)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = small_files.find([process.pid], [str(place)])
        process.kill()
    yield small_files.keep(found, str(image))


def test_small_open_files_of_its_own_are_kept(
    place: pathlib.Path, kept: tuple[SmallFile, ...]
) -> None:
    (file,) = kept
    assert (file.path, file.size, file.mode) == (str(place / "cache/kernel.lock"), 2, 0o640)


def test_what_is_gone_is_made_again_as_it_was(
    place: pathlib.Path, image: pathlib.Path, kept: tuple[SmallFile, ...]
) -> None:
    lock = place / "cache/kernel.lock"
    lock.unlink()
    for _ in range(2):  # an image is good for more than one restore
        assert small_files.put_back(kept, str(image), [str(place)]) == (str(lock),)
        assert (lock.read_bytes(), lock.stat().st_mode & 0o777) == (b"7\n", 0o640)


def test_what_has_changed_is_left_alone_and_not_vouched_for(
    place: pathlib.Path, image: pathlib.Path, kept: tuple[SmallFile, ...]
) -> None:
    lock = place / "cache/kernel.lock"
    lock.write_bytes(b"another's")
    assert small_files.put_back(kept, str(image), [str(place)]) == ()
    assert lock.read_bytes() == b"another's"


def test_nothing_is_written_outside_of_its_own_directories_or_through_links(
    place: pathlib.Path, image: pathlib.Path, kept: tuple[SmallFile, ...]
) -> None:
    """The path is the image's, and images come from other hosts, too."""
    lock = place / "cache/kernel.lock"
    lock.unlink()
    assert small_files.put_back(kept, str(image), [str(place / "other")]) == ()
    up = f"{place}/cache/../../outside2"
    crooked = [SmallFile(up, kept[0].file, 2, 0o640, os.getuid(), os.getgid())]
    assert small_files.put_back(crooked, str(image), [str(place)]) == ()
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    (place / "cache" / "weights").unlink()
    (place / "cache").rmdir()
    (place / "cache").symlink_to(elsewhere)
    assert small_files.put_back(kept, str(image), [str(place)]) == ()
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in place.parent.iterdir()) == [
        "elsewhere",
        "home",
        "image",
        "outside",
    ]


def test_one_that_was_replaced_or_grew_hides_no_other(
    place: pathlib.Path, image: pathlib.Path
) -> None:
    paths = [place / "cache" / name for name in ("a", "b", "c", "d")]
    found = {}
    for path in paths:
        path.write_text(path.name)
        status = path.stat()
        found[str(path)] = status.st_dev, status.st_ino
    gone, replaced, large, last = paths
    gone.unlink()
    (place / "another").write_text("another")
    (place / "another").rename(replaced)
    large.write_bytes(b"x" * (small_files.MOST_BYTES + 1))
    (kept,) = small_files.keep(found, str(image))
    assert (kept.path, kept.size) == (str(last), 1)
    assert (image / kept.file).read_text() == "d"

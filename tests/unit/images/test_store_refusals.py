"""What the file system refuses to the store of images is said, and takes no image with it."""

from __future__ import annotations

import errno
import os
import pathlib
from dataclasses import replace

import pytest

from llmux.drivers.images.check import load_image
from llmux.drivers.images.files import FileSums
from llmux.drivers.images.manifest import Manifest, ManifestError, TreeProcess
from llmux.drivers.images.store import ImageStore
from llmux.image_ports import Image

GOOD = Manifest(
    model="m",
    created=1.0,
    dump_seconds=2.0,
    cold_seconds=60.0,
    criu="4.2",
    identity={"a": "1"},
    recipe={},
    root_pid=70,
    processes=(TreeProcess(70, "vllm", (70,)),),
    runtime_dir=None,
    append_files=(),
    unix_paths=(),
    tcp_ports=(),
    shm=(),
    known=(),
    files=(),
    apparent_bytes=40,
    disk_bytes=30,
)


def test_a_manifest_is_written_once_and_for_us_alone(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    temporary = pathlib.Path(store.begin("m"))
    (temporary / "manifest.json").write_text("another's")
    with pytest.raises(FileExistsError):
        store.publish(str(temporary), GOOD)
    assert store.images() == []
    path = pathlib.Path(store.publish(store.begin("m"), GOOD).path)
    assert (path / "manifest.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["begin", "receive", "restore_directory"])
def test_what_is_made_for_an_image_is_ours_alone_from_the_top(
    home: pathlib.Path, call: str
) -> None:
    path = pathlib.Path(getattr(ImageStore(str(home / "top" / "images")), call)("org/name"))
    own = home / "top" / "images" / os.path.relpath(path, home / "top" / "images").split("/")[0]
    for made in {path, own, home / "top" / "images"}:
        assert made.stat().st_mode & 0o777 == 0o700
    assert os.listdir(home / "top" / "images") == [own.name]


@pytest.mark.parametrize("what", ["publish", "quarantine", "discard"])
def test_a_directory_that_cannot_be_renamed_is_an_error(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = ImageStore(str(home))
    image = store.publish(store.begin("m"), GOOD)
    temporary = store.begin("m")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="busy"):
        patched.setattr(os, "rename", busy)
        if what == "publish":
            store.publish(temporary, replace(GOOD, created=5.0))
        elif what == "quarantine":
            store.quarantine(image, "it broke")
        else:
            store.discard("m")
    assert store.images() == [image]


def test_a_directory_of_images_that_cannot_be_read_is_no_empty_one(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(str(home / "images"))
    assert (store.images(), store.sweep()) == ([], [])
    (home / "images").mkdir(mode=0o700)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fails)
        for look in (store.images, store.sweep, store.image_directories):
            with pytest.raises(OSError, match="Input/output error"):
                look()


def test_a_file_in_the_place_of_a_directory_is_said(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    temporary = pathlib.Path(store.begin("m"))
    (temporary / "shm").touch(mode=0o600)
    image = store.publish(str(temporary), replace(GOOD, files=(FileSums("shm/0", 0, ()),)))
    with pytest.raises(ManifestError, match=r"^it cannot be read: .*Not a directory.*shm/0"):
        load_image(image.path)


def test_an_image_of_the_users_may_be_a_link_to_our_own(home: pathlib.Path) -> None:
    """It is ours then, and moved when it fails."""
    store = ImageStore(str(home / "images"))
    store.publish(store.begin("m"), GOOD)
    (home / "link").symlink_to(home / "images" / "m" / "images")
    image = store.find("m", {"a": "1"}, str(home / "link"))
    assert isinstance(image, Image)
    assert (image.managed, image.path) == (True, str(home / "images" / "m" / "images"))


def test_an_image_was_used_when_its_model_was_restored_and_no_link_is_followed(
    home: pathlib.Path,
) -> None:
    now = [100.0]
    store = ImageStore(str(home), clock=lambda: now[0])
    assert store.publish(store.begin("m"), GOOD).last_used == 1.0
    for moment in (100.0, 200.0):
        now[0] = moment
        store.used("m")
        assert [image.last_used for image in store.images()] == [moment]
    mark = home / "m" / "last-used"
    assert mark.stat().st_mode & 0o777 == 0o600
    mark.unlink()
    (home / "file").touch()
    before = (home / "file").stat().st_mtime
    mark.symlink_to(home / "file")
    now[0] = 300.0
    store.used("m")
    assert (home / "file").stat().st_mtime == before
    mark.unlink()
    os.mkfifo(mark)
    store.used("m")  # a pipe does not hold us up

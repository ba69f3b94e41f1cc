"""What is no plain file in an image's place, and notes that are damaged: nothing waits or ends."""

from __future__ import annotations

import asyncio
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
from test_store_lives import publish, store_of

from llmux.drivers.criu.driver import Criu
from llmux.drivers.criu.held_names import read_remapped
from llmux.drivers.images.files import digest_files, fetch, sync_tree
from llmux.drivers.images.manifest import ManifestError, load_manifest
from llmux.drivers.images.notes import DUMPING, RESTORING, Begun, write_note
from llmux.drivers.transfer.stream import Import
from llmux.image_ports import Interrupted
from llmux.typed_json import BadJson
from tests.twins.units import MemoryUnits
from tests.twins.world import World


def a_pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


def a_device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def a_directory(path: pathlib.Path) -> None:
    path.mkdir()


def a_circle(path: pathlib.Path) -> None:
    path.symlink_to(path)


def more_than_a_manifest(path: pathlib.Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


ODD = [a_pipe, a_device, a_directory, a_circle, more_than_a_manifest]


@pytest.mark.parametrize("odd", ODD)
def test_a_manifest_that_is_no_file_is_none(
    home: pathlib.Path, odd: Callable[[pathlib.Path], None]
) -> None:
    images = store_of(home)
    path = pathlib.Path(publish(images).path) / "manifest.json"
    path.unlink()
    odd(path)
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(str(path.parent))
    assert images.images() == []
    assert "cannot be used" in getattr(images.find("m", {}), "reason", "")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["last-used", "images/reason"])
def test_what_is_written_beside_an_image_waits_for_no_reader(
    home: pathlib.Path, odd: Callable[[pathlib.Path], None], name: str
) -> None:
    images = store_of(home)
    image = publish(images)
    odd(home / "m" / name)
    images.used("m")
    kept = pathlib.Path(images.quarantine(image, "it is odd"))
    if name == "images/reason" and odd is not a_directory:
        assert (kept / "reason").read_text() == "it is odd\n"
    assert images.images() == []


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", [".import.json", ".import.done"])
def test_an_import_that_was_begun_in_no_file_begins_anew(
    home: pathlib.Path, odd: Callable[[pathlib.Path], None], name: str
) -> None:
    (home / ".import").mkdir()
    odd(home / name)
    assert Import(str(home)).received() is None


def test_a_pipe_among_the_files_holds_no_thread(home: pathlib.Path) -> None:
    a_pipe(home / "pages-1.img")
    (found,) = digest_files(
        str(home), ["pages-1.img"], punch=False, stop=threading.Event(), count=lambda _: None
    )
    assert (found.size, found.sums) == (0, ())
    for work in (sync_tree, fetch):
        with pytest.raises(OSError, match=r"Invalid argument|Illegal seek"):
            work(str(home))
    a_pipe(home / "remap-fpath.img")
    with pytest.raises(OSError, match="not a plain file"):
        read_remapped(str(home))


# ---- notes ---------------------------------------------------------------------------------------

GOOD = {"unit": "u", "operation": "restore", "names": ["x"], "leftovers": ["/y"], "uid": 1}


@pytest.mark.parametrize(
    "damaged",
    [
        {"unit": None}, {"unit": ["u"]}, {"operation": 1}, {"shm": [[1]]}, {"shm": [1]},
        {"shm": [[10**400, 1]]}, {"shm": {"a": 1}}, {"names": [["x"]]}, {"names": ["/etc/x"]},
        {"names": ["x\0"]}, {"names": [""]}, {"leftovers": [1]}, {"leftovers": ["/" * 5000]},
        {"uid": -1}, {"uid": 2**40}, {"uid": True}, {"uid": "x"},
    ],
)  # fmt: skip
def test_a_note_of_other_types_is_none(
    home: pathlib.Path,
    tmp_path: pathlib.Path,
    damaged: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(BadJson):
        Begun.of(GOOD | damaged)
    images = store_of(home)
    write_note(f"{images.receive('m')}/{RESTORING}", GOOD | damaged)
    write_note(f"{images.begin('m')}/{DUMPING}", {"unit": "u", "operation": "dump"})
    driver = Criu(MemoryUnits(World()), images, str(home), proc=str(tmp_path), shm=str(tmp_path))
    assert asyncio.run(driver.recover()) == [Interrupted("m", "u", "dump", ())]
    assert caplog.text.count("cannot use the note") == 1
    assert os.listdir(home / "m") == []
    assert asyncio.run(driver.recover()) == []

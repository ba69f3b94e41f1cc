"""What becomes of an image: found, refused, kept, moved out of the way, swept up."""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmux.drivers.images.check import load_image
from llmux.drivers.images.files import FileSums
from llmux.drivers.images.manifest import Manifest, ManifestError, TreeProcess
from llmux.drivers.images.notes import DUMPING, RESTORING, write_note
from llmux.drivers.images.store import FAILURE_LOG, IMAGES, IMPORT, RESTORE, ImageStore
from llmux.errors import CheckpointFailed, TreeState
from llmux.image_ports import NONE_MADE, Image, NoImage

NOW = 1e9
WHOSE = {"a": "1", "boot_id": "b"}
GOOD = Manifest(
    model="m",
    created=NOW - 100,
    dump_seconds=2.0,
    cold_seconds=60.0,
    criu="4.2",
    identity=WHOSE,
    recipe={"eviction": "x"},
    root_pid=70,
    processes=(TreeProcess(70, "vllm", (70,)),),
    runtime_dir=None,
    append_files=(),
    unix_paths=(),
    tcp_ports=(),
    shm=(),
    known=(),
    files=(FileSums("pages-1.img", 4, (7,)),),
    apparent_bytes=40,
    disk_bytes=30,
)


def store_of(home: pathlib.Path, **options: Any) -> ImageStore:
    return ImageStore(str(home), clock=lambda: NOW, **options)


def publish(images: ImageStore, model: str = "m", **fields: Any) -> Image:
    temporary = images.begin(model)
    with open(os.open(f"{temporary}/pages-1.img", os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
        file.write(b"page")
    return images.publish(temporary, replace(GOOD, model=model, **fields))


def test_an_image_is_described_field_by_field(home: pathlib.Path) -> None:
    images = store_of(home)
    image = publish(images)
    assert image == Image(
        model="m", path=f"{home}/m/images", identity=WHOSE, recipe={"eviction": "x"},
        created=NOW - 100, dump_seconds=2.0, root_pid=70, apparent_bytes=40, disk_bytes=30,
        managed=True, last_used=NOW - 100,
    )  # fmt: skip
    assert images.images() == [image]
    assert images.with_manifests() == [(image, GOOD)]
    assert images.image_directory("m") == image.path
    assert images.image_directories() == [("m", image.path)]
    images.used("m")
    (used,) = images.images()
    assert used.last_used == NOW
    publish(images, created=NOW + 50)
    (later,) = images.images()
    assert later.last_used == NOW + 50, "a new one was not used before it was made"
    images.used("gone")
    assert images.find("gone", WHOSE) == NoImage(NONE_MADE)
    publish(images, "org/name")
    assert [model for model, _ in images.image_directories()] == ["m", "org/name"]


@pytest.mark.parametrize(
    ("identity", "across", "reason"),
    [
        (WHOSE, False, None),
        ({**WHOSE, "boot_id": "c"}, True, None),
        ({**WHOSE, "boot_id": "c"}, False, 'does not fit: boot_id was "b"'),
        ({**WHOSE, "a": "2"}, True, 'does not fit: a was "1"'),
    ],
)
def test_an_image_that_fits_is_found_in_either_place(
    home: pathlib.Path, identity: dict[str, str], across: bool, reason: str | None
) -> None:
    images = store_of(home, across_reboot=across)
    publish(images)
    shutil.copytree(home / "m" / IMAGES, home / "other")
    for path in (None, f"{home}/m/images", f"{home}/m/../m/images/"):
        found = images.find("m", identity, path)
        if reason is None:
            assert isinstance(found, Image)
            assert (found.path, found.managed) == (f"{home}/m/images", True)
        else:
            assert isinstance(found, NoImage)
            assert found.reason.startswith(f"the image in {home}/m/images {reason}")
            assert ";" not in found.reason, "one place is looked at once"
    images.discard("m")
    found = images.find("m", identity, f"{home}/other")
    if reason is None:
        assert isinstance(found, Image)
        assert (found.path, found.managed) == (f"{home}/other", False)
    else:
        assert isinstance(found, NoImage)
        assert found.reason.startswith(f"{NONE_MADE}; the image in {home}/other {reason}")


@pytest.mark.parametrize(
    ("wrong", "found_in"),
    [("", "m/images"), ("damaged", "other"), ("misfit", "other"), ("failed", "other")],
)
def test_where_the_own_one_is_of_no_use_the_users_is_taken(
    home: pathlib.Path, wrong: str, found_in: str
) -> None:
    images = store_of(home)
    image = publish(images)
    shutil.copytree(home / "m" / IMAGES, home / "other")
    if wrong == "misfit":
        publish(images, identity={**WHOSE, "a": "2"})
    elif wrong == "damaged":
        (home / "m" / IMAGES / "manifest.json").write_text("{")
    elif wrong == "failed":  # for another model, whose operator named it
        images.quarantine(replace(image, model="n", managed=False), "it broke")
    found = images.find("m", WHOSE, f"{home}/other")
    assert isinstance(found, Image)
    assert (found.path, found.managed) == (f"{home}/{found_in}", found_in != "other")


def test_what_cannot_be_removed_is_no_failure_and_no_link_is_followed(home: pathlib.Path) -> None:
    images = store_of(home)
    image = publish(images)
    temporary = images.begin("m")
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "file").touch()
    for name in (".old-x", IMPORT, "quarantine-1"):
        (home / "m" / name).symlink_to(home / "elsewhere")
    for _ in range(2):
        images.abandon(temporary, "dump.log")
        assert images.sweep() == []
    assert images.images() == [image]
    images.quarantine(image, "it broke")
    assert images.images() == []
    assert os.listdir(home / "elsewhere") == ["file"]


def test_one_of_the_users_that_failed_stays_and_is_not_tried_again(home: pathlib.Path) -> None:
    images = store_of(home)
    publish(images)
    (home / "m" / IMAGES).rename(home / "other")
    image = images.find("m", WHOSE, f"{home}/other")
    assert isinstance(image, Image)
    assert images.quarantine(image, "it broke") == f"{home}/other"
    assert (home / "other").is_dir()
    found = images.find("m", WHOSE, f"{home}/./other")
    assert found == NoImage(f"{NONE_MADE}; {home}/./other failed before: it broke")


def open_file(path: pathlib.Path) -> None:
    (path / "pages-1.img").chmod(0o666)


def cut(path: pathlib.Path) -> None:
    (path / "pages-1.img").write_bytes(b"pag")


def strange(path: pathlib.Path) -> None:
    (path / "pages-2.img").touch(mode=0o600)


def inner(path: pathlib.Path) -> None:
    (path / "d").mkdir()
    (path / "d" / "pages-1.img").touch(mode=0o600)


def leads_out(path: pathlib.Path) -> None:
    named = replace(GOOD, files=(FileSums("./pages-1.img", 4, (7,)),))
    (path / "manifest.json").write_text(named.to_json())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.chmod(0o777), "it is not safe: "),
        (open_file, "it is not safe: "),
        (cut, "pages-1.img has 3 bytes and should have 4: it was cut or changed"),
        (strange, "pages-2.img is not in the manifest"),
        (inner, "d/pages-1.img is not in the manifest"),
        (leads_out, "pages-1.img is not in the manifest"),
        (lambda path: (path / "pages-1.img").unlink(), "pages-1.img is missing"),
        (lambda path: (path / "manifest.json").unlink(), "the image was never completed"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_an_image_that_is_not_whole_or_not_safe_is_none(
    home: pathlib.Path, change: Callable[[pathlib.Path], object], said: str
) -> None:
    images = store_of(home)
    path = pathlib.Path(publish(images).path)
    (path / "notes.txt").touch(mode=0o600)  # CRIU reads *.img only
    assert load_image(str(path)) == GOOD
    change(path)
    with pytest.raises(ManifestError) as raised:
        load_image(str(path))
    assert said in str(raised.value)
    assert not str(raised.value).startswith("it cannot be read")
    found = images.find("m", WHOSE)
    assert isinstance(found, NoImage)
    assert found.reason.startswith(f"the image in {path} cannot be used: ")


def test_a_link_or_a_file_in_its_place_is_none(home: pathlib.Path) -> None:
    path = pathlib.Path(publish(store_of(home)).path)
    (home / "link").symlink_to(path)
    for name in ("link", "gone"):
        with pytest.raises(ManifestError, match="is not a directory"):
            load_image(str(home / name))


# ---- making --------------------------------------------------------------------------------------


def test_a_dump_that_failed_leaves_its_log_alone(home: pathlib.Path) -> None:
    images = store_of(home)
    for text in ("first", "second"):
        temporary = images.begin("m")
        assert os.stat(temporary).st_mode & 0o777 == 0o700
        pathlib.Path(temporary, "dump.log").write_text(text)
        images.abandon(temporary, "dump.log")
        assert os.listdir(home / "m") == [FAILURE_LOG]
        assert (home / "m" / FAILURE_LOG).read_text() == text
    images.abandon(images.begin("m"), "dump.log")
    assert (home / "m" / FAILURE_LOG).read_text() == "second"


@pytest.mark.parametrize("place", ["root", "model"])
def test_nothing_is_made_where_others_could_put_something(home: pathlib.Path, place: str) -> None:
    images = ImageStore(str(home / "images"))
    if place == "root":
        home.chmod(0o777)
    else:
        (home / "images" / "m").mkdir(parents=True)
        (home / "images" / "m").chmod(0o777)
    for call in (images.begin, images.receive):
        with pytest.raises(CheckpointFailed, match="its images directory is not safe") as raised:
            call("m")
        assert raised.value.tree is TreeState.RUNNING
        assert raised.value.hint
    home.chmod(0o700)


def test_an_image_that_arrived_is_put_in_place_of_the_former(home: pathlib.Path) -> None:
    images = store_of(home)
    publish(images)
    shutil.copytree(home / "m" / IMAGES, home / "m" / IMPORT)
    arrived = replace(GOOD, created=NOW - 5)
    (home / "m" / IMPORT / "manifest.json").write_text(arrived.to_json())
    image = images.adopt("m", WHOSE)
    assert (image.created, image.path, image.managed) == (NOW - 5, f"{home}/m/images", True)
    assert os.listdir(home / "m") == [IMAGES]


@pytest.mark.parametrize(
    ("fields", "identity", "said"),
    [
        ({"model": "n"}, WHOSE, 'it is of model "n"'),
        ({}, {**WHOSE, "a": "2"}, "it does not fit: a was"),
        ({}, {**WHOSE, "boot_id": "2"}, "it does not fit: boot_id was"),
        (None, WHOSE, "is not a directory"),
    ],
)
def test_what_arrived_and_does_not_fit_stays_where_it_is(
    home: pathlib.Path, fields: dict[str, Any] | None, identity: dict[str, str], said: str
) -> None:
    images = store_of(home)
    publish(images)
    if fields is not None:
        shutil.copytree(home / "m" / IMAGES, home / "m" / IMPORT)
        (home / "m" / IMPORT / "manifest.json").write_text(replace(GOOD, **fields).to_json())
    before = sorted(os.listdir(home / "m"))
    with pytest.raises(CheckpointFailed) as raised:
        images.adopt("m", identity)
    assert said in str(raised.value)
    assert 'cannot import the image of model "m"' in str(raised.value)
    assert sorted(os.listdir(home / "m")) == before


# ---- losing --------------------------------------------------------------------------------------


def test_an_image_that_failed_is_kept_with_its_reason_and_log(home: pathlib.Path) -> None:
    images = store_of(home, keep_quarantined=2)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(NOW))
    for number in range(12):
        image = publish(images)
        log = pathlib.Path(images.restore_directory("m"), "restore.log")
        log.write_text(f"log {number}")
        path = images.quarantine(image, f"reason {number}")
        assert path == f"{home}/m/quarantine-{stamp}-{number:03}"
        assert pathlib.Path(path, "reason").read_text() == f"reason {number}\n"
        assert pathlib.Path(path, RESTORE, "restore.log").read_text() == f"log {number}"
        assert pathlib.Path(path, "pages-1.img").exists()
    left = sorted(name for name in os.listdir(home / "m") if name.startswith("quarantine"))
    assert left == [f"quarantine-{stamp}-010", f"quarantine-{stamp}-011"]
    shutil.rmtree(home / "m" / RESTORE)
    image = publish(images)
    images.discard("m")
    images.discard("m")
    assert IMAGES not in os.listdir(home / "m")
    assert not os.path.exists(images.quarantine(image, "it is gone"))
    without = images.quarantine(publish(images), "without a log")
    assert sorted(os.listdir(without)) == ["manifest.json", "pages-1.img", "reason"]
    none = store_of(home, keep_quarantined=0)
    none.quarantine(publish(none), "x")
    assert os.listdir(home / "m") == []


def test_what_a_killed_supervisor_left_is_told_moved_or_removed(home: pathlib.Path) -> None:
    images = store_of(home)
    (home / "a file").touch()
    for model in ("m", "n"):
        begun = images.begin(model)
        if model == "m":
            write_note(f"{begun}/{DUMPING}", {"unit": "u"})
        own = home / model
        write_note(str(own / RESTORING), {"operation": "restore"})
        for name in (".old-1", IMAGES, IMPORT, "quarantine-1", RESTORE):
            (own / name).mkdir()
            (own / name / "x").touch()
    (home / "n" / IMAGES / "manifest.json").touch()
    fresh = home / "n" / f"{IMPORT}.done"
    fresh.touch()
    os.utime(fresh, (NOW - 7 * 86400, NOW - 7 * 86400))
    found = images.sweep()
    assert sorted(found) == sorted(
        [(model, str(path), note)
         for model, note in (("m", {"unit": "u"}), ("n", {}))
         for path in (home / model).glob(".dump-*")]
        + [(model, f"{home}/{model}/{RESTORING}", {"operation": "restore"})
           for model in ("m", "n")]
    )  # fmt: skip
    names = {model: sorted(os.listdir(home / model)) for model in ("m", "n")}
    assert [n.split("-")[0] for n in names["m"]] == [".dump", "quarantine", "quarantine", RESTORE,
                                                     RESTORING]  # fmt: skip
    assert any(name.startswith("quarantine-incomplete-") for name in names["m"])
    assert set(names["n"]) >= {IMAGES, IMPORT, f"{IMPORT}.done"}
    os.utime(fresh, (NOW - 7 * 86400 - 1, NOW - 7 * 86400 - 1))
    images.sweep()
    assert not (home / "n" / IMPORT).exists()
    for model, path, _ in found:
        images.forget(path)
        images.forget(path)
        assert model in ("m", "n")
    assert images.sweep() == []
    away = home / "away"
    away.mkdir()
    (home / "link").symlink_to(away)
    images.forget(str(home / "link"))
    assert away.is_dir() and not os.path.lexists(home / "link")


def test_nothing_is_believed_where_others_could_put_something(home: pathlib.Path) -> None:
    images = ImageStore(str(home / "images"))
    publish(images)
    home.chmod(0o777)
    try:
        assert (images.images(), images.sweep(), images.image_directories()) == ([], [], [])
    finally:
        home.chmod(0o700)
    assert len(images.images()) == 1


def test_what_cannot_be_removed_stays_and_stops_nothing(home: pathlib.Path) -> None:
    """A file where we have directories only: somebody else put it there."""
    images = store_of(home, keep_quarantined=1)
    image = publish(images)
    for name in (".old-1", "quarantine-0", "quarantine-1"):
        (home / "m" / name).write_text("x")
    path = pathlib.Path(images.quarantine(image, "it broke"))
    assert (path / "reason").read_text() == "it broke\n"
    assert images.sweep() == []
    left = {".old-1", "quarantine-0", "quarantine-1", path.name}
    assert set(os.listdir(home / "m")) == left

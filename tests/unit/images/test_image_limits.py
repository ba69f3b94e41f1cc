"""What an image may have and what it is written as: numbers that files of other hosts rely on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import struct
import zlib
from dataclasses import replace
from threading import Event
from typing import Any

import pytest

from llmux.drivers.images import files, identity
from llmux.drivers.images.check import load_image
from llmux.drivers.images.files import FileSums
from llmux.drivers.images.manifest import (
    KeptPath,
    KnownFile,
    Manifest,
    ManifestError,
    ShmGroup,
    SmallFile,
    TreeProcess,
    load_manifest,
)
from llmux.drivers.images.notes import Begun, read_note
from llmux.drivers.images.store import ImageStore
from llmux.errors import CheckpointFailed, TreeState
from llmux.image_ports import Image
from llmux.typed_json import BadJson

MIB = 1 << 20
GOOD = Manifest(
    model="m",
    created=1.0,
    dump_seconds=2.0,
    cold_seconds=3.0,
    criu="4.2",
    identity={"boot_id": "b"},
    recipe={"eviction": "offload+checkpoint"},
    root_pid=7,
    processes=(TreeProcess(7, "vllm", (7, 8)),),
    runtime_dir=KeptPath("/run/llmux/engines/m", 0, 0, 0o750),
    append_files=(KeptPath("/images/m/stdout.log", 0, 0, 0o640),),
    unix_paths=("/run/llmux/engines/m/api.sock",),
    tcp_ports=(8000,),
    shm=(ShmGroup(("sem.x",), "shm/0", 32, 0o600, 0, 0),),
    known=(KnownFile("/usr/bin/python3", 1, 2, 0, 0o100755),),
    files=(FileSums("pages-1.img", 5000, (1,)),),
    apparent_bytes=5000,
    disk_bytes=4096,
    small=(SmallFile("/home/m/a", "small/0", 3, 0o600, 5, 6),),
)


def changed(path: tuple[Any, ...], value: Any) -> str:
    """GOOD's text, with another value in one place."""
    body = inner = json.loads(GOOD.to_json())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(body)


# ---- the manifest --------------------------------------------------------------------------------


def test_a_manifest_of_this_version_is_written_in_order_and_others_are_none() -> None:
    text = GOOD.to_json()
    body = json.loads(text)
    assert text.startswith('{\n "apparent_bytes": ') and text.endswith("\n}\n")
    assert list(body) == sorted(body)
    assert list(body["files"][0]) == ["name", "size", "sums"]
    assert body["version"] == 2
    for version in (1, 3, None, "2"):
        with pytest.raises(ManifestError, match=r"^its version is .*, this llmux writes 2$"):
            Manifest.from_json(json.dumps({**body, "version": version}))


def test_a_manifest_has_16_mib_at_most_and_is_no_link(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "manifest.json"
    text = GOOD.to_json()
    path.write_text(text + " " * (16 * MIB - len(text)))
    assert load_manifest(str(tmp_path)) == GOOD
    os.rename(path, tmp_path / "other.json")
    path.symlink_to("other.json")
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(str(tmp_path))
    os.rename(tmp_path / "other.json", path)
    with path.open("a") as file:
        file.write(" ")
    with pytest.raises(ManifestError, match="larger than 16777216 bytes"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "least", "most"),
    [
        (("root_pid",), 1, 4194304),
        (("processes", 0, "tids", 0), 1, 4194304),
        (("runtime_dir", "gid"), 0, 4294967294),
        (("append_files", 0, "uid"), 0, 4294967294),
        (("append_files", 0, "mode"), 0, 65535),
        (("known", 0, "uid"), 0, 4294967294),
        (("small", 0, "uid"), 0, 4294967294),
        (("small", 0, "gid"), 0, 4294967294),
        (("small", 0, "mode"), 0, 65535),
        (("small", 0, "size"), 0, 2**63 - 1),
        (("apparent_bytes",), 0, 2**63 - 1),
    ],
)
def test_ids_modes_and_sizes_are_what_the_kernel_has(
    path: tuple[Any, ...], least: int, most: int
) -> None:
    for value in (least, most):
        assert Manifest.from_json(changed(path, value))
    for value in (least - 1, most + 1):
        with pytest.raises(ManifestError, match=r"(: -?\d+|the number) is out of range$"):
            Manifest.from_json(changed(path, value))


def test_an_image_without_a_directory_of_its_own_may_be(tmp_path: pathlib.Path) -> None:
    bare = replace(GOOD, runtime_dir=None, append_files=(), shm=(), known=(), files=())
    (tmp_path / "manifest.json").write_text(bare.to_json())
    assert load_manifest(str(tmp_path)) == bare
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ManifestError, match=r"manifest.json: it is not a JSON object$"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "a/../b", "../a", "a/.."])
@pytest.mark.parametrize("path", [("files", 0, "name"), ("shm", 0, "file"), ("small", 0, "file")])
def test_a_name_that_leads_out_of_the_image_is_none(path: tuple[Any, ...], name: str) -> None:
    assert Manifest.from_json(changed(path, "a..b/c"))
    with pytest.raises(ManifestError, match="is outside of the image"):
        Manifest.from_json(changed(path, name))


@pytest.mark.parametrize(
    ("name", "place"),
    [("./a", "a"), ("a//b", "a/b"), ("a/./b", "a/b"), ("..a", "..a"), ("a/", "a")],
)
def test_a_file_has_one_name_in_an_image(home: pathlib.Path, name: str, place: str) -> None:
    path = home / "i"
    (path / place).parent.mkdir(parents=True)
    path.chmod(0o700)
    for file in (path / place, path / "manifest.json"):
        file.touch(mode=0o600)
    named = replace(GOOD, files=(FileSums(name, 0, ()),))
    (path / "manifest.json").write_text(named.to_json())
    with pytest.raises(ManifestError) as raised:
        load_image(str(path))
    assert str(raised.value) == f"the file name {name!r} leads out of it"


# ---- what cannot be removed ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["abandon", "publish", "quarantine", "discard", "sweep", "forget"])
def test_a_directory_that_is_busy_stays_and_stops_nothing(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = ImageStore(str(home), keep_quarantined=0)

    def publish() -> Image:
        return store.publish(store.begin("m"), replace(GOOD, files=()))

    image, temporary = publish(), store.begin("m")
    for name in (".old-1", ".import"):
        (home / "m" / name).mkdir()

    def busy(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "rmdir", busy)
    if what == "abandon":
        store.abandon(temporary, "dump.log")
    elif what == "publish":
        publish()
    elif what == "quarantine":
        assert os.path.isdir(store.quarantine(image, "it broke"))
    elif what == "discard":
        store.discard("m")
    elif what == "sweep":
        assert [found[:2] for found in store.sweep()] == [("m", temporary)]
    else:
        store.forget(temporary)
    monkeypatch.undo()
    assert bool(store.images()) is (what not in ("quarantine", "discard"))
    assert {".old-1", ".import", os.path.basename(temporary)} <= set(os.listdir(home / "m"))


# ---- what a power cut must not take --------------------------------------------------------------


def test_all_is_on_the_disk_before_it_has_its_name(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        done.append(os.path.relpath(path, home).replace(os.path.basename(temporary), "dump"))
        if path.endswith("manifest.json"):
            assert Manifest.from_json(pathlib.Path(path).read_text()) == manifest
        real_sync(fd)

    def rename(old: str, new: str) -> None:
        real_rename(old, new)
        done.append("-> " + os.path.relpath(new, home).partition("old")[0])

    store = ImageStore(str(home))
    manifest = replace(GOOD, files=())
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    for former in (False, True):
        done.clear()
        temporary = store.begin("m")
        pathlib.Path(temporary, "core-1.img").touch(mode=0o600)
        store.publish(temporary, manifest)
        assert done == [
            "m/dump/core-1.img", "m/dump", "m/dump/manifest.json", "m/dump",
            *(["-> m/."] if former else []), "-> m/images", "m",
        ]  # fmt: skip
        assert os.listdir(home / "m") == ["images"]
    done.clear()
    store.quarantine(store.images()[0], "it broke")
    assert done[0].startswith("-> m/quarantine-")
    assert done[-1] == "m"


def test_a_restore_has_an_empty_private_directory_made_to_the_top(home: pathlib.Path) -> None:
    store = ImageStore(str(home / "images"))
    for _ in range(2):
        path = pathlib.Path(store.restore_directory("m"))
        assert path == home / "images" / "m" / "restore"
        assert list(path.iterdir()) == []
        (path / "restore.log").touch()
        for made in (path, path.parent, path.parent.parent):
            assert made.stat().st_mode & 0o777 == 0o700
    for unsafe in (home / "images", home / "images" / "m"):
        unsafe.chmod(0o777)
        with pytest.raises(CheckpointFailed, match="its images directory is not safe") as raised:
            store.restore_directory("m")
        assert raised.value.tree is TreeState.RUNNING
        assert raised.value.hint
        unsafe.chmod(0o700)


# ---- sums and stamps -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sums"), [(0, 0), (1, 1), (16 * MIB, 1), (16 * MIB + 1, 2)])
def test_there_is_a_checksum_for_each_16_mib(tmp_path: pathlib.Path, size: int, sums: int) -> None:
    (tmp_path / "f").touch()
    os.truncate(tmp_path / "f", size)
    (found,) = files.digest_files(
        str(tmp_path), ["f"], punch=False, stop=Event(), count=lambda _: None
    )
    assert found.sums == (0,) * sums
    for count in range(4):
        other = replace(GOOD, files=(replace(found, sums=(0,) * count),))
        if count == sums:
            assert Manifest.from_json(other.to_json()) == other
        else:
            with pytest.raises(ManifestError, match=f"f: {count} checksums for {size} bytes"):
                Manifest.from_json(other.to_json())


@pytest.mark.parametrize(
    ("before", "data", "after"),
    [
        (4096, b"x" * 4096 + b"y" * 100, 0),
        (0, b"x" * (1 << 18), 100),  # zeros that end within a page
        (0, b"x" * ((1 << 18) + 4096), 100),
        (8192, b"x" + bytes(4095), 4096),
        (0, b"", 5000),
    ],
)
def test_a_checksum_is_of_what_is_not_zero_and_of_its_place(
    tmp_path: pathlib.Path, before: int, data: bytes, after: int
) -> None:
    """The same on every host: images go from one llmux to another."""
    (tmp_path / "f").write_bytes(bytes(before) + data + bytes(after))
    (found,) = files.digest_files(
        str(tmp_path), ["f"], punch=False, stop=Event(), count=lambda _: None
    )
    checksum = 0
    for start in range(0, len(data), 1 << 18):  # of each piece that is read at once
        piece = data[start : start + (1 << 18)]
        place = struct.pack("<QQ", before + start, before + start + len(piece))
        checksum = zlib.crc32(place + piece, checksum)
    assert found.sums == (checksum,)


def test_of_weights_over_1_gib_16_mib_at_either_end_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    size = (1 << 30) + 1
    with path.open("wb") as file:
        for place in (0, 16 * MIB, size - 16 * MIB - 1, size - 1):
            file.seek(place)
            file.write(b"x")
    start = b"x" + bytes(16 * MIB - 1)
    digest = hashlib.sha256(start + start[::-1]).hexdigest()
    assert identity.content_stamp(str(path)) == f"{size} bytes, sha256 {digest[:32]}"


# ---- notes ---------------------------------------------------------------------------------------


def test_a_note_has_1_mib_at_most(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "note"
    path.write_text('{"a": 1}'.ljust(MIB))
    assert read_note(str(path)) == {"a": 1}
    path.write_text('{"a": 1}'.ljust(MIB + 1))
    assert read_note(str(path)) == {}


NOTE = {"unit": "u", "operation": "dump"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"unit": "x" * 4096},
        {"names": ["x" * 4096, "a"], "leftovers": ["/" + "x" * 4095]},
        {"shm": [[0, 2**63 - 1], [2**63 - 1, 0]], "uid": 4294967294},
        {"uid": 0, "leftovers": ["/a/b", ""]},
    ],
)
def test_what_a_note_may_say(more: dict[str, Any]) -> None:
    begun = Begun.of({**NOTE, **more})
    fields = {"shm": [], "names": [], "leftovers": [], "uid": 0, **NOTE, **more}
    assert begun == Begun(
        unit=fields["unit"],
        operation="dump",
        shm=tuple((device, inode) for device, inode in fields["shm"]),
        names=tuple(fields["names"]),
        leftovers=tuple(fields["leftovers"]),
        uid=fields["uid"],
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"unit": "x" * 4097}, "is no name"),
        ({"unit": "a\0b"}, "is no name"),
        ({"names": ["x" * 4097]}, "is no name"),
        ({"names": ["a", "b\0"]}, "is no name"),
        ({"leftovers": ["/" + "x" * 4096]}, "is no name"),
        ({"leftovers": ["/\0"]}, "is no name"),
        ({"names": ["a/b"]}, "names: a path"),
        ({"names": ["a", ""]}, "names: a path"),
        ({"names": ["/a"]}, "names: a path"),
        ({"shm": [[-1, 1]]}, "out of range"),
        ({"shm": [[1, 2**63]]}, "out of range"),
        ({"uid": -1}, "out of range"),
        ({"uid": 4294967295}, "out of range"),
    ],
)
def test_what_a_note_may_not_say(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadJson, match=said):
        Begun.of({**NOTE, **more})

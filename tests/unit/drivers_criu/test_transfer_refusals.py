"""Images as streams: what is not the image, or cannot work here, is refused by name."""

from __future__ import annotations

import io
import json
import os
import pathlib
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from transfer_site import Site, quiet

from llmux.daemon.images import import_image
from llmux.drivers.images.manifest import KeptPath
from llmux.drivers.transfer.header import NAME, BadStream
from llmux.errors import CheckpointFailed, Refused


def entries(stream: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        found = []
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            found.append((entry, file.read() if file else b""))
        return found


def packed(parts: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for entry, data in parts:
            entry.size = len(data) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kernel", "6.13", "kernel: 6.12 there, 6.13 here"),
        ("processor", "EPYC", "processor: Xeon there, EPYC here"),
        ("version.vllm", "0.33", "version.vllm: 0.32 there, 0.33 here"),
        ("uid", "12345", "uid: "),
        ("env.HF_TOKEN", "hash:1", "env.HF_TOKEN: not known there"),
    ],
)
def test_what_differs_is_named_before_anything_is_written(
    sites: tuple[Site, Site], key: str, value: str, said: str
) -> None:
    there, here = sites
    stream = there.export()
    here.portable[key] = value
    with pytest.raises(Refused, match="cannot import the image of m: it would not work") as raised:
        here.take(stream)
    assert said in str(raised.value)
    assert not os.path.exists(here.store.directory("m"))


def test_a_file_of_the_engine_that_differs_is_named(sites: tuple[Site, Site]) -> None:
    there, here = sites
    stream = there.export()
    there.library.write_bytes(b"another")
    with pytest.raises(Refused, match=r"path \S*lib.so: its state is 3 bytes, sha256"):
        here.take(stream)
    there.library.unlink()
    with pytest.raises(Refused, match=r"path \S*lib.so: No such file"):
        here.take(stream)


def test_an_image_of_an_earlier_boot_is_not_exported(sites: tuple[Site, Site]) -> None:
    there, _ = sites
    there.identity = {**there.identity, "boot_id": "later"}
    with pytest.raises(Refused, match=r"cannot export the image of m: .*boot_id was"):
        there.export()


def test_cuda_state_stays_on_its_gpu(sites: tuple[Site, Site]) -> None:
    there, here = sites
    gpu = "gpu.0000:01:00.0.GPU UUID"
    there.identity, here.identity = {**there.identity, gpu: "a"}, {**here.identity, gpu: "b"}
    there.portable[gpu], here.portable[gpu] = "a", "b"
    recipe = {"eviction": "retain+checkpoint", "uds": "/run/x/api.sock", "cuda_pids": [4194000]}
    there.publish(recipe=recipe)
    with pytest.raises(Refused, match=r"GPU UUID: a there, b here"):
        here.take(there.export())
    there.publish()
    here.take(there.export())


def _link(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[1][0].type, parts[1][0].linkname = tarfile.SYMTYPE, "/etc/shadow"


def _hard_link(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[1][0].type, parts[1][0].linkname = tarfile.LNKTYPE, "core-7.img"


def _device(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[1][0].type = tarfile.CHRTYPE


def _outside(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[1][0].name = "../../../etc/cron.d/x"


def _order(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[1], parts[2] = parts[2], parts[1]


def _twice(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts.insert(2, parts[1])


def _flipped(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[2] = parts[2][0], b"X" + parts[2][1][1:]


def _short(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    parts[2] = parts[2][0], parts[2][1][:-1]


def _without_one(parts: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del parts[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_link, "is not a plain file"),
        (_hard_link, "is not a plain file"),
        (_device, "is not a plain file"),
        (_outside, "is not what comes next|is missing in the stream"),
        (_order, "is missing in the stream"),
        (_twice, "is not what comes next|is missing in the stream"),
        (_flipped, "arrived damaged"),
        (_short, "has .* bytes"),
        (_without_one, "is missing in the stream"),
    ],
)
def test_a_stream_that_is_not_the_image_is_refused(
    sites: tuple[Site, Site],
    home: pathlib.Path,
    change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None],
    said: str,
) -> None:
    there, here = sites
    parts = entries(there.export())
    change(parts)
    with pytest.raises(BadStream, match=said):
        here.take(packed(parts))
    assert "image_adopt" not in here.asked
    assert set(here.left()) <= {".import", ".import.json", ".import.done"}
    assert sorted(os.listdir(home)) == ["here", "lib.so", "there"]
    assert here.take(there.export())["path"], "a good stream is taken after it"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("manifest", "files", 0, "name"), "../x", "is not the name of an image's file"),
        (("manifest", "files", 0, "name"), "/etc/x", "is not the name of an image's file"),
        (("manifest", "files", 0, "name"), "manifest.json", "cannot be an image's file"),
        (("manifest", "files", 0, "name"), "pages-1.img", "listed twice"),
        (("manifest", "files", 0, "size"), 1 << 60, "checksums for"),
        (("manifest", "files", 0, "size"), "4", "expected a whole number"),
        (("manifest", "shm", 0, "names"), ["../x"], "is not the name of a file in /dev/shm"),
        (("manifest", "shm", 0, "file"), "core-7.img", "is not in it as it says"),
        (("manifest", "shm", 0, "mode"), 0o4755, "is not in it as it says"),
        (("manifest", "processes", 0, "tids"), [1], "process ids"),
        (("manifest", "known"), [], "differ from those described"),
        (("paths", 0, "path"), "/etc/../etc/shadow", "is not an absolute path"),
        (("first",), -1, "its id, salt or first segment"),
        (("version",), 2, "its version is 2, this llmux writes 1"),
        (("manifest_version",), 1, "its manifest_version is 1"),
    ],
)
def test_a_head_with_something_wrong_is_refused(
    sites: tuple[Site, Site], place: tuple[str | int, ...], value: Any, said: str
) -> None:
    there, here = sites
    parts = entries(there.export())
    body = json.loads(parts[0][1])
    where: Any = body
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    parts[0] = parts[0][0], json.dumps(body).encode()
    with pytest.raises(BadStream, match=said):
        here.take(packed(parts))
    assert here.asked == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"runtime_dir": KeptPath("/etc", 0, 0, 0o777)}, "runtime directory: /etc there"),
        ({"append_files": (KeptPath("/etc/passwd", 0, 0, 0o666),)}, "output: /etc/passwd"),
        ({"recipe": {"eviction": "discard+checkpoint", "port": 22}}, "address"),
        ({"criu": "4.3"}, "criu made it in version 4.3"),
    ],
)
def test_places_that_are_not_this_models_are_refused(
    sites: tuple[Site, Site], fields: dict[str, Any], said: str
) -> None:
    """llmux makes those directories and files as root, with the owners that the manifest says."""
    there, here = sites
    there.publish(**fields)
    with pytest.raises(Refused) as raised:
        here.take(there.export())
    assert said in str(raised.value)


def test_what_is_no_stream_is_refused(sites: tuple[Site, Site]) -> None:
    _, here = sites
    for data in (b"", b"x" * 512, bytes(1024), packed([(tarfile.TarInfo("x"), b"y")])):
        with pytest.raises(BadStream):
            here.take(data)
    huge = tarfile.TarInfo(NAME)
    huge.size = 1 << 32
    with pytest.raises(BadStream, match="at most"):
        here.take(huge.tobuf(tarfile.USTAR_FORMAT))


def test_an_image_that_changed_after_it_arrived_is_not_adopted(sites: tuple[Site, Site]) -> None:
    there, here = sites
    stream = there.export()

    def tamper(verb: str, values: dict[str, Any]) -> Any:
        if verb == "image_adopt":
            path = pathlib.Path(here.store.directory("m"), ".import/core-7.img")
            path.unlink()
            path.symlink_to("/etc/shadow")
        return here.ask(verb, values)

    with pytest.raises(CheckpointFailed, match="is not a plain file"):
        import_image(here.config, io.BytesIO(stream), tamper, quiet)
    assert "images" not in here.left()

"""The checkpoint store on directories of its own: nothing incomplete, unsafe or foreign is used."""

from __future__ import annotations

import asyncio
import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from threading import Event

import pytest

from llmux.drivers.criu import host, shm
from llmux.drivers.criu.driver import Criu
from llmux.drivers.criu.held_names import HeldNames
from llmux.drivers.criu.tree import SHM
from llmux.drivers.images import identity as images_identity
from llmux.drivers.images.budget import check_disk, enforce_budget, look_for_room
from llmux.drivers.images.files import (
    SEGMENT,
    FileSums,
    Stopped,
    digest_files,
    first_difference,
    sizes_on_disk,
)
from llmux.drivers.images.identity import host_identity
from llmux.drivers.images.manifest import (
    KeptPath,
    Manifest,
    ManifestError,
    ShmGroup,
    TreeProcess,
    load_manifest,
)
from llmux.drivers.images.notes import RESTORING, read_note, write_note
from llmux.drivers.images.store import ImageStore
from llmux.errors import CheckpointFailed
from llmux.image_ports import Image, NoImage
from tests.twins.units import MemoryUnits
from tests.twins.world import World

IDENTITY = {"model_path": "/m", "boot_id": "one"}


def digest(directory: pathlib.Path, *names: str, punch: bool = False) -> tuple[FileSums, ...]:
    return digest_files(
        str(directory), names, punch=punch, stop=Event(), count=lambda _: None, workers=2
    )


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    """Below /, whose every parent is root's or ours: pytest uses directories of others."""
    path = pathlib.Path(f"/var/tmp/llmux-images-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def publish(store: ImageStore, model: str, size: int = 8192, **fields: object) -> Image:
    temporary = pathlib.Path(store.begin(model))
    (temporary / "pages-1.img").write_bytes(b"x" * size)
    (temporary / "pages-1.img").chmod(0o600)
    apparent, on_disk = sizes_on_disk(str(temporary))
    manifest = Manifest(
        model=model,
        created=1e9,
        dump_seconds=1.0,
        cold_seconds=60.0,
        criu="4.2.1",
        identity=IDENTITY,
        recipe={"weights": "retain"},
        root_pid=4194000,
        processes=(TreeProcess(4194000, "vllm", (4194000, 4194001)),),
        runtime_dir=None,
        append_files=(),
        unix_paths=(),
        tcp_ports=(),
        shm=(),
        known=(),
        files=digest(temporary, "pages-1.img"),
        apparent_bytes=apparent,
        disk_bytes=on_disk,
    )
    return store.publish(str(temporary), replace(manifest, **fields))  # type: ignore[arg-type]


def test_a_published_image_is_found_again_as_it_was(home: pathlib.Path) -> None:
    store = ImageStore(str(home / "images"))
    image = publish(store, "m")
    found = ImageStore(str(home / "images")).find("m", IDENTITY)
    assert found == image
    assert image.path == str(home / "images/m/images")
    assert os.listdir(home / "images/m") == ["images"]


@pytest.mark.parametrize("model", ["org/name", ".hidden", "..", "a b", "ü", "100%"])
def test_any_model_name_has_a_directory_of_its_own(home: pathlib.Path, model: str) -> None:
    store = ImageStore(str(home))
    assert os.path.dirname(store.directory(model)) == str(home)
    assert not os.path.basename(store.directory(model)).startswith(".")
    publish(store, model)
    assert [image.model for image in store.images()] == [model]


def test_a_mismatch_names_the_field_and_both_values(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    publish(store, "m")
    found = store.find("m", {**IDENTITY, "model_path": "/other"})
    assert isinstance(found, NoImage)
    assert 'model_path was "/m" when the image was made and is "/other" now' in found.reason


def test_a_reboot_ends_an_image_unless_configured_otherwise(home: pathlib.Path) -> None:
    publish(ImageStore(str(home)), "m")
    rebooted = {**IDENTITY, "boot_id": "two"}
    assert isinstance(ImageStore(str(home)).find("m", rebooted), NoImage)
    assert isinstance(ImageStore(str(home), across_reboot=True).find("m", rebooted), Image)
    other = {**rebooted, "nvidia_driver": "NVRM version: 580"}
    assert isinstance(ImageStore(str(home), across_reboot=True).find("m", other), NoImage)


def test_the_driver_is_part_of_what_an_image_fits(tmp_path: pathlib.Path) -> None:
    (tmp_path / "version").write_text("NVRM version:  NVIDIA 580.1\nGCC version: 12\n")
    found = host_identity(driver_path=str(tmp_path / "version"))
    assert found["nvidia_driver"] == "NVRM version: NVIDIA 580.1"
    assert "nvidia_driver" not in host_identity(driver_path=str(tmp_path / "none"))


def test_a_directory_without_manifest_is_never_an_image(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    assert store.find("m", IDENTITY) == NoImage("no checkpoint available")
    (home / "m/images").mkdir(parents=True)
    (home / "m/images/pages-1.img").write_bytes(b"x")
    assert isinstance(store.find("m", IDENTITY), NoImage)
    assert store.sweep() == []
    assert store.find("m", IDENTITY) == NoImage("no checkpoint available")


def test_a_configured_directory_is_used_and_never_changed(home: pathlib.Path) -> None:
    store = ImageStore(str(home / "images"))
    shutil.copytree(publish(store, "m").path, home / "given", copy_function=shutil.copy2)
    store.discard("m")
    given = store.find("m", IDENTITY, str(home / "given"))
    assert isinstance(given, Image)
    assert not given.managed
    store.quarantine(given, "its canary answered wrongly")
    assert (home / "given/manifest.json").exists()
    found = store.find("m", IDENTITY, str(home / "given"))
    assert isinstance(found, NoImage)
    assert "its canary answered wrongly" in found.reason


def test_quarantine_keeps_the_newest_with_its_reason(home: pathlib.Path) -> None:
    clock = Clock()
    store = ImageStore(str(home), keep_quarantined=2, clock=clock)
    kept = []
    for number in range(4):
        clock.now += 60
        kept.append(store.quarantine(publish(store, "m"), f"reason {number}"))
    left = sorted(str(path) for path in (home / "m").glob("quarantine-*"))
    assert left == kept[2:]
    assert pathlib.Path(kept[3], "reason").read_text() == "reason 3\n"
    assert store.find("m", IDENTITY) == NoImage("no checkpoint available")


def test_what_a_kept_path_is_now(home: pathlib.Path) -> None:
    path = home / "kept"
    path.write_text("x")
    path.chmod(0o4640)
    assert KeptPath.look(str(path)) == KeptPath(str(path), os.geteuid(), os.getegid(), 0o4640)
    assert KeptPath.look(str(home / "gone")) is None


def test_images_quarantined_within_a_second_are_all_kept(home: pathlib.Path) -> None:
    store = ImageStore(str(home), keep_quarantined=3, clock=Clock())
    kept = [store.quarantine(publish(store, "m"), f"reason {number}") for number in range(3)]
    assert [pathlib.Path(path, "reason").read_text() for path in kept] == [
        f"reason {number}\n" for number in range(3)
    ]
    assert sorted(str(path) for path in (home / "m").glob("quarantine-*")) == sorted(kept)


def test_the_budget_takes_the_least_valuable_first(home: pathlib.Path) -> None:
    clock = Clock()
    store = ImageStore(str(home), max_bytes=10_000_000, clock=clock)
    publish(store, "old", disk_bytes=4_000_000, created=clock.now - 100 * 3600)
    publish(store, "cheap", disk_bytes=4_000_000, cold_seconds=5.0)
    publish(store, "dear", disk_bytes=4_000_000, cold_seconds=600.0)
    publish(store, "new", disk_bytes=4_000_000, cold_seconds=0.1)
    assert enforce_budget(store, {"new"}) == ["old", "cheap"]
    assert sorted(image.model for image in store.images()) == ["dear", "new"]
    for look in (check_disk, look_for_room):
        with pytest.raises(CheckpointFailed, match="more than all images may"):
            look(store, "m", 10_000_001)


def test_what_a_crash_left_is_reported_and_never_an_image(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    publish(store, "m")
    temporary = store.begin("m")
    write_note(f"{temporary}/dumping.json", {"unit": "llmux-m.scope", "operation": "dump"})
    (home / "m/.old-1").mkdir()
    assert store.sweep() == [("m", temporary, {"unit": "llmux-m.scope", "operation": "dump"})]
    store.forget(temporary)
    assert os.listdir(home / "m") == ["images"]
    assert read_note(f"{temporary}/dumping.json") == {}


def test_a_restore_is_under_way_until_it_is_settled(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    publish(store, "m")
    note = {"unit": "llmux-m.scope", "operation": "restore"}
    write_note(str(home / "m" / RESTORING), note)
    for _ in range(2):
        assert store.sweep() == [("m", str(home / "m" / RESTORING), note)]
    store.confirm_restore("m")
    store.confirm_restore("m")
    assert store.sweep() == []


def test_a_second_publication_replaces_the_first(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    publish(store, "m", created=1.0)
    publish(store, "m", created=2.0)
    (image,) = store.images()
    assert image.created == 2.0
    assert os.listdir(home / "m") == ["images"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99}', '{"version": 1, "model": 3}'])
def test_a_broken_manifest_is_no_manifest(home: pathlib.Path, text: str) -> None:
    (home / "manifest.json").write_text(text)
    with pytest.raises(ManifestError):
        load_manifest(str(home))


# ---- bytes ----


def test_zeros_become_holes_and_the_checksum_stays(tmp_path: pathlib.Path) -> None:
    data = os.urandom(100_000) + bytes(SEGMENT) + os.urandom(SEGMENT // 2) + bytes(300_000) + b"end"
    path = tmp_path / "pages-1.img"
    path.write_bytes(data)
    before = digest(tmp_path, path.name)
    assert digest(tmp_path, path.name, punch=True) == before
    assert digest(tmp_path, path.name) == before
    assert path.read_bytes() == data
    assert path.stat().st_blocks * 512 < len(data) - SEGMENT // 2


@pytest.mark.parametrize("offset", [0, 4096, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 16])
def test_one_flipped_bit_anywhere_is_found_and_located(tmp_path: pathlib.Path, offset: int) -> None:
    path = tmp_path / "pages-1.img"
    data = bytearray(b"ab" * 50 + bytes(2 * SEGMENT) + b"tail")
    path.write_bytes(data)
    before = digest(tmp_path, path.name)
    data[offset] ^= 1
    path.write_bytes(data)
    difference = first_difference(before, digest(tmp_path, path.name))
    assert difference is not None
    start = offset // SEGMENT * SEGMENT
    assert f"pages-1.img is damaged between bytes {start} and " in difference


def test_moved_zeros_are_a_difference(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 4096 + bytes(4096))
    before = digest(tmp_path, "f")
    path.write_bytes(bytes(4096) + b"x" * 4096)
    assert first_difference(before, digest(tmp_path, "f")) is not None


def test_a_check_can_be_stopped(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        digest_files(str(tmp_path), ["f"], punch=False, stop=stop, count=lambda _: None)


# ---- /dev/shm ----


def held_at(place: pathlib.Path) -> HeldNames:
    """Without images: no name is held."""
    return HeldNames(ImageStore(str(place / "none")), str(place))


def test_names_of_one_file_are_one_file_again(tmp_path: pathlib.Path) -> None:
    place, image = tmp_path / "shm", tmp_path / "image"
    place.mkdir()
    image.mkdir()
    (place / "sem.mp-a").write_bytes(b"semaphore")
    (place / "sem.mp-a").chmod(0o640)
    os.link(place / "sem.mp-a", place / "link_remap.5")
    (place / "other").write_bytes(b"not ours")
    status = (place / "sem.mp-a").stat()
    groups = shm.find_names({(status.st_dev, status.st_ino)}, str(place))
    assert list(groups.values()) == [["link_remap.5", "sem.mp-a"]]
    renamed = {f"{SHM}/link_remap.5": f"{SHM}/link_remap.5.tok"}
    kept = shm.keep(groups, str(image), renamed, str(place))
    shm.remove([name for names in groups.values() for name in names], str(place))
    assert os.listdir(place) == ["other"]

    made = shm.put_back(kept, str(image), held_at(place), str(place))
    assert sorted(made) == ["link_remap.5.tok", "sem.mp-a"]
    again = (place / "sem.mp-a").stat()
    assert again.st_ino == (place / "link_remap.5.tok").stat().st_ino
    assert again.st_mode & 0o777 == 0o640
    assert (place / "sem.mp-a").read_bytes() == b"semaphore"


def test_a_name_in_use_is_refused_and_nothing_is_left(tmp_path: pathlib.Path) -> None:
    place, image = tmp_path / "shm", tmp_path / "image"
    place.mkdir()
    (image / "shm").mkdir(parents=True)
    (image / "shm/0").write_bytes(b"")
    (image / "shm/1").write_bytes(b"")
    uid, gid = os.getuid(), os.getgid()
    groups = [
        ShmGroup((name,), f"shm/{index}", 0, 0o600, uid, gid)
        for index, name in enumerate(["first", "second"])
    ]
    with open(place / "second", "w"):
        with pytest.raises(shm.ShmTaken, match=f"is used by process {os.getpid()}"):
            shm.put_back(groups, str(image), held_at(place), str(place))
        assert os.listdir(place) == ["second"]
    assert shm.put_back(groups, str(image), held_at(place), str(place)) == ("first", "second")


def test_links_that_another_criu_left_are_set_aside_and_used_ones_named(
    tmp_path: pathlib.Path,
) -> None:
    for name in ("link_remap.16", "link_remap.7", "link_remap.5.tok", "sem.mp-a", "xlink_remap.1"):
        (tmp_path / name).write_text(name)
    with (tmp_path / "link_remap.7").open():
        moved, used = shm.set_aside_links("t0", str(tmp_path))
    assert moved == [str(tmp_path / "link_remap.16")]
    (one,) = used
    assert one.startswith(f"{tmp_path}/link_remap.7, which process {os.getpid()} (")
    assert (tmp_path / "link_remap.16.aside-t0").read_text() == "link_remap.16"
    assert len(list(tmp_path.iterdir())) == 5
    assert shm.set_aside_links("t1", str(tmp_path)) == ([str(tmp_path / "link_remap.7")], [])


def test_a_name_that_leads_out_of_dev_shm_is_refused(tmp_path: pathlib.Path) -> None:
    group = ShmGroup(("../etc/passwd",), "shm/0", 0, 0o600, 0, 0)
    with pytest.raises(shm.ShmTaken):
        shm.put_back([group], str(tmp_path), held_at(tmp_path), str(tmp_path))


# ---- the host ----


def test_how_much_of_an_image_was_read_is_reports(home: pathlib.Path) -> None:
    store = ImageStore(str(home))
    publish(store, "m")
    reports: list[tuple[int, int]] = []

    async def body() -> None:
        (image,) = store.images()
        criu = Criu(MemoryUnits(World()), store, str(home))
        await criu.read_ahead(image, lambda _, done, total: reports.append((done, total)))

    asyncio.run(body())
    done, total = reports[-1]
    assert 0 < done == total


def test_a_taken_pid_is_named(home: pathlib.Path) -> None:
    manifest = load_manifest(publish(ImageStore(str(home)), "m").path)
    host.check_pids(manifest)
    taken = replace(manifest, processes=(TreeProcess(os.getpid(), "x", (os.getpid(),)),))
    with pytest.raises(host.HostNotReady, match=f"pid {os.getpid()} of the image is taken"):
        host.check_pids(taken)


def test_memory_is_left_for_others() -> None:
    def available() -> int:
        return 3072

    host.check_memory(3072, available=available)
    host.check_memory(2048, 1024, available=available)
    with pytest.raises(host.HostNotReady, match="needs 3073 bytes of memory, and 3072 are"):
        host.check_memory(3073, available=available)
    with pytest.raises(host.HostNotReady, match="2048 bytes of memory, 1025 must be left"):
        host.check_memory(2048, 1025, available=available)


def test_log_files_are_made_again_but_never_through_a_link(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run" / "out.log"
    kept = KeptPath(str(path), os.getuid(), os.getgid(), 0o640)
    host._own(replace(kept, path=str(tmp_path / "out")), os.O_CREAT | os.O_WRONLY)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        host._own(kept, os.O_CREAT | os.O_WRONLY)


# ---- identity ----


def test_secrets_are_hashed_and_their_change_is_seen() -> None:
    argv = ["vllm", "serve", "m", "--api-key", "sk-1", "--hf-token=abc", "--port", "1"]
    env = {"VLLM_API_KEY": "sk-2", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_TOKEN": "abc"}
    one = images_identity.launch_identity(argv, env, None)
    assert not [value for value in one.values() if "sk-" in value or "abc" in value]
    assert one["env.VLLM_CPU_KVCACHE_SPACE"] == "1"
    other = images_identity.launch_identity(argv, {**env, "VLLM_API_KEY": "sk-3"}, None)
    assert [key for key in one if one[key] != other[key]] == ["env.VLLM_API_KEY"]


def test_tokens_of_text_are_no_secrets() -> None:
    argv = [
        "vllm",
        "serve",
        "m",
        "--max-num-batched-tokens",
        "2048",
        "--max_num_batched_tokens=1",
        "--tokenizer",
        "t",
    ]
    assert images_identity.hidden_argv(argv) == " ".join(argv)
    for name in ("--api-key", "--hf-token", "--hf_token", "--ssl-password-file", "-token"):
        assert "hush" not in images_identity.hidden_argv([name, "hush"])


def test_a_snapshot_is_known_by_its_commit_and_a_directory_by_its_files(
    tmp_path: pathlib.Path,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub/models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    identity = images_identity.model_identity("org/name", {"HF_HOME": str(tmp_path)})
    assert identity["revision"] == commit
    (tmp_path / "own").mkdir()
    (tmp_path / "own/model.safetensors").write_bytes(b"1")
    before = images_identity.model_identity(str(tmp_path / "own"), {})
    (tmp_path / "own/model.safetensors").write_bytes(b"22")
    assert before != images_identity.model_identity(str(tmp_path / "own"), {})

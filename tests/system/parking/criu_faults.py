"""Scenarios in which something is broken, killed or in the way. See criu_scenarios.py."""

# One scenario at a time, in a program of its own: blocking harms none.
# ruff: noqa: ASYNC230, ASYNC240

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import threading
from collections.abc import Callable

from criu_lab import (
    IDENTITY,
    IMAGES,
    SHM,
    THREADS,
    Lab,
    end_of_child,
    find_criu,
    flip,
    has_children,
    home,
    in_shm,
    is_held,
    kill_criu,
    launch_spec,
    note_exists,
    pages_exist,
    process_with_pid,
    refused,
    restoring_exists,
    tree_has_begun,
)

from llmux.image_ports import DumpSpec, Image, NoImage
from llmux.ports import UnitHandle

# ---- what is wrong with an image ----------------------------------------------------------------


async def a_damaged_image_is_caught_and_leaves_nothing(lab: Lab) -> None:
    handle = await lab.start("m")
    image = await lab.dump(handle)
    pages = max(pathlib.Path(image.path).glob("pages-*.img"), key=lambda path: path.stat().st_size)

    async def check_restore(words: str) -> None:
        error = await refused(lab.criu.restore(image, launch_spec("m"), 30))
        assert error.blame == "image", error
        assert words in error.message, error.message
        assert await lab.units.observe() == []
        assert in_shm() == []
        assert "restoring.json" not in home("m")

    flip(pages, pages.stat().st_size // 2)
    await check_restore(f"{pages.name} is damaged between bytes")
    error = await refused(lab.criu.read_ahead(image))
    assert pages.name in error.message
    flip(pages, pages.stat().st_size // 2)
    await lab.criu.read_ahead(image)
    for path in sorted(pathlib.Path(image.path).glob("*.img")):
        if path != pages:
            flip(path, path.stat().st_size - 1)
            error = await refused(lab.criu.read_ahead(image))
            assert path.name in error.message
            flip(path, path.stat().st_size - 1)
    await lab.kill(await lab.restore("m"))

    size = pages.stat().st_size
    os.truncate(pages, size - 4096)
    await check_restore(f"{pages.name} has {size - 4096} bytes and should have {size}")
    found = await lab.criu.find("m", IDENTITY)
    assert isinstance(found, NoImage)
    assert pages.name in found.reason
    await lab.criu.quarantine(image, "a test")
    found = await lab.criu.find("m", IDENTITY)
    assert found == NoImage("no checkpoint available"), found
    assert [name for name in home("m") if name.startswith("quarantine-")]


async def an_unsafe_image_is_not_given_to_criu(lab: Lab) -> None:
    image = await lab.dump(await lab.start("m"))
    path = pathlib.Path(image.path)
    core = next(path.glob("core-*.img"))

    async def check_found(words: str) -> None:
        found = await lab.criu.find("m", IDENTITY)
        assert isinstance(found, NoImage), words
        assert words in found.reason, found.reason
        error = await refused(lab.criu.restore(image, launch_spec("m"), 30))
        assert error.blame == "image"

    path.chmod(0o755)
    await check_found("is open to others")
    path.chmod(0o700)
    core.chmod(0o622)
    await check_found("can be written by others")
    core.chmod(0o600)
    os.chown(core, 12345, 0)
    await check_found("belongs to user 12345")
    os.chown(core, 0, 0)
    path.parent.chmod(0o777)
    await check_found("can be written by others")
    path.parent.chmod(0o700)
    os.chown(path.parent, 12345, 0)
    await check_found("belongs to user 12345")
    os.chown(path.parent, 0, 0)
    (path / "core-999.img").write_bytes(b"")
    await check_found("is not in the manifest")
    (path / "core-999.img").unlink()
    core.rename("/var/lib/llmux/core.img")
    core.symlink_to("/var/lib/llmux/core.img")
    await check_found("is not a plain file")
    core.unlink()
    await check_found(f"{core.name}")
    os.rename("/var/lib/llmux/core.img", core)
    await lab.restore("m")


async def an_image_for_something_else_is_not_used(lab: Lab) -> None:
    await lab.dump(await lab.start("m"))
    found = await lab.criu.find("m", {**IDENTITY, "vllm": "0.33.0"})
    assert isinstance(found, NoImage)
    assert 'vllm was not known when the image was made and is "0.33.0" now' in found.reason
    found = await lab.criu.find("m", {**IDENTITY, "boot_id": "2"})
    assert isinstance(found, NoImage)
    (pathlib.Path(IMAGES) / "m/images/manifest.json").unlink()
    found = await lab.criu.find("m", IDENTITY)
    assert isinstance(found, NoImage)
    assert "never completed" in found.reason


# ---- what stands in the way of a restore --------------------------------------------------------


async def a_taken_pid_is_named(lab: Lab) -> None:
    handle = await lab.start("m")
    image = await lab.dump(handle)
    await lab.criu.read_ahead(image)
    all_threads = threading.Barrier(THREADS)  # or one of ours, started later, would take the pid
    await asyncio.gather(*(asyncio.to_thread(all_threads.wait) for _ in range(THREADS)))
    with process_with_pid(image.root_pid):
        error = await refused(lab.restore("m"))
        assert f"pid {image.root_pid} of the image is taken by process" in error.message
        assert error.blame == "host"
    await lab.restore("m")
    await lab.ask("m")


async def a_taken_name_in_dev_shm_is_named(lab: Lab) -> None:
    await lab.dump(await lab.start("m"))
    manifest = json.loads(pathlib.Path(IMAGES, "m/images/manifest.json").read_text())
    name = next(
        name for group in manifest["shm"] for name in group["names"] if "link_remap" not in name
    )
    with open(f"{SHM}/{name}", "w"):
        error = await refused(lab.restore("m"))
        assert f"{SHM}/{name} exists and is used by process {os.getpid()}" in error.message
        assert error.blame == "host"
        assert in_shm() == [name]
    # Now it is unused: what an earlier life of the engine left behind.
    await lab.restore("m")
    await lab.ask("m")


def take_as_nobody(names: list[str]) -> None:
    for name in names:
        for attack in ("rm -f {}", "mv -f own {}", "mv {} away", ": >{}", "ln -f own {}"):
            done = subprocess.run(
                ["sh", "-c", f": >own && {attack.format(name)}"],
                cwd=SHM,
                user="nobody",
                group="nogroup",
                extra_groups=(),
                check=False,
                capture_output=True,
            )
            assert done.returncode, (attack, name)


async def no_other_user_takes_a_name_in_dev_shm(lab: Lab) -> None:
    """While the model is parked, after a dump and after a kill."""
    handle = await lab.start("m")
    before = await lab.ask("m")
    await lab.dump(handle)
    for _ in range(2):
        names = sorted(filter(is_held, os.listdir(SHM)))
        for group in json.loads(pathlib.Path(IMAGES, "m/images/manifest.json").read_text())["shm"]:
            assert set(group["names"]) <= set(names)
        take_as_nobody(names)
        os.unlink(f"{SHM}/own")
        assert sorted(filter(is_held, os.listdir(SHM))) == names
        handle = await lab.restore("m")
        assert await lab.ask("m") == before
        await lab.kill(handle)
    await lab.criu.discard("m")
    assert os.listdir(SHM) == []


async def criu_killed_in_a_restore_leaves_nothing(lab: Lab) -> None:
    await lab.dump(await lab.start("m", weights_mib=256))
    stop = threading.Event()
    killer = threading.Thread(target=kill_criu, args=("restore", has_children, stop))
    killer.start()
    error = await refused(lab.restore("m"))
    stop.set()
    killer.join()
    assert error.blame == "host"
    assert await lab.units.observe() == []
    assert in_shm() == []
    await lab.restore("m")
    await lab.ask("m")


# ---- the supervisor dies ------------------------------------------------------------------------


async def a_supervisor_killed_in_a_dump_is_cleaned_up_after(lab: Lab) -> None:
    for moment in (note_exists, pages_exist):
        handle = await lab.start("m", weights_mib=256)
        await end_of_child("child_dumps", moment)
        found = await Lab().criu.recover()
        assert [(item.unit, item.operation) for item in found] == [("llmux-m.scope", "dump")]
        assert find_criu("dump") == []
        assert not [name for name in in_shm() if name.startswith("link_remap")]
        assert not [name for name in home("m") if name.startswith(".")]
        assert isinstance(await lab.criu.find("m", IDENTITY), NoImage)
        await lab.kill(handle)
        await lab.criu.remove_shm("m", found[0].shm)
        assert in_shm() == []


async def a_supervisor_killed_in_a_restore_is_cleaned_up_after(lab: Lab) -> None:
    await lab.dump(await lab.start("m", weights_mib=256))
    for moment in (restoring_exists, tree_has_begun):
        await end_of_child("child_restores", moment)
        again = Lab()
        found = await again.criu.recover()
        assert [(item.unit, item.operation) for item in found] == [("llmux-m.scope", "restore")]
        for handle in await again.units.observe():
            await again.kill(handle)
        await again.criu.remove_shm("m", found[0].shm)
        assert await again.criu.recover() == found, "named until it is settled"
        await again.criu.confirm_restore("m")
        assert await again.criu.recover() == []
        assert in_shm() == []
        await again.units.close()
    handle = await lab.restore("m")
    await lab.ask("m")
    await lab.kill(handle)
    assert in_shm() == []


async def child_dumps(lab: Lab) -> None:
    (handle,) = await lab.units.observe()
    await lab.dump(handle)


async def child_restores(lab: Lab) -> None:
    await lab.restore("m")


async def a_supervisor_killed_after_a_restore_that_nobody_took_over(lab: Lab) -> None:
    """The engine lives, and no supervisor may take it for one that serves."""
    await lab.dump(await lab.start("m"))
    done = pathlib.Path("/tmp/restored")
    done.unlink(missing_ok=True)
    await end_of_child("child_restores_and_waits", done.exists)
    again = Lab()
    found = await again.criu.recover()
    assert [(item.unit, item.operation) for item in found] == [("llmux-m.scope", "restore")]
    (handle,) = await again.units.observe()
    await again.units.kill(handle, 10)
    await again.criu.remove_shm("m", found[0].shm)
    await again.criu.confirm_restore("m")
    assert in_shm() == []
    assert home("m") == ["images", "last-used", "restore"]
    await again.units.close()
    await lab.restore("m")
    await lab.ask("m")


async def child_restores_and_waits(lab: Lab) -> None:
    image = await lab.criu.find("m", IDENTITY)
    assert isinstance(image, Image)
    await lab.criu.restore(image, launch_spec("m"), 30)
    pathlib.Path("/tmp/restored").touch()
    await asyncio.Event().wait()  # until it is killed


def busy_until(moment: Callable[[], bool], task: asyncio.Future[UnitHandle]) -> None:
    """It lasts for milliseconds."""
    while not moment() and not task.done():
        pass


async def a_restore_that_is_cancelled_leaves_nothing(lab: Lab) -> None:
    image = await lab.dump(await lab.start("m", weights_mib=256))
    for moment in (restoring_exists, tree_has_begun):
        task = asyncio.ensure_future(lab.criu.restore(image, launch_spec("m"), 30))
        await asyncio.to_thread(busy_until, moment, task)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert list(await lab.units.observe()) == []
        assert in_shm() == []
        assert home("m") == ["images", "restore"]
    await lab.restore("m")
    await lab.ask("m")


async def criu_killed_in_a_dump_condemns_the_tree_only(lab: Lab) -> None:
    handle = await lab.start("m", weights_mib=256)
    stop = threading.Event()
    killer = threading.Thread(target=kill_criu, args=("dump", pages_exist, stop))
    killer.start()
    error = await refused(lab.dump(handle))
    stop.set()
    killer.join()
    assert error.tree == "broken", error
    assert home("m") == ["last-failure.log"]
    assert not [name for name in in_shm() if name.startswith("link_remap")]
    await lab.kill(handle)
    assert in_shm() == []
    handle = await lab.start("m")
    await lab.dump(handle)
    await lab.restore("m")
    await lab.ask("m")


async def criu_out_of_time_in_a_dump_condemns_the_tree_only(lab: Lab) -> None:
    handle = await lab.start("m", weights_mib=256)
    await lab.criu.check()
    error = await refused(lab.criu.dump(handle, DumpSpec(launch_spec("m"), IDENTITY), 0.06))
    assert error.tree == "broken", error
    await lab.kill(handle)
    assert in_shm() == []

"""What an engine's user may put in the place of its files while it is parked, and gets nothing for.

An image makes CRIU, which is root, open paths that the engine chose. Each scenario swaps one of
them for something of root's and expects: refused, root's file untouched, nothing left.
"""

# One scenario at a time, in a program of its own: blocking harms none.
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import os
import pathlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from unittest import mock

from criu_lab import IDENTITY, Lab, refused, runtime_dir

from llmux.drivers.criu import known_files
from llmux.drivers.processes import cgroup
from llmux.drivers.processes.users import SharedUser
from llmux.errors import Blame
from llmux.image_ports import DumpSpec, Image
from llmux.ports import LaunchSpec

CAP_SYS_RESOURCE = 24


def _capabilities() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(
        next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16
    )


# Without CAP_SYS_RESOURCE, as in a container, CRIU cannot dump a process of another user.
USER = "nobody" if _capabilities() >> CAP_SYS_RESOURCE & 1 else None
HOME = pathlib.Path("/var/tmp/engine-home")
SECRET = pathlib.Path("/etc/target-shadow")

# Holds one of each kind of path, then says so and waits.
ENGINE = """
import mmap, os, pathlib, signal, sys
home = pathlib.Path(sys.argv[1])
os.umask(0o027)
for name in ("notes", "mapped", "linked", "ghosts/ghost"):
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_bytes(b"mine" * 2048)
(home / "work").mkdir(exist_ok=True)
os.chdir(home / "work")
notes = open(home / "notes", "ab")
with open(home / "mapped", "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
linked = open(home / "linked", "rb")
ghost = open(home / "ghosts/ghost", "ab")
os.unlink(home / "ghosts/ghost")
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
(home / "ready").write_text("")
while True:
    signal.sigwait({signal.SIGUSR1})
    pathlib.Path("answer").write_text("")
"""

Swap = Callable[[], None]


def spec() -> LaunchSpec:
    os.makedirs("/var/log/llmux/m", exist_ok=True)
    return LaunchSpec(
        model="m",
        argv=(sys.executable, "-c", textwrap.dedent(ENGINE), str(HOME)),
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        user=SharedUser(USER, "/nowhere").find("m") if USER else None,
        stdout="/var/log/llmux/m/stdout.log",
        stderr="/var/log/llmux/m/stderr.log",
        runtime_dir=runtime_dir("m"),
    )


async def parked(lab: Lab, user: str | None = USER) -> Image:
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    shutil.chown(HOME, user or "root")
    HOME.chmod(0o750)
    SECRET.write_text("root-only\n")
    SECRET.chmod(0o640)
    handle = await lab.units.start(spec(), 20)
    while not (HOME / "ready").exists():
        assert await lab.units.pids(handle), "the engine ended"
        await asyncio.sleep(0.02)  # no event tells that a file appears there
    return await lab.criu.dump(handle, DumpSpec(spec(), IDENTITY), 60)


def is_alive(pid: int) -> bool:
    return cgroup.process_state(pid) not in "ZX"


def link(name: str) -> Swap:
    def swap() -> None:
        (HOME / name).unlink()
        (HOME / name).symlink_to(SECRET)

    return swap


def hard_link(name: str) -> Swap:
    """With fs.protected_hardlinks=0; the engine's user cannot do so otherwise."""

    def swap() -> None:
        place = SECRET.with_name("target-hard")
        place.unlink(missing_ok=True)
        # not unlinked: the copy could get the number of the free inode, here also its owner
        (HOME / name).rename(HOME / f"{name}-away")
        shutil.copyfile(SECRET, HOME / name)
        (HOME / name).chmod(0o640)  # another file, of root's, under the name

    return swap


def directory_link(name: str) -> Swap:
    """The directory moves away; a link to it, or to one like it, is in its place."""

    def swap() -> None:
        (HOME / name).rename(HOME / f"{name}-away")
        (HOME / name).symlink_to(HOME / f"{name}-away")

    return swap


def home_link() -> None:
    HOME.rename(f"{HOME}-away")
    HOME.symlink_to(f"{HOME}-away")


def other_owner() -> None:
    shutil.chown(HOME / "notes", "daemon")


SWAPS: dict[str, Swap] = {
    "an open file by a link": link("notes"),
    "a mapped file by a link": link("mapped"),
    "an open file by a file of root's": hard_link("linked"),
    "an open file's owner": other_owner,
    "the working directory by a link": directory_link("work"),
    "the directory of a deleted file by a link": directory_link("ghosts"),
    "a directory above by a link": home_link,
}


def clean() -> None:
    for path in (HOME, pathlib.Path(f"{HOME}-away")):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


async def an_untouched_image_is_restored_and_runs(lab: Lab) -> None:
    image = await parked(lab)
    handle = await lab.criu.restore(image, spec(), 30)
    try:
        os.kill(handle.pid, signal.SIGUSR1)  # it answers, so it runs
        async with asyncio.timeout(10):
            while not (HOME / "work/answer").exists():
                assert is_alive(handle.pid)
                await asyncio.sleep(0.02)  # no event tells that a file appears
        assert os.readlink(f"/proc/{handle.pid}/cwd") == str(HOME / "work")
    finally:
        await lab.kill(handle)
        clean()


async def what_was_swapped_is_refused_before_criu_opens_it(lab: Lab) -> None:
    for what, swap in SWAPS.items():
        image = await parked(lab)
        try:
            swap()
            error = await refused(lab.criu.restore(image, spec(), 30))
            assert error.blame is Blame.IMAGE, (what, error)
            assert str(HOME) in str(error), (what, error)
            assert SECRET.read_text() == "root-only\n", what
            assert not is_alive(image.root_pid), what
        finally:
            clean()


async def what_is_swapped_too_late_for_that_is_seen_before_the_engine_runs(lab: Lab) -> None:
    """The first look is skipped, as if the swap had come right after it."""
    for what in ("an open file by a link", "a mapped file by a link"):
        image = await parked(lab)
        try:
            SWAPS[what]()
            # What CRIU compares must be right, or it refuses by itself.
            SECRET.write_bytes(b"mine" * 2048)
            with mock.patch.object(known_files, "check"):
                error = await refused(lab.criu.restore(image, spec(), 30))
            assert error.blame is Blame.IMAGE, (what, error)
            assert f"holds {SECRET}, which it did not when dumped" in str(error), (what, error)
            assert not is_alive(image.root_pid), what
            assert SECRET.read_bytes() == b"mine" * 2048, what
        finally:
            clean()


async def leftovers_of_root_and_behind_links_stay(lab: Lab) -> None:
    """A killed restore may leave NAME.cr.N.ghost; only what the engine could remove is removed."""
    image = await parked(lab)
    victims = pathlib.Path("/etc/victims")
    victims.mkdir(exist_ok=True)
    try:
        names = [
            path.name.replace("remap", "x") for path in pathlib.Path(image.path).glob("ghost-*")
        ]
        assert names, "the deleted file is in the image"
        victim = victims / "ghost.cr.1.ghost"
        victim.write_text("root's\n")
        (HOME / "ghosts").rename(HOME / "ghosts-away")
        (HOME / "ghosts").symlink_to(victims)
        await refused(lab.criu.restore(image, spec(), 30))
        assert victim.read_text() == "root's\n"
    finally:
        shutil.rmtree(victims)
        clean()

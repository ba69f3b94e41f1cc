"""What the CRIU driver promises, one scenario a function; run in a guest by test_criu.py.

    python3 tests/system/parking/criu_scenarios.py SCENARIO

Real systemd, real CRIU, the stand-in engine. A scenario ends with status 0 or with a traceback.
Those in which something breaks are in criu_faults.py.
"""

# One scenario at a time, in a program of its own: blocking harms none.
# ruff: noqa: ASYNC230, ASYNC240

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import criu_faults
import criu_swaps
from criu_lab import (
    IDENTITY,
    IMAGES,
    MIB,
    SHM,
    Lab,
    home,
    in_shm,
    launch_spec,
    refused,
    runtime_dir,
    tmpfs,
)

from llmux.drivers.criu import command, shm
from llmux.drivers.criu.held_names import HeldNames
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.image_ports import DumpPhase, DumpSpec, Image, NoImage
from llmux.ports import LaunchSpec

# ---- the good way -------------------------------------------------------------------------------


async def one_image_serves_twenty_restores(lab: Lab) -> None:
    handle = await lab.start("m")
    before = await lab.ask("m")
    assert await lab.criu.precheck(handle) > 64 * MIB
    image = await lab.dump(handle)
    assert in_shm() == []
    assert not os.path.exists(f"/proc/{handle.pid}")
    stamps = {path: path.stat().st_mtime_ns for path in pathlib.Path(image.path).rglob("*")}
    for _ in range(20):
        handle = await lab.restore("m")
        assert handle.pid == image.root_pid
        assert await lab.ask("m") == before
        with open(f"/proc/{handle.pid}/cgroup") as file:
            assert file.read().strip().endswith("/llmux.slice/llmux-m.scope/engine")
        await lab.kill(handle)
        assert in_shm() == []
    after = {path: path.stat().st_mtime_ns for path in pathlib.Path(image.path).rglob("*")}
    assert after == stamps, "a restore changed the image"


async def a_restored_engine_can_be_dumped_again(lab: Lab) -> None:
    handle = await lab.start("m")
    before = await lab.ask("m")
    for _ in range(5):
        await lab.dump(handle)
        assert in_shm() == []
        handle = await lab.restore("m")
        assert await lab.ask("m") == before
    assert home("m") == ["images", "last-used", "restore"]


async def a_frozen_engine_is_dumped_as_it_is(lab: Lab) -> None:
    handle = await lab.start("m")
    before = await lab.ask("m")
    freezer = CgroupFreezer()
    await freezer.freeze(handle, 5)
    await lab.dump(handle, frozen=True)
    handle = await lab.restore("m")
    assert not await freezer.frozen(handle)
    assert await lab.ask("m") == before


async def two_models_take_turns_fifty_times(lab: Lab) -> None:
    before = {}
    for model in ("a", "b"):
        handle = await lab.start(model)
        before[model] = await lab.ask(model)
        await lab.dump(handle)
    for _ in range(25):
        for model in ("a", "b"):
            handle = await lab.restore(model)
            assert await lab.ask(model) == before[model]
            await lab.kill(handle)
    assert in_shm() == []


async def two_restored_models_live_side_by_side(lab: Lab) -> None:
    """Their links in /dev/shm have the same numbers in both images."""
    for model in ("a", "b"):
        await lab.dump(await lab.start(model))
    await asyncio.gather(lab.restore("a"), lab.restore("b"))
    await asyncio.gather(lab.ask("a"), lab.ask("b"))


async def a_dump_goes_on_when_its_caller_is_cancelled(lab: Lab) -> None:
    handle = await lab.start("m")
    dumping = asyncio.Event()

    def progress(phase: DumpPhase, _done: int, _total: int) -> None:
        if phase is DumpPhase.DUMP:
            dumping.set()

    spec = DumpSpec(launch_spec("m"), IDENTITY)
    task = asyncio.ensure_future(lab.criu.dump(handle, spec, 60, progress))
    await dumping.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await lab.restore("m")
    await lab.ask("m")


async def what_the_engine_expects_outside_is_made_again(lab: Lab) -> None:
    handle = await lab.start("m")
    await lab.dump(handle)
    shutil.rmtree(runtime_dir("m"))
    os.unlink("/var/log/llmux/m/stdout.log")
    await lab.restore("m")
    await lab.ask("m")


async def loopback_connections_inside_the_tree_survive(lab: Lab) -> None:
    """torch's TCPStore is one. Nothing in the firewall is needed for it, so nothing can be left
    there."""
    program = (
        "import os, socket\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "if os.fork() == 0:\n"
        "    c = socket.create_connection(s.getsockname())\n"
        "    while d := c.recv(9): c.sendall(d.upper())\n"
        "c, _ = s.accept()\n"
        "u = socket.socket(socket.AF_UNIX); u.bind('/run/llmux/t/u'); u.listen()\n"
        "while True:\n"
        "    q, _ = u.accept(); c.sendall(q.recv(9)); q.sendall(c.recv(9)); q.close()\n"
    )
    spec = program_spec(program)
    handle = await lab.units.start(spec, 10)
    assert await first_answer() == b"ABC"
    for _ in range(3):
        image = await lab.criu.dump(handle, DumpSpec(spec, IDENTITY), 30)
        handle = await lab.criu.restore(image, spec, 30)
        assert ask() == b"ABC"


async def zero_pages_are_left_out_of_the_image_and_not_of_memory(lab: Lab) -> None:
    """Among them those that a child of a fork made zero and its parent did not, the other way
    round, and those that lie over a file, whose bytes must not come back."""
    program = (
        "import hashlib, mmap, os, socket\n"
        "MIB = 1 << 20\n"
        "with open('/tmp/over', 'wb') as f: f.write(b'x' * MIB)\n"
        "plain = mmap.mmap(-1, 256 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "forked = mmap.mmap(-1, 16 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "with open('/tmp/over', 'rb') as f:\n"
        "    over = mmap.mmap(f.fileno(), MIB, mmap.MAP_PRIVATE)\n"
        "for area in (plain, forked, over):\n"
        "    for at in range(0, len(area), 4096): area[at] = 0\n"
        "over[:] = bytes(MIB)\n"
        "for at in range(0, 256 * MIB, 5 * MIB): plain[at:at + 9] = b'not zero.'\n"
        "forked[:8 * MIB] = b'p' * (8 * MIB)\n"
        "def state():\n"
        "    return '/'.join(hashlib.md5(a).hexdigest() for a in (plain, forked, over)).encode()\n"
        "a, b = socket.socketpair(socket.AF_UNIX)\n"
        "if os.fork() == 0:\n"
        "    a.close()\n"
        "    forked[:4 * MIB] = bytes(4 * MIB)\n"
        "    forked[10 * MIB:12 * MIB] = b'c' * (2 * MIB)\n"
        "    while b.recv(1): b.sendall(state())\n"
        "    os._exit(0)\n"
        "b.close()\n"
        "forked[6 * MIB:7 * MIB] = bytes(MIB)\n"
        "u = socket.socket(socket.AF_UNIX); u.bind('/run/llmux/t/u'); u.listen()\n"
        "while True:\n"
        "    q, _ = u.accept(); q.recv(9); a.sendall(b'?')\n"
        "    q.sendall(state() + b' ' + a.recv(999)); q.close()\n"
    )
    spec = program_spec(program)
    handle = await lab.units.start(spec, 10)
    before = await first_answer()
    assert len(before.split(b" ")[1]) == 3 * 32 + 2
    for _ in range(3):
        image = await lab.criu.dump(handle, DumpSpec(spec, IDENTITY), 30)
        assert 24 * MIB < image.apparent_bytes < 64 * MIB, image
        handle = await lab.criu.restore(image, spec, 30)
        assert ask() == before


def program_spec(program: str) -> LaunchSpec:
    """A Python program that answers at the socket "u" of its runtime directory."""
    spec = launch_spec("t")
    with suppress(FileNotFoundError):
        os.unlink("/run/llmux/t/u")
    return LaunchSpec("t", (sys.executable, "-c", program), spec.env, None, spec.stdout,
                      spec.stderr, spec.runtime_dir)  # fmt: skip


def ask() -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("/run/llmux/t/u")
        connection.sendall(b"abc")
        return connection.recv(999)


async def first_answer() -> bytes:
    end = time.monotonic() + 10
    while True:
        try:
            return ask()
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)


# ---- what stands in the way of a dump -----------------------------------------------------------


async def a_tree_that_cannot_be_dumped_is_refused_by_name(lab: Lab) -> None:
    handle = await lab.start("m")
    children = await lab.units.pids(handle)
    os.kill(children[-1], signal.SIGSTOP)
    error = await refused(lab.criu.precheck(handle))
    assert f"process {children[-1]} " in error.message
    assert "is stopped" in error.message
    assert error.tree == "running"
    os.kill(children[-1], signal.SIGCONT)
    await lab.ask("m")


async def a_connection_from_outside_is_refused_by_name(lab: Lab) -> None:
    program = (
        "import socket, time\n"
        "s = socket.create_server(('127.0.0.1', 8124))\n"
        "c, _ = s.accept()\n"
        "time.sleep(1e6)\n"
    )
    handle = await lab.units.start(program_spec(program), 10)
    end = time.monotonic() + 10
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", 8124))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
    with client:
        error = await refused(lab.criu.precheck(handle))
    assert f"process {handle.pid} " in error.message
    assert "127.0.0.1:8124 to 127.0.0.1:" in error.message
    assert error.hint is not None


async def a_full_disk_leaves_the_engine_serving(lab: Lab) -> None:
    """Out of inodes: the free space looks sufficient beforehand and CRIU meets ENOSPC half-way."""
    handle = await lab.start("m")
    before = await lab.ask("m")
    with tmpfs("/mnt/images", "size=512m,nr_inodes=25"):
        full = Lab("/mnt/images")
        error = await refused(full.dump(handle))
        assert error.tree == "running", error
        assert "free some space" in (error.hint or ""), error.hint
        assert os.listdir("/mnt/images/m") == ["last-failure.log"]
        assert isinstance(await full.criu.find("m", IDENTITY), NoImage)
        await full.units.close()
    with tmpfs("/mnt/images", "size=32m"):
        full = Lab("/mnt/images")
        error = await refused(full.dump(handle))
        assert "has" in error.message
        assert "free" in error.message
        await full.units.close()
    assert not [name for name in in_shm() if name.startswith("link_remap")]
    assert await lab.ask("m") == before
    await lab.dump(handle)


async def files_of_others_in_dev_shm_are_never_touched(lab: Lab) -> None:
    foreign = ["sem.mp-foreign", "psm_foreign", "link_remap.9999"]
    for name in foreign:
        pathlib.Path(SHM, name).write_text("mine")
    handle = await lab.start("m")
    await lab.dump(handle)
    assert in_shm() == sorted(foreign)
    handle = await lab.restore("m")
    await lab.kill(handle)
    assert in_shm() == sorted(foreign)


async def a_foreign_link_in_the_way_is_set_aside(lab: Lab) -> None:
    foreign = [f"link_remap.{number}" for number in range(200)]
    for name in foreign:
        pathlib.Path(SHM, name).write_text("mine")
    handle = await lab.start("m")
    await lab.dump(handle)
    left = [name for name in in_shm() if name.startswith("link_remap")]
    assert sorted(name.partition(".aside-")[0] for name in left) == sorted(foreign)
    assert all(".aside-" in name for name in left)
    assert {pathlib.Path(SHM, name).read_text() for name in left} == {"mine"}
    handle = await lab.restore("m")
    await lab.ask("m")


async def a_foreign_link_that_is_used_fails_the_dump_and_stays(lab: Lab) -> None:
    foreign = [f"link_remap.{number}" for number in range(200)]
    for name in foreign:
        pathlib.Path(SHM, name).write_text("mine")
    files = [os.open(f"{SHM}/{name}", os.O_RDONLY) for name in foreign]
    handle = await lab.start("m")
    error = await refused(lab.dump(handle))
    assert error.tree == "running"
    assert f"link_remap.0, which process {os.getpid()}" in (error.hint or ""), error.hint
    assert {name for name in in_shm() if name.startswith("link_remap")} == set(foreign)
    for file in files:
        os.close(file)
    await lab.ask("m")


# ---- measuring ----------------------------------------------------------------------------------


async def measure_against_bare_criu(lab: Lab) -> None:
    """Printed for the record; the bound is 1.5 times the bare tool's restore."""
    handle = await lab.start("m", weights_mib=512)
    started = time.monotonic()
    image = await lab.dump(handle)
    dump_seconds = time.monotonic() - started
    ours = []
    for _ in range(7):
        started = time.monotonic()
        handle = await lab.restore("m")
        ours.append(time.monotonic() - started)
        await lab.kill(handle)
    bare = [await bare_restore(lab, image) for _ in range(7)]
    print(
        json.dumps(
            {
                "dump": round(dump_seconds, 3),
                "criu_dump": image.dump_seconds,
                "restore_median": round(statistics.median(ours), 3),
                "bare_median": round(statistics.median(bare), 3),
                "apparent_bytes": image.apparent_bytes,
                "disk_bytes": image.disk_bytes,
            }
        )
    )
    assert statistics.median(ours) < 1.5 * statistics.median(bare) + 0.1


async def bare_restore(lab: Lab, image: Image) -> float:
    manifest = lab.store.load(image.path)
    work = "/tmp/bare"
    shutil.rmtree(work, ignore_errors=True)
    os.mkdir(work)
    os.makedirs("/tmp/empty", exist_ok=True)
    held = HeldNames(lab.store, SHM)
    made = shm.put_back(manifest.shm, image.path, held)
    held.begin(image.model)
    arguments = command.restore_arguments("/usr/sbin/criu", image.path, work, "/tmp/empty")
    started = time.monotonic()
    done = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, pathlib.Path(work, "restore.log").read_text()[-2000:]
    for process in manifest.processes:
        with suppress(ProcessLookupError):  # the first to die may take others along
            os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{item.pid}") for item in manifest.processes):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    held.end(image.model, [*made, *in_shm()])
    return seconds


def scenarios() -> dict[str, Callable[[Lab], Awaitable[None]]]:
    """Every coroutine of one argument ``lab``; those called child_… are parts of others."""
    return {
        name: value
        for module in (sys.modules[__name__], criu_faults, criu_swaps)
        for name, value in vars(module).items()
        if asyncio.iscoroutinefunction(value)
        and value.__module__ == module.__name__
        and value.__code__.co_varnames[: value.__code__.co_argcount] == ("lab",)
    }


async def main(name: str, keep: bool) -> None:
    if not keep:
        shutil.rmtree(IMAGES, ignore_errors=True)
        for left in in_shm():
            os.unlink(f"{SHM}/{left}")
    lab = Lab()
    try:
        await scenarios()[name](lab)
    finally:
        if not keep:
            await lab.end()


if __name__ == "__main__":
    if sys.argv[1] == "list":
        print("\n".join(name for name in scenarios() if not name.startswith("child_")))
    else:
        asyncio.run(main(sys.argv[1], "--keep" in sys.argv))

"""What the CRIU driver promises, one scenario a function; run in a guest by test_criu.py.

    python3 tests/system/criu_scenarios.py SCENARIO

Real systemd, real CRIU, the stand-in engine. A scenario ends with status 0 or with a traceback.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

PROJECT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))
sys.dont_write_bytecode = True

from llmux.drivers import criu_cli  # noqa: E402 (the path first)
from llmux.drivers.criu import Criu  # noqa: E402
from llmux.drivers.freezer import CgroupFreezer  # noqa: E402
from llmux.drivers.images import ImageStore  # noqa: E402
from llmux.drivers.systemd import SystemdUnits  # noqa: E402
from llmux.errors import CheckpointFailed  # noqa: E402
from llmux.ports import (  # noqa: E402
    DumpPhase,
    DumpSpec,
    Image,
    LaunchSpec,
    NoImage,
    UnitHandle,
)

IDENTITY = {"model_path": "/models/tiny", "boot_id": "1"}
IMAGES = "/var/lib/llmux/checkpoints"
SHM = "/dev/shm"
MIB = 1024 * 1024
THREADS = min(
    32, (os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count() or 1) + 4
)  # asyncio.to_thread's


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def runtime_dir(model: str) -> str:
    return f"/run/llmux/{model}"


def launch_spec(model: str, *flags: str, weights_mib: int = 64) -> LaunchSpec:
    logs = f"/var/log/llmux/{model}"
    os.makedirs(logs, exist_ok=True)
    return LaunchSpec(
        model=model,
        argv=(
            sys.executable,
            str(PROJECT / "tests/standin/standin.py"),
            "serve",
            f"/models/{model}",
            "--served-model-name",
            model,
            "--uds",
            f"{runtime_dir(model)}/engine.sock",
            f"--standin-host-weights-mib={weights_mib}",
            *flags,
        ),
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
        user=None,
        stdout=f"{logs}/stdout.log",
        stderr=f"{logs}/stderr.log",
        runtime_dir=runtime_dir(model),
    )


def ask_once(model: str) -> str:
    connection = UnixConnection(f"{runtime_dir(model)}/engine.sock")
    try:
        body = {"model": model, "prompt": "one two three", "max_tokens": 16, "temperature": 0}
        headers = {"content-type": "application/json", "connection": "close"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return str(json.loads(text)["choices"][0]["text"])
    finally:
        connection.close()


class Lab:
    """The drivers, wired as the supervisor wires them."""

    def __init__(self, images: str = IMAGES, **store: int) -> None:
        self.units = SystemdUnits()
        self.store = ImageStore(images, **store)  # type: ignore[arg-type]  # max_bytes and such
        self.criu = Criu(self.units, self.store, images)
        self.images = images

    async def start(self, model: str, *flags: str, weights_mib: int = 64) -> UnitHandle:
        with suppress(FileNotFoundError):  # vLLM takes a socket left behind for one in use
            os.unlink(f"{runtime_dir(model)}/engine.sock")
        handle = await self.units.start(launch_spec(model, *flags, weights_mib=weights_mib), 20)
        await self.ready(model)
        return handle

    async def ready(self, model: str) -> str:
        end = time.monotonic() + 20
        while True:
            try:
                return await self.ask(model)
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < end, f"{model} does not answer"
                await asyncio.sleep(0.01)  # no event tells a client that a socket listens

    async def ask(self, model: str) -> str:
        return await asyncio.to_thread(ask_once, model)

    async def dump(self, handle: UnitHandle, **fields: object) -> Image:
        spec = DumpSpec(launch_spec(handle.model), IDENTITY, **fields)  # type: ignore[arg-type]
        return await self.criu.dump(handle, spec, 60)

    async def restore(self, model: str, flags: tuple[str, ...] = ()) -> UnitHandle:
        image = await self.criu.find(model, IDENTITY)
        assert isinstance(image, Image), image
        return await self.criu.restore(image, launch_spec(model, *flags), 30)

    async def kill(self, handle: UnitHandle) -> None:
        names = await self.criu.shm_names(handle)
        await self.units.kill(handle, 10)
        await self.criu.remove_shm(names)

    async def end(self) -> None:
        for handle in await self.units.observe():
            await self.kill(handle)
        await self.units.close()


def in_shm() -> list[str]:
    return sorted(os.listdir(SHM))


async def refused(work: Awaitable[object]) -> CheckpointFailed:
    try:
        await work
    except CheckpointFailed as error:
        print("refused:", error)
        return error
    raise AssertionError("it was not refused")


def home(model: str) -> list[str]:
    return sorted(os.listdir(f"{IMAGES}/{model}"))


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
    spec = launch_spec("t")
    spec = LaunchSpec("t", (sys.executable, "-c", program), spec.env, None, spec.stdout,
                      spec.stderr, spec.runtime_dir)  # fmt: skip

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("/run/llmux/t/u")
            connection.sendall(b"abc")
            return connection.recv(9)

    with suppress(FileNotFoundError):
        os.unlink("/run/llmux/t/u")
    handle = await lab.units.start(spec, 10)
    end = time.monotonic() + 10
    while True:
        try:
            assert await asyncio.to_thread(ask) == b"ABC"
            break
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
    for _ in range(3):
        image = await lab.criu.dump(handle, DumpSpec(spec, IDENTITY), 30)
        handle = await lab.criu.restore(image, spec, 30)
        assert await asyncio.to_thread(ask) == b"ABC"


# ---- what stands in the way of a dump -----------------------------------------------------------


async def a_tree_that_cannot_be_dumped_is_refused_by_name(lab: Lab) -> None:
    handle = await lab.start("m")
    children = await lab.units.pids(handle)
    os.kill(children[-1], signal.SIGSTOP)
    error = await refused(lab.criu.precheck(handle))
    assert f"process {children[-1]} " in error.message
    assert "is stopped" in error.message
    assert error.fields["tree"] == "running"
    os.kill(children[-1], signal.SIGCONT)
    await lab.ask("m")


async def a_connection_from_outside_is_refused_by_name(lab: Lab) -> None:
    spec = launch_spec("t")
    program = (
        "import socket, time\n"
        "s = socket.create_server(('127.0.0.1', 8124))\n"
        "c, _ = s.accept()\n"
        "time.sleep(1e6)\n"
    )
    spec = LaunchSpec("t", (sys.executable, "-c", program), spec.env, None, spec.stdout,
                      spec.stderr, spec.runtime_dir)  # fmt: skip
    handle = await lab.units.start(spec, 10)
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
        assert error.fields["tree"] == "running", error.fields
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


async def a_foreign_link_in_the_way_fails_the_dump_and_stays(lab: Lab) -> None:
    foreign = [f"link_remap.{number}" for number in range(200)]
    for name in foreign:
        pathlib.Path(SHM, name).write_text("mine")
    handle = await lab.start("m")
    error = await refused(lab.dump(handle))
    assert error.fields["tree"] == "running"
    assert {name for name in in_shm() if name.startswith("link_remap")} == set(foreign)
    await lab.ask("m")


async def criu_killed_in_a_dump_condemns_the_tree_only(lab: Lab) -> None:
    handle = await lab.start("m", weights_mib=256)
    stop = threading.Event()
    killer = threading.Thread(target=kill_criu, args=("dump", pages_exist, stop))
    killer.start()
    error = await refused(lab.dump(handle))
    stop.set()
    killer.join()
    assert error.fields["tree"] == "broken", error.fields
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
    assert error.fields["tree"] == "broken", error.fields
    await lab.kill(handle)
    assert in_shm() == []


# ---- what is wrong with an image ----------------------------------------------------------------


async def a_damaged_image_is_caught_and_leaves_nothing(lab: Lab) -> None:
    handle = await lab.start("m")
    image = await lab.dump(handle)
    pages = max(pathlib.Path(image.path).glob("pages-*.img"), key=lambda path: path.stat().st_size)

    async def check_restore(words: str) -> None:
        error = await refused(lab.criu.restore(image, launch_spec("m"), 30))
        assert error.fields["blame"] == "image", error.fields
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
        assert error.fields["blame"] == "image"

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
    await check_found("is not part of it")
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
        assert error.fields["blame"] == "host"
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
        assert error.fields["blame"] == "host"
        assert in_shm() == [name]
    # Now nobody uses it: what an earlier life of the engine left behind.
    await lab.restore("m")
    await lab.ask("m")


async def criu_killed_in_a_restore_leaves_nothing(lab: Lab) -> None:
    await lab.dump(await lab.start("m", weights_mib=256))
    stop = threading.Event()
    killer = threading.Thread(target=kill_criu, args=("restore", has_children, stop))
    killer.start()
    error = await refused(lab.restore("m"))
    stop.set()
    killer.join()
    assert error.fields["blame"] == "host"
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
        await lab.criu.remove_shm(found[0].shm)
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
        await again.criu.remove_shm(found[0].shm)
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


# ---- measuring ----------------------------------------------------------------------------------


async def measure_against_bare_criu(lab: Lab) -> None:
    """Printed for the record; the bound is 1.5 times the bare tool's restore."""
    handle = await lab.start("m", weights_mib=512)
    started = time.monotonic()
    image = await lab.dump(handle)
    dump_seconds = time.monotonic() - started
    ours, bare = [], []
    for _ in range(7):
        started = time.monotonic()
        handle = await lab.restore("m")
        ours.append(time.monotonic() - started)
        await lab.kill(handle)
    for _ in range(7):
        bare.append(await bare_restore(lab, image))
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
    from llmux.drivers import criu_shm

    manifest = lab.store.load(image.path)
    work = "/tmp/bare"
    shutil.rmtree(work, ignore_errors=True)
    os.mkdir(work)
    os.makedirs("/tmp/empty", exist_ok=True)
    criu_shm.put_back(manifest.shm, image.path)
    arguments = criu_cli.restore_arguments("/usr/sbin/criu", image.path, work, "/tmp/empty")
    started = time.monotonic()
    done = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, pathlib.Path(work, "restore.log").read_text()[-2000:]
    for process in manifest.processes:
        os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{item.pid}") for item in manifest.processes):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    for name in in_shm():
        os.unlink(f"{SHM}/{name}")
    return seconds


# ---- tools --------------------------------------------------------------------------------------


def flip(path: pathlib.Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@contextmanager
def tmpfs(path: str, options: str) -> Iterator[None]:
    os.makedirs(path, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0755,{options}", "x", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def process_with_pid(pid: int) -> Iterator[None]:
    """A process of that pid: the kernel gives the one after ns_last_pid, if nobody was quicker."""
    for _ in range(200):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        if child == pid:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        raise AssertionError(f"pid {pid} could not be had")
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(pid + 1000))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def find_criu(verb: str) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
            if arguments[0].endswith(b"criu") and arguments[1:2] == [verb.encode()]:
                found.append(int(name))
    return found


def temporary() -> list[pathlib.Path]:
    return list(pathlib.Path(IMAGES).glob("*/.dump-*"))


def note_exists() -> bool:
    return any((path / "dumping.json").exists() for path in temporary())


def pages_exist() -> bool:
    """The largest pages file is being written: threads are in CRIU's code, links are made."""
    return any(
        file.stat().st_size > MIB for path in temporary() for file in path.glob("pages-*.img")
    )


def restoring_exists() -> bool:
    return os.path.exists(f"{IMAGES}/m/restoring.json")


def has_children() -> bool:
    try:
        with open("/sys/fs/cgroup/llmux.slice/llmux-m.scope/engine/cgroup.procs") as file:
            return len(file.read().split()) > 2
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.ENODEV)
        return False


def tree_has_begun() -> bool:
    return bool(find_criu("restore")) and has_children()


def kill_criu(verb: str, moment: Callable[[], bool], stop: threading.Event) -> None:
    """Busy: the moment lasts for milliseconds."""
    while not stop.is_set():
        if moment() and (pids := find_criu(verb)):
            with suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
            return


async def end_of_child(scenario: str, moment: Callable[[], bool]) -> None:
    """Run a scenario in a supervisor of its own and kill that at a moment."""
    child = subprocess.Popen([sys.executable, __file__, scenario, "--keep"])

    def wait() -> bool:
        while child.poll() is None:
            if moment():
                child.kill()
                child.wait()
                return True
        return False

    assert await asyncio.to_thread(wait), "it ended before it could be killed"


def scenarios() -> list[str]:
    own = sys.modules[__name__]
    return [
        name
        for name, value in vars(own).items()
        if asyncio.iscoroutinefunction(value)
        and value.__module__ == own.__name__
        and value.__code__.co_varnames[: value.__code__.co_argcount] == ("lab",)
        and not name.startswith("child_")
    ]


async def main(name: str, keep: bool) -> None:
    if not keep:
        shutil.rmtree(IMAGES, ignore_errors=True)
        for left in in_shm():
            os.unlink(f"{SHM}/{left}")
    lab = Lab()
    try:
        await globals()[name](lab)
    finally:
        if not keep:
            await lab.end()


if __name__ == "__main__":
    if sys.argv[1] == "list":
        print("\n".join(scenarios()))
    else:
        asyncio.run(main(sys.argv[1], "--keep" in sys.argv))

"""What the CRIU scenarios share: the drivers wired as the supervisor wires them, and tools to
break things. Runs in a guest, as root, with the distribution's Python."""

# One scenario at a time, in a program of its own: blocking harms none.
# ruff: noqa: ASYNC220

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

PROJECT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(PROJECT))
sys.dont_write_bytecode = True

from llmux.drivers.criu.driver import Criu  # noqa: E402
from llmux.drivers.images.store import ImageStore  # noqa: E402
from llmux.drivers.systemd.units import SystemdUnits  # noqa: E402
from llmux.errors import CheckpointFailed  # noqa: E402
from llmux.image_ports import DumpSpec, Image  # noqa: E402
from llmux.ports import LaunchSpec, UnitHandle  # noqa: E402

IDENTITY = {"model_path": "/models/tiny", "boot_id": "1"}
IMAGES = "/var/lib/llmux/checkpoints"
SHM = "/dev/shm"
MIB = 1024 * 1024
# asyncio.to_thread's; what the pool counts is the affinity since 3.13, all processors before
PROCESSORS = len(os.sched_getaffinity(0)) if sys.version_info >= (3, 13) else os.cpu_count() or 1
THREADS = min(32, PROCESSORS + 4)


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
        end = time.monotonic() + 120
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
        handle = await self.criu.restore(image, launch_spec(model, *flags), 30)
        await self.criu.confirm_restore(model)
        return handle

    async def kill(self, handle: UnitHandle) -> None:
        names = await self.criu.shm_names(handle)
        await self.units.kill(handle, 10)
        await self.criu.remove_shm(handle.model, names)

    async def end(self) -> None:
        for handle in await self.units.observe():
            await self.kill(handle)
        await self.units.close()


def is_held(name: str) -> bool:
    """For an image: such a file says so."""
    with open(f"{SHM}/{name}", "rb") as file:
        return file.read(13) == b"held by llmux"


def in_shm() -> list[str]:
    """What engines and others have there."""
    return sorted(name for name in os.listdir(SHM) if not is_held(name))


async def refused(work: Awaitable[object]) -> CheckpointFailed:
    try:
        await work
    except CheckpointFailed as error:
        print("refused:", error)
        return error
    raise AssertionError("it was not refused")


def home(model: str) -> list[str]:
    return sorted(os.listdir(f"{IMAGES}/{model}"))


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
    """A process of that pid: the kernel gives the one after ns_last_pid, if none was quicker."""
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
    for path in temporary():
        for file in path.glob("pages-*.img"):
            with suppress(FileNotFoundError):  # the dump has just ended
                if file.stat().st_size > MIB:
                    return True
    return False


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
    program = pathlib.Path(__file__).with_name("criu_scenarios.py")
    child = subprocess.Popen([sys.executable, program, scenario, "--keep"])

    def wait() -> bool:
        while child.poll() is None:
            if moment():
                child.kill()
                child.wait()
                return True
        return False

    assert await asyncio.to_thread(wait), "it ended before it could be killed"

"""What the proof needs of the host: GPU memory seen, a cgroup to freeze in, CRIU.

Each thing that is missing says so by raising ``NotHere`` with the reason that the table prints.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

MIB = 1 << 20


class NotHere(Exception):  # not an error: a row that is not measured
    """This host cannot show it, and why."""


class Nvml:
    """Used memory of one GPU, by NVML in this process (never in the engine's)."""

    name = "NVML"

    class _Memory(ctypes.Structure):
        _fields_ = (
            ("total", ctypes.c_ulonglong),
            ("free", ctypes.c_ulonglong),
            ("used", ctypes.c_ulonglong),
        )

    def __init__(self, gpu: int) -> None:
        try:
            self._dll = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NotHere(f"no NVML: {error}") from error
        self._handle = ctypes.c_void_p()
        self._check("nvmlInit_v2", self._dll.nvmlInit_v2())
        get = self._dll.nvmlDeviceGetHandleByIndex_v2
        self._check("nvmlDeviceGetHandleByIndex", get(gpu, ctypes.byref(self._handle)))

    @staticmethod
    def _check(call: str, code: int) -> None:
        if code != 0:
            raise NotHere(f"{call} failed with {code}")

    def used_mib(self) -> int:
        memory = self._Memory()
        get = self._dll.nvmlDeviceGetMemoryInfo
        self._check("nvmlDeviceGetMemoryInfo", get(self._handle, ctypes.byref(memory)))
        return int(memory.used // MIB)

    def describe(self) -> str:
        name = ctypes.create_string_buffer(96)
        driver = ctypes.create_string_buffer(96)
        self._dll.nvmlDeviceGetName(self._handle, name, 96)
        self._dll.nvmlSystemGetDriverVersion(driver, 96)
        return f"{name.value.decode()}, driver {driver.value.decode()}"


class Smi:
    """The same by nvidia-smi, where NVML cannot be loaded."""

    name = "nvidia-smi"

    def __init__(self, gpu: int) -> None:
        self._gpu = gpu
        self.used_mib()

    def _query(self, what: str) -> str:
        argv = ["nvidia-smi", "-i", str(self._gpu), f"--query-gpu={what}"]
        try:
            done = subprocess.run(
                [*argv, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotHere(f"no nvidia-smi: {error}") from error
        if done.returncode != 0:
            raise NotHere(f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}")
        return done.stdout.strip()

    def used_mib(self) -> int:
        return int(self._query("memory.used"))

    def describe(self) -> str:
        name, _, driver = self._query("name,driver_version").partition(",")
        return f"{name.strip()}, driver {driver.strip()}"


class FakeMemory:
    """The ledger of pretended engines; what is checkpointed holds nothing."""

    name = "ledger (pretended)"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def used_mib(self) -> int:
        total = 0
        for path in (self._directory / "ledger").glob("*"):
            if path.suffix or not Path(f"/proc/{path.name}").exists():
                continue
            if (self._directory / "procs" / path.name).read_text().strip() != "2":
                total += int(path.read_text())
        return total // MIB

    def describe(self) -> str:
        return "no GPU: pretended"


def find_memory(gpu: int) -> Nvml | Smi:
    try:
        return Nvml(gpu)
    except NotHere as first:
        try:
            return Smi(gpu)
        except NotHere as second:
            raise NotHere(f"{first}; {second}") from second


class Freezer:
    """A cgroup v2 below our own, or NotHere. Holds the engine while a freeze row runs."""

    def __init__(self) -> None:
        mount = next(
            (
                line.split()[4]
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if " - cgroup2 " in line
            ),
            None,
        )
        if mount is None:
            raise NotHere("no cgroup v2 is mounted")
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "/")
        self._home = Path(mount) / own.lstrip("/")
        self._group = self._home / f"gpu-proof-{os.getpid()}"
        try:
            self._group.mkdir()
        except OSError as error:
            raise NotHere(f"cannot make a cgroup in {self._home}: {error.strerror}") from error
        if not (self._group / "cgroup.freeze").exists():
            self._group.rmdir()
            raise NotHere(f"{self._home} has no freezer")

    def take(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                (self._group / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                continue
            except OSError as error:
                raise NotHere(f"cannot move {pid} into {self._group}: {error.strerror}") from error

    def set(self, frozen: bool) -> None:
        """Frozen or thawed, and seen so in cgroup.events."""
        wanted = f"frozen {int(frozen)}"
        end = time.monotonic() + 30
        with (self._group / "cgroup.events").open() as events:
            changes = select.poll()
            changes.register(events, select.POLLPRI)
            (self._group / "cgroup.freeze").write_text(str(int(frozen)))
            while wanted not in events.read():
                if time.monotonic() > end:
                    raise NotHere(f"{self._group} did not become {wanted} within 30 s")
                changes.poll(100)
                events.seek(0)

    def close(self) -> None:
        try:
            for pid in (self._group / "cgroup.procs").read_text().split():
                (self._home / "cgroup.procs").write_text(pid)
            self._group.rmdir()
        except OSError:
            return  # somebody is still in it: it goes when they do


class Criu:
    """CRIU by its command line, with an empty plugin directory: the CUDA part is done outside."""

    FLAGS = (
        "--no-default-config",
        "-v4",
        "--tcp-established",
        "--ext-unix-sk",
        "--file-locks",
        "--link-remap",
        "--ghost-limit",
        "512M",
        "--manage-cgroups=ignore",
    )

    def __init__(self, program: str, images: Path) -> None:
        found = shutil.which(program)
        if found is None:
            raise NotHere(f"{program} is not installed")
        if os.geteuid() != 0:
            raise NotHere("CRIU needs root")
        self._program = found
        self._images = images
        self._plugins = images / "no-plugins"
        done = self._run("check", "--no-default-config")
        if done.returncode != 0:
            raise NotHere(f"criu check: {done.stdout.strip()[-200:]}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            umask=0o077,  # CRIU writes its images 0644
        )

    def _act(self, verb: str, directory: Path, *arguments: str) -> None:
        log = directory / f"{verb}.log"
        places = ["-D", str(directory), "-L", str(self._plugins), "--log-file", str(log)]
        done = self._run(verb, *self.FLAGS, *places, *arguments)
        if done.returncode != 0:
            text = log.read_text(errors="replace") if log.exists() else done.stdout
            errors = [line for line in text.splitlines() if "Error" in line]
            raise RuntimeError(f"criu {verb}: {' | '.join(errors[-3:]) or text[-300:]}")

    def dump(self, pid: int, name: str) -> tuple[Path, int]:
        """The image's directory and its bytes; the tree is gone."""
        directory = self._images / name
        shutil.rmtree(directory, ignore_errors=True)
        for path in (directory, self._plugins):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._act("dump", directory, "--tree", str(pid))
        return directory, sum(file.stat().st_size for file in directory.glob("*.img"))

    def restore(self, directory: Path) -> int:
        pidfile = directory / "pid"
        pidfile.unlink(missing_ok=True)
        self._act("restore", directory, "--restore-detached", "--pidfile", str(pidfile))
        return int(pidfile.read_text())


def nvidia_leftovers(pids: list[int]) -> list[str]:
    """Descriptors and mappings of /dev/nvidia* that CRIU would refuse, as "PID what"."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("/dev/nvidia"):
                found.add(f"{pid} {target}")
        try:
            if "/dev/nvidia" in Path(f"/proc/{pid}/maps").read_text():
                found.add(f"{pid} maps /dev/nvidia*")
        except OSError:
            continue
    return sorted(found)

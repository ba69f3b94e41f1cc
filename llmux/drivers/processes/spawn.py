"""Starting the launcher: the supervisor's half of the gate. Shared by both unit managers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from contextlib import suppress

from llmux.drivers.processes import launcher
from llmux.drivers.processes.process import Process
from llmux.errors import DriverTimeout, UnitFailed
from llmux.names import escape, unescape
from llmux.ports import LaunchSpec

# Imported, not run as a script: only imports use the compiled file, and compiling costs 5 ms. Its
# directory goes last on the path, so that none of our modules can stand in for one of the library.
_RUN = "import sys; sys.path.append(sys.argv[1]); import launcher; launcher.main()"
READY_DELAY = 1.0  # seconds after a start until the next launcher is made ready
_LOWEST_FD = 10  # above the launcher's fixed descriptors, so that dup2 never overwrites a source


def unit_name(model: str, suffix: str = ".scope") -> str:
    """``llmux-<model>.scope``, escaped where systemd does not take the name as it is."""
    return f"llmux-{escape(model)}{suffix}"


def model_of(unit: str) -> str:
    """The inverse of ``unit_name``."""
    return unescape(unit.removeprefix("llmux-").rpartition(".")[0])


class Launch:
    """One launcher between fork and exec. ``process`` is the launcher, later the engine itself
    (systemd) or its guardian (direct). ``close`` before ``open`` has returned makes it exit."""

    def __init__(self, process: Process, gate: int, status: int, memfd: int) -> None:
        self.process = process
        self.engine_pid = process.pid
        self._gate = gate
        self._status = status
        self._memfd = memfd
        self._heard = b""
        self.ready = asyncio.Event()  # it has reached the gate, or ended before
        self._eof = asyncio.Event()
        os.set_blocking(status, False)
        asyncio.get_running_loop().add_reader(status, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._status, 4096)
        except BlockingIOError:
            return
        self._heard += data
        self.ready.set()
        if not data:
            self._close_status()
            self._eof.set()

    def _close_status(self) -> None:
        if self._status >= 0:
            asyncio.get_running_loop().remove_reader(self._status)
            os.close(self._status)
            self._status = -1

    async def open(
        self, spec: LaunchSpec, timeout: float, *, cgroup_root: str | None, guardian: bool
    ) -> None:
        """Open the gate; returns when execve has succeeded. Raises UnitFailed with the cause."""
        target = f'model "{spec.model}"'
        os.write(self._memfd, _encode(spec, cgroup_root=cgroup_root, guardian=guardian))
        with suppress(BrokenPipeError):
            os.write(self._gate, b"G")
        try:
            async with asyncio.timeout(timeout):
                await self._eof.wait()
        except TimeoutError:
            raise DriverTimeout(
                "start", target, f"its launcher did not exec within {timeout:g}s"
            ) from None
        lines = self._heard.decode(errors="replace").splitlines()
        for line in lines:
            if line.startswith("E"):
                number, _, text = line[1:].partition(" ")
                cause = f"{text} ({os.strerror(int(number))})" if int(number or 0) else text
                # The text usually ends in strerror already; say it once.
                if number and os.strerror(int(number)) in text:
                    cause = text
                raise UnitFailed("start", target, cause, errno=int(number or 0))
            if line.startswith("P"):
                self.engine_pid = int(line[1:])
        if "X" not in lines:
            await self.process.wait(1.0)
            raise UnitFailed(
                "start",
                target,
                f"its launcher ended before it could exec {spec.argv[0]}:"
                f" {self.process.ended or 'no reason given'}",
            )

    def take_gate(self) -> int:
        """The gate's write end, which the caller keeps open as a lifeline."""
        gate, self._gate = self._gate, -1
        return gate

    def close(self) -> None:
        """Give up the descriptors. A launcher that still waits at the gate exits."""
        self._close_status()
        for fd in (self._gate, self._memfd):
            if fd >= 0:
                os.close(fd)
        self._gate = self._memfd = -1


def _encode(spec: LaunchSpec, *, cgroup_root: str | None, guardian: bool) -> bytes:
    options = {"stdout": spec.stdout, "stderr": spec.stderr, "cwd": spec.cwd}
    options["deny_io_uring"] = "1" if spec.deny_io_uring else "0"
    if cgroup_root is not None:
        options["cgroup_root"] = cgroup_root
    if guardian:
        options["guardian"] = "1"
    if (user := spec.user) is not None:
        groups = ",".join(map(str, user.groups))
        options |= {"user": user.name, "uid": str(user.uid), "gid": str(user.gid), "groups": groups}
        if user.temporary is not None:
            options["temporary"] = user.temporary
    try:
        return launcher.encode_spec(spec.argv, spec.env, options)
    except ValueError as error:
        raise UnitFailed("start", f'model "{spec.model}"', str(error)) from error


def _high(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
    finally:
        os.close(fd)


def spawn_launcher() -> Launch:
    """Fork a launcher; it stops at the gate and learns only then what it is to become, so that one
    can be held ready. Raises UnitFailed. Must run in the event loop."""
    kept: list[int] = []
    lent: list[int] = []
    try:
        status_read, status_write = os.pipe()
        kept.append(status_read)
        lent.append(_high(status_write))
        gate_read, gate_write = os.pipe()
        kept.append(gate_write)
        lent.append(_high(gate_read))
        memfd = os.memfd_create("llmux-launch")
        kept.append(memfd)
        lent.append(_high(os.dup(memfd)))
        wanted = (launcher.STATUS_FD, launcher.GATE_FD, launcher.SPEC_FD)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _RUN, os.path.dirname(launcher.__file__)],
            {"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, have, want) for have, want in zip(lent, wanted, strict=True)
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=[*(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})],
        )
    except OSError as error:
        for fd in kept:
            os.close(fd)
        raise UnitFailed(
            "start", "a launcher", f"cannot run {sys.executable}: {error.strerror}"
        ) from error
    finally:
        for fd in lent:
            os.close(fd)
    # Not reaped yet even if it has ended: only Process reaps, so the pid is still its.
    process = Process.open(pid)
    assert process is not None
    return Launch(process, gate=kept[1], status=kept[0], memfd=kept[2])


class Launchers:
    """Hands launchers out and holds one ready at its gate, which takes the start of a Python
    interpreter, 15 to 40 ms, out of every start and restore."""

    def __init__(self) -> None:
        self._ready: Launch | None = None
        self._timer: asyncio.TimerHandle | None = None

    def take(self) -> Launch:
        """The one that is ready, or a new one. Raises UnitFailed."""
        ready, self._ready = self._ready, None
        if self._timer is None:
            # Not at once: the engine that starts now can use the CPU better.
            self._timer = asyncio.get_running_loop().call_later(READY_DELAY, self._make_ready)
        if ready is not None:
            if ready.process.ended is None:
                return ready
            ready.close()
        return spawn_launcher()

    def prepare(self) -> Launch:
        """The one that is held ready, made if there is none. Raises UnitFailed."""
        if self._ready is None:
            self._ready = spawn_launcher()
        return self._ready

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ready is not None:
            self._ready.close()
            await self._ready.process.wait(1.0)
            self._ready.process.close()
            self._ready = None

    def _make_ready(self) -> None:
        self._timer = None
        with suppress(UnitFailed):
            self.prepare()

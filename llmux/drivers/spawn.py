"""Starting the launcher: the supervisor's half of the gate. Shared by both unit managers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pwd
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from grp import getgrnam

from llmux.drivers import launcher
from llmux.drivers.process import Process
from llmux.errors import DriverTimeout, UnitFailed
from llmux.ports import LaunchSpec

GATEWAY_GROUP = "llmux"  # the front end's group: it must reach the sockets in the runtime directory
# Imported, not run as a script: only imports use the compiled file, and compiling costs 5 ms. Its
# directory goes last on the path, so that none of our modules can stand in for one of the library.
_RUN = "import sys; sys.path.append(sys.argv[1]); import launcher; launcher.main()"
SPARE_DELAY = 1.0  # seconds after a start until the next launcher is made ready
_LOWEST_FD = 10  # above the launcher's fixed descriptors, so that dup2 never overwrites a source


@dataclass(frozen=True, slots=True)
class _User:
    name: str
    uid: int
    gid: int


def unit_name(model: str, suffix: str = ".scope") -> str:
    """``llmux-<model>.scope``; what systemd does not take in a name becomes ``\\xNN``, as
    systemd-escape does, but a dash stays a dash."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.-"
    escaped = "".join(
        chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(model)
    )
    return f"llmux-{escaped}{suffix}"


def model_of(unit: str) -> str:
    """The inverse of ``unit_name``."""
    body = unit.removeprefix("llmux-").rpartition(".")[0]
    first, *rest = body.split("\\x")
    data = first.encode()
    for part in rest:
        data += bytes([int(part[:2], 16)]) + part[2:].encode()
    return os.fsdecode(data)


def _find_user(spec: LaunchSpec) -> _User | None:
    if spec.user is None:
        return None
    try:
        entry = pwd.getpwnam(spec.user)
    except KeyError:
        raise UnitFailed(
            "start",
            f'model "{spec.model}"',
            f'there is no user "{spec.user}" on this machine',
            hint="create it with `systemd-sysusers`, or set engine_user to one that exists",
        ) from None
    return _User(spec.user, entry.pw_uid, entry.pw_gid)


def prepare_runtime_dir(spec: LaunchSpec) -> None:
    """Make ``spec.runtime_dir``: 02770, the engine user's, group llmux where there is one.

    Without root it is 0700 and ours. Raises UnitFailed.
    """
    user = _find_user(spec)
    target = f'model "{spec.model}"'
    try:
        os.makedirs(spec.runtime_dir, mode=0o755, exist_ok=True)
        # O_NOFOLLOW: the directory may belong to the engine's user, who must not redirect our
        # chown.
        fd = os.open(spec.runtime_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.geteuid() != 0:
                os.fchmod(fd, 0o700)
                return
            gid = user.gid if user else os.getegid()
            with suppress(KeyError):
                gid = getgrnam(GATEWAY_GROUP).gr_gid
            os.fchown(fd, user.uid if user else os.geteuid(), gid)
            os.fchmod(fd, 0o2770)
        finally:
            os.close(fd)
    except OSError as error:
        raise UnitFailed(
            "start", target, f"cannot make its directory {spec.runtime_dir}: {error.strerror}"
        ) from error


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
        """The gate's write end, for whoever wants to keep it open as a lifeline."""
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
    if (user := _find_user(spec)) is not None:
        options |= {"user": user.name, "uid": str(user.uid), "gid": str(user.gid)}
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
        self._spare: Launch | None = None
        self._timer: asyncio.TimerHandle | None = None

    def take(self) -> Launch:
        """The one that is ready, or a new one. Raises UnitFailed."""
        spare, self._spare = self._spare, None
        if self._timer is None:
            # Not at once: the engine that starts now can use the CPU better.
            self._timer = asyncio.get_running_loop().call_later(SPARE_DELAY, self._make_ready)
        if spare is not None:
            if spare.process.ended is None:
                return spare
            spare.close()
        return spawn_launcher()

    def prepare(self) -> Launch:
        """The one that is held ready, made if there is none. Raises UnitFailed."""
        if self._spare is None:
            self._spare = spawn_launcher()
        return self._spare

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._spare is not None:
            self._spare.close()
            await self._spare.process.wait(1.0)
            self._spare.process.close()
            self._spare = None

    def _make_ready(self) -> None:
        self._timer = None
        with suppress(UnitFailed):
            self.prepare()

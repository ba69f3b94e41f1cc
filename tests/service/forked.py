"""Programs of llmux without the half second of their imports: children of a process that has them.

``start`` takes what ``subprocess.Popen`` does for ``python -m llmux …`` or ``python -c … …`` and
gives a process of its own: these arguments, environment and descriptors and no others, signals as a
new interpreter has them, a random state of its own. What it shares with others is what importing
left, and so the hash seed. It ends as an interpreter does, and the fork server is its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# What `llmux serve` and `llmux gateway` import until they serve, at the latest.
IMPORTED = (
    "uvloop", "llmux.cli.main", "llmux.daemon.process", "llmux.daemon.serve",
    "llmux.daemon.gateway", "llmux.daemon.gateway_worker", "encodings.utf_8_sig",
)  # fmt: skip
MOST_FDS = 16
_PARKED = 500  # descriptors that came with a request, until each has its number
_SERVE = "import sys; sys.path.append(sys.argv[1]); import forked; sys.path.pop(); forked.serve(%d)"


class Forked:
    """A program that runs; as far as the tests need it, what Popen is for a child."""

    def __init__(self, server: Server, pid: int, stderr: IO[bytes] | None) -> None:
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # another thread was told how it ended
                fd = os.pidfd_open(self.pid)
                try:
                    ended, _, _ = select.select([fd], [], [], timeout)
                finally:
                    os.close(fd)
                if not ended:
                    raise subprocess.TimeoutExpired("llmux", timeout or 0)
            self.returncode = self._server.collect(self)
        return self.returncode

    async def ended(self) -> int:
        """As ``wait``, for a test in a loop."""
        if self.returncode is None:
            over, loop = asyncio.Event(), asyncio.get_running_loop()
            fd = os.pidfd_open(self.pid)
            loop.add_reader(fd, over.set)
            try:
                await over.wait()
            finally:
                loop.remove_reader(fd)
                os.close(fd)
        return self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
    own_interpreter: bool = False,
) -> Forked:
    """``python *arguments`` in the project's folder. ``stderr`` may be ``subprocess.PIPE``;
    ``own_interpreter`` really does it, at the cost of all that is imported."""
    ask: dict[str, Any] = {
        "arguments": list(arguments), "env": dict(env), "session": start_new_session,
        "own": own_interpreter,
    }  # fmt: skip
    return Server.running().start(ask, stderr == subprocess.PIPE, pass_fds)


class Server:
    """The fork server of this process, and the connection to it."""

    _running: Server | None = None

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            code = _SERVE % theirs.fileno()
            command = [sys.executable, "-c", code, str(Path(__file__).parent)]
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._lock = threading.Lock()

    @classmethod
    def running(cls) -> Server:
        if cls._running is None:
            cls._running = cls()
        return cls._running

    @classmethod
    def end(cls) -> None:
        if cls._running is not None:
            cls._running._link.close()
            cls._running._process.wait()
            cls._running = None

    def start(self, ask: dict[str, Any], piped: bool, pass_fds: Sequence[int]) -> Forked:
        ours, theirs = os.pipe() if piped else (-1, 2)
        with open(os.devnull, "rb") as nothing, self._lock:
            given = {0: nothing.fileno(), 1: 1, 2: theirs, **{fd: fd for fd in pass_fds}}
            assert max(given) < _PARKED
            pid = self._exchange(ask | {"fds": list(given)}, list(given.values()))
        if piped:
            os.close(theirs)
        return Forked(self, pid, os.fdopen(ours, "rb") if piped else None)

    def collect(self, process: Forked) -> int:
        """How a process ended that has."""
        with self._lock:
            if process.returncode is None:
                status = self._exchange({"collect": process.pid}, [])
                process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode

    def _exchange(self, ask: dict[str, Any], fds: list[int]) -> int:
        socket.send_fds(self._link, [json.dumps(ask).encode()], fds)
        answer = self._link.recv(64)
        assert answer, "the fork server has ended"
        return int(answer)


# ---- in the fork server -------------------------------------------------------------------------


def serve(link_fd: int) -> None:
    """Fork what is asked for until the other end is closed. A child returns from here, too: it
    leaves nothing of the server on its stack when it ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child's first collection would copy what is shared
    children: set[int] = set()
    ask = _serve_until_forked(socket.socket(fileno=link_fd), children)
    if ask is not None:
        if ask["own"]:
            os.execv(sys.executable, [sys.executable, *ask["arguments"]])
        _run(ask["arguments"])
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _serve_until_forked(link: socket.socket, children: set[int]) -> dict[str, Any] | None:
    """In a child: what was asked for. In the server: None at the end."""
    with link:
        while True:
            data, fds, _, _ = socket.recv_fds(link, 1 << 20, MOST_FDS)
            if not data:
                return None
            ask: dict[str, Any] = json.loads(data)
            if (pid := ask.get("collect")) is not None:
                children.discard(pid)
                link.send(b"%d" % os.waitpid(pid, 0)[1])
                continue
            if (pid := os.fork()) == 0:
                children.clear()
                break
            children.add(pid)
            for fd in fds:
                os.close(fd)
            link.send(b"%d" % pid)
    _become(ask, fds)
    return ask


def _become(ask: dict[str, Any], fds: list[int]) -> None:
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PARKED) for fd in fds]
    os.closerange(3, _PARKED)
    for fd, number in zip(parked, ask["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    if ask["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(ask["env"])
    random.seed()


def _run(arguments: Sequence[str]) -> None:
    """As the interpreter runs ``-m module …`` and ``-c code …``."""
    how, what, *rest = arguments
    sys.path[0] = os.getcwd() if how == "-m" else ""
    if how == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(what, "<string>", "exec"), module.__dict__)  # what -c does

"""The guardian alone: whatever ends first, supervisor or engine, nothing of the engine is left."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llmux.drivers.processes.process import Process, descendants, start_ticks
from llmux.drivers.processes.spawn import spawn_launcher
from llmux.ports import LaunchSpec

SECONDS = 20.0

# Two daemons in sessions of their own, which ignore what they can; the engine ends as it is told.
ENGINE = """
for n in 1 2; do (setsid sh -c 'trap "" TERM HUP INT; echo $$ > "$0"; while :; do sleep 1000; done' "$1" &) & done
read how < "$2"
eval "$how"
"""  # noqa: E501


@pytest.mark.parametrize(
    ("end", "description"),
    [
        ("the supervisor is gone", "killed by SIGKILL"),
        ("a second byte", "killed by SIGKILL"),
        ("exit 3", "exit status 3"),
        ("kill -TERM $$", "killed by SIGTERM"),
        ("kill -KILL $$", "killed by SIGKILL"),
    ],
)
def test_its_end_is_the_engines_and_nothing_is_left(
    tmp_path: Path, end: str, description: str
) -> None:
    names, how = tmp_path / "names", tmp_path / "how"
    for fifo in (names, how):
        os.mkfifo(fifo)
    # Open until the end: a reader that opened it for each line lost what was written while it
    # closed, and waited for ever.
    reader, writer = (os.open(fifo, os.O_RDWR) for fifo in (names, how))

    def read_names() -> list[int]:
        read = b""
        while read.count(b"\n") < 2:
            ready, _, _ = select.select([reader], [], [], SECONDS)
            assert ready, f"of two names there is {read!r}"
            read += os.read(reader, 4096)
        return [int(line) for line in read.split()]

    async def body() -> None:
        launch = spawn_launcher()
        guardian = launch.process
        argv = ("/bin/sh", "-c", ENGINE, "sh", str(names), str(how))
        output = str(tmp_path / "output")
        spec = LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, output, output, "/")
        pids: list[int] = []
        try:
            await launch.open(spec, SECONDS, cgroup_root=None, guardian=True)
            daemons = await asyncio.to_thread(read_names)
            pids = descendants(guardian.pid)
            assert {launch.engine_pid, *daemons} <= set(pids)
            gate = launch.take_gate()
            if end == "a second byte":
                os.write(gate, b"x")
            elif end == "the supervisor is gone":
                os.close(gate)
                gate = -1
            else:
                os.write(writer, f"{end}\n".encode())
            assert await guardian.wait(SECONDS), "it waits for ever"
            assert guardian.ended == description
            assert [pid for pid in pids if start_ticks(pid) is not None] == []
            if gate >= 0:
                os.close(gate)
        finally:
            launch.close()
            for pid in [*pids, guardian.pid]:
                if guardian.ended is None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await guardian.wait(SECONDS)
            guardian.close()

    try:
        asyncio.run(body())
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def core_dumps() -> Iterator[None]:
    """Allowed, as far as they can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.mark.usefixtures("core_dumps")
@pytest.mark.parametrize(
    ("script", "ended"),
    [
        ("exit 3", "exit status 3"),
        ("(exit 4) & wait; exit 3", "exit status 3"),
        ("kill -SEGV $$", "killed by SIGSEGV"),  # and neither of them dumps core
    ],
)
def test_an_engine_that_leaves_nothing_ends_it_too(tmp_path: Path, script: str, ended: str) -> None:
    async def body() -> None:
        launch = spawn_launcher()
        output = str(tmp_path / "output")
        argv = ("/bin/sh", "-c", script)
        spec = LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, output, output, "/")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=True)
        assert await launch.process.wait(SECONDS)
        assert launch.process.ended == ended
        launch.close()

    asyncio.run(body())


def test_one_that_is_killed_takes_the_engine_along(tmp_path: Path) -> None:
    """The kernel does it; what the engine forked is another matter."""

    async def body() -> None:
        launch = spawn_launcher()
        output = str(tmp_path / "output")
        argv = ("/bin/sleep", "1000")
        spec = LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, output, output, "/")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=True)
        engine = Process.open(launch.engine_pid)
        assert engine is not None
        launch.process.signal(signal.SIGKILL)
        try:
            assert await engine.wait(SECONDS)
        finally:
            engine.signal(signal.SIGKILL)
            assert await launch.process.wait(SECONDS)
            launch.close()

    asyncio.run(body())


def test_no_signal_but_the_gate_decides(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    async def body() -> None:
        launch = spawn_launcher()
        output = str(tmp_path / "output")
        argv = ("/bin/sh", "-c", f"read x < {tmp_path}/go; exit 3")
        spec = LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, output, output, "/")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=True)
        guardian = launch.process
        async with asyncio.timeout(SECONDS):
            while not ignored(guardian.pid) >= {*signals}:  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0)
        for number in signals:
            guardian.signal(number)
        await asyncio.to_thread((tmp_path / "go").write_text, "\n")
        assert await guardian.wait(SECONDS)
        assert guardian.ended == "exit status 3"
        launch.close()

    asyncio.run(body())


def ignored(pid: int) -> set[int]:
    """The signals that a process ignores."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            bits = int(line.split()[1], 16)
            return {number for number in range(1, 65) if bits >> (number - 1) & 1}
    return set()

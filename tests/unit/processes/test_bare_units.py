"""Units for trials, without systemd and without a cgroup: a real process, and all that is told."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtime_harness import VirtualTime

from llmux.drivers.gpu import LedgerObserver
from llmux.drivers.processes.bare import BareUnits
from llmux.drivers.processes.cgroup import process_state
from llmux.drivers.processes.children import DirectUnits
from llmux.drivers.processes.launcher import PR_SET_CHILD_SUBREAPER
from llmux.drivers.processes.process import descendants, start_ticks
from llmux.errors import DriverTimeout, UnitFailed
from llmux.ports import GpuProcess, LaunchSpec, UnitHandle
from llmux.protocol import Address

SECONDS = 20.0


@pytest.fixture(autouse=True)
def no_sub_reaper() -> Iterator[None]:
    """What units make of this process for good."""
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def spec(directory: Path, *argv: str) -> LaunchSpec:
    output = str(directory / "output")
    return LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, output, output, str(directory))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  # of processes, which tell nobody
            await asyncio.sleep(0)


class Exits:
    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[UnitHandle, str]] = asyncio.Queue()

    def __call__(self, handle: UnitHandle, description: str) -> None:
        self.told.put_nowait((handle, description))

    async def next(self) -> tuple[UnitHandle, str]:
        async with asyncio.timeout(SECONDS):
            return await self.told.get()


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_a_unit_ends_as_a_whole_and_who_watches_is_told(tmp_path: Path, how: str) -> None:
    async def body() -> None:
        units = BareUnits(None)
        before = len(os.listdir("/proc/self/fd"))
        handle = await units.start(spec(tmp_path, "/bin/sleep", "1000"), SECONDS)
        assert len(os.listdir("/proc/self/fd")) == before + 1, "what holds the process"
        assert (handle.model, handle.cgroup) == ("m", None)
        assert start_ticks(handle.pid) == handle.start_ticks
        pids = await units.pids(handle)
        assert pids == [handle.pid]
        assert 0 < await units.memory_bytes(handle) < 1 << 32
        assert await units.cpu_seconds(handle) >= 0
        assert await units.stranger(Address(port=1), handle) is None
        exits = Exits()
        units.watch(handle, exits)
        if how == "kill":
            await units.kill(handle, SECONDS)
        else:
            assert await units.terminate(handle, SECONDS)
        assert await exits.next() == (handle, "killed by SIGKILL")
        assert await units.pids(handle) == []
        assert start_ticks(handle.pid) is None
        await units.kill(handle, SECONDS)
        late = Exits()
        units.watch(handle, late)
        assert await late.next() == (handle, "gone")
        assert await units.observe() == ()

    asyncio.run(body())


def test_orphans_that_came_as_zombies_are_reaped(tmp_path: Path) -> None:
    """Seen on a GPU: vLLM's resource tracker was a zombie of ours after the dump."""

    async def body() -> None:
        units = BareUnits(None)
        # The parent, stopped, reaps nobody: its child is a zombie when it becomes ours.
        handle = await units.start(spec(tmp_path, "/bin/sh", "-c", "sleep 1000 & wait"), SECONDS)
        await until(lambda: len(descendants(handle.pid)) == 1)
        (child,) = descendants(handle.pid)
        async with units.reaping(await units.pids(handle)):
            os.kill(handle.pid, signal.SIGSTOP)
            os.kill(child, signal.SIGKILL)
            await until(lambda: process_state(child) == "Z")
            os.kill(handle.pid, signal.SIGKILL)
            await until(lambda: start_ticks(child) is None)
        await units.kill(handle, SECONDS)

    asyncio.run(body())


def test_a_kill_leaves_no_zombie(tmp_path: Path) -> None:
    async def body() -> None:
        units = BareUnits(None)
        handle = await units.start(spec(tmp_path, "/bin/sh", "-c", "sleep 1000 & wait"), SECONDS)
        await until(lambda: len(descendants(handle.pid)) == 1)
        (child,) = descendants(handle.pid)
        os.kill(handle.pid, signal.SIGSTOP)  # it reaps nobody any more
        await units.kill(handle, SECONDS)
        assert (start_ticks(handle.pid), start_ticks(child)) == (None, None)

    asyncio.run(body())


def test_what_cannot_be_reaped_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A zombie whose parent is none of the unit's and reaps nobody."""
    procs, kill = tmp_path / "c" / "cgroup.procs", tmp_path / "c" / "cgroup.kill"
    procs.parent.mkdir()
    argv = ["/bin/sh", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())

        async def empty_when_killed() -> None:
            await until(kill.exists)
            procs.write_text("")  # as the kernel: it holds no zombies

        async def body() -> None:
            os.kill(parent.pid, signal.SIGSTOP)
            await until(lambda: process_state(parent.pid) == "T")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: process_state(pid) == "Z")
            procs.write_text(f"{pid}\n")
            units = BareUnits((str(tmp_path), ""))
            handle = UnitHandle("m", "llmux-m.scope", 2**22 + 1, 1, "/c")
            await asyncio.gather(units.kill(handle, 30.0), empty_when_killed())
            await units.kill(handle, 30.0)

        try:
            with asyncio.Runner(loop_factory=VirtualTime) as runner:
                runner.run(body())
        finally:
            parent.kill()
    (said,) = caplog.messages
    assert said == (
        f"cannot reap all of llmux-m.scope: after 30s processes {pid} are still there (next step:"
        f" `ps -o pid,ppid,stat,comm -p {pid}`: a zombie (state Z) goes when its parent is ended,"
        " one in state D waits for its driver)"
    )


def test_what_cannot_be_started_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        units = BareUnits(None)
        with pytest.raises(UnitFailed, match="cannot execute /no/such/engine"):
            await units.start(spec(tmp_path, "/no/such/engine"), SECONDS)
        assert units._processes == {}

    asyncio.run(body())


def test_children_of_ours_are_stopped_by_nobody_else() -> None:
    assert asyncio.run(DirectUnits().ending()) is False
    assert asyncio.run(BareUnits(None).ending()) is False


def test_rows_of_the_dead_hide_nobody_in_a_ledger(tmp_path: Path) -> None:
    me, ticks = os.getpid(), start_ticks(os.getpid())
    assert ticks is not None
    rows = [
        {"gpu": 0, "pid": 2**22 + 1, "start": 1, "bytes": 5},  # nobody's
        {"gpu": 0, "pid": me, "start": ticks + 1000, "bytes": 7},  # of one that had the pid before
        {"gpu": 1, "pid": me, "start": ticks, "bytes": 11},
        {"gpu": 1, "pid": me, "start": ticks, "bytes": 13},
    ]
    gpus = {"0": {"capacity": 100}, "1": {"capacity": 200}}
    (tmp_path / "ledger").write_text(json.dumps({"gpus": gpus, "rows": rows}))
    ledger = LedgerObserver(str(tmp_path / "ledger"))

    async def body() -> None:
        assert await ledger.processes() == [GpuProcess(1, me, 24)]
        assert await ledger.totals() == {0: 100, 1: 200}
        assert await ledger.used() == {0: 0, 1: 24}
        assert (await ledger.gpu_count(), ledger.available, ledger.blind) == (2, True, None)

    asyncio.run(body())


def test_who_ends_meanwhile_is_no_fault_and_who_stays_is_counted(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cgroup.procs").write_text(f"{2**22 + 1}\n{2**22 + 2}\n")

    async def body() -> None:
        units = BareUnits((str(tmp_path), ""))
        handle = UnitHandle("m", "u", 2**22 + 1, 1, "/c")
        with pytest.raises(DriverTimeout) as raised:
            await units.kill(handle, 0)
        assert str(raised.value).endswith("2 processes are still there after 0s")
        assert (tmp_path / "c" / "cgroup.kill").read_text() == "1"

    asyncio.run(body())


def test_who_was_not_started_here_is_held_once_for_all_who_watch(tmp_path: Path) -> None:
    async def body() -> None:
        other, units = BareUnits(None), BareUnits(None)
        handle = await other.start(spec(tmp_path, "/bin/sleep", "1000"), SECONDS)
        before = len(os.listdir("/proc/self/fd"))
        first, second = Exits(), Exits()
        units.watch(handle, first)
        units.watch(handle, second)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        await units.kill(handle, SECONDS)
        for exits in (first, second):
            assert (await exits.next())[0] == handle
        await other.kill(handle, SECONDS)

    asyncio.run(body())

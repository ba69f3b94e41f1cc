"""Scopes under a real systemd: what only a guest can show. Run inside one by test_systemd_units.py.

Everything that systemd, the cgroup tree and /proc say is looked at from outside the driver.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pwd
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rigs import DEADLINE, Exits, UnitsRig, units_rig

from llmux.drivers.processes.process import read_stat, start_ticks
from llmux.drivers.processes.spawn import Launchers
from llmux.drivers.processes.users import SharedUser
from llmux.drivers.systemd.units import SystemdUnits
from llmux.errors import UnitFailed
from llmux.ports import LaunchSpec, UnitHandle

MEASURED = 30


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def show(unit: str, name: str) -> str:
    return systemctl("show", "--property", name, "--value", unit)


def as_user(rig: UnitsRig, name: str = "nobody") -> LaunchSpec:
    return dataclasses.replace(rig.spec(), user=SharedUser(name, "/var/cache/llmux").find("alpha"))


def ended(pid: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE)[0])
    finally:
        os.close(fd)


def test_the_scope_is_as_designed(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            handle = await rig.units.start(rig.spec(), DEADLINE)
            assert handle.unit == "llmux-alpha.scope"
            assert show(handle.unit, "ActiveState") == "active"
            assert show(handle.unit, "Slice") == "llmux.slice"
            assert show(handle.unit, "Delegate") == "yes"
            assert show(handle.unit, "CollectMode") == "inactive-or-failed"
            assert show(handle.unit, "KillMode") == "control-group"
            assert show(handle.unit, "ControlGroup") == handle.cgroup
            # Tied to no service: a restart of llmux must not touch it.
            for tie in ("PartOf", "BindsTo"):
                assert show(handle.unit, tie) == ""
            where = proc(handle.pid, "cgroup").splitlines()[-1]
            assert where == f"0::{handle.cgroup}/engine"

    asyncio.run(body())


def test_the_engine_has_its_user_and_no_capability(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            handle = await rig.units.start(as_user(rig), DEADLINE)
            status = proc(handle.pid, "status")
            fields = dict(line.split(":\t", 1) for line in status.splitlines())
            uid = str(pwd.getpwnam("nobody").pw_uid)
            assert fields["Uid"].split() == [uid] * 4
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(fields[name], 16) == 0, name
            assert fields["NoNewPrivs"] == "1"
            made = (tmp_path / "alpha.run").stat()
            assert made.st_uid == int(uid)
            assert made.st_mode & 0o7777 == 0o2750  # the gateway may connect, not change it

    asyncio.run(body())


@pytest.mark.parametrize("frozen", [False, True])
def test_systemctl_stop_works_and_is_noticed(tmp_path: Path, frozen: bool) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            handle = await rig.units.start(rig.spec(), DEADLINE)
            exits = Exits()
            rig.units.watch(handle, exits)
            if frozen:
                await rig.freezer.freeze(handle, DEADLINE)
            stop = ("kill", "--signal=KILL") if frozen else ("stop",)
            await asyncio.to_thread(systemctl, *stop, handle.unit)
            assert (await exits.next()).startswith("killed by SIG")
            await rig.units.kill(handle, DEADLINE)
            assert list(await rig.units.observe()) == []

    asyncio.run(body())


ESCAPES = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.makedirs("/sys/fs/cgroup/elsewhere", exist_ok=True)
with open("/sys/fs/cgroup/elsewhere/cgroup.procs", "w") as file:
    file.write("0")
if os.fork() == 0:
    os.setsid()
open(sys.argv[1] + str(os.getpid()), "w")
while True:
    signal.pause()
"""


def escaped(directory: Path, count: int) -> list[int]:
    end = time.monotonic() + DEADLINE
    while len(found := list(directory.glob("escaped-*"))) < count:
        assert time.monotonic() < end
        os.sched_yield()
    return sorted(int(path.name.removeprefix("escaped-")) for path in found)


def test_an_engine_that_left_its_cgroup_is_noticed_and_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a container runtime does with its containers; needs root."""

    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            mark = tmp_path / "escaped-"
            argv = (sys.executable, "-c", ESCAPES, str(mark))
            handle = await rig.units.start(dataclasses.replace(rig.spec(), argv=argv), DEADLINE)
            pids = await asyncio.to_thread(escaped, tmp_path, 2)
            assert handle.pid in pids
            assert handle.pid in await rig.units.pids(handle)
            assert not await rig.units.terminate(handle, 0.2), "not seen empty"
            await rig.units.kill(handle, DEADLINE)
            assert all(ended(pid) for pid in pids)
            assert list(await rig.units.pids(handle)) == []

    asyncio.run(body())
    assert "left its cgroup for /elsewhere" in caplog.text


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from rigs import UnitsRig, DEADLINE
from llmux.drivers.systemd.units import SystemdUnits
from llmux.drivers.processes.freezer import CgroupFreezer
async def main():
    rig = UnitsRig("systemd", SystemdUnits(), CgroupFreezer(), Path(sys.argv[1]))
    handle = await rig.units.start(rig.spec("adopted"), DEADLINE)
    print(handle.pid, handle.start_ticks, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_an_engine_survives_its_supervisor_and_is_found_again(tmp_path: Path) -> None:
    path = os.pathsep.join(sys.path)
    former = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert former.stdout is not None
    pid, ticks = map(int, former.stdout.readline().split())
    former.kill()
    former.wait()
    former.stdout.close()

    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            (handle,) = await rig.units.observe()
            assert (handle.model, handle.pid, handle.start_ticks) == ("adopted", pid, ticks)
            exits = Exits()
            rig.units.watch(handle, exits)
            await rig.freezer.freeze(handle, DEADLINE)
            await rig.freezer.thaw(handle, DEADLINE)
            with pytest.raises(UnitFailed, match="exists already"):
                await rig.units.start(rig.spec("adopted"), DEADLINE)
            assert await rig.units.terminate(handle, DEADLINE)
            assert await exits.next() == "gone"  # not our child: how is not told

    asyncio.run(body())
    assert start_ticks(pid) is None


def test_a_launcher_whose_supervisor_dies_at_the_gate_goes_away(tmp_path: Path) -> None:
    async def body() -> int:
        launchers = Launchers()
        units = SystemdUnits(launchers=launchers)
        pid = launchers.prepare().process.pid
        await units.close()
        return pid

    assert ended(asyncio.run(body()))


def test_the_bus_connection_is_replaced_when_lost(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            handle = await rig.units.start(rig.spec(), DEADLINE)
            # PID 1 starts anew and reconnects to the bus; then our own connection is cut.
            await asyncio.to_thread(systemctl, "daemon-reexec")
            assert list(await rig.units.observe()) == [handle]
            assert isinstance(rig.units, SystemdUnits)
            fd = rig.units._bus._bus._bus.get_fd()
            import socket

            sock = socket.socket(fileno=os.dup(fd))
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            assert list(await rig.units.observe()) == [handle]
            await rig.units.start(rig.spec("beta"), DEADLINE)

    asyncio.run(body())


@contextmanager
def stopping_gateway() -> Iterator[None]:
    """A llmux-gateway.service that is in the middle of a restart, waiting for its clients."""
    unit = Path("/run/systemd/system/llmux-gateway.service")
    unit.write_text("[Service]\nExecStart=/bin/sleep inf\nExecStop=/bin/sleep 20\n")
    systemctl("daemon-reload")
    systemctl("start", unit.name)
    try:
        systemctl("restart", "--no-block", unit.name)
        assert show(unit.name, "ActiveState") == "deactivating"
        yield
    finally:
        systemctl("kill", "--signal=KILL", unit.name)
        systemctl("stop", unit.name)
        unit.unlink()
        systemctl("daemon-reload")


def test_a_start_does_not_wait_for_a_gateway_that_stops(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            with stopping_gateway():
                handle = await rig.units.start(rig.spec(), DEADLINE)
                assert show("llmux-gateway.service", "ActiveState") == "deactivating"
                assert show(handle.unit, "ActiveState") == "active"

    asyncio.run(body())


def test_limits_of_the_unit_are_taken_or_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            limits = {"MemoryMax": 1 << 30, "CPUWeight": 50, "TasksMax": "infinity"}
            spec = dataclasses.replace(rig.spec(), properties=limits)
            handle = await rig.units.start(spec, DEADLINE)
            assert show(handle.unit, "MemoryMax") == str(1 << 30)
            assert show(handle.unit, "CPUWeight") == "50"
            for bad in ({"MemoryMaxx": 1}, {"MemoryMax": "much"}):
                refused = dataclasses.replace(rig.spec("beta"), properties=bad)
                with pytest.raises(UnitFailed, match="MemoryMax"):
                    await rig.units.start(refused, DEADLINE)

    asyncio.run(body())


def test_names_that_systemd_would_not_take_come_back_as_they_were(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            name = "Qwen3-0.6B ünïcode@v1"
            handle = await rig.units.start(rig.spec(name), DEADLINE)
            assert [h.model for h in await rig.units.observe()] == [name]
            assert show(handle.unit, "ActiveState") == "active"

    asyncio.run(body())


def test_a_tree_with_children_freezes_and_thaws_as_one(tmp_path: Path) -> None:
    async def body() -> None:
        async with units_rig("systemd", tmp_path) as rig:
            argv = (
                "/bin/sh",
                "-c",
                "for i in 1 2 3 4 5; do sh -c 'while :; do :; done' & done; wait",
            )
            handle = await rig.units.start(rig.spec(argv=argv), DEADLINE)
            await rig.freezer.freeze(handle, DEADLINE)
            before = {pid: _cpu(pid) for pid in await rig.units.pids(handle)}
            os.sched_yield()
            assert {pid: _cpu(pid) for pid in before} == before
            await rig.freezer.thaw(handle, DEADLINE)
            await rig.units.kill(handle, DEADLINE)

    asyncio.run(body())


def _cpu(pid: int) -> str:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return " ".join(fields[11:13])


def test_nothing_is_left_and_the_loop_is_never_held_long(tmp_path: Path) -> None:
    """Thirty whole lives; prints what each act took, and the longest time the loop stood still."""
    took: dict[str, list[float]] = {}

    async def timed(name: str, work: object) -> object:
        begin = time.perf_counter()
        result = await work  # type: ignore[misc]
        took.setdefault(name, []).append((time.perf_counter() - begin) * 1000)
        return result

    async def body() -> float:
        worst = 0.0
        stop = asyncio.Event()

        async def heartbeat() -> None:
            nonlocal worst
            last = time.perf_counter()
            while not stop.is_set():
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                worst = max(worst, now - last - 0.001)
                last = now

        async with units_rig("systemd", tmp_path) as rig:
            beat = asyncio.create_task(heartbeat())
            assert isinstance(rig.units, SystemdUnits)
            for number in range(MEASURED):
                if number % 2:
                    await rig.units._launchers.prepare().ready.wait()
                kind = "start, launcher ready" if number % 2 else "start"
                handle = await timed(kind, rig.units.start(rig.spec(), DEADLINE))
                assert isinstance(handle, UnitHandle)
                await timed("freeze", rig.freezer.freeze(handle, DEADLINE))
                await timed("thaw", rig.freezer.thaw(handle, DEADLINE))
                if number % 3:
                    await timed("kill", rig.units.kill(handle, DEADLINE))
                else:
                    assert await timed("terminate", rig.units.terminate(handle, DEADLINE))
            stop.set()
            await beat
        return worst

    worst = asyncio.run(body())
    for name, values in sorted(took.items()):
        values.sort()
        print(f"{name:22} p50 {values[len(values) // 2]:6.1f} ms  max {values[-1]:6.1f} ms")
    print(f"{'loop stood still':22} max {worst * 1000:6.1f} ms")
    assert systemctl("list-units", "--all", "--plain", "--no-legend", "llmux-*.scope") == ""
    mine = os.getpid()
    stats = (read_stat(int(p.name)) for p in Path("/proc").glob("[0-9]*"))
    assert [stat for stat in stats if stat and stat[0] == mine and stat[2] == "Z"] == []
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL

"""UnitManager: the rules that scopes, direct children and the twin keep alike."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
from rigs import DEADLINE, UNIT_RIGS, Exits, turns, units_rig

from llmux.drivers.processes.process import start_ticks
from llmux.errors import UnitFailed
from llmux.ports import EngineUser

# Leaves a daemon behind that is in no session, group or parent's care and ignores SIGTERM.
DAEMON = """
trap '' TERM
(setsid sh -c 'trap "" TERM HUP; echo $$ > "$0"; while :; do sleep 1000; done' "$1" &) &
while :; do sleep 1000; done
"""


@pytest.mark.parametrize("kind", UNIT_RIGS)
class TestUnitManager:
    def test_a_started_unit_is_observed_with_its_processes(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                assert handle.model == "alpha"
                assert handle.unit.startswith("llmux-alpha")
                assert list(await rig.units.observe()) == [handle]
                assert handle.pid in await rig.units.pids(handle)
                if rig.real:
                    assert start_ticks(handle.pid) == handle.start_ticks

        asyncio.run(body())

    def test_its_host_memory_is_seen_while_it_lives(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                assert 0 < await rig.units.memory_bytes(handle) < 2**40
                await rig.units.kill(handle, DEADLINE)
                assert await rig.units.memory_bytes(handle) == 0

        asyncio.run(body())

    def test_a_taken_name_is_refused_and_its_holder_lives(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                with pytest.raises(UnitFailed, match="alpha"):
                    await rig.units.start(rig.spec(), DEADLINE)
                assert list(await rig.units.observe()) == [handle]

        asyncio.run(body())

    def test_terminate_empties_the_unit_and_the_watcher_learns_how(
        self, kind: str, tmp_path: Path
    ) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                exits = Exits()
                rig.units.watch(handle, exits)
                assert await rig.units.terminate(handle, DEADLINE)
                assert await exits.next() == "killed by SIGTERM"
                assert list(await rig.units.observe()) == []
                assert list(await rig.units.pids(handle)) == []
                await turns()
                assert len(exits.seen) == 1

        asyncio.run(body())

    def test_kill_frees_the_name_at_once_and_may_be_repeated(
        self, kind: str, tmp_path: Path
    ) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                for _ in range(3):
                    handle = await rig.units.start(rig.spec(), DEADLINE)
                    await rig.units.kill(handle, DEADLINE)
                    await rig.units.kill(handle, DEADLINE)
                    assert list(await rig.units.observe()) == []
                    # Not even a zombie: CRIU could not restore the pid.
                    assert not rig.real or start_ticks(handle.pid) is None

        asyncio.run(body())

    def test_kill_by_two_at_once(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                await asyncio.gather(*(rig.units.kill(handle, DEADLINE) for _ in range(2)))
                assert list(await rig.units.observe()) == []

        asyncio.run(body())

    def test_unwatch_is_final(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                exits = Exits()
                rig.units.watch(handle, exits)
                rig.units.unwatch(handle)
                await rig.units.kill(handle, DEADLINE)
                await turns()
                assert exits.seen == []

        asyncio.run(body())

    def test_a_watch_that_comes_too_late_is_told_all_the_same(
        self, kind: str, tmp_path: Path
    ) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                await rig.units.kill(handle, DEADLINE)
                exits = Exits()
                rig.units.watch(handle, exits)
                assert await exits.next() in ("gone", "killed by SIGKILL")

        asyncio.run(body())

    def test_several_units_do_not_mix(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                if rig.world is not None:
                    rig.world.gpu_bytes = ()
                models = ["alpha", "beta-0.6b", "gamma:8B_it"]
                specs = [rig.spec(model) for model in models]
                handles = await asyncio.gather(*(rig.units.start(s, DEADLINE) for s in specs))
                assert {h.model for h in await rig.units.observe()} == set(models)
                await rig.units.kill(handles[1], DEADLINE)
                left = {handle.model for handle in await rig.units.observe()}
                assert left == {"alpha", "gamma:8B_it"}

        asyncio.run(body())


@pytest.mark.parametrize("kind", [kind for kind in UNIT_RIGS if kind != "memory"])
class TestRealProcesses:
    @pytest.mark.parametrize(
        ("argv", "cause"),
        [
            (("/no/such/engine",), "cannot execute /no/such/engine: No such file"),
            (("/etc/passwd",), "cannot execute /etc/passwd: Permission denied"),
            (("/bin/echo", "a\0b"), "NUL"),
        ],
    )
    def test_a_failed_exec_names_its_cause_and_leaves_nothing(
        self, kind: str, tmp_path: Path, argv: tuple[str, ...], cause: str
    ) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                with pytest.raises(UnitFailed, match=cause):
                    await rig.units.start(rig.spec(argv=argv), DEADLINE)
                assert list(await rig.units.observe()) == []
                # The name is free.
                await rig.units.start(rig.spec(), DEADLINE)

        asyncio.run(body())

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
    def test_it_is_exactly_the_user_that_was_given(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                # What is in none of pytest's directories, which are closed to others.
                with tempfile.TemporaryDirectory(prefix="llmux-user-") as place:
                    os.chmod(place, 0o711)
                    home = f"{place}/cache/alpha"
                    user = EngineUser("llmux-x", 61000, 61000, home, (61001,), f"{home}/tmp")
                    script = (
                        'id -u; id -g; id -G; stat -c %u:%a "$0" "$0/tmp";'
                        " grep CapBnd /proc/self/status; read x < $1"
                    )
                    gate = f"{place}/gate"  # the watch is there before its end
                    os.mkfifo(gate)
                    os.chmod(gate, 0o666)
                    argv = ("/bin/sh", "-c", script, home, gate)
                    spec = dataclasses.replace(rig.spec(argv=argv), user=user)
                    handle = await rig.units.start(spec, DEADLINE)
                    exits = Exits()
                    rig.units.watch(handle, exits)
                    await asyncio.to_thread(Path(gate).write_text, "go\n")
                    await exits.next()
                    said = (await asyncio.to_thread(Path(spec.stdout).read_text)).split()
                    assert said[:6] == ["61000"] * 3 + ["61001", "61000:700", "61000:700"]
                    assert said[6:] == ["CapBnd:", "0" * 16]

        asyncio.run(body())

    @pytest.mark.parametrize(
        ("script", "description"),
        [("exit 3", "exit status 3"), ("kill -SEGV $$", "killed by SIGSEGV")],
    )
    def test_the_end_is_described(
        self, kind: str, tmp_path: Path, script: str, description: str
    ) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                # It ends when its input file appears, so that the watch is surely there before.
                gate = tmp_path / "gate"
                os.mkfifo(gate)
                argv = ("/bin/sh", "-c", f"ulimit -c 0; read x < {gate}; {script}")
                handle = await rig.units.start(rig.spec(argv=argv), DEADLINE)
                exits = Exits()
                rig.units.watch(handle, exits)
                await asyncio.to_thread(gate.write_text, "go\n")
                assert (await exits.next()).startswith(description)

        asyncio.run(body())

    def test_nothing_outlives_kill(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                fifo = tmp_path / "daemon"
                os.mkfifo(fifo)
                argv = ("/bin/sh", "-c", DAEMON, "sh", str(fifo))
                handle = await rig.units.start(rig.spec(argv=argv), DEADLINE)
                daemon = int(await asyncio.to_thread(fifo.read_text))
                pids = await rig.units.pids(handle)
                assert daemon in pids
                assert not await rig.units.terminate(handle, 0.05)
                await rig.units.kill(handle, DEADLINE)
                assert [pid for pid in pids if start_ticks(pid) is not None] == []

        asyncio.run(body())

    def test_the_engine_gets_just_what_was_asked_for(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                fifo = tmp_path / "facts"
                os.mkfifo(fifo)
                # Sockets and pipes of ours that must not be inherited.
                read, write = os.pipe()
                os.set_inheritable(read, True)
                script = (
                    f"(echo fds $(ls /proc/$$/fd | sort -n); echo umask $(umask); env;"
                    f" grep -E 'NoNewPrivs|Seccomp:' /proc/$$/status; readlink /proc/$$/fd/0)"
                    f" > {fifo}; echo out; echo err >&2; exec sleep 1000"
                )
                spec = rig.spec(argv=("/bin/sh", "-c", script))
                try:
                    await rig.units.start(spec, DEADLINE)
                finally:
                    os.close(read)
                    os.close(write)
                facts = await asyncio.to_thread(fifo.read_text)
                assert "fds 0 1 2\n" in facts
                assert "umask 0007" in facts
                assert "NoNewPrivs:\t1" in facts
                assert "Seccomp:\t2" in facts
                assert "/dev/null" in facts
                names = {line.partition("=")[0] for line in facts.splitlines() if "=" in line}
                assert names <= {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}  # the shell's own besides

        asyncio.run(body())

    def test_io_uring_is_answered_with_enosys(self, kind: str, tmp_path: Path) -> None:
        import dataclasses
        import sys

        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                fifo = tmp_path / "errno"
                os.mkfifo(fifo)
                probe = (
                    "import ctypes,sys; c=ctypes.CDLL(None,use_errno=True);"
                    "r=c.syscall(425,8,0); open(sys.argv[1],'w').write(f'{r} {ctypes.get_errno()}')"
                )
                argv = (sys.executable, "-c", probe, str(fifo))
                answers = []
                for deny in (True, False):
                    spec = dataclasses.replace(rig.spec(argv=argv), deny_io_uring=deny)
                    handle = await rig.units.start(spec, DEADLINE)
                    answers.append(await asyncio.to_thread(fifo.read_text))
                    await rig.units.kill(handle, DEADLINE)
                assert answers[0] == "-1 38"
                assert answers[1] != "-1 38"

        asyncio.run(body())

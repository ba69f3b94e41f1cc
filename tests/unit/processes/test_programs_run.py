"""Programs that are run to their end: what they are given, what is kept, what is let go of."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from llmux.drivers.processes.process import start_ticks
from llmux.drivers.processes.run import run
from llmux.errors import DriverTimeout

SECONDS = 30.0


def sh(script: str, **options: str) -> str:
    done = asyncio.run(run(["/bin/sh", "-c", script], SECONDS, **options))  # type: ignore[arg-type]
    assert (done.code, done.stderr) == (0, "")
    return done.stdout


def test_a_program_has_no_input_and_a_session_of_its_own(tmp_path: Path) -> None:
    kept = os.dup(0)
    ours = os.open(tmp_path / "input", os.O_CREAT | os.O_RDONLY)
    os.dup2(ours, 0)
    try:
        found = sh('readlink /proc/$$/fd/0; echo $$; cut -d" " -f6 /proc/$$/stat; pwd')
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(ours)
    source, pid, session, place = found.splitlines()
    assert (source, place) == ("/dev/null", "/")
    assert pid == session


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"]
)
def test_a_program_inherits_what_finds_things(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    allowed = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    for other in allowed:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "/here")
    done = asyncio.run(run(["/usr/bin/env"], SECONDS))
    assert sorted(done.stdout.splitlines()) == sorted(["LC_ALL=C.UTF-8", f"{name}=/here"])
    done = asyncio.run(run(["/usr/bin/env"], SECONDS, env={name: "/there", "LC_ALL": "C"}))
    assert sorted(done.stdout.splitlines()) == sorted(["LC_ALL=C", f"{name}=/there"])


def test_of_much_output_the_last_256_kib_are_kept() -> None:
    found = sh("head -c 700000 /dev/zero | tr '\\0' x; echo end")
    assert len(found) == 256 * 1024
    assert found.endswith("xend\n")


@pytest.mark.parametrize("cap", [1, 7, 14])
def test_of_output_of_any_length_the_last_bytes_are_kept(cap: int) -> None:
    script = "for n in 1 2 3 4 5; do printf $n-abcdefgh; sleep 0; done"
    done = asyncio.run(run(["/bin/sh", "-c", script], SECONDS, output_cap=cap))
    assert done.stdout == "".join(f"{n}-abcdefgh" for n in range(1, 6))[-cap:]


def test_a_program_that_overruns_is_killed_with_all_its_group(tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $$ $! > {tmp_path}/pids; wait"
    with pytest.raises(DriverTimeout, match=r"not finished after 0\.2s; it was killed"):
        asyncio.run(run(["/bin/sh", "-c", script], 0.2))
    if (tmp_path / "pids").exists():  # a busy machine may not have come so far
        first, *_ = (tmp_path / "pids").read_text().split() or ["0"]
        assert start_ticks(int(first)) is None


@pytest.mark.usefixtures("no_descriptor_left_open")
def test_who_holds_the_output_of_a_program_that_ended_is_let_go_of(tmp_path: Path) -> None:
    """A daemon in a session of its own, which no kill of the group reaches."""
    os.mkfifo(tmp_path / "pids")
    daemon = f'echo "$1 $$" > {tmp_path}/pids; exec sleep 1000'
    script = f"setsid sh -c '{daemon}' sh $$ & exit 0"

    daemons: list[int] = []

    async def body() -> None:
        task = asyncio.ensure_future(run(["/bin/sh", "-c", script], 1000))
        text = await asyncio.to_thread((tmp_path / "pids").read_text)
        parent, pid = map(int, text.split())
        daemons.append(pid)
        async with asyncio.timeout(SECONDS):
            while start_ticks(parent) is not None:  # noqa: ASYNC110  # its end is asyncio's to see
                await asyncio.sleep(0)
        for _ in range(100):  # a start that is cancelled amid its pipes never ends in asyncio 3.11
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert start_ticks(pid) is not None, "it is not ours to kill"

    try:
        asyncio.run(body())
    finally:
        for pid in daemons:
            os.kill(pid, signal.SIGKILL)

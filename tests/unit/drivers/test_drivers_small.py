"""Parts of the drivers that are pure, or need no more than a temporary directory."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.drivers.gpu import (
    LEDGER_VARIABLE,
    LedgerObserver,
    NoGpu,
    NvmlObserver,
    _Caller,
    find_gpu_observer,
)
from llmux.drivers.processes.launcher import decode_spec, encode_spec
from llmux.drivers.processes.process import describe_status, find_root, start_ticks
from llmux.drivers.processes.run import run
from llmux.drivers.processes.spawn import model_of, unit_name
from llmux.engines import line_priority
from llmux.errors import DriverError, DriverTimeout, Unsupported
from llmux.ports import GpuProcess
from llmux.printable import clean

no_nul = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
names = st.text(st.characters(exclude_characters="=\0", exclude_categories=["Cs"]), min_size=1)


class TestNames:
    @pytest.mark.parametrize(
        ("model", "unit"),
        [
            ("qwen3-0.6b", "llmux-qwen3-0.6b.scope"),
            ("a b@c", "llmux-a\\x20b\\x40c.scope"),
            ("ü", "llmux-\\xc3\\xbc.scope"),
            ("Qwen/Qwen3-8B", "llmux-Qwen\\x2fQwen3-8B.scope"),
            ("a\\x20", "llmux-a\\x5cx20.scope"),
        ],
    )
    def test_a_units_name(self, model: str, unit: str) -> None:
        assert unit_name(model) == unit

    @given(no_nul.filter(bool))
    def test_and_back(self, model: str) -> None:
        assert model_of(unit_name(model)) == model
        assert unit_name(model).isascii()


class TestLaunchSpec:
    @given(
        st.lists(no_nul, min_size=1),
        st.dictionaries(names, no_nul),
        st.dictionaries(names, no_nul),
    )
    def test_it_comes_back_whole(
        self, argv: list[str], env: dict[str, str], options: dict[str, str]
    ) -> None:
        have = decode_spec(encode_spec(argv, env, options))
        want_env = {os.fsencode(key): os.fsencode(value) for key, value in env.items()}
        assert have == ([os.fsencode(word) for word in argv], want_env, options)

    def test_a_nul_is_refused(self) -> None:
        with pytest.raises(ValueError, match="NUL"):
            encode_spec(["a\0b"], {}, {})


class TestProcesses:
    def test_our_own_start_is_known_and_nobodys_is_not(self) -> None:
        assert start_ticks(os.getpid())
        assert start_ticks(2**22 + 1) is None

    def test_the_root_is_the_one_whose_parent_is_outside(self) -> None:
        assert find_root([os.getpid()]) == os.getpid()
        assert find_root([os.getpid(), os.getppid()]) == os.getppid()
        assert find_root([]) is None

    @pytest.mark.parametrize(
        ("code", "status", "text"),
        [
            (os.CLD_EXITED, 0, "exit status 0"),
            (os.CLD_KILLED, 9, "killed by SIGKILL"),
            (os.CLD_DUMPED, 11, "killed by SIGSEGV (core dumped)"),
            (os.CLD_KILLED, 40, "killed by signal 40"),
        ],
    )
    def test_an_end_in_words(self, code: int, status: int, text: str) -> None:
        assert describe_status(code, status) == text


class TestOutputLines:
    @pytest.mark.parametrize(
        ("line", "priority"),
        [
            ("INFO 11-21 20:00:00 [a.py:1] ok", 6),
            ("INFO:     Started server process [7]", 6),
            ("(APIServer pid=7) WARNING 11-21 [a.py:1] hm", 4),
            ("(EngineCore_DP0 pid=7) ERROR 11-21 [a.py:1] no", 3),
            ("DEBUG 11-21 x", 7),
            ("CRITICAL x", 2),
            ("Traceback (most recent call last):", 3),
            ("torch.OutOfMemoryError: CUDA out of memory. Tried", 3),
            ("(EngineCore pid=1) ValueError: x", 3),
            ("INFORMATION is no level", 6),
            ("an ERROR in the middle", 6),
            ("", 6),
        ],
    )
    def test_levels(self, line: str, priority: int) -> None:
        assert line_priority(line) == priority

    @given(st.text())
    def test_nothing_that_a_terminal_would_obey_is_left(self, line: str) -> None:
        assert not any(ord(char) < 32 and char != "\t" for char in clean(line))


class TestRun:
    def test_status_and_both_streams(self) -> None:
        done = asyncio.run(run(["/bin/sh", "-c", "echo out; echo err >&2; exit 7"], 5))
        assert (done.code, done.stdout, done.stderr) == (7, "out\n", "err\n")
        assert done.excerpt == "err"

    def test_a_closed_stdin_a_fixed_locale_and_no_more_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECRET_TOKEN", "x")
        done = asyncio.run(run(["/bin/sh", "-c", "cat; env"], 5, env={"A": "b"}))
        assert "SECRET_TOKEN" not in done.stdout
        assert "LC_ALL=C.UTF-8" in done.stdout
        assert "A=b" in done.stdout

    def test_one_that_overruns_is_gone_with_its_children(self, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        script = f"sleep 1000 & echo $$ $! > {pids}; wait"
        with pytest.raises(DriverTimeout, match="killed"):
            asyncio.run(run(["/bin/sh", "-c", script], 0.2))
        leader, child = map(int, pids.read_text().split())
        assert start_ticks(leader) is None
        # The child was killed with its group; its new parent reaps it.
        try:
            pidfd = os.pidfd_open(child)
        except ProcessLookupError:
            return
        try:
            assert select.select([pidfd], [], [], 10)[0]
        finally:
            os.close(pidfd)

    def test_output_is_capped_at_its_end(self) -> None:
        words = [sys.executable, "-c", "print('x' * 1000000 + 'end')"]
        done = asyncio.run(run(words, 20, output_cap=1000))
        assert len(done.stdout) == 1000
        assert done.stdout.endswith("end\n")

    def test_a_missing_program_is_named(self) -> None:
        with pytest.raises(Unsupported, match="/no/such/tool"):
            asyncio.run(run(["/no/such/tool"], 1))


class TestGpus:
    def test_only_rows_of_the_living_count(self, tmp_path: Path) -> None:
        own, ticks = os.getpid(), start_ticks(os.getpid())
        former = (ticks or 0) - 100  # of a process that had the pid before
        rows = [
            {"gpu": 0, "pid": own, "start": ticks, "model": "a", "kind": "weights", "bytes": 5},
            {"gpu": 0, "pid": own, "start": ticks, "model": "a", "kind": "kv", "bytes": 7},
            {"gpu": 1, "pid": own, "start": former, "model": "b", "kind": "kv", "bytes": 9},
        ]
        gpus = {"0": {"capacity": 80}, "1": {"capacity": 40}}
        path = tmp_path / "ledger.json"
        path.write_text(json.dumps({"version": 1, "gpus": gpus, "rows": rows}))
        observer = LedgerObserver(str(path))
        assert asyncio.run(observer.gpu_count()) == 2
        assert asyncio.run(observer.totals()) == {0: 80, 1: 40}
        assert asyncio.run(observer.processes()) == [GpuProcess(0, own, 12)]

    def test_no_ledger_yet_and_a_broken_one(self, tmp_path: Path) -> None:
        observer = LedgerObserver(str(tmp_path / "ledger.json"))
        assert asyncio.run(observer.processes()) == []
        (tmp_path / "ledger.json").write_text("{")
        with pytest.raises(DriverError, match="ledger"):
            asyncio.run(observer.processes())

    def test_the_variable_selects_the_ledger(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv(LEDGER_VARIABLE, str(tmp_path / "l"))
        assert isinstance(find_gpu_observer(), LedgerObserver)

    def test_without_the_library_nothing_is_known(self) -> None:
        with pytest.raises(Unsupported, match="libnothing"):
            NvmlObserver("libnothing.so.1")
        assert not NoGpu().available
        assert asyncio.run(NoGpu().processes()) == ()


def test_a_call_that_hangs_is_abandoned_and_makes_the_observer_blind_until_it_returns() -> None:
    async def body() -> None:
        caller = _Caller("the GPUs")
        assert await caller.call(lambda: 7) == 7
        free = threading.Event()
        with pytest.raises(DriverTimeout, match="no answer within"):
            await caller.call(free.wait, 0.01)
        assert "has not returned" in str(caller.blind)
        with pytest.raises(DriverError, match="has not returned"):
            await caller.call(lambda: 7)  # at once, and no further thread
        free.set()
        while caller.blind is not None:  # noqa: ASYNC110  # the thread says nothing
            await asyncio.sleep(0.001)
        assert await caller.call(lambda: 8) == 8
        with pytest.raises(ZeroDivisionError):
            await caller.call(lambda: 1 // 0)

    asyncio.run(body())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_an_engine_becomes_its_user_for_good_and_that_user_needs_no_right_to_stay_it() -> None:
    """As `llmux serve` of any user: what that may not do is not tried."""
    code = (
        "import ctypes, os\n"
        "from llmux.drivers.processes.launcher import _drop_to\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for _ in range(2):\n"
        "    _drop_to(libc, 65534, 65533, [65532])\n"
        "    print(os.getresuid(), os.getresgid(), os.getgroups())\n"
        "status = open('/proc/self/status').read()\n"
        "print({line.split()[1] for line in status.splitlines() if line.startswith('Cap')})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "(65534, 65534, 65534) (65533, 65533, 65533) [65532]\n"
    assert done.stdout == said * 2 + "{'0000000000000000'}\n", done.stderr


def test_a_call_that_was_given_up_is_not_made_and_hides_no_other() -> None:
    caller, free, made = _Caller("the GPUs"), threading.Event(), list[int]()
    caller.submit(free.wait)
    given_up, other = (caller.submit(lambda: made.append(1)) for _ in range(2))
    assert given_up.cancel()
    free.set()
    other.result(20)
    assert made == [1]
    caller.end()

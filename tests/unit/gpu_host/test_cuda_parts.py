"""Parts of a CUDA suspend that need no driver: words, codes, /proc, memory, a child's socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.cuda import calls, tool
from llmux.drivers.cuda.calls import (
    ADVICE,
    Code,
    CudaCallError,
    CudaCallTimeout,
    CudaState,
    ProcessTable,
)
from llmux.drivers.cuda.driver import greeting_problem
from llmux.drivers.cuda.failures import raise_failure
from llmux.drivers.cuda.host_memory import GIB, HostMemory, required_host_bytes
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, TreeState, Unsupported


@pytest.mark.parametrize(
    ("text", "ticks"),
    [
        ("7 (a b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20", 4242),
        ("7 (a) S) (b) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20", 4242),
        ("7 (a) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20", None),
        ("7 (a) X 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20", None),
        ("", None),
        (None, None),
    ],
)
def test_a_process_is_known_by_its_start(
    tmp_path: Path, text: str | None, ticks: int | None
) -> None:
    (tmp_path / "7").mkdir()
    if text is not None:
        (tmp_path / "7" / "stat").write_text(text)
    assert ProcessTable(tmp_path).start_ticks(7) == ticks


def test_one_that_maps_a_gpu_is_told_from_one_that_asked_nvml(tmp_path: Path) -> None:
    table = ProcessTable(tmp_path)
    assert table.maps_gpu(7) is False, "it is gone"
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "maps").write_text("7f0-7f1 rw-p 0 00:00 0\n")
    assert table.maps_gpu(7) is False
    (tmp_path / "7" / "maps").write_text("x\n7f0-7f1 rw-s 0 00:05 9 /dev/nvidia0\n")
    assert table.maps_gpu(7) is True


@pytest.mark.parametrize(
    ("pids", "text"),
    [([], "processes (none)"), ([7], "process 7"), ([9, 7], "processes 7, 9")],
)
def test_processes_in_words(pids: list[int], text: str) -> None:
    assert calls.names(iter(pids)) == text


def test_codes_and_states_in_words() -> None:
    error = CudaCallError("lock", 7, Code.NOT_READY, "device not ready")
    late = CudaCallTimeout("restore", 8)
    assert str(error) == "lock of process 7: device not ready"
    assert str(late) == "restore of process 8 has not ended"
    assert calls.answered(error, Code.NOT_READY)
    assert not calls.answered(error, Code.INVALID_VALUE)
    assert not calls.answered(late, Code.NOT_READY)
    assert [state for state in CudaState if state.busy] == [
        CudaState.CHECKPOINTING, CudaState.RESTORING,
    ]  # fmt: skip
    assert {int(code) for code in Code} >= set(ADVICE)


def test_codes_and_states_are_those_of_cuda_h() -> None:
    header = (  # CUresult and CUprocessState
        "CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2,"
        " CUDA_ERROR_NOT_INITIALIZED = 3, CUDA_ERROR_OPERATING_SYSTEM = 304,"
        " CUDA_ERROR_ILLEGAL_STATE = 401, CUDA_ERROR_NOT_READY = 600,"
        " CUDA_ERROR_NOT_PERMITTED = 800, CUDA_ERROR_NOT_SUPPORTED = 801,"
        " CU_PROCESS_STATE_RUNNING = 0, CU_PROCESS_STATE_LOCKED = 1,"
        " CU_PROCESS_STATE_CHECKPOINTED = 2, CU_PROCESS_STATE_FAILED = 3,"
        " CU_PROCESS_STATE_CHECKPOINTING = 4, CU_PROCESS_STATE_RESTORING = 5"
    )
    ours = [f"CUDA_ERROR_{code.name} = {code.value}" for code in Code]
    ours += [f"CU_PROCESS_STATE_{state.name} = {state.value}" for state in CudaState]
    assert ", ".join(ours) == header


# ---- the tool ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("restore_tid", ["--get-restore-tid", "--pid", "7"]),
        ("state", ["--get-state", "--pid", "7"]),
        ("lock", ["--action", "lock", "--pid", "7", "--timeout", "50"]),
        ("checkpoint", ["--action", "checkpoint", "--pid", "7"]),
        ("restore", ["--action", "restore", "--pid", "7"]),
        ("unlock", ["--action", "unlock", "--pid", "7"]),
    ],
)
def test_what_the_tool_is_asked(operation: str, words: list[str]) -> None:
    assert tool.arguments(operation, 7, 50) == words


@pytest.mark.parametrize(
    ("operation", "status", "output", "value"),
    [
        ("state", 0, "running\n", 0),
        ("state", 0, "checkpointed", 2),
        ("state", 0, "odd", (None, "unknown state 'odd'")),
        ("restore_tid", 0, " 42\n", 42),
        ("restore_tid", 0, "x", (None, "no thread id: 'x'")),
        ("lock", 0, "anything", 0),
        ("lock", 1, "", (1, "no message (exit status 1)")),
        ("lock", 88, "CUDA: device not\n ready", (600, "CUDA: device not ready (exit status 88)")),
        ("restore_tid", 1, tool.NO_CUDA, (1, f"{tool.NO_CUDA} (exit status 1)")),
        ("lock", 2, "out of memory", (2, "out of memory (exit status 2)")),
        ("lock", 9, "initialization error", (3, "initialization error (exit status 9)")),
        ("lock", 9, "OS call failed", (304, "OS call failed (exit status 9)")),
        ("lock", 9, "operation not permitted", (800, "operation not permitted (exit status 9)")),
        ("lock", 9, "operation not supported", (801, "operation not supported (exit status 9)")),
        ("lock", 9, "an illegal state", (401, "an illegal state (exit status 9)")),
        ("lock", 9, "an invalid argument", (1, "an invalid argument (exit status 9)")),
        ("lock", 9, "x" * 400, (9, "x" * 300 + " (exit status 9)")),
    ],
)
def test_what_the_tool_answers(operation: str, status: int, output: str, value: Any) -> None:
    if isinstance(value, int):
        assert tool.parse_answer(operation, 7, status, output) == value
        return
    with pytest.raises(CudaCallError) as raised:
        tool.parse_answer(operation, 7, status, output)
    assert (raised.value.code, raised.value.words) == value
    assert (raised.value.operation, raised.value.pid) == (operation, 7)


@pytest.mark.parametrize("requests", [True, False])
def test_a_child_talks_over_one_socket_whose_end_is_its_exit(requests: bool) -> None:
    script = 'read x; echo "got $x"; echo noise >&2; pwd; cut -d" " -f6 /proc/$$/stat; exit 3'
    before = len(os.listdir("/proc/self/fd"))
    process, ours = calls.spawn(["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin"},
                                requests=requests)  # fmt: skip
    with ours:
        if requests:
            ours.sendall(b"hello\n")
        ours.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: ours.recv(4096), b"")).decode().split("\n")
    assert process.wait(20) == 3
    assert process in calls._CHILDREN, "kept until it is seen to have ended"
    assert said[0] == ("got hello" if requests else "got ")
    assert ("noise" in said) is not requests
    assert "/" in said
    assert str(process.pid) in "".join(said), "its own session"
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        calls.spawn(["/no/such/tool"], {}, requests=requests)
    assert len(os.listdir("/proc/self/fd")) == before
    other, ours = calls.spawn(["/bin/true"], {}, requests=False)
    ours.close()
    assert process not in calls._CHILDREN
    assert other.wait(20) == 0


def test_a_child_has_the_environment_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    process, ours = calls.spawn(["/usr/bin/env"], {"A": "b"}, requests=False)
    with ours:
        assert b"".join(iter(lambda: ours.recv(4096), b"")) == b"A=b\n"
    assert process.wait(20) == 0


def test_a_call_has_what_libcuda_needs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib")
    monkeypatch.setenv("PATH", "/bin")
    assert calls.call_environment(None) == {
        "LC_ALL": "C", "PATH": "/bin", "LD_LIBRARY_PATH": "/lib",
    }  # fmt: skip
    monkeypatch.delenv("LD_LIBRARY_PATH")
    found = calls.call_environment({"PATH": "/x", "A": "b"})
    assert found == {"LC_ALL": "C", "PATH": "/x", "A": "b"}


# ---- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        ({"problem": "p", "missing": ["x"], "code": 3}, "p"),
        ({"missing": ["a", "b"], "driver_version": 12050}, "L (CUDA 12.5) lacks a, b"),
        ({"missing": ["a"], "driver_version": 0}, "L (unknown CUDA version) lacks a"),
        ({"missing": ["a"]}, "L (unknown CUDA version) lacks a"),
        ({"code": 3, "text": "t", "name": "N", "missing": []}, "cuInit of L failed: t (N)"),
        ({"code": 0, "missing": [], "problem": None}, None),
        ({}, None),
    ],
)
def test_why_a_helper_cannot_be_used(greeting: dict[str, Any], words: str | None) -> None:
    problem = greeting_problem(greeting, "L")
    assert (problem and problem[0]) == words
    if problem:
        assert ("journalctl" in problem[1]) is bool(words and words.startswith("cuInit"))


ERROR = CudaCallError("lock", 7, Code.NOT_READY, "not ready")


@pytest.mark.parametrize(
    ("errors", "lines", "text", "hint", "blame"),
    [
        ([ERROR], [], "lock of process 7: not ready", ADVICE[Code.NOT_READY], Blame.ENGINE),
        ([ERROR], ["line"], "lock of process 7: not ready; line", ADVICE[Code.NOT_READY],
         Blame.ENGINE),
        ([CudaCallError("lock", 7, 999, "x"), CudaCallError("lock", 8, 2, "y")], [],
         "lock of process 7: x; lock of process 8: y", ADVICE[Code.OUT_OF_MEMORY], Blame.HOST),
        ([CudaCallError("lock", 7, None, "x")], [], "lock of process 7: x", None, Blame.ENGINE),
        ([ERROR], ["process 7 died in the call: why"],
         "lock of process 7: not ready; process 7 died in the call: why",
         "see `journalctl -k` for the crash; a newer NVIDIA driver may not have it", Blame.ENGINE),
    ],
)  # fmt: skip
def test_a_failure_has_its_cause_and_the_advice_for_it(
    errors: list[CudaCallError], lines: list[str], text: str, hint: str | None, blame: Blame
) -> None:
    with pytest.raises(CheckpointFailed) as raised:
        raise_failure("suspend", "lock", [8, 7], errors, lines, TreeState.RUNNING)
    error = raised.value
    assert str(error).startswith(f"cannot suspend processes 7, 8: {text}")
    assert (error.hint, error.blame, error.tree) == (hint, blame, TreeState.RUNNING)
    assert error.fields["pids"] == [one.pid for one in errors]
    with pytest.raises(CheckpointFailed) as raised:
        raise_failure("resume", "lock", [7], errors, lines)
    assert raised.value.tree is TreeState.BROKEN


def test_a_call_that_is_still_out_makes_the_outcome_unknown() -> None:
    late = CudaCallTimeout("lock", 9)
    with pytest.raises(DriverTimeout) as raised:
        raise_failure("suspend", "lock", [7, 9], [ERROR, late], ["line"])
    assert str(raised.value).startswith(
        "cannot suspend processes 7, 9: lock of process 7: not ready; lock of process 9 has not"
        " ended; line; the outcome of lock for process 9 is unknown"
    )
    assert raised.value.fields["pids"] == [9]
    assert "kill the model, not the helper" in (raised.value.hint or "")


# ---- host memory ---------------------------------------------------------------------------------


def limit(place: Path, most: str, used: int, inactive: int = 0, active: int = 0) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.max").write_text(f"{most}\n")
    (place / "memory.current").write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file {active}\n")


def test_memory_that_is_just_enough_is_enough_in_every_cgroup_above(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cg"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text("1:name=x:/old\n0::/a/b\n")
    need = required_host_bytes(50 * GIB)
    assert need == 50 * GIB + GIB + GIB
    limit(cgroups, "max", 0)
    limit(cgroups / "a", str(need + 300), 500, 100, 100)
    limit(cgroups / "a" / "b", str(need + 5), 4)
    host = HostMemory(proc, cgroups, available=lambda: need)
    assert host.headroom(7) == (need, "a")
    assert host.shortage([8, 7], 50 * GIB) is None
    assert "but MemAvailable is" in (host.shortage([7], 50 * GIB + 100) or "")
    limit(cgroups / "a", str(need + 299), 500, 100, 100)
    assert "but MemoryMax of a leaves 52.0 GiB" in (host.shortage([8, 7], 50 * GIB) or "")
    limit(cgroups / "a" / "b", str(need), 2)
    assert host.headroom(7) == (need - 2, "a/b")
    limit(cgroups, str(need), 2)
    assert host.headroom(7) == (need - 2, "a/b"), "of two alike the inner one"
    limit(cgroups, "max", 0)
    (cgroups / "a" / "b" / "memory.stat").write_text("")
    assert host.headroom(7) == (need - 2, "a/b")
    for name in ("memory.current", "memory.max"):
        (cgroups / "a" / "b" / name).write_text("x")
        assert host.headroom(7) == (need - 1, "a")
    for text in ("", "1:name=x:/a\n"):
        (proc / "7" / "cgroup").write_text(text)
        assert host.headroom(7) is None


def a_tool(place: Path, script: str) -> tool.ToolCalls:
    path = place / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return tool.ToolCalls(str(path))


def test_a_run_of_the_tool_and_what_becomes_of_it(tmp_path: Path) -> None:
    async def body() -> None:
        late: list[str] = []

        def called(runs: tool.ToolCalls, operation: str = "state") -> Coroutine[Any, Any, int]:
            return runs.call(operation, 7, 20.0, on_late=lambda: late.append(operation))

        answers = a_tool(tmp_path, 'echo "$@" >&2; echo locked')
        await answers.ready()
        with pytest.raises(CudaCallError, match="unknown state '--get-state --pid 7 locked'"):
            await called(answers)
        assert await called(a_tool(tmp_path, "echo locked")) == CudaState.LOCKED
        with pytest.raises(CudaCallError, match="was killed by signal 9 in mid-operation"):
            await called(a_tool(tmp_path, "kill -9 $$"))
        absent = tool.ToolCalls(f"{tmp_path}/absent")
        with pytest.raises(CudaCallError, match=f"cannot run {tmp_path}/absent: .*No such file"):
            await called(absent)
        with pytest.raises(Unsupported, match="no such program, or not executable"):
            await absent.ready()
        assert late == []
        # Whoever asked is gone: the run goes on, and its end is told.
        running = a_tool(tmp_path, "read x <pipe; exit 1")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "tool").write_text(f"#!/bin/sh\nread x <{tmp_path}/pipe; exit 1\n")
        task = asyncio.create_task(called(running, "lock"))
        pipe = await asyncio.to_thread(open, tmp_path / "pipe", "wb")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert late == []
        pipe.close()
        async with asyncio.timeout(20):
            while not late:  # noqa: ASYNC110  # a process of others: no event
                await asyncio.sleep(0.001)
        assert late == ["lock"]
        assert running._late == set()
        # A run that is late is left to end by itself, and nobody waits for it.
        with pytest.raises(CudaCallTimeout):
            await running.call("unlock", 7, 0.0, on_late=lambda: late.append("unlock"))
        await running.close()
        with open(tmp_path / "pipe", "wb"):  # noqa: ASYNC230  # its reader is there, or comes
            pass
        assert late == ["lock"]

    asyncio.run(body())

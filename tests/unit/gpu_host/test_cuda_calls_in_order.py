"""Which driver calls a suspend and a resume make, in which order, with which time for each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.cuda.calls import Code, CudaCallError, CudaCallTimeout, CudaState, ProcessTable
from llmux.drivers.cuda.host_memory import HostMemory
from llmux.drivers.cuda.sequence import CudaSequence
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, TreeState

RUNNING, LOCKED, CHECKPOINTED, FAILED = list(CudaState)[:4]
AFTER = {"lock": LOCKED, "checkpoint": CHECKPOINTED, "restore": LOCKED, "unlock": RUNNING}


class Driver:
    """Processes with a state; an answer in ``codes`` fails, one in ``lies`` changes nothing."""

    def __init__(self, **states: CudaState) -> None:
        self.states = {int(name[1:]): state for name, state in states.items()}
        self.codes: dict[tuple[str, int], int | None] = {}
        self.lies: set[str] = set()
        self.odd: dict[int, int] = {}
        self.calls: list[tuple[str, int, int]] = []
        self.left: list[float] = []
        self.closed = False
        self.not_ready = False
        self.late: set[tuple[str, int]] = set()  # of those in ``codes``: they do not answer
        self.after: dict[tuple[str, int], int] = {}  # codes once anything was done

    async def ready(self) -> None:
        if self.not_ready:
            await asyncio.Event().wait()

    async def call(
        self,
        operation: str,
        pid: int,
        timeout: float,
        *,
        on_late: Callable[[], None],
        lock_ms: int = 0,
    ) -> int:
        self.calls.append((operation, pid, lock_ms))
        self.left.append(timeout)
        if len(self.made()) > 0:
            self.codes |= self.after
        if (operation, pid) in self.codes and (operation, pid) in self.late:
            raise CudaCallTimeout(operation, pid)
        if (operation, pid) in self.codes:
            raise CudaCallError(operation, pid, self.codes[operation, pid], "words")
        if operation == "restore_tid":
            if pid not in self.states:
                raise CudaCallError(operation, pid, Code.INVALID_VALUE, "none")
            return pid + 1
        if operation == "state":
            return self.odd.get(pid, self.states[pid])
        if operation not in self.lies:
            self.states[pid] = AFTER[operation]
        return 0

    async def close(self) -> None:
        self.closed = True

    def made(self) -> list[tuple[str, int]]:
        return [(call, pid) for call, pid, _ in self.calls if call not in ("state", "restore_tid")]


class Table(ProcessTable):
    def __init__(self) -> None:
        super().__init__(Path("/no/such"))
        self.gone: set[int] = set()
        self.mapping: set[int] = set()

    def start_ticks(self, pid: int) -> int | None:
        return None if pid in self.gone else pid * 10

    def maps_gpu(self, pid: int) -> bool:
        return pid in self.mapping


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def sequence(driver: Driver, table: Table | None = None, **options: object) -> CudaSequence:
    return CudaSequence(driver, processes=table or Table(), clock=Clock(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("deadline", "lock_secs", "lock_ms"),
    [(20.0, 3.0, 3000), (4.0, 3.0, 2000), (0.0015, 3.0, 1), (20.0, 0.0, 1)],
)
def test_a_suspend_locks_all_before_it_checkpoints_any(
    deadline: float, lock_secs: float, lock_ms: int
) -> None:
    driver = Driver(p8=RUNNING, p7=RUNNING)
    cuda = sequence(driver, lock_secs=lock_secs)
    assert asyncio.run(cuda.suspend([9, 8, 7], deadline)) == [7, 8]
    assert driver.made() == [("lock", 8), ("lock", 7), ("checkpoint", 8), ("checkpoint", 7)]
    assert {ms for call, _, ms in driver.calls if call == "lock"} == {lock_ms}
    assert {ms for call, _, ms in driver.calls if call != "lock"} == {1}, "it is for nothing else"
    assert {round(left, 6) for left in driver.left} == {deadline}
    assert asyncio.run(cuda.suspended([9, 8, 7], 5)) == [7, 8]
    driver.calls.clear()
    asyncio.run(cuda.resume([9, 8, 7], 5))
    assert driver.made() == [("restore", 8), ("restore", 7), ("unlock", 8), ("unlock", 7)]
    assert asyncio.run(cuda.suspended([9, 8, 7], 5)) == []
    assert asyncio.run(cuda.suspendable([9, 8, 7], 5)) == [7, 8]
    asyncio.run(cuda.close())
    assert driver.closed


@pytest.mark.parametrize(
    ("states", "suspend", "resume"),
    [
        ({"p7": LOCKED, "p8": RUNNING},
         [("lock", 8), ("checkpoint", 7), ("checkpoint", 8)], [("unlock", 7)]),
        ({"p7": CHECKPOINTED, "p8": RUNNING},
         [("lock", 8), ("checkpoint", 8)], [("restore", 7), ("unlock", 7)]),
        ({"p7": CHECKPOINTED}, [], [("restore", 7), ("unlock", 7)]),
        ({}, [], []),
    ],
)  # fmt: skip
def test_what_is_done_already_is_not_done_again(
    states: dict[str, CudaState],
    suspend: list[tuple[str, int]],
    resume: list[tuple[str, int]],
) -> None:
    for verb, expected in (("suspend", suspend), ("resume", resume)):
        driver = Driver(**states)
        asyncio.run(getattr(sequence(driver), verb)([7, 8], 5))
        assert driver.made() == expected


@pytest.mark.parametrize(
    ("operation", "undone"),
    [
        ("lock", [("unlock", 7)]),
        ("checkpoint", [("restore", 7), ("unlock", 7), ("unlock", 8)]),
    ],
)
def test_a_suspend_that_fails_is_undone_whole(
    operation: str, undone: list[tuple[str, int]]
) -> None:
    driver = Driver(p7=RUNNING, p8=RUNNING)
    driver.codes[operation, 8] = Code.NOT_READY
    with pytest.raises(CheckpointFailed) as raised:
        asyncio.run(sequence(driver).suspend([7, 8], 5))
    assert sorted(driver.made()[2 if operation == "lock" else 4 :]) == sorted(undone)
    assert set(driver.states.values()) == {RUNNING}
    assert (raised.value.tree, raised.value.blame) == (TreeState.RUNNING, Blame.ENGINE)
    assert raised.value.fields["pids"] == [8]


@pytest.mark.parametrize("code", [Code.OUT_OF_MEMORY, Code.NOT_READY])
def test_a_restore_that_ran_out_of_memory_is_not_tried_again(code: int) -> None:
    driver = Driver(p7=CHECKPOINTED, p8=CHECKPOINTED)
    driver.codes["restore", 8] = code
    table = Table()
    cuda = sequence(driver, table)
    with pytest.raises(CheckpointFailed) as raised:
        asyncio.run(cuda.resume([8, 7], 5))
    assert raised.value.tree is TreeState.BROKEN
    assert "process 7 is now locked; process 8 is now checkpointed" in str(raised.value)
    assert ("unlock", 7) not in driver.made()
    driver.codes.clear()
    if code == Code.NOT_READY:
        asyncio.run(cuda.resume([8, 7], 5))
        assert set(driver.states.values()) == {RUNNING}
        return
    for verb in (cuda.resume, cuda.suspend):
        with pytest.raises(CheckpointFailed, match="process 8 ran out of GPU memory") as raised:
            asyncio.run(verb([8, 7], 5))
        assert raised.value.fields["pids"] == [8]


def test_a_success_that_is_none_is_found_out() -> None:
    driver = Driver(p7=RUNNING)
    driver.lies = {"checkpoint"}
    with pytest.raises(CheckpointFailed, match="reported success, but it is locked"):
        asyncio.run(sequence(driver).suspend([7], 5))
    assert driver.states[7] is RUNNING
    driver = Driver(p7=LOCKED)
    driver.lies = {"unlock"}
    with pytest.raises(CheckpointFailed, match="reported success, but it is locked"):
        asyncio.run(sequence(driver).resume([7], 5))
    driver = Driver(p7=RUNNING)
    driver.odd[7] = 99
    with pytest.raises(CheckpointFailed, match="unknown state 99") as raised:
        asyncio.run(sequence(driver).suspend([7], 5))
    assert raised.value.tree is TreeState.RUNNING
    with pytest.raises(CheckpointFailed, match="unknown state 99") as raised:
        asyncio.run(sequence(driver).resume([7], 5))
    assert raised.value.tree is TreeState.BROKEN


@pytest.mark.parametrize(
    ("code", "maps", "cuda"),
    [
        (Code.INVALID_VALUE, True, False), (Code.NOT_INITIALIZED, True, False),
        (Code.OPERATING_SYSTEM, False, False), (Code.OPERATING_SYSTEM, True, None),
        (None, False, None),
    ],
)  # fmt: skip
def test_who_has_cuda_state_is_asked_and_not_guessed(
    code: int | None, maps: bool, cuda: bool | None
) -> None:
    driver, table = Driver(p7=RUNNING), Table()
    driver.codes["restore_tid", 7] = code
    table.mapping = {7} if maps else set()
    look = sequence(driver, table).suspendable([7], 5)
    if cuda is None:
        with pytest.raises(CheckpointFailed, match="cannot look at process 7: restore_tid"):
            asyncio.run(look)
    else:
        assert asyncio.run(look) == ([7] if cuda else [])


def test_what_is_gone_failed_or_late_is_refused() -> None:
    driver, table = Driver(p7=FAILED, p8=RUNNING), Table()
    cuda = sequence(driver, table)
    for verb in (cuda.suspend, cuda.resume):
        with pytest.raises(CheckpointFailed, match="CUDA state of process 7 is failed") as raised:
            asyncio.run(verb([7, 8], 5))
        assert (raised.value.fields["pids"], raised.value.blame) == ([7], Blame.ENGINE)
    assert driver.made() == []
    table.gone = {8}
    with pytest.raises(CheckpointFailed, match="cannot resume process 8: no such") as raised:
        asyncio.run(cuda.resume([7, 8], 5))
    assert raised.value.tree is TreeState.GONE
    driver.not_ready = True
    with pytest.raises(DriverTimeout, match=r"not ready within 0\.01s; nothing was changed"):
        asyncio.run(cuda.suspend([7], 0.01))
    with pytest.raises(CheckpointFailed, match="the deadline passed before it was begun"):
        asyncio.run(sequence(Driver(p7=RUNNING)).suspend([7], 0))


def test_memory_is_asked_for_before() -> None:
    cuda = sequence(Driver(), memory=HostMemory(available=lambda: 0))
    with pytest.raises(CheckpointFailed, match="GiB of host memory are needed") as raised:
        asyncio.run(cuda.check_memory([7], 1))
    assert raised.value.tree is TreeState.RUNNING
    assert "gpu-memory-utilization" in (raised.value.hint or "")
    plenty = sequence(Driver(), memory=HostMemory(Path("/no"), available=lambda: 1 << 60))
    asyncio.run(plenty.check_memory([7], 1))


@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_put_back_or_looked_at_is_said(late: bool) -> None:
    """Beside what failed first: of each process by itself."""
    driver = Driver(p7=RUNNING, p8=RUNNING, p9=RUNNING)
    driver.codes["checkpoint", 8] = Code.NOT_READY
    driver.codes["unlock", 7] = Code.OPERATING_SYSTEM
    said = "process 7: words"
    if late:
        driver.late.add(("unlock", 7))
        said = "process 7 has not ended"
    with pytest.raises(CheckpointFailed) as raised:
        asyncio.run(sequence(driver).suspend([7, 8, 9], 5))
    assert f"and could not be put back: unlock of {said}" in str(raised.value)
    assert raised.value.tree is TreeState.BROKEN
    assert (driver.states[8], driver.states[9]) == (RUNNING, RUNNING)
    driver = Driver(p7=CHECKPOINTED, p8=CHECKPOINTED, p9=CHECKPOINTED)
    driver.codes["restore", 9] = Code.NOT_READY
    driver.after = {("state", 7): Code.OPERATING_SYSTEM}
    if late:
        driver.late.add(("state", 7))
    with pytest.raises(CheckpointFailed) as raised:
        asyncio.run(sequence(driver).resume([7, 8, 9], 5))
    assert f"state of {said}; process 8 is now locked" in str(raised.value)
    assert "process 9 is now checkpointed" in str(raised.value)


def test_undoing_has_a_time_of_its_own() -> None:
    """The deadline of what failed may have passed."""
    for verb, states, fails, limit in (
        ("suspend", {"p7": RUNNING}, ("checkpoint", 7), {}),
        ("resume", {"p7": CHECKPOINTED}, ("restore", 7), {}),
        ("suspend", {"p7": RUNNING}, ("checkpoint", 7), {"undo_secs": 2.0}),
    ):
        driver = Driver(**states)
        driver.codes[fails] = Code.NOT_READY
        with pytest.raises(CheckpointFailed):
            asyncio.run(getattr(sequence(driver, None, **limit), verb)([7], 0.5))
        made = [call for call, _, _ in driver.calls]
        undone = made.index(fails[0]) + 1
        assert set(driver.left[:undone]) == {0.5}
        assert set(driver.left[undone:]) == {limit.get("undo_secs", 15.0)}


def test_processes_are_this_hosts_own_unless_told_otherwise() -> None:
    driver = Driver(p1=RUNNING)
    driver.states = {os.getpid(): RUNNING}
    cuda = CudaSequence(driver)
    assert asyncio.run(cuda.suspend([os.getpid()], 30)) == [os.getpid()]
    asyncio.run(cuda.resume([os.getpid()], 30))
    with pytest.raises(CheckpointFailed, match="no such process"):
        asyncio.run(cuda.resume([2**22 + 1], 30))
    with pytest.raises(CheckpointFailed, match="GiB of host memory are needed"):
        asyncio.run(cuda.check_memory([os.getpid()], 1 << 60))


@pytest.mark.parametrize("verb", ["suspend", "resume"])
@pytest.mark.parametrize("where", ["ready", "restore_tid", "state", "lock", "unlock"])
def test_a_fault_of_ours_is_no_answer_of_the_driver(verb: str, where: str) -> None:
    class Faulty(Driver):
        async def ready(self) -> None:
            if where == "ready":
                raise LookupError("a fault")

        async def call(self, operation: str, *words: Any, **options: Any) -> int:
            if operation == where:
                raise LookupError("a fault")
            return await super().call(operation, *words, **options)

    driver = Faulty(p7=RUNNING if verb == "suspend" else LOCKED)
    if (verb, where) in (("suspend", "unlock"), ("resume", "lock")):
        asyncio.run(getattr(sequence(driver), verb)([7], 5))
        return
    with pytest.raises(LookupError, match="a fault"):
        asyncio.run(getattr(sequence(driver), verb)([7], 5))
